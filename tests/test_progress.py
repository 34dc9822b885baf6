"""What a long stage needs: a request to stop, and randomness of its own."""

from __future__ import annotations

import random
import signal
import threading

import numpy
import pytest
import torch

from matkv.progress import Interrupt, own_randomness


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(numpy.random.rand())


def test_global_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    expected = drawn()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
    with pytest.raises(RuntimeError, match="stop"), own_randomness(3):
        drawn()
        raise RuntimeError("stop")
    assert drawn() == expected


def test_the_same_seed_draws_the_same() -> None:
    numbers = []
    for seed in (3, 3, 4):
        with own_randomness(seed):
            numbers.append(float(torch.rand(())))
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_first_ctrl_c_asks_and_a_second_one_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.agreed(torch.device("cpu"))
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested and interrupt.agreed(torch.device("cpu"))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_ctrl_c_stays_as_it_is() -> None:
    handlers: list[object] = []

    def stage() -> None:
        with Interrupt():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
