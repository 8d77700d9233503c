"""Figures of the distillation: which teacher layer taught which student layer, how that moved, and the losses.

Rows are teacher layers and columns student layers, as in the paper; layers are numbered from 1, nearest the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.report.drawing import CONTRAST, INK, SERIES, STUDENT_INT8, WIDTH, Drawing, canvas, legend, to_svg
from bertemd_deploy.report.text import dig, digits, number, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

Matrix = NDArray[np.float64]
KINDS = ("attention", "hidden")
LEAST_SHOWN = 0.1  # percent; a smaller flow prints as an empty cell
MOST_BESIDE = 8  # student layers up to which two maps stand side by side, above which one below the other
MOST_COLUMNS = 60  # steps drawn of the marginals
MOST_POINTS = 300  # steps drawn of the losses
LOSSES = ("total", "prediction", "embedding", "attention", "hidden")


def distillation_figures(distillation: Any, *, name: str = "") -> list[Drawing]:
    """Return flows, marginals and losses of a record's `distillation`, leaving out what it does not hold.

    Args:
        distillation: as the record holds it.
        name: tells it from others on the page.
    """
    found = [flow_maps(distillation, kind, name=name) for kind in KINDS]
    found += [*marginal_maps(distillation, name=name), loss_curves(distillation, name=name)]
    return [drawing for drawing in found if drawing]


def matrix(value: Any) -> Matrix | None:
    """Return a JSON list of equally long rows of finite numbers as an array, or None for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return None
    rows = [[number(cell) for cell in row] for row in value]
    if len({len(row) for row in rows}) != 1 or any(cell is None for row in rows for cell in row):
        return None
    return np.array(rows, dtype=np.float64)


def flow_maps(distillation: Any, kind: str, *, name: str = "") -> Drawing | None:
    """Return the first and last flow of one kind ("attention" or "hidden") side by side on one colour scale."""
    maps: dict[str, Matrix] = {}
    for moment in ("first", "last"):
        flow = matrix(dig(distillation, moment, f"{kind}_flow"))
        total = 0.0 if flow is None else float(flow.sum())
        if flow is not None and total > 0:
            step = number(dig(distillation, moment, "step"))
            maps[f"{moment} step" + ("" if step is None else f", {int(step)}")] = 100 * flow / total
    if not maps:
        return None
    rows, columns = next(iter(maps.values())).shape
    top = max(float(flow.max()) for flow in maps.values()) or 1.0
    what = "attention scores" if kind == "attention" else "hidden states"
    alternative = f"EMD flow between {what} of {rows} teacher and {columns} student layers. " + " ".join(
        f"{title}: {_strongest(flow)}." for title, flow in maps.items()
    )
    across = len(maps) if columns <= MOST_BESIDE else 1
    down = len(maps) // across
    with canvas(f"flow-{kind}-{name}", height=0.5 + down * (0.65 + 0.19 * rows)) as figure:
        axes = figure.subplots(down, across, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06}).ravel()
        for panel, (title, flow) in zip(axes, maps.items(), strict=True):
            mesh = panel.pcolormesh(flow, cmap="Blues", vmin=0, vmax=top, edgecolors="white", linewidth=0.8)
            size = min(7.5, 72 * WIDTH * 0.75 / across / columns / 1.9)
            _numbers(panel, flow, top=top, size=size)
            _layer_axes(panel, rows=rows, columns=columns)
            panel.set_title(title)
        for panel in axes[::across]:
            panel.set_ylabel("teacher layer")
        bar = figure.colorbar(mesh, ax=list(axes), fraction=0.045, pad=0.02, aspect=28)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        _quiet_bar(bar)
        svg = to_svg(figure, alternative=alternative)
    return Drawing(
        f"EMD flow between {what}",
        "Percent of the mass that moves between each pair of layers; the cells of a map sum to 100. Cells below "
        f"{LEAST_SHOWN:g} are left blank. Both maps share one colour scale.",
        alternative,
        svg,
    )


def _strongest(flow: Matrix) -> str:
    reached = flow.any(axis=0)
    places = [f"teacher {int(np.argmax(flow[:, at])) + 1} to student {at + 1}" for at in np.flatnonzero(reached)]
    told = "the strongest flow into each student layer goes from " + ", ".join(places)
    left = [str(at + 1) for at in np.flatnonzero(~reached)]
    return told + (f"; none goes to student {', '.join(left)}" if left else "")


def _numbers(axes: Axes, values: Matrix, *, top: float, size: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if value >= LEAST_SHOWN:
            text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            color = "white" if value > 0.55 * top else INK
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=color)


