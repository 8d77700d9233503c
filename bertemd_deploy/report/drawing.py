"""How every figure looks: palette, type, and matplotlib's output made fit to stand inline in one HTML page.

Text stays text (the page's font, searchable); identifiers depend on the figure's name alone, so equal input gives equal
bytes, and nothing in the SVG names an outside address.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bertemd_deploy.errors import missing_extra
from bertemd_deploy.report.records import Span, Variant
from bertemd_deploy.report.text import milliseconds, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.9, 3.0  # inches; with 8-point type this stays legible on a phone 390 px wide
INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
TEACHER, STUDENT, STUDENT_INT8, CONTRAST = "#6b7280", "#4a8fd0", "#0b4a8f", "#b35806"
SERIES = ("#0b4a8f", "#b35806", "#2a9d8f", "#8e5ea2", "#6b7280")  # distinct in hue and in lightness
_STYLE: Any = {  # matplotlib types each key by name; this is checked when it is applied
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from records; a dollar sign is a dollar sign
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its heading, what to see in it, its words for who cannot see it, and the SVG element."""

    title: str
    caption: str
    alternative: str
    svg: str


@dataclass(frozen=True)
class Look:
    """Colour and shape of one model in every figure."""

    color: str
    marker: str
    dashes: str


def look(variant: Variant) -> Look:
    """Return how a variant is drawn: teacher grey, student blue, int8 darkest; dashed where the graph is not fused."""
    fused = (variant.graph or "").startswith("fused")
    if variant.is_teacher:
        return Look(TEACHER, "s", "-") if variant.backend == "pytorch" else Look(TEACHER, "P", "--")
    if variant.precision == "int8":
        return Look(STUDENT_INT8, "D" if fused else "d", "-" if fused else "--")
    return Look(STUDENT, "o" if fused else "^", "-" if fused else "--")


def short(variant: Variant) -> str:
    """Return a variant's label for the end of a bar."""
    return variant.label.removeprefix("Student ").replace("Teacher, ", "Teacher\n")


@contextmanager
def canvas(name: str, *, width: float = WIDTH, height: float = HEIGHT) -> Iterator[Figure]:
    """Yield an empty matplotlib figure in the page's style; `name` seeds its identifiers.

    Raises:
        BertemdError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("report", package="matplotlib") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": name})
        yield Figure(figsize=(width, height), layout="constrained")


class Marks:
    """Which model each part of a figure shows, and the words for each of its points.

    The page hides a model's parts when it is switched off, and shows the words under the pointer; without a script the
    browser shows them as titles.
    """

    def __init__(self) -> None:
        """Start without any."""
        self._found: dict[str, tuple[str, list[str]]] = {}

    def add(self, artist: Any, variant_key: str, tips: Sequence[str] = ()) -> None:
        """Say that an artist shows a model (see `Variant.key`; "" for none), with a text for each of its points, in order."""
        identifier = f"mark-{len(self._found)}"
        artist.set_gid(identifier)
        self._found[identifier] = (variant_key, list(tips))

    def apply(self, root: ElementTree.Element) -> None:
        """Write what is known into the elements that the artists became.

        Raises:
            ValueError: an artist has another number of points than texts.
        """
        for element in root.iter("g"):
            key, tips = self._found.get(element.attrib.pop("id", ""), ("", []))
            if key:
                element.set("data-model", key)
            if tips:
                defined = {child for definition in element.iter("defs") for child in definition.iter()}
                points = list(element.iter("use")) or [path for path in element.iter("path") if path not in defined]
                for point, tip in zip(points, tips, strict=True):
                    point.set("class", "mark")
                    ElementTree.SubElement(point, "title").text = tip


def to_svg(figure: Figure, *, alternative: str, marks: Marks | None = None) -> str:
    """Return the figure as an SVG element that scales with its box and is announced as `alternative`.

    Raises:
        ValueError: matplotlib wrote no viewBox, or `marks` do not fit the figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    drawn = ElementTree.fromstring(text[text.index("<svg") :])
    box = drawn.get("viewBox")
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    for element in drawn.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: _shortened(name, value) for name, value in element.items()}
    (marks or Marks()).apply(drawn)
    referred = {
        name for element in drawn.iter() for value in element.attrib.values() for name in _REFERENCE.findall(value)
    }
    root = ElementTree.Element("svg", {"viewBox": box, "role": "img", "aria-label": alternative})
    root.extend(_kept(drawn, referred))
    return ElementTree.tostring(root, encoding="unicode")


