"""Any evaluator at every size, from one encode, and the model as it was."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
    TripletEvaluator,
)

from matkv.embeddings import RungEvaluator, RungTable, encode_rungs, rung_table, truncate
from matkv.embeddings.serve import record
from matkv.errors import SizeError, UnsupportedModelError
from tiny_embedders import HIDDEN, LAYERS, TEXTS, build, features

SIZES = ((1, 8), (2, 16), (LAYERS, HIDDEN))
SHUFFLED = [TEXTS[index] for index in (2, 0, 3, 1, 4)]
SCORES = [0.1, 0.7, 0.3, 0.9, 0.5]


def similarity(**options: Any) -> EmbeddingSimilarityEvaluator:
    return EmbeddingSimilarityEvaluator(TEXTS, SHUFFLED, SCORES, write_csv=False, **options)


EVALUATORS: dict[str, Any] = {
    "similarity": lambda: similarity(name="dev"),
    "dot": lambda: similarity(similarity_fn_names=["dot", "cosine"]),
    "triplet": lambda: TripletEvaluator(TEXTS[:3], TEXTS[1:4], TEXTS[2:], write_csv=False),
    "retrieval": lambda: InformationRetrievalEvaluator(
        {"q1": "dog", "q2": "plane"},
        {str(index): text for index, text in enumerate(TEXTS)},
        {"q1": {"2"}, "q2": {"0"}},
        write_csv=False,
        query_prompt="find ",
    ),
    "reranking": lambda: RerankingEvaluator(
        [{"query": "dog", "positive": [TEXTS[2]], "negative": TEXTS[:2]}], write_csv=False
    ),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_size_measures_what_its_own_model_measures(name: str) -> None:
    model = build("bert", modules.Normalize())
    found = rung_table(model, EVALUATORS[name](), SIZES)
    for layer, dim in SIZES:
        evaluator = EVALUATORS[name]()
        alone = evaluator(truncate(model, layer, dim))
        assert found.values[layer, dim] == alone[evaluator.primary_metric]


def test_the_mean_over_sizes_is_the_main_metric() -> None:
    evaluator = RungEvaluator(similarity(name="dev"), SIZES)
    metrics = evaluator(build("bert"))
    assert list(metrics) == ["dev_1x8", "dev_2x16", "dev_4x32", "dev_mean"]
    assert evaluator.primary_metric == "dev_mean"
    assert metrics["dev_mean"] == pytest.approx(np.mean(list(metrics.values())[:3]))
    assert evaluator.greater_is_better
    assert RungEvaluator(similarity(), SIZES).primary_metric == "mean"
    assert RungEvaluator(similarity(), SIZES, name="all").primary_metric == "all_mean"


def test_texts_are_encoded_once_for_all_sizes() -> None:
    model = build("bert")
    passes: list[int] = []
    measure = RungEvaluator(similarity(), tuple(product(range(1, LAYERS + 1), (4, 8, 16, HIDDEN))))
    measure(model)
    layer = model[0].model.encoder.layer[-1]
    layer.register_forward_hook(lambda *_: passes.append(1))
    one: list[int] = []
    similarity()(model)
    one, passes = passes.copy(), passes
    passes.clear()
    measure(model)
    looking = 4  # passes of two probe texts that find the layers and try a cut out
    assert len(passes) <= len(one) + looking


def test_an_evaluator_may_give_a_number() -> None:
    class Norm(BaseEvaluator):
        def __call__(self, model: Any, *_: Any, **__: Any) -> float:
            return float(np.linalg.norm(model.encode("a plane")))

    model = build("bert")
    found = rung_table(model, Norm(), SIZES)
    assert found.metric == "Norm"
    alone = np.linalg.norm(truncate(model, 2, 16).encode("a plane"))
    assert found.values[2, 16] == pytest.approx(alone)


def test_forms_of_embeddings_are_those_of_encode() -> None:
    model = build("bert")
    seen: list[Any] = []

    class Asks(BaseEvaluator):
        def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> float:
            seen.append(model.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True))
            seen.append(model.encode(TEXTS, convert_to_numpy=False))
            seen.append(model.encode(TEXTS[0]))
            seen.append(model.encode_query(TEXTS))
            seen.append(model.encode(TEXTS, precision="int8"))
            seen.append(model.encode(TEXTS, precision="ubinary"))
            seen.append(model.encode([]))
            return 0.0

    RungEvaluator(Asks(), [(2, 8)])(model)
    RungEvaluator(Asks(), [(LAYERS, HIDDEN)])(model)
    Asks()(truncate(model, 2, 8))
    for found, wanted in zip(seen[:7], seen[14:], strict=True):
        assert type(found) is type(wanted)
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_the_model_is_as_it_was_also_after_an_exception() -> None:
    class Fails(BaseEvaluator):
        def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> float:
            model.encode(TEXTS)
            raise RuntimeError("broken")

    model = build("bert").train()
    config, attributes = dict(vars(model[0].model.config)), dict(vars(model))
    card = copy.copy(model.model_card_data.__dict__)
    layers = list(model[0].model.encoder.layer)
    with pytest.raises(RuntimeError, match="broken"):
        RungEvaluator(Fails(), SIZES)(model)
    assert dict(vars(model[0].model.config)) == config
    assert dict(vars(model)) == attributes
    assert model.model_card_data.__dict__ == card
    assert list(model[0].model.encoder.layer) == layers
    assert all(module.training for module in model.modules())


def test_a_loss_that_wraps_the_model_does_not_change_what_is_measured() -> None:
    model = build("bert")
    before = rung_table(model, similarity(), SIZES).values
    base = losses.MultipleNegativesRankingLoss(model)
    wraps = losses.Matryoshka2dLoss(model, base, [8, 16, HIDDEN])
    wraps(features(model, TEXTS, SHUFFLED), torch.zeros(0))
    model.eval()
    assert rung_table(model, similarity(), SIZES).values == before
    for size, found in encode_rungs(model, TEXTS, SIZES).items():
        assert np.array_equal(found, truncate(build("bert"), *size).encode(TEXTS))


@pytest.mark.parametrize("output", ["token_embeddings", None])
def test_an_evaluator_that_does_not_read_embeddings_is_refused(output: Any) -> None:
    class Tokens(BaseEvaluator):
        def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> float:
            model.encode(TEXTS, output_value=output)
            return 0.0

    with pytest.raises(SizeError, match="cannot be run by size"):
        RungEvaluator(Tokens(), SIZES)(build("bert"))


def test_an_evaluator_that_runs_the_model_itself_is_refused() -> None:
    class Runs(BaseEvaluator):
        def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> float:
            model(features(model, TEXTS)[0])
            return 0.0

    with pytest.raises(SizeError, match="does not call encode"):
        RungEvaluator(Runs(), SIZES)(build("bert"))


def test_sizes_and_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SizeError, match="no size is given"):
        RungEvaluator(similarity(), [])
    with pytest.raises(SizeError, match="has a truncate_dim"):
        RungEvaluator(similarity(truncate_dim=8), SIZES)
    with pytest.raises(SizeError, match=r"layer 9 of 9x8 must be in 1\.\.4"):
        RungEvaluator(similarity(), [(9, 8)])(build("bert"))
    with pytest.raises(UnsupportedModelError):
        rung_table(build("albert"), similarity(), SIZES)
    inside = SequentialEvaluator([similarity(truncate_dim=4)])
    with pytest.raises(SizeError, match="truncate_dim 4"):
        RungEvaluator(inside, SIZES)(build("bert"))


# ---- the table


def test_a_grid_has_every_layer_at_every_dimension() -> None:
    model = build("bert")
    record(model, SIZES, (LAYERS, HIDDEN))
    found = rung_table(model, similarity(), grid=True)
    assert found.layers == (1, 2, 3, 4)
    assert found.dims == (8, 16, 32)
    assert set(found.values) == set(product(found.layers, found.dims))
    assert found.trained == SIZES
    assert found.metric == "spearman_cosine"
    assert found.mean == pytest.approx(np.mean(list(found.values.values())))
    rows = found.to_json()
    assert [row["trained"] for row in rows].count(True) == 3
    assert rows[0] == {
        "layer": 1, "dim": 8, "metric": "spearman_cosine", "value": found.values[1, 8],
        "trained": True,
    }  # fmt: skip


def test_without_sizes_those_that_were_trained_are_measured() -> None:
    model = build("bert")
    assert (LAYERS, HIDDEN) in rung_table(model, similarity()).values
    record(model, SIZES, (LAYERS, HIDDEN))
    assert tuple(rung_table(model, similarity()).values) == SIZES


def test_a_table_is_a_heat_map_in_text() -> None:
    table = RungTable("ndcg", {(1, 8): 0.25, (2, 8): 0.5, (2, 16): float("nan")}, ((2, 8),))
    assert str(table).splitlines() == [
        "ndcg, * trained",
        "layer       8      16",
        "    1 0.250          ",
        "    2 0.500█*   nan  ",
    ]
