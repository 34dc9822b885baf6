"""Text in, token batches out: files, hub data sets and the packaged default articles.

The path of the data is the order of this file:

    read_texts -> documents -> token_stream -> tokens_T -> windows -> windows_NT -> batches
    (text_windows joins the middle)

Shapes: B batch, N windows, T tokens.
"""

import bz2
import hashlib
import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from matkv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]

# Wikipedia's text is CC BY-SA; it is read from the installed package and never redistributed.
ARTICLES_FILE = (
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
ARTICLES_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
# Part of the cached file's name: raise it when the extraction below changes its output.
EXTRACTION = 1
STUB_CHARACTERS = 200
VALIDATION_STRIDE = 10


def cache_home() -> Path:
    """Folder for what matkv derives once and keeps: `MATKV_CACHE`, else the XDG cache folder."""
    if own := os.environ.get("MATKV_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "matkv"
    return Path.home() / ".cache" / "matkv"


# ------------------------------------------------------------------------------- documents


def read_texts(source: str | Path, split: Split) -> list[str]:
    """Documents of `source`, none of them blank.

    `source` is "default" (the packaged articles), "hub:NAME[:CONFIG]" (a hub data set with a
    column "text"), a .txt file (one document), a .jsonl file (field "text" of every line) or a
    directory of .txt files. Only the default and hub data sets have splits: a file or directory
    is read whole whatever `split` says, so name different ones for training and validation.

    Raises:
        DataError: `source` is missing, empty, malformed or of an unknown kind.
    """
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
        return [_read_file(file) for file in files]
    if not path.exists():
        raise DataError(
            f'{path} does not exist: name a .txt or .jsonl file, a directory of .txt, "default" '
            'or "hub:NAME[:CONFIG]"'
        )
    if path.suffix == ".txt":
        return [_read_file(path)]
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    raise DataError(f"{path} has suffix {path.suffix!r}: only .txt and .jsonl files are read")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f'{path}, line {number}: every line must be an object with a string field "text"'
            )
        yield text


def _read_hub(source: str, split: Split) -> list[str]:
    name, _, config = source.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source} needs the package datasets: pip install 'matkv[train]'"
        ) from error
    try:
        dataset: Any = load_dataset(name, config or None, split=split)
    # Unknown names and lost connections are OSErrors, unknown configurations and splits ValueErrors
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load split {split!r} of {source}: {error}") from error
    if "text" not in dataset.column_names:
        raise DataError(f'{source} has columns {dataset.column_names}: one must be called "text"')
    return [text for text in dataset["text"] if isinstance(text, str)]


# ------------------------------------------------------------------------ default articles


def default_articles(split: Split) -> list[str]:
    """106 full English Wikipedia articles, 96 to train on and 10 to validate on.

    They come from gensim's packaged test data, are extracted once into `cache_home()`, and are
    split by article: every tenth one, in the order of the dump, is held out.

    Raises:
        DataError: gensim is missing or carries another file, or the cache cannot be written.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split {split!r} must be 'train' or 'validation'")
    cached = cache_home() / "text" / f"enwiki-{ARTICLES_SHA256[:12]}-{EXTRACTION}.jsonl"
    if not cached.exists():
        _write_articles(_extract_articles(_find_articles()), cached)
    texts = list(_read_jsonl(cached))
    held_out = split == "validation"
    last = VALIDATION_STRIDE - 1
    return [text for i, text in enumerate(texts) if (i % VALIDATION_STRIDE == last) == held_out]


def _find_articles() -> Path:
    # find_spec on a top-level name does not import the package.
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the default text comes from the package gensim, which is not installed: "
            "pip install 'matkv[default-model]'"
        )
    path = Path(spec.submodule_search_locations[0]) / ARTICLES_FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != ARTICLES_SHA256:
        raise DataError(
            f"{path} is missing or is not the file the default text is made from: "
            "pip install --force-reinstall --no-deps gensim==4.4.0"
        )
    return path


def _extract_articles(path: Path) -> list[tuple[str, str]]:
    """Title and plain text of every article in a MediaWiki dump, redirects and stubs left out.

    gensim's own `segment_all_articles` does the same in a pool of forked processes, which is
    unsafe beside PyTorch's threads; one process needs two seconds.
    """
    from gensim.corpora.wikicorpus import IGNORED_NAMESPACES
    from gensim.scripts.segment_wiki import extract_page_xmls, segment

    logger.info("extracting the default articles from %s", path.name)
    articles = []
    with bz2.open(path, "rb") as dump:
        for page_xml in extract_page_xmls(dump):
            title, sections = segment(page_xml)
            if any(title.startswith(f"{namespace}:") for namespace in IGNORED_NAMESPACES):
                continue
            if not sections or sections[0][1].lstrip().lower().startswith("#redirect"):
                continue
            if sum(len(body.strip()) for _, body in sections) >= STUB_CHARACTERS:
                articles.append((title, _article_text(title, sections)))
    return articles


def _article_text(title: str, sections: list[tuple[str, str]]) -> str:
    """Title, lead and titled sections as paragraphs; sections left empty are dropped."""
    (_, lead), *titled = sections
    parts = [title, _plain(lead)]
    for heading, body in titled:
        if text := _plain(body):
            parts += [heading, text]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(wikitext: str) -> str:
    """Remove the markup gensim leaves: bold and italic quotes, heading bars, empty bullets."""
    text = re.sub(r"'{2,}", "", wikitext)
    text = re.sub(r"(?m)^=+[ \t]*(.*?)[ \t]*=+[ \t]*$", r"\1", text)
    text = re.sub(r"(?m)^[*#:;\s]*$", "", text)
    text = re.sub(r"(?m)[^\S\n]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _write_articles(articles: list[tuple[str, str]], path: Path) -> None:
    """Write JSON lines under a name of this process's own, then rename: never seen half done."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for title, text in articles:
                file.write(json.dumps({"title": title, "text": text}) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write the default text to {path}: {error.strerror}; free some space or set "
            "MATKV_CACHE to another folder"
        ) from error
    finally:
        # Its folder may be what could not be made; that error must not hide behind this one.
        with suppress(OSError):
            temporary.unlink()


