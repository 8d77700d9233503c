"""How every figure looks: palette, type, and matplotlib's output made fit to stand inline in one HTML page.

Text stays text (the page's font, searchable); identifiers depend on the figure's name alone, so equal input gives equal
bytes, and nothing in the SVG names an outside address.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bertemd_deploy.errors import missing_extra
from bertemd_deploy.report.records import Variant

if TYPE_CHECKING:
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


def to_svg(figure: Figure, *, alternative: str) -> str:
    """Return the figure as an SVG element that scales with its box and is announced as `alternative`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(alternative)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    return re.sub(r"\n\s*", "\n", text).strip()


def legend(figure: Figure, handles: Mapping[str, Any], *, columns: int = 2) -> None:
    """Put one legend for all panels under the figure, handles by label."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        handlelength=2.4,
        columnspacing=1.2,
    )
