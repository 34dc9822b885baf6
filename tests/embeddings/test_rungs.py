"""Sizes as text, and schedules over them."""

from __future__ import annotations

import pytest

from matkv.embeddings import default_rungs, ladder, parse
from matkv.embeddings.rungs import check, covered, size_axes
from matkv.errors import SizeError, TrainingError, UnsupportedModelError
from matkv.schedule import Cycle, Independent, Ladder, Sandwich
from tiny_embedders import HIDDEN, LAYERS, build


def test_sizes_are_read_from_text_and_sorted() -> None:
    assert parse("2x64, 1x32,12x768") == ((1, 32), (2, 64), (12, 768))


@pytest.mark.parametrize(
    "text", ["", "2", "2x", "x2", "2*64", "0x64", "2x0", "-1x3", "1x32,", "2x6.5", "²x3", "2x64x3"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match="must be LAYERxDIMENSION"):
        parse(text)


def test_a_size_named_twice_is_refused() -> None:
    with pytest.raises(SizeError, match="2x64 is named twice"):
        parse("2x64,1x2,2x64")


def test_default_rungs_grow_in_both_directions() -> None:
    assert default_rungs(6, 384) == ((1, 32), (2, 64), (3, 96), (4, 192), (5, 256), (6, 384))
    assert default_rungs(12, 768)[-1] == (12, 768)
    assert default_rungs(12, 768, 1) == ((12, 768),)
    for layers, dim, count in ((1, 1, 6), (2, 8, 6), (28, 1024, 4), (3, 100, 9)):
        rungs = default_rungs(layers, dim, count)
        assert rungs[-1] == (layers, dim)
        assert list(rungs) == sorted(set(rungs))
        assert all(1 <= layer <= layers and 1 <= width <= dim for layer, width in rungs)


def test_no_rungs_can_be_made_of_nothing() -> None:
    with pytest.raises(SizeError, match="must be above 0"):
        default_rungs(6, 0)


@pytest.mark.parametrize(
    ("size", "message"),
    [((5, 8), r"layer 5 of 5x8 must be in 1\.\.4"), ((1, 33), r"dimension 33 of 1x33 .* 1\.\.32")],
)
def test_a_size_that_a_model_lacks_is_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(SizeError, match=message):
        ladder(build("bert"), [size])
    with pytest.raises(SizeError, match="no size is given"):
        check([], (4, 32))


def test_a_ladder_is_over_the_layers_and_dimensions_of_the_model() -> None:
    made = ladder(build("bert"))
    assert [(axis.name, axis.size) for axis in made.axes] == [("layer", LAYERS), ("dim", HIDDEN)]
    assert made.rungs[-1] == (LAYERS, HIDDEN)
    assert ladder(build("bert"), [(2, 8)]).rungs == ((2, 8),)


def test_what_a_schedule_covers() -> None:
    axes = size_axes((2, 8), 4)
    grid = ((1, 4), (1, 8), (2, 4), (2, 8))
    assert covered(Independent(axes)) == covered(Sandwich(axes)) == grid
    assert covered(Ladder(axes, ((2, 8), (1, 2)))) == ((1, 2), (2, 8))
    assert covered(Cycle(axes, ((2, 8), (1, 2)))) == ((1, 2), (2, 8))


def test_rungs_of_no_layer_or_no_dimension_are_refused() -> None:
    with pytest.raises((SizeError, TrainingError)):
        ladder(build("bert"), [(0, 8)])


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="AlbertModel has 0 lists of 4 layers"):
        ladder(build("albert"))
