"""Haystacks: exactly as long as asked, the same by seed, with each fact where it belongs."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from matkv.data import haystacks
from matkv.data.haystacks import TESTS, HaystackConfig, Haystacks, Test
from matkv.errors import DataError
from tiny import save_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def articles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the packaged ones, which need a package."""
    text = "A lighthouse is a tower. It emits light!\n\nUses\n\nIt marks a coast. " * 3
    monkeypatch.setattr("matkv.data.haystacks.read_texts", lambda source, split: [text])


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("filler", get_args(haystacks.Filler))
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.usefixtures("articles")
def test_the_prompt_has_the_asked_length(
    tokenizer: Any, test: Test, filler: haystacks.Filler, chat: bool
) -> None:
    made = Haystacks(tokenizer, HaystackConfig(filler=filler, chat=chat))
    for context in (640, 641, 777, 1500):
        for depth in (0.0, 0.3, 1.0):
            assert made.sample(test, context, depth).prompt_T.shape == (context,)


@pytest.mark.parametrize("test", TESTS)
def test_the_asked_fact_is_at_its_depth(tokenizer: Any, test: Test) -> None:
    config = HaystackConfig(keys=3)
    made = Haystacks(tokenizer, config)
    sentence = max(map(len, haystacks.NOISE)) + 1
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = made.sample(test, 1200, depth, index=2)
        text = tokenizer.decode(sample.prompt_T)
        word = text.rsplit("number for ", 1)[1].split(" ")[0]
        fact = " " + haystacks.FACT.format(word=word, number=sample.answer)
        assert text.count(fact) == 1
        assert text.index(fact) == sample.start  # one token is one byte here
        facts = text.count("magic number for ") - 2  # the question and its prefix name it too
        assert facts == (1 if test == "needle" else 3)
        hay = text[len(haystacks.INTRO) : text.rindex(haystacks.QUESTION.format(word=word))]
        before, after = hay.split(fact)
        if test == "needle":
            share = len(before) / (len(before) + len(after))
            assert abs(share - depth) <= sentence / len(hay)


def test_other_facts_have_other_keys_and_numbers(tokenizer: Any) -> None:
    text = tokenizer.decode(
        Haystacks(tokenizer, HaystackConfig(keys=6, digits=5))
        .sample("multikey", 1500, 0.5)
        .prompt_T
    )
    parts = text.split(" The special magic number for ")[1:-1]
    pairs = [part.split(".")[0].split(" is: ") for part in parts]
    assert len(pairs) == 6
    assert len({word for word, _ in pairs}) == len({number for _, number in pairs}) == 6
    assert all(len(number) == 5 for _, number in pairs)


def test_samples_depend_on_their_name_alone(tokenizer: Any) -> None:
    made = Haystacks(tokenizer, HaystackConfig(seed=3))
    first = made.sample("needle", 700, 0.5, 1)
    made.sample("multikey", 900, 0.1, 0)
    again = Haystacks(tokenizer, HaystackConfig(seed=3)).sample("needle", 700, 0.5, 1)
    assert torch.equal(first.prompt_T, again.prompt_T)
    others = [
        made.sample("needle", 700, 0.5, 2),
        Haystacks(tokenizer, HaystackConfig(seed=4)).sample("needle", 700, 0.5, 1),
    ]
    assert all(one.answer != first.answer for one in others)


def test_the_answer_continues_the_prompt(tokenizer: Any) -> None:
    for chat in (False, True):
        sample = Haystacks(tokenizer, HaystackConfig(chat=chat, digits=4)).sample("needle", 600, 0)
        assert tokenizer.decode(sample.prompt_T).endswith("text above is:")
        assert tokenizer.decode(sample.answer_A) == f" {sample.answer}"
        assert len(sample.answer) == 4


def test_a_leading_special_token_is_counted(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leading:
        """As a tokenizer that starts every text with token 7."""

        bos_token_id, chat_template = 7, None

        def __call__(self, text: str, add_special_tokens: bool = True, **how: Any) -> Any:
            found = tokenizer(text, add_special_tokens=False, **how)
            found["input_ids"] = [7] * add_special_tokens + found["input_ids"]
            return found

    sample = Haystacks(Leading(), HaystackConfig()).sample("needle", 600, 0.5)  # type: ignore[arg-type]
    assert sample.prompt_T.shape == (600,)
    assert sample.prompt_T.tolist().count(7) == 1
    assert int(sample.prompt_T[0]) == 7


def test_pieces_are_tokenized_as_one_text_where_texts_start_with_a_space() -> None:
    """As Llama 2's tokenizer does: pieces on their own would have two spaces."""
    letters = sorted({*"\u2581\n", *map(chr, range(33, 127))})
    own = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    own.normalizer = normalizers.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    assert tokenizer.tokenize(" a") == ["\u2581", "\u2581", "a"]
    sample = Haystacks(tokenizer, HaystackConfig()).sample("needle", 700, 0.5)
    names = tokenizer.convert_ids_to_tokens(torch.cat((sample.prompt_T, sample.answer_A)).tolist())
    text = "".join(names).replace("\u2581", " ")
    assert "  " not in text
    assert text.endswith(f" is: {sample.answer}")


def test_filler_articles_are_held_out_and_whole_sentences(articles: None) -> None:
    sentences = haystacks._sentences("articles")
    assert set(sentences) == {
        "A lighthouse is a tower.",
        "It emits light!",
        "It marks a coast.",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digits": 0}, "digits 0"),
        ({"digits": 19}, "digits 19"),
        ({"keys": 1}, "keys 1"),
        ({"filler": "hay"}, "filler 'hay'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        HaystackConfig(**settings)


def test_bad_samples_are_refused(tokenizer: Any) -> None:
    made = Haystacks(tokenizer, HaystackConfig())
    with pytest.raises(
        DataError, match=r"context of 40 tokens is too short for 1 facts .* \d{3} to"
    ):
        made.sample("needle", 40, 0.5)
    with pytest.raises(DataError, match=r"depth 1\.5 must be in 0\.\.1"):
        made.sample("needle", 900, 1.5)
    with pytest.raises(DataError, match="test 'hay' must be one of needle, multikey"):
        made.sample("hay", 900, 0.5)  # type: ignore[arg-type]


def test_chat_needs_a_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        Haystacks(tokenizer, HaystackConfig(chat=True))


def test_the_shortest_context_has_no_filler(tokenizer: Any) -> None:
    made = Haystacks(tokenizer, HaystackConfig())
    with pytest.raises(DataError) as caught:
        made.sample("needle", 1, 0.5)
    shortest = int(str(caught.value).split("question, ")[1].split(" ")[0])
    # The word of a sample depends on its context, so lengths differ by a few letters.
    assert made.sample("needle", shortest + 8, 0.5).prompt_T.shape == (shortest + 8,)
