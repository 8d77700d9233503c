"""Figures of one device: latency against length, score against latency, memory and size, cold start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bertemd_deploy.report.drawing import GRID, INK, Drawing, canvas, legend, look, to_svg
from bertemd_deploy.report.records import Cell, Record, Variant, count
from bertemd_deploy.report.summary import Comparison
from bertemd_deploy.report.text import digits, megabytes, milliseconds, number, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLD_PARTS = ("import", "load", "first")
COLD_COLORS = ("#cbd2d9", "#7b8794", "#323f4b")  # neither teacher nor student: parts of a time
Points = Sequence[tuple[int, float]]


def device_figures(comparison: Comparison, *, name: str) -> list[Drawing]:
    """Return the figures of one device, in the page's order, leaving out those whose numbers were not measured."""
    found = (
        latency_by_length(comparison.record, name=name),
        score_by_latency(comparison, name=name),
        memory_and_size(comparison, name=name),
        cold_start(comparison, name=name),
    )
    return [drawing for drawing in found if drawing]


def latency_by_length(record: Record, *, name: str) -> Drawing | None:
    """Return median latency at the smallest batch against input length: a panel for the fewest and the most threads."""
    if not record.batches:
        return None
    batch = record.batches[0]
    lengths = [cell for _, cell in record.cells if cell.batch == batch and isinstance(cell.sequence, int)]
    threads = sorted({cell.threads for cell in lengths})
    panels = {
        amount: _curves(record, batch=batch, threads=amount) for amount in dict.fromkeys(threads[:1] + threads[-1:])
    }
    panels = {amount: curves for amount, curves in panels.items() if curves}
    if not panels:
        return None
    said = [
        f"with {count(amount, 'thread')}: "
        + "; ".join(f"{variant.label} {_ends(points)}" for variant, points in curves.items())
        for amount, curves in panels.items()
    ]
    alternative = f"Median latency at batch {batch} by input length, {'. '.join(said)}."
    with canvas(f"latency-{name}", height=3.2) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for panel, (amount, curves) in zip(axes, panels.items(), strict=True):
            panel.set_yscale("log")
            panel.set_xscale("log", base=2)
            for variant, points in curves.items():
                style = look(variant)
                (line,) = panel.plot(
                    *zip(*points, strict=True), color=style.color, marker=style.marker, ls=style.dashes, ms=4
                )
                handles[variant.label] = line
            ticks = sorted({length for points in curves.values() for length, _ in points})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_title(count(amount, "thread"))
            panel.set_xlabel("tokens")
            panel.grid(True)
        _plain_log_axis(
            axes[0], [value for curves in panels.values() for points in curves.values() for _, value in points]
        )
        axes[0].set_ylabel(f"p50 in ms, batch {batch}")
        legend(figure, handles)
        svg = to_svg(figure, alternative=alternative)
    return Drawing(
        "Latency against input length",
        f"Median time of one call at batch {batch}, logarithmic: equal distances are equal factors. Lower is better.",
        alternative,
        svg,
    )


def _curves(record: Record, *, batch: int, threads: int) -> dict[Variant, Points]:
    curves: dict[Variant, Points] = {}
    for variant in record.variants:
        points = sorted(
            (cell.sequence, value)
            for owner, cell in record.cells
            if owner == variant and (cell.batch, cell.threads) == (batch, threads) and isinstance(cell.sequence, int)
            if (value := record.latency(variant, cell)) is not None and value > 0
        )
        if points:
            curves[variant] = points
    return curves


def _ends(points: Points) -> str:
    (shortest, low), (longest, high) = points[0], points[-1]
    if shortest == longest:
        return f"{milliseconds(low)} at {shortest} tokens"
    return f"{milliseconds(low)} at {shortest} to {milliseconds(high)} at {longest} tokens"


def _plain_log_axis(axes: Axes, values: Sequence[float], *, which: str = "y") -> None:
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


