"""The packaged articles: found, extracted once, split without overlap."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from matkv.data import articles
from matkv.data.texts import read_texts
from matkv.errors import DataError


def test_articles_are_extracted_once_and_split_without_overlap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extractions = []

    def extract(path: Path) -> list[tuple[str, str]]:
        extractions.append(path)
        return [(f"Title {i}", f"Text {i}") for i in range(106)]

    monkeypatch.setenv("MATKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(articles, "_find_articles", lambda: tmp_path)
    monkeypatch.setattr(articles, "_extract_articles", extract)
    train, validation = articles.default_articles("train"), read_texts("default", "validation")
    assert (len(train), len(validation), len(extractions)) == (96, 10, 1)
    assert sorted(train + validation) == sorted(f"Text {i}" for i in range(106))
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 1


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="split 'test' must be"):
        articles.default_articles("test")  # type: ignore[arg-type]


def test_missing_gensim_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install gensim==4.4.0"):
        articles.default_articles("train")


def test_another_article_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / articles.ARTICLES_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other articles")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(DataError, match=r"gensim==4\.4\.0"):
        articles.default_articles("train")


def test_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="set MATKV_CACHE"):
        articles._write_articles([("A", "a")], tmp_path / "file" / "articles.jsonl")


def test_article_text_has_no_markup_and_no_empty_section() -> None:
    sections = [
        ("Introduction", "\n\n\n'''Ant''' is ''an''  insect. \n\n\n\n* \n* one\n"),
        ("History", "===Early===\nLong ago."),
        ("References", "\n* \n* \n"),
    ]
    assert articles._article_text("Ant", sections) == (
        "Ant\n\nAnt is an  insect.\n\n* one\n\nHistory\n\nEarly\nLong ago.\n"
    )


@pytest.mark.slow
def test_real_articles_are_the_documented_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path))
    train, validation = articles.default_articles("train"), articles.default_articles("validation")
    assert (len(train), len(validation)) == (96, 10)
    assert train[0].startswith("Anarchism\n\nAnarchism is a political philosophy")
    assert validation[2].startswith("Andre Agassi\n")
    assert 3_000_000 < sum(map(len, train + validation)) < 3_200_000
