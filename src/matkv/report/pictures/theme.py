"""How the report looks: its colours, and pictures that follow the reader's light or dark theme.

A picture is drawn in the colours of the light theme. In the SVG of the page they become CSS
variables and text stays text, in the page's font; the PNG beside the page stays as drawn.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matkv.errors import MatkvError
from matkv.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The first eight series are Okabe and Ito's colours, which colour-blind readers tell apart, made
# darker or lighter for the background; the others are as far from these, and from one another, as
# those are apart. Series also differ by marker.
LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1d2126",
    "muted": "#5c6570",
    "grid": "#dfe2e6",
    "c1": "#0069b4",
    "c2": "#cf4f00",
    "c3": "#00875f",
    "c4": "#a83e8c",
    "c5": "#8f6a00",
    "c6": "#2b8fc4",
    "c7": "#6d5c4b",
    "c8": "#4a3fb5",
    "c9": "#a76ef8",
    "c10": "#6c170e",
    "c11": "#fc328c",
    "c12": "#354004",
    "c13": "#0f3778",
    "c14": "#dd47d6",
    "c15": "#791f75",
    "c16": "#979836",
}
DARK = {
    "paper": "#15181c",
    "ink": "#e7e9ec",
    "muted": "#a2abb6",
    "grid": "#343a42",
    "c1": "#5fb0f0",
    "c2": "#ff8d52",
    "c3": "#3fcb9d",
    "c4": "#e48fd2",
    "c5": "#dfb840",
    "c6": "#9ad8ff",
    "c7": "#bdab97",
    "c8": "#aea6f5",
    "c9": "#955be3",
    "c10": "#bd6254",
    "c11": "#fc328c",
    "c12": "#7a8750",
    "c13": "#5480c7",
    "c14": "#dd47d6",
    "c15": "#a566a0",
    "c16": "#e3e585",
}
SERIES = tuple(name for name in LIGHT if name.startswith("c"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<")
# From blue to orange, clear on light and on dark paper, for layers from first to last.
RAMP = ("#2a7fc9", "#7d8fa8", "#b88c6a", "#e07a1c")
WIDE, NARROW = 860, 350  # units across, which are the pixels of a wide page and of a phone
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs and methods may hold a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.dpi": 72,
}
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Canvas:
    """What a picture is drawn on: a figure, narrow or not."""

    figure: Figure
    narrow: bool

    def color(self, name: str) -> str:
        """A colour of the theme."""
        return LIGHT[name]


Draw = Callable[[Canvas], None]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture: SVG for wide and for narrow pages, and a PNG.

    `text` says what it shows to those who do not see it; `caption` stands below it.
    """

    name: str
    text: str
    caption: str
    wide: str
    narrow: str
    png: bytes


def picture(
    name: str, draw: Draw, *, wide: Size, narrow: Size, text: str, caption: str = ""
) -> Picture:
    """Draw a picture in both widths and as PNG; sizes are (width, height) in units.

    Raises:
        MatkvError: matplotlib is not installed.
    """
    with _settings(name):
        broad, slim = _drawn(draw, wide, narrow=False), _drawn(draw, narrow, narrow=True)
        return Picture(
            name=name,
            text=text,
            caption=caption,
            wide=_svg(broad, f"{name}-w"),
            narrow=_svg(slim, f"{name}-n"),
            png=_png(broad),
        )


def save(drawn: Picture, path: str | Path) -> Path:
    """Write the PNG of a picture.

    Raises:
        MatkvError: `path` cannot be written, or is not named as a PNG.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise MatkvError(f"cannot draw {target}: pictures are PNG files, so end its name in .png")
    try:
        with replacing(target) as new:
            new.write_bytes(drawn.png)
    except OSError as error:
        raise MatkvError(f"cannot draw {target}: {error}") from error
    return target


@contextmanager
def _settings(name: str) -> Iterator[None]:
    """Our settings over matplotlib's own, so that a report is the same with any user's."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise MatkvError("a report needs matplotlib: pip install matplotlib") from error
    with style.context(["default", SETTINGS | {"svg.hashsalt": name}]):
        yield


def _drawn(draw: Draw, size: Size, *, narrow: bool) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 72, size[1] / 72))
    figure.set_layout_engine("constrained", h_pad=7 / 72, w_pad=5 / 72)
    draw(Canvas(figure, narrow))
    return figure


def _svg(figure: Figure, name: str) -> str:
    """The figure as part of a page; without `savefig`, which draws everything twice."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    figure.set_facecolor("none")
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(file, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _png(figure: Figure) -> bytes:
    """The figure, laid out before, on paper."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    figure.set_layout_engine("none")
    figure.set_facecolor(LIGHT["paper"])
    figure.set_dpi(144)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(file)
    return file.getvalue()


def _inline(svg: str, name: str) -> str:
    """An SVG file as part of a page: colours by theme, the page's font, ids of its own."""
    root = ET.fromstring(svg)
    # Its style sheet would apply to the whole page.
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", " ".join(_references(root))))
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {
            key if key != _XLINK else "href": _attribute(key, value, name)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    return ET.tostring(root, encoding="unicode")


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == _XLINK or "url(" in value:
                yield value


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == _XLINK and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key in ("d", "x", "y", "transform"):
        return re.sub(r"\d+\.\d+", partial(_round), " ".join(value.split()))
    value = re.sub(r"font-family: [^;]+;? ?", "", value)
    for name_of_color, color in LIGHT.items():
        value = value.replace(color, f"var(--{name_of_color})")
    return value


def _round(match: re.Match[str]) -> str:
    return f"{float(match.group()):.2f}".rstrip("0").rstrip(".")


def css() -> str:
    """The colours as CSS variables, light unless the reader prefers dark; print is light."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in theme.items()) for theme in (LIGHT, DARK)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )
