"""matkv lm-eval: lm-eval's own command line, with the model `matkv` known to it."""

from __future__ import annotations

import sys
from unittest.mock import patch

import typer

from matkv.data.task_items import require_lm_eval
from matkv.errors import MatkvError, first_line

# lm-eval reads what it is given by itself, its --help too.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def lm_eval_command(context: typer.Context) -> None:
    """Run lm-eval, all its options passed on; it then knows --model matkv.

    matkv lm-eval run --model matkv --model_args artifact=RUN,budget=0.5 --tasks piqa
    """
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import matkv.evaluate.lm_eval_model  # noqa: F401  adds the model to lm-eval's registry

    with patch.object(sys, "argv", ["matkv lm-eval", *context.args]):
        try:
            cli_evaluate()
        except MatkvError:
            raise
        except Exception as error:  # lm-eval's own for slips in what was passed on
            raise MatkvError(
                f"lm-eval ended with {type(error).__name__}: {first_line(error)}"
            ) from error
