"""Make the model name `matkv` known to lm-eval, which looks for no plugins by itself.

`lm_eval --model matkv` imports nothing of matkv, and lm-eval has neither entry points nor an option
for models of other packages. So `matkv_lm_eval.pth`, installed beside this module, imports it when
Python starts; it costs nothing but a look at the name of every module imported afterwards, and adds
one name to lm-eval's registry when `lm_eval.models` is imported. The model itself is imported when
it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

WATCHED = "lm_eval.models"
NAME, TARGET = "matkv", "matkv.lm_eval_model:MatkvLM"


class Finder:
    """Finds `lm_eval.models` as usual, and registers the model after it was executed."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add the model to lm-eval's registry; a release without that registry is left alone."""
    with suppress(ImportError):
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