# ---------------------------------------------------------------------------------- tokens


def token_stream(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Tensor:
    """All documents as one int64 sequence, with the end-of-sequence token between two of them.

    No other special token is added; a tokenizer without an end-of-sequence token joins the
    documents directly.

    Raises:
        DataError: the documents give no token at all.
    """
    if not texts:
        raise DataError("0 documents give no tokens: name a source with at least one document")
    # verbose=False: documents longer than the model's context are cut into windows later.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    for i, tokens in enumerate(encoded["input_ids"]):
        pieces.append(torch.tensor([*(separator if i else []), *tokens], dtype=torch.int64))
    tokens_T = torch.cat(pieces)
    if tokens_T.numel() == 0:
        raise DataError(f"{len(texts)} documents give no tokens: they are all empty")
    return tokens_T


def windows(tokens_T: Tensor, window: int, limit_tokens: int | None = None) -> Tensor:
    """Cut a token sequence into full windows that do not overlap; the ragged end is dropped.

    Returns:
        int64 [N, window], from the first `limit_tokens` tokens where that is given.

    Raises:
        DataError: there are fewer tokens than one window, or `window` is below 1.
    """
    if window < 1:
        raise DataError(f"window {window} must be at least 1 token")
    available = tokens_T.numel() if limit_tokens is None else min(limit_tokens, tokens_T.numel())
    if available < window:
        total = tokens_T.numel()
        which = f"{total}" if available == total else f"the first {available} of {total}"
        raise DataError(
            f"{which} tokens are fewer than one window of {window}: "
            "give more text or a smaller window"
        )
    count = available // window
    return tokens_T[: count * window].reshape(count, window)


def text_windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    window: int,
    limit_tokens: int | None = None,
) -> Tensor:
    """Documents as full windows of a model's tokens.

    Where the tokenizer starts every text with a special token, as Gemma's does, every window starts
    with it, for such models are at a loss without it.

    Returns:
        int64 [N, window], `limit_tokens` tokens at most.

    Raises:
        DataError: there are fewer tokens than one window, or `window` is below 1.
    """
    tokens_T = token_stream(tokenizer, texts)
    start = tokenizer.bos_token_id
    if start is None or tokenizer("a").input_ids[0] != start:
        return windows(tokens_T, window, limit_tokens)
    limit = None if limit_tokens is None else limit_tokens - limit_tokens // max(window, 1)
    windows_NT = windows(tokens_T, window - 1, limit)
    return torch.cat((torch.full((len(windows_NT), 1), start), windows_NT), dim=1)


def batches(
    windows_NT: Tensor, batch_size: int, *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield every window once as [B, T] batches, the last one possibly smaller.

    The order is shuffled only when a generator is given.

    Raises:
        DataError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size} must be at least 1")
    if generator is not None:
        order_N = torch.randperm(len(windows_NT), generator=generator, device=generator.device)
        windows_NT = windows_NT[order_N.to(windows_NT.device)]
    return iter(windows_NT.split(batch_size))
