"""Documents by name: files, hub data sets and the packaged default articles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matkv.data.articles import Split, default_articles
from matkv.data.hub import hub_or_fetched
from matkv.errors import DataError
from matkv.files import read_json_lines, read_text


def read_texts(source: str | Path, split: Split) -> list[str]:
    """Documents of `source`, none of them blank.

    `source` is "default" (the packaged articles), "hub:NAME[:CONFIG]" (a hub data set with a
    column "text"), a .txt file (one document), a .jsonl file (field "text" of every line) or a
    directory of .txt files. Only the default and hub data sets have splits: a file or directory
    is read whole whatever `split` says, so name different ones for training and validation.

    Raises:
        DataError: `source` is missing, empty, malformed or of an unknown kind.
    """
    if str(source) in ("", "hub:"):
        raise DataError(
            f"text {str(source)!r} names nothing: give a file, a directory or a data set"
        )
    if source == "default":
        return default_articles(split)
    if isinstance(source, str) and source.startswith("hub:"):
        texts = _read_hub(source, split)
    else:
        texts = _read_path(Path(source))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"{source} holds no text: name a source with at least one document")
    return documents


def _read_path(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"directory {path} has no .txt file: put the documents there as .txt")
        return [read_text(file) for file in files]
    if not path.exists():
        raise DataError(
            f'{path} does not exist: name a .txt or .jsonl file, a directory of .txt, "default" '
            'or "hub:NAME[:CONFIG]"'
        )
    if path.suffix == ".txt":
        return [read_text(path)]
    if path.suffix == ".jsonl":
        return [_text_field(*line) for line in read_json_lines(path)]
    raise DataError(f"{path} has suffix {path.suffix!r}: only .txt and .jsonl files are read")


def _text_field(where: str, record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: every line must be an object with a string field "text"')
    return text


def _read_hub(source: str, split: Split) -> list[str]:
    name, _, config = source.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets: pip install datasets") from error
    try:
        with hub_or_fetched():
            dataset: Any = load_dataset(name, config or None, split=split)
    # Unknown names and lost connections are OSErrors, unknown configurations and splits ValueErrors
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load split {split!r} of {source}: {error}") from error
    if "text" not in dataset.column_names:
        raise DataError(f'{source} has columns {dataset.column_names}: one must be called "text"')
    return [text for text in dataset["text"] if isinstance(text, str)]
