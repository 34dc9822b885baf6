"""The packaged default text: Wikipedia articles, extracted once and split to train and validate."""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Literal

from matkv.errors import DataError
from matkv.files import cache_home, read_json_lines, replacing

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
logger = logging.getLogger(__name__)


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
    texts = [record["text"] for _, record in read_json_lines(cached)]
    held_out = split == "validation"
    last = VALIDATION_STRIDE - 1
    return [text for i, text in enumerate(texts) if (i % VALIDATION_STRIDE == last) == held_out]


def _find_articles() -> Path:
    # find_spec on a top-level name does not import the package.
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the default text comes from the package gensim, which is not installed: "
            "pip install gensim==4.4.0"
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
    try:
        with replacing(path) as new, new.open("w", encoding="utf-8") as file:
            for title, text in articles:
                file.write(json.dumps({"title": title, "text": text}) + "\n")
    except OSError as error:
        raise DataError(
            f"cannot write the default text to {path}: {error.strerror}; free some space or set "
            "MATKV_CACHE to another folder"
        ) from error
