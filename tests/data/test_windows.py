"""Token windows and batches of them."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matkv import data
from matkv.errors import DataError


def word_tokenizer(eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    vocab = {"<eos>": 0, "<unk>": 1, "one": 2, "two": 3, "three": 4}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")


def test_documents_are_joined_with_end_of_sequence() -> None:
    tokens_T = data.token_stream(word_tokenizer(), ["one two", "three"])
    assert tokens_T.dtype == torch.int64
    assert tokens_T.tolist() == [2, 3, 0, 4]
    assert data.token_stream(word_tokenizer(eos=None), ["one two", "three"]).tolist() == [2, 3, 4]


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_tokens_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no tokens"):
        data.token_stream(word_tokenizer(), texts)


def test_windows_are_full_and_do_not_overlap() -> None:
    windows_NT = data.windows(torch.arange(11), 4)
    assert windows_NT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.windows(torch.arange(11), 4, limit_tokens=7).tolist() == [[0, 1, 2, 3]]


def test_too_few_tokens_for_a_window_names_both_numbers() -> None:
    with pytest.raises(DataError, match="11 tokens are fewer than one window of 12"):
        data.windows(torch.arange(11), 12)
    with pytest.raises(DataError, match="the first 5 of 11 tokens are fewer than one window of 8"):
        data.windows(torch.arange(11), 8, limit_tokens=5)
    with pytest.raises(DataError, match="window length 0 must be at least 1"):
        data.windows(torch.arange(11), 0)


def test_batches_keep_the_order_unless_given_a_generator() -> None:
    windows_NT = torch.arange(10).reshape(5, 2)
    assert [len(batch_BT) for batch_BT in data.batches(windows_NT, 2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(data.batches(windows_NT, 2))), windows_NT)

    def shuffled(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(list(data.batches(windows_NT, 2, generator=generator)))

    assert torch.equal(shuffled(0), shuffled(0))
    assert not torch.equal(shuffled(0), windows_NT)
    assert sorted(shuffled(0).flatten().tolist()) == list(range(10))
    with pytest.raises(DataError, match="batch size 0"):
        data.batches(windows_NT, 0)
