"""Score against latency: the models of one record, and the students of one teacher on one device.

A model is on the edge where no faster one scores as much. Students are drawn together only where their numbers were got in
the same way on the same device and in the same cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.report.drawing import (
    SERIES,
    TEACHER,
    Drawing,
    Look,
    Marks,
    canvas,
    legend,
    look,
    plain_log_axis,
    to_svg,
)
from bertemd_deploy.report.records import Cell, Span, count
from bertemd_deploy.report.summary import Comparison, Row
from bertemd_deploy.report.text import milliseconds, score, sentence, spread

MARKERS = ("o", "D", "^", "v", "P", "X", "*", "h")
EDGE = "Upper left is better. The grey line joins the models that no other beats in both."


@dataclass(frozen=True)
class Place:
    """One point: its label and key, latency in ms with its interval, score, and looks."""

    label: str
    key: str
    time_ms: float
    interval: Span | None
    value: float
    style: Look


def score_by_latency(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return each model's gating metric against its median latency, with the edge no other model beats on both."""
    metric = next(iter(comparison.record.metric_names), None)
    if metric is None or comparison.cell is None:
        return None
    points = [
        Place(row.variant.label, row.variant.key, row.p50_ms, row.p50_interval, value, look(row.variant))
        for row in comparison.rows
        if (value := row.metrics.get(metric)) is not None and row.p50_ms is not None and row.p50_ms > 0
    ]
    if len(points) < 2:
        return None
    return _drawing(
        points,
        name=f"pareto-{name}",
        title=f"{sentence(metric)} against latency",
        metric=metric,
        cell=comparison.cell,
        estimated=comparison.record.estimated,
    )


def students_figures(comparisons: Sequence[Comparison]) -> list[Drawing]:
    """Return every student's score against its latency: a figure per device and way of getting the numbers.

    Only devices with at least two students are drawn, each student with the graph that is used, the teacher once.
    """
    groups: dict[tuple[str, str, Cell | None], list[Comparison]] = {}
    for comparison in comparisons:
        record = comparison.record
        if record.student:
            device = str(record.device.get("name") or "unnamed device")
            groups.setdefault((device, record.kind, comparison.cell), []).append(comparison)
    order = list(dict.fromkeys(comparison.record.student for comparison in comparisons))
    found = [
        _students(device, kind, cell, group, order=order, name=f"students-{at}")
        for at, ((device, kind, cell), group) in enumerate(groups.items())
        if cell is not None and len({one.record.student for one in group}) > 1
    ]
    return [drawing for drawing in found if drawing]


def _students(
    device: str, kind: str, cell: Cell, group: Sequence[Comparison], *, order: Sequence[str], name: str
) -> Drawing | None:
    metric = next(iter(group[0].record.metric_names), None)
    if metric is None:
        return None
    points = []
    for comparison in group:
        at = order.index(comparison.record.student)
        style = Look(SERIES[at % len(SERIES)], MARKERS[at % len(MARKERS)], "-")
        points += _place(comparison.student, comparison.record.student, metric, style=style)
    teachers = [
        place for one in group for place in _place(one.teacher, "Teacher", metric, style=Look(TEACHER, "s", "-"))
    ]
    points += teachers[:1]
    if len(points) < 2:
        return None
    return _drawing(
        points,
        name=name,
        title=f"Students on {device} ({kind})",
        metric=metric,
        cell=cell,
        estimated=kind == "estimated",
    )


def _place(row: Row | None, label: str, metric: str, *, style: Look) -> list[Place]:
    if row is None or row.p50_ms is None or row.p50_ms <= 0 or (value := row.metrics.get(metric)) is None:
        return []
    name = (
        f"{label}, {row.variant.runtime}"
        if row.variant.is_teacher
        else f"{label}: {row.variant.label.removeprefix('Student ')}"
    )
    return [Place(name, "", row.p50_ms, row.p50_interval, value, style)]


def _drawing(points: Sequence[Place], *, name: str, title: str, metric: str, cell: Cell, estimated: bool) -> Drawing:
    said = "; ".join(f"{point.label} {score(point.value)} at {milliseconds(point.time_ms)}" for point in points)
    what = "estimated median latency" if estimated else "median latency"
    alternative = f"{metric} against {what} ({cell.label}): {said}."
    marks = Marks()
    with canvas(name, height=3.2) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        edge = frontier([(point.time_ms, point.value) for point in points])
        axes.plot(*zip(*edge, strict=True), color="#9aa5b1", lw=1, drawstyle="steps-post", zorder=1)
        handles: dict[str, Any] = {}
        for point in points:
            handles[point.label] = _draw(axes, point, metric=metric, marks=marks, estimated=estimated)
        bounds = [bound for point in points for bound in (point.interval or ()) if bound > 0]
        plain_log_axis(axes, [*(point.time_ms for point in points), *bounds], which="x")
        axes.margins(y=0.18)
        axes.set_xlabel(f"{'estimated ' if estimated else ''}p50 in ms ({_conditions(cell)})")
        axes.set_ylabel(metric)
        axes.grid(True)
        columns = 2 if max(len(label) for label in handles) < 24 else 1
        legend(figure, handles, columns=columns, marks=marks, keys=[point.key for point in points])
        svg = to_svg(figure, alternative=alternative, marks=marks)
    caption = EDGE
    if estimated:
        caption += " Latency is an estimate; the bars are its intervals."
    elif any(point.interval for point in points):
        caption += " The bars are 95% intervals of the median."
    return Drawing(title, caption, alternative, svg)


def _draw(axes: Any, point: Place, *, metric: str, marks: Marks, estimated: bool) -> Any:
    style = point.style
    if point.interval is not None and point.interval.low > 0:
        bar = axes.hlines(point.value, point.interval.low, point.interval.high, color=style.color, lw=1.1, zorder=2)
        marks.add(bar, point.key)
    handle = axes.scatter(
        [point.time_ms],
        [point.value],
        s=52,
        color=style.color,
        marker=style.marker,
        edgecolor="white",
        linewidth=0.8,
        zorder=3,
    )
    around = f" ({spread(*point.interval)})" if point.interval else ""
    how = "estimate " if estimated else ""
    tip = f"{point.label}: {metric} {score(point.value)}, {how}{milliseconds(point.time_ms)}{around}"
    marks.add(handle, point.key, [tip])
    return handle


def _conditions(cell: Cell) -> str:
    length = "replay" if isinstance(cell.sequence, str) else f"{cell.sequence} tokens"
    return f"batch {cell.batch}, {length}, {count(cell.threads, 'thread')}"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (time, score), fastest first, that score more than every faster one."""
    edge: list[tuple[float, float]] = []
    for time, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not edge or value > edge[-1][1]:
            edge.append((time, value))
    return edge