_REFERENCE = re.compile(r"(?:url\(|^)#([^)]+)\)?")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font-family: [^;]*;\s*")  # the page's


def _shortened(name: str, value: str) -> str:
    """Return an attribute with coordinates to a hundredth of a unit, about a fiftieth of a pixel on the page."""
    if name in ("style", "d", "x", "y", "width", "height", "transform", "points"):
        rounded = _LONG.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(_FONT.sub("", rounded).split())
    return value


def _kept(element: ElementTree.Element, referred: Set[str]) -> list[ElementTree.Element]:
    """Return the children without metadata, styles, unused identifiers, empty rotations and groups that say nothing."""
    found: list[ElementTree.Element] = []
    for child in element:
        if child.tag in ("metadata", "style"):
            continue
        if child.get("id") is not None and child.get("id") not in referred:
            del child.attrib["id"]
        if child.get("transform", "").startswith("rotate(-0 "):
            del child.attrib["transform"]
        child.tail = None
        if child.tag not in ("text", "tspan", "title"):
            child.text = None  # line ends
        inner = _kept(child, referred)
        if child.tag in ("g", "defs") and not inner:
            continue
        if child.tag == "g" and not child.attrib:
            found += inner
            continue
        child[:] = inner
        found.append(child)
    return found


Point = tuple[int, float, Span | None]  # where, value, its interval


def curve(panel: Axes, variant: Variant, points: Sequence[Point], *, tips: Sequence[str], marks: Marks) -> Any:
    """Draw a model's points, joined, with thin bars for their intervals; return the line, for the legend."""
    style = look(variant)
    bounded = [(at, span) for at, _, span in points if span is not None and span.low > 0]
    if bounded:
        lows, highs = [span.low for _, span in bounded], [span.high for _, span in bounded]
        bars = panel.vlines([at for at, _ in bounded], lows, highs, color=style.color, lw=0.9)
        marks.add(bars, variant.key)
    places, values = [at for at, *_ in points], [value for _, value, _ in points]
    (line,) = panel.plot(places, values, color=style.color, marker=style.marker, ls=style.dashes, ms=4)
    marks.add(line, variant.key, tips)
    return line


def reach(points: Sequence[Point]) -> list[float]:
    """Return what an axis has to hold of these points: their values, and the bounds above 0 of their intervals."""
    bounds = [bound for *_, span in points for bound in (span or ()) if bound > 0]
    return [value for _, value, _ in points] + bounds


def value_text(value: float, span: Span | None, *, estimated: bool) -> str:
    """Return a time in ms for a point's words, with its interval where it has one."""
    said = milliseconds(value) + (f" ({spread(*span)})" if span else "")
    return f"estimate {said}" if estimated else said


def legend(
    figure: Figure,
    handles: Mapping[str, Any],
    *,
    columns: int = 2,
    marks: Marks | None = None,
    keys: Sequence[str] = (),
) -> None:
    """Put one legend for all panels under the figure, handles by label; `keys` says which model each is."""
    box = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        handlelength=2.4,
        columnspacing=1.2,
    )
    for key, handle, text in zip(keys, box.legend_handles, box.get_texts(), strict=False):
        if marks is not None:
            marks.add(handle, key)
            marks.add(text, key)


def plain_log_axis(axes: Axes, values: Sequence[float], *, which: str = "y") -> None:
    """Label a logarithmic axis with plain numbers, 1, 2 and 5 of each decade, and leave room around `values`."""
    low, high = min(values) / 1.25, max(values) * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: tuple[float, ...] = (1, 2, 5) if high / low < 400 else (1,)
    if high / low < 6:
        steps = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    labels = [f"{tick:g}" for tick in ticks]
    if which == "y":
        axes.set_ylim(low, high)
        axes.set_yticks(ticks, labels)
    else:
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, labels)
    axes.minorticks_off()
