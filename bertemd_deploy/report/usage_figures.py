"""Figures of a device in use: what threads give and cost, requests one by one, memory with and without the arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertemd_deploy.report.drawing import (
    GRID,
    INK,
    Drawing,
    Marks,
    Point,
    canvas,
    curve,
    legend,
    look,
    plain_log_axis,
    reach,
    short,
    to_svg,
    value_text,
)
from bertemd_deploy.report.records import Cell, Record, Span, Variant, count, length_label
from bertemd_deploy.report.summary import Comparison
from bertemd_deploy.report.text import dig, digits, megabytes, milliseconds, number, sentence
from bertemd_deploy.report.usage import arena_bytes, paced, paced_cell


def thread_scaling(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return latency and CPU time of one call against the number of threads, in the cell the page compares."""
    record, cell = comparison.record, comparison.cell
    if cell is None:
        return None
    panels = {"latency, p50": _by_threads(record, cell, _latency)}
    if not record.estimated:
        panels["CPU time per call"] = _by_threads(record, cell, _cpu)
    panels = {title: curves for title, curves in panels.items() if curves}
    amounts = sorted({amount for curves in panels.values() for points in curves.values() for amount, *_ in points})
    if len(amounts) < 2:
        return None
    where = f"batch {cell.batch}, {length_label(cell.sequence)}"
    said = ". ".join(f"{title}: {_in_words(curves)}" for title, curves in panels.items())
    alternative = f"{'Estimates by' if record.estimated else 'By'} threads, of one call ({where}). {sentence(said)}."
    marks = Marks()
    with canvas(f"threads-{name}", height=3.2) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        handles: dict[Variant, Any] = {}
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            for variant, points in curves.items():
                tips = [
                    f"{variant.label}, {title}, {count(amount, 'thread')}: "
                    f"{value_text(value, span, estimated=record.estimated)}"
                    for amount, value, span in points
                ]
                handles.setdefault(variant, curve(panel, variant, points, tips=tips, marks=marks))
            panel.set_xticks(amounts, [str(amount) for amount in amounts])
            panel.set_xlim(amounts[0] / 1.15, amounts[-1] * 1.15)
            plain_log_axis(panel, [value for points in curves.values() for value in reach(points)])
            panel.set_title(title)
            panel.set_xlabel("threads")
            panel.grid(True)
        axes[0].set_ylabel("ms")
        labels = {variant.label: handle for variant, handle in handles.items()}
        legend(figure, labels, marks=marks, keys=[variant.key for variant in handles])
        svg = to_svg(figure, alternative=alternative, marks=marks)
    caption = f"One call ({where}), logarithmic. Lower is better."
    if len(panels) > 1:
        caption += " CPU time is over all threads: where it rises more than latency falls, the threads wait."
    if record.estimated:
        caption += " Estimates; the thin bars are their intervals."
    return Drawing("What threads give and cost", caption, alternative, svg)


Reading = tuple[float | None, Span | None]


def _latency(record: Record, variant: Variant, cell: Cell) -> Reading:
    return record.latency(variant, cell), record.interval(variant, cell)


def _cpu(record: Record, variant: Variant, cell: Cell) -> Reading:
    seconds = number(dig(record.cells[variant, cell], "cpu_seconds_per_inference"))
    return None if seconds is None else 1000 * seconds, None


def _by_threads(
    record: Record, cell: Cell, read: Callable[[Record, Variant, Cell], Reading]
) -> dict[Variant, list[Point]]:
    """Return every model's points by threads, in the batch and length of a cell; without models that have none."""
    curves: dict[Variant, list[Point]] = {}
    for variant in record.variants:
        points: list[Point] = []
        for owner, at in record.cells:
            if owner == variant and (at.batch, at.sequence) == (cell.batch, cell.sequence):
                value, span = read(record, variant, at)
                points += [(at.threads, value, span)] if value is not None and value > 0 else []
        if points:
            curves[variant] = sorted(points, key=lambda point: point[0])
    return curves


def _in_words(curves: Mapping[Variant, Sequence[Point]]) -> str:
    return "; ".join(
        f"{variant.label} " + ", ".join(f"{milliseconds(value)} with {amount}" for amount, value, _ in points)
        for variant, points in curves.items()
    )


