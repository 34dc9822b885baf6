"""Loading models by name."""

from __future__ import annotations

from typing import Any

import pytest

import matkv
from matkv.errors import ModelError
from matkv.models import load


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"cannot load /no/such/model"):
        matkv.load_model("/no/such/model")
    with pytest.raises(ModelError, match=r"no file /no/such/model\.gguf"):
        matkv.load_model("/no/such/model.gguf")


@pytest.mark.parametrize("dtype", ["float64x", "int8", "nonsense", "Tensor"])
def test_a_dtype_that_is_none_is_named(tmp_path: Any, dtype: str) -> None:
    with pytest.raises(ModelError, match="must be auto, float32, bfloat16 or float16"):
        load._dtype(dtype)
