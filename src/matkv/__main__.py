"""`python -m matkv`, and with it `accelerate launch -m matkv` on many devices."""

from matkv.cli import main

if __name__ == "__main__":
    main()
