"""Maps of the flows at the end of training, as SVG files: which teacher layer teaches which student layer, mean over seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bertemd_deploy.files import write_text
from bertemd_deploy.report.mapping import KINDS, Matrix, flow_maps, matrix
from bertemd_deploy.report.text import dig

SCALE = 1.35  # pixels of the page for a unit of the figure


@dataclass(frozen=True)
class Picture:
    """A figure that was written: its file, and its words for who cannot see it."""

    path: Path
    alternative: str


def mean_flow(lines: Sequence[Mapping[str, Any]], kind: str) -> Matrix | None:
    """Return the mean over seeds of the last flow (M, N) of one kind, or None where no line holds any."""
    flows = [matrix(dig(line, "flows", "last", f"{kind}_flow")) for line in lines]
    known = [flow for flow in flows if flow is not None]
    return np.mean(known, axis=0) if known else None


def draw_flows(lines: Sequence[Mapping[str, Any]], *, name: str, folder: Path) -> dict[str, Picture]:
    """Write a variant's maps of one task, teacher layers as rows and student layers as columns; return them by kind.

    Args:
        lines: of one task and variant.
        name: what the files' names begin with; equal lines and names give equal bytes.
        folder: where they go.
    """
    found: dict[str, Picture] = {}
    for kind in KINDS:
        flow = mean_flow(lines, kind)
        drawing = None if flow is None else flow_maps({"last": {f"{kind}_flow": flow.tolist()}}, kind, name=name)
        if drawing is not None:
            words = drawing.alternative.replace("last step", f"Mean of the last step over {len(lines)} seed(s)")
            found[kind] = Picture(folder / f"{name}-{kind}.svg", f"{name}. {words}")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(found[kind].path, stand_alone(drawing.svg, alternative=found[kind].alternative))
    return found


def stand_alone(svg: str, *, alternative: str) -> str:
    """Return an inline SVG element as a file of its own: with a name space, a size, a font and its words."""
    root = ElementTree.fromstring(svg)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "width": f"{SCALE * width:.0f}",
        "height": f"{SCALE * height:.0f}",
        "font-family": "DejaVu Sans, Verdana, sans-serif",
        "aria-label": alternative,
    }
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def picture_rows(pictures: Mapping[str, Mapping[str, Picture]], *, page: Path) -> list[tuple[str, list[str]]]:
    """Return each variant with its pictures in Markdown, one cell a kind, "" where it has none.

    Args:
        pictures: by variant and kind.
        page: the file whose links they are.
    """
    rows = []
    for variant, of_kind in pictures.items():
        known = [of_kind.get(kind) for kind in KINDS]
        links = [Path(os.path.relpath(one.path, page.parent)).as_posix() if one else "" for one in known]
        rows.append(
            (variant, [f"![{one.alternative}]({link})" if one else "" for one, link in zip(known, links, strict=True)])
        )
    return rows