def _layer_axes(axes: Axes, *, rows: int, columns: int | None) -> None:
    axes.set_ylim(rows, 0)
    axes.set_yticks(np.arange(rows) + 0.5, [str(layer) for layer in range(1, rows + 1)])
    if columns is not None:
        axes.set_xticks(np.arange(columns) + 0.5, [str(layer) for layer in range(1, columns + 1)])
        axes.set_xlabel("student layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _quiet_bar(bar: Any) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7.5)


def marginal_maps(distillation: Any, *, name: str = "") -> list[Drawing]:
    """Return how the layers' weights moved during training: one figure, or one per kind where the two differ."""
    entries = dig(distillation, "marginals")
    series = {kind: _marginals(entries if isinstance(entries, list) else [], kind) for kind in KINDS}
    found = {kind: value for kind, value in series.items() if value is not None}
    if len(found) == 2 and all(np.array_equal(*pair) for pair in zip(*found.values(), strict=True)):
        return [_marginal_map("attention and hidden states", found["attention"], shared=True, name=name)]
    names = {"attention": "attention scores", "hidden": "hidden states"}
    return [_marginal_map(names[kind], value, shared=False, name=name) for kind, value in found.items()]


Marginals = tuple[Matrix, Matrix, Matrix]  # steps (S,), teacher weights (S, M), student weights (S, N)


def _marginals(entries: Sequence[Any], kind: str) -> Marginals | None:
    kept = [
        entry
        for entry in entries
        if number(dig(entry, "step")) is not None and isinstance(dig(entry, f"{kind}_teacher"), list)
    ]
    kept = [kept[place] for place in _spread(len(kept), MOST_COLUMNS)]
    teacher, student = (matrix([entry.get(f"{kind}_{side}") for entry in kept]) for side in ("teacher", "student"))
    if teacher is None or student is None:
        return None
    return np.array([float(entry["step"]) for entry in kept]), teacher, student


def _spread(amount: int, most: int) -> list[int]:
    """Return at most `most` places in range(amount), evenly spread, first and last among them."""
    return sorted({round(float(place)) for place in np.linspace(0, amount - 1, min(amount, most))}) if amount else []


def _marginal_map(what: str, marginals: Marginals, *, shared: bool, name: str) -> Drawing:
    steps, *sides = marginals
    relative = [weights.T * weights.shape[1] for weights in sides]  # 1 is the uniform weight
    spread = max(0.1, float(np.abs(np.concatenate(relative) - 1).max()))
    names = ("teacher", "student")
    last = [
        f"{side} layers end at " + ", ".join(f"{weight:.3f}" for weight in weights[-1])
        for side, weights in zip(names, sides, strict=True)
    ]
    alternative = (
        f"Layer weights for {what} from step {steps[0]:g} to {steps[-1]:g}: {'; '.join(last)}. "
        f"Uniform would be {1 / sides[0].shape[1]:.3f} and {1 / sides[1].shape[1]:.3f}."
    )
    rows = [part.shape[0] for part in relative]
    with canvas(f"marginals-{what}-{name}", height=1.5 + 0.17 * sum(rows)) as figure:
        axes = figure.subplots(2, 1, sharex=True, height_ratios=rows)
        for panel, values, weights, side in zip(axes, relative, sides, names, strict=True):
            mesh = _weights_over_steps(panel, steps, values, spread=spread)
            _layer_axes(panel, rows=len(values), columns=None)
            panel.set_ylabel(f"{side} layer")
            right = panel.secondary_yaxis("right")
            right.set_yticks(
                np.arange(len(values)) + 0.5, [f"{weight:.3f}".removeprefix("0") for weight in weights[-1]]
            )
            right.tick_params(length=0, labelsize=7.5)
            right.spines["right"].set_visible(False)
        axes[0].set_title("weight at the end", loc="right", fontsize=7.5)
        axes[1].set_xlabel("training step")
        bar = figure.colorbar(mesh, ax=list(axes), location="bottom", fraction=0.05, aspect=40, pad=0.02)
        bar.set_label("times the uniform weight", fontsize=8)
        _quiet_bar(bar)
        svg = to_svg(figure, alternative=alternative)
    if all(np.allclose(weights, weights[0]) for weights in sides):
        text = "The weights stay as they were: this mapping does not move them."
    else:
        text = "Cost attention gives layers that are cheap to match more weight (blue) and dear ones less (orange)."
    if shared:
        text += " Attention and hidden states share one set of weights in this run, drawn once."
    return Drawing(f"Layer weights during training: {what}", text, alternative, svg)


def _weights_over_steps(axes: Axes, steps: Matrix, values: Matrix, *, spread: float) -> QuadMesh:
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    colors = LinearSegmentedColormap.from_list("weights", [CONTRAST, "#f3d9b8", "#f7f7f7", "#a9cbea", STUDENT_INT8])
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([steps[:1], middles, steps[-1:]]) if len(steps) > 1 else np.array([steps[0], steps[0] + 1])
    rows = np.arange(len(values) + 1)
    norm = TwoSlopeNorm(vcenter=1, vmin=max(0.0, 1 - spread), vmax=1 + spread)  # a weight is never below 0
    return axes.pcolormesh(edges, rows, values, cmap=colors, norm=norm, rasterized=True)


def loss_curves(distillation: Any, *, name: str = "") -> Drawing | None:
    """Return the losses over training on a logarithmic axis, or None where none were kept."""
    entries = dig(distillation, "losses")
    if not isinstance(entries, list):
        return None
    curves = {part: curve for part in LOSSES if len(curve := _curve(entries, part)) > 1}
    if not curves:
        return None
    said = "; ".join(f"{part} {digits(curve[0][1])} to {digits(curve[-1][1])}" for part, curve in curves.items())
    alternative = f"Losses over training: {said}."
    with canvas(f"losses-{name}", height=3.2) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        handles: dict[str, Any] = {}
        for color, part in zip(SERIES, LOSSES, strict=True):
            if part in curves:
                weight = 2.0 if part == "total" else 1.2
                (handles[words(part)],) = axes.plot(*zip(*curves[part], strict=True), color=color, lw=weight)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        axes.grid(True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        legend(figure, handles, columns=3)
        svg = to_svg(figure, alternative=alternative)
    text = "Logarithmic. Total is the weighted sum, its parts stand before their weights; attention and hidden are EMD losses."
    return Drawing("Losses during training", text, alternative, svg)


def _curve(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [(number(dig(entry, "step")), number(dig(entry, name))) for entry in entries]
    known = [(step, value) for step, value in points if step is not None and value is not None and value > 0]
    return [known[place] for place in _spread(len(known), MOST_POINTS)]
