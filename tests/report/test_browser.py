"""The report in a real browser: light and dark, wide, narrow and on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_rows
from matkv.report.build import report
from tiny import tiny

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-report")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]

WIDE, NARROW = 1280, 390
A4 = (688, 1009)  # CSS pixels between the margins

# Pairs of texts in a picture that overlap, texts that leave their picture, elements that leave the
# page but for those that scroll by themselves, and blocks that lie on one another.
FAULTS = """() => {
  const faults = [], shown = e => e.getClientRects().length > 0 && e.checkVisibility();
  const box = e => e.getBoundingClientRect(), start = e => e.textContent.slice(0, 30);
  const meet = (a, b, by) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > by
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > by;
  for (const svg of [...document.querySelectorAll('svg')].filter(shown)) {
    const frame = box(svg), texts = [...svg.querySelectorAll('text')];
    const name = svg.closest('figure').id;
    texts.forEach((text, i) => {
      const at = box(text);
      if (at.left < frame.left - 1 || at.right > frame.right + 1
          || at.top < frame.top - 1 || at.bottom > frame.bottom + 1)
        faults.push(`${name}: "${text.textContent}" leaves its picture`);
      for (const other of texts.slice(i + 1))
        if (meet(at, box(other), 2))
          faults.push(`${name}: "${text.textContent}" overlaps "${other.textContent}"`);
    });
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) faults.push(`the page is ${page.scrollWidth} wide`);
  for (const e of document.querySelectorAll('body *'))
    if (shown(e) && !e.closest('.scroll, svg') && box(e).right > page.clientWidth + 0.5)
      faults.push(`${e.tagName} ${e.className} leaves the page`);
  const kinds = 'h1, h2, h3, p, figure, nav, .scroll, .tile, .answer, summary, dt, dd, td, th';
  const blocks = [...document.querySelectorAll(kinds)].filter(shown);
  blocks.forEach((block, i) => {
    for (const other of blocks.slice(i + 1, i + 40)) {
      if (block.contains(other) || other.closest('.scroll') !== block.closest('.scroll')) continue;
      if (meet(box(block), box(other), 1) && getComputedStyle(block).position !== 'sticky')
        faults.push(`"${start(block)}" overlaps "${start(other)}"`);
    }
  });
  return faults;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of one full run, and of two, one of them bare."""
    folder = tmp_path_factory.mktemp("report")
    tiny("llama").artifact.save(folder / "bare")
    tiny("llama").artifact.save(folder / "full")
    report_rows.fill(folder / "full")
    return {
        "full": report([folder / "full"], folder / "one"),
        "two": report([folder / "bare", folder / "full"], folder / "two"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("name", ["full", "two"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_without_faults(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    said: list[str] = []
    loaded: list[str] = []
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: loaded.append(request.url))
    view.goto(pages[name].as_uri())
    view.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert view.evaluate(FAULTS) == []
    assert said == []
    assert {url for url in loaded if not url.startswith("data:")} == {pages[name].as_uri()}
    paper = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in paper[4:-1].split(",")) < 200) == (scheme == "dark")
    shown = "narrow" if width == NARROW else "wide"
    assert view.locator(f"figure .{shown}").first.is_visible()
    view.close()


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    """On A4 in the light theme; nothing is wider than the paper, no figure higher."""
    view = browser.new_page(viewport={"width": A4[0], "height": A4[1]}, color_scheme="dark")
    view.emulate_media(media="print")
    view.goto(pages["full"].as_uri())
    assert view.evaluate(FAULTS) == []
    sizes = view.evaluate(
        "[...document.querySelectorAll('figure, table')].map(e => [e.tagName, e.offsetWidth, "
        "e.offsetHeight])"
    )
    assert all(width <= A4[0] for _, width, _ in sizes), sizes
    assert all(height <= A4[1] for kind, _, height in sizes if kind == "FIGURE"), sizes
    paper = view.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
    assert paper == "#fdfdfc"
    assert view.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    view.close()


def test_the_check_finds_faults(browser: Any, pages: dict[str, Path]) -> None:
    view = browser.new_page(viewport={"width": NARROW, "height": 900})
    view.goto(pages["full"].as_uri())
    view.add_style_tag(content="svg text { font-size: 30px !important } .tile { width: 30rem }")
    view.add_style_tag(content="h2 { margin-bottom: -3rem !important }")
    found = " ".join(view.evaluate(FAULTS))
    for fault in ("leaves its picture", "leaves the page", '" overlaps "', "the page is"):
        assert fault in found
    view.close()