def score_by_latency(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return each model's gating metric against its median latency, with the edge no other model beats on both."""
    metric = next(iter(comparison.record.metric_names), None)
    points: dict[Variant, tuple[float, float]] = {}
    for row in comparison.rows:
        value = row.metrics.get(metric) if metric else None
        if value is not None and row.p50_ms is not None and row.p50_ms > 0:
            points[row.variant] = (row.p50_ms, value)
    if len(points) < 2 or metric is None or comparison.cell is None:
        return None
    said = "; ".join(
        f"{variant.label} {score(value)} at {milliseconds(time)}" for variant, (time, value) in points.items()
    )
    alternative = f"{metric} against median latency ({comparison.cell.label}): {said}."
    with canvas(f"pareto-{name}", height=3.2) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        edge = _edge(list(points.values()))
        axes.plot(*zip(*edge, strict=True), color="#9aa5b1", lw=1, drawstyle="steps-post", zorder=1)
        handles: dict[str, Any] = {}
        for variant, (time, value) in points.items():
            style = look(variant)
            handles[variant.label] = axes.scatter(
                [time],
                [value],
                s=52,
                color=style.color,
                marker=style.marker,
                edgecolor="white",
                linewidth=0.8,
                zorder=3,
            )
        _plain_log_axis(axes, [time for time, _ in points.values()], which="x")
        axes.margins(y=0.18)
        axes.set_xlabel(f"p50 in ms ({_conditions(comparison.cell)})")
        axes.set_ylabel(metric)
        axes.grid(True)
        legend(figure, handles)
        svg = to_svg(figure, alternative=alternative)
    return Drawing(
        f"{metric.capitalize()} against latency",
        "Upper left is better. The grey line joins the models that no other beats in both.",
        alternative,
        svg,
    )


def _conditions(cell: Cell) -> str:
    length = "replay" if isinstance(cell.sequence, str) else f"{cell.sequence} tokens"
    return f"batch {cell.batch}, {length}, {count(cell.threads, 'thread')}"


def _edge(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, fastest first, that score more than every faster one."""
    edge: list[tuple[float, float]] = []
    for time, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not edge or value > edge[-1][1]:
            edge.append((time, value))
    return edge


def memory_and_size(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return bars of model size and peak memory for every model."""
    panels = {
        "Model file": {row.variant: row.model_bytes for row in comparison.rows},
        "Peak memory": {row.variant: row.peak_rss_bytes for row in comparison.rows},
    }
    panels = {title: bars for title, bars in panels.items() if any(value is not None for value in bars.values())}
    if not panels:
        return None
    said = [
        f"{title}: " + "; ".join(f"{variant.label} {megabytes(value)}" for variant, value in bars.items())
        for title, bars in panels.items()
    ]
    alternative = ". ".join(said) + "."
    with canvas(f"memory-{name}", height=max(1.6, 0.9 + 0.36 * len(comparison.rows))) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (title, bars) in zip(axes, panels.items(), strict=True):
            _bars(panel, title, bars)
        axes[0].set_yticks(range(len(comparison.rows)), [_short(row.variant) for row in comparison.rows])
        axes[0].invert_yaxis()
        svg = to_svg(figure, alternative=alternative)
    return Drawing(
        "Memory and size",
        "Megabytes of 10⁶ bytes. Peak memory is the most the fresh process held, interpreter and libraries included.",
        alternative,
        svg,
    )


def _bars(axes: Axes, title: str, bars: Mapping[Variant, float | None]) -> None:
    top = max(value for value in bars.values() if value is not None) / 1e6 or 1.0
    for place, (variant, value) in enumerate(bars.items()):
        if value is None:
            axes.text(0, place, " not measured", va="center", fontsize=8, color=INK, style="italic")
            continue
        axes.barh(place, value / 1e6, height=0.62, color=look(variant).color)
        axes.text(value / 1e6 + top * 0.03, place, digits(value / 1e6), va="center", fontsize=8)
    axes.set_xlim(0, top * 1.28)
    axes.set_title(title)
    axes.set_xlabel("MB")
    axes.locator_params(axis="x", nbins=4)
    axes.grid(True, axis="x", color=GRID)
    axes.tick_params(axis="y", length=0)


def cold_start(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return bars of the time from a fresh process to its first answer, in its three parts."""
    record = comparison.record
    parts = {
        row.variant: [number(record.fact(row.variant, "cold_start_ms", part)) for part in COLD_PARTS]
        for row in comparison.rows
    }
    known = {variant: [part for part in times if part is not None] for variant, times in parts.items()}
    known = {variant: times for variant, times in known.items() if len(times) == len(COLD_PARTS)}
    if not known:
        return None
    said = "; ".join(
        f"{variant.label} {milliseconds(sum(times))} ("
        + ", ".join(f"{part} {milliseconds(time)}" for part, time in zip(COLD_PARTS, times, strict=True))
        + ")"
        for variant, times in known.items()
    )
    alternative = f"Cold start: {said}."
    with canvas(f"cold-{name}", height=max(1.9, 1.2 + 0.36 * len(known))) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(known)
        handles: dict[str, Any] = {}
        for at, (part, color) in enumerate(zip(COLD_PARTS, COLD_COLORS, strict=True)):
            widths = [times[at] for times in known.values()]
            bars = axes.barh(
                range(len(known)), widths, left=starts, height=0.62, color=color, edgecolor="white", lw=0.6
            )
            handles["first answer" if part == "first" else part] = bars
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for place, total in enumerate(starts):
            axes.text(total + max(starts) * 0.02, place, digits(total), va="center", fontsize=8)
        axes.set_yticks(range(len(known)), [_short(variant) for variant in known])
        axes.invert_yaxis()
        axes.set_xlim(0, max(starts) * 1.14)
        axes.set_xlabel("ms")
        axes.grid(True, axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        legend(figure, handles, columns=3)
        svg = to_svg(figure, alternative=alternative)
    return Drawing(
        "Cold start",
        "From a fresh process to its first answer: importing the runtime, loading the model, one call.",
        alternative,
        svg,
    )


def _short(variant: Variant) -> str:
    return variant.label.removeprefix("Student ").replace("Teacher, ", "Teacher\n")