def paced_latency(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return latency in a loop beside latency of requests that come with pauses: p50 as a point, up to p95 as a line."""
    record = comparison.record
    cell = paced_cell(record)
    rows = [
        (
            row.variant,
            record.latency(row.variant, cell),
            record.latency(row.variant, cell, "p95"),
            *_pair(record, row.variant),
        )
        for row in comparison.rows
        if _pair(record, row.variant)[0] is not None and record.latency(row.variant, cell) is not None
    ]
    if not rows or cell is None:
        return None
    alternative = f"Latency in a loop and one by one ({cell.label}): " + "; ".join(
        f"{variant.label} p50 {milliseconds(loop)} in a loop, {milliseconds(alone)} one by one"
        for variant, loop, _, alone, _ in rows
    )
    marks = Marks()
    with canvas(f"paced-{name}", height=max(1.9, 1.3 + 0.42 * len(rows))) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        handles: dict[str, Any] = {}
        values: list[float] = []
        for place, (variant, loop, loop_95, alone, alone_95) in enumerate(rows):
            for at, (title, p50, p95) in enumerate((("in a loop", loop, loop_95), ("one by one", alone, alone_95))):
                assert p50 is not None
                height = place + (-0.16, 0.16)[at]
                color = look(variant).color
                high = p95 if p95 is not None and p95 >= p50 else p50
                marks.add(axes.hlines(height, p50, high, color=color, lw=1.4), variant.key)
                (point,) = axes.plot(
                    [p50], [height], color=color, marker="o", ms=5, ls="", mfc=color if at == 0 else "white"
                )
                tail = f", p95 {milliseconds(p95)}" if p95 is not None else ""
                marks.add(point, variant.key, [f"{variant.label}, {title}: p50 {milliseconds(p50)}{tail}"])
                (key,) = axes.plot([], [], color=INK, marker="o", ms=5, ls="", mfc=INK if at == 0 else "white")
                handles.setdefault(title, key)
                values += [p50, high]
        plain_log_axis(axes, values, which="x")
        axes.set_yticks(range(len(rows)), [short(row[0]) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("ms")
        axes.grid(True, axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        legend(figure, handles)
        svg = to_svg(figure, alternative=alternative, marks=marks)
    return Drawing(
        "In a loop, and one by one",
        f"Point: p50, line: to p95 ({cell.label}). With pauses between requests, threads sleep, caches cool and clocks drop.",
        alternative + ".",
        svg,
    )


def _pair(record: Record, variant: Variant) -> tuple[float | None, float | None]:
    return paced(record, variant, "p50"), paced(record, variant, "p95")


def memory_arena(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return bars of peak memory over requests of mixed lengths, with and without the runtime's arena."""
    record = comparison.record
    pairs = {
        row.variant: (
            arena_bytes(record, row.variant, "arena", "peak"),
            arena_bytes(record, row.variant, "no_arena", "peak"),
        )
        for row in comparison.rows
    }
    known = {variant: pair for variant, pair in pairs.items() if None not in pair}
    if not known:
        return None
    alternative = "Peak memory over requests of mixed lengths: " + "; ".join(
        f"{variant.label} {megabytes(on)} with arena, {megabytes(off)} without" for variant, (on, off) in known.items()
    )
    marks = Marks()
    with canvas(f"arena-{name}", height=max(1.9, 1.3 + 0.5 * len(known))) as figure:
        axes = figure.subplots()
        top = max(value for pair in known.values() for value in pair if value is not None) / 1e6
        handles: dict[str, Any] = {}
        for place, (variant, pair) in enumerate(known.items()):
            for at, (title, value) in enumerate(zip(("with arena", "without arena"), pair, strict=True)):
                assert value is not None
                height = place + (-0.2, 0.2)[at]
                color = look(variant).color
                (bar,) = axes.barh(
                    height, value / 1e6, height=0.36, color=color if at == 0 else "white", edgecolor=color, lw=1
                )
                marks.add(bar, variant.key, [f"{variant.label}, {title}: {megabytes(value)}"])
                label = axes.text(value / 1e6 + top * 0.02, height, digits(value / 1e6), va="center", fontsize=7.5)
                marks.add(label, variant.key)
                (key,) = axes.plot([], [], color=INK, marker="s", ms=7, ls="", mfc=INK if at == 0 else "white")
                handles.setdefault(title, key)
        axes.set_yticks(range(len(known)), [short(variant) for variant in known])
        axes.invert_yaxis()
        axes.set_xlim(0, top * 1.18)
        axes.set_xlabel("MB")
        axes.grid(True, axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        legend(figure, handles)
        svg = to_svg(figure, alternative=alternative + ".", marks=marks)
    return Drawing(
        "Memory with and without the arena",
        "The most the process held. The arena keeps memory for the next call; without it, it goes back to the system.",
        alternative + ".",
        svg,
    )
