"""Figures of one record: latency against length, what threads give, memory and size, cold start, in the page's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from bertemd_deploy.report.pareto import score_by_latency
from bertemd_deploy.report.records import Record, Variant, count
from bertemd_deploy.report.summary import Comparison, Row
from bertemd_deploy.report.text import digits, megabytes, milliseconds, number
from bertemd_deploy.report.usage_figures import memory_arena, paced_latency, thread_scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLD_PARTS = ("import", "load", "first")
COLD_NAMES = ("start of the process", "import", "load", "first answer")
COLD_COLORS = ("#f0c48a", "#cbd2d9", "#7b8794", "#323f4b")  # neither teacher nor student: parts of a time


def device_figures(comparison: Comparison, *, name: str) -> list[Drawing]:
    """Return the figures of one record, in the page's order, leaving out those whose numbers were not measured."""
    found = [
        latency_by_length(comparison.record, name=name),
        score_by_latency(comparison, name=name),
        thread_scaling(comparison, name=name),
        memory_and_size(comparison, name=name),
    ]
    if not comparison.record.estimated:
        found += [
            paced_latency(comparison, name=name),
            memory_arena(comparison, name=name),
            cold_start(comparison, name=name),
        ]
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
    what = "Estimated median latency" if record.estimated else "Median latency"
    alternative = f"{what} at batch {batch} by input length, {'. '.join(said)}."
    marks = Marks()
    with canvas(f"latency-{name}", height=3.2) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        handles: dict[Variant, Any] = {}
        for panel, (amount, curves) in zip(axes, panels.items(), strict=True):
            panel.set_yscale("log")
            panel.set_xscale("log", base=2)
            for variant, points in curves.items():
                tips = [
                    f"{variant.label}: {value_text(value, span, estimated=record.estimated)} at {length} tokens"
                    for length, value, span in points
                ]
                handles[variant] = curve(panel, variant, points, tips=tips, marks=marks)
            ticks = sorted({length for points in curves.values() for length, *_ in points})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_title(count(amount, "thread"))
            panel.set_xlabel("tokens")
            panel.grid(True)
        drawn = [point for curves in panels.values() for points in curves.values() for point in points]
        plain_log_axis(axes[0], reach(drawn))
        axes[0].set_ylabel(f"p50 in ms, batch {batch}")
        labels = {variant.label: handle for variant, handle in handles.items()}
        legend(figure, labels, marks=marks, keys=[variant.key for variant in handles])
        svg = to_svg(figure, alternative=alternative, marks=marks)
    caption = (
        f"Median time of one call at batch {batch}, logarithmic: equal distances are equal factors. Lower is better."
    )
    caption += _bars_mean(
        record, any(span for curves in panels.values() for line in curves.values() for *_, span in line)
    )
    return Drawing("Latency against input length", caption, alternative, svg)


def _bars_mean(record: Record, drawn: bool) -> str:
    if record.estimated:
        return " Estimates; the thin bars are their intervals."
    return " The thin bars are 95% intervals." if drawn else ""


def _curves(record: Record, *, batch: int, threads: int) -> dict[Variant, list[Point]]:
    curves: dict[Variant, list[Point]] = {}
    for variant in record.variants:
        points = [
            (cell.sequence, value, record.interval(variant, cell))
            for owner, cell in record.cells
            if owner == variant and (cell.batch, cell.threads) == (batch, threads) and isinstance(cell.sequence, int)
            if (value := record.latency(variant, cell)) is not None and value > 0
        ]
        if points:
            curves[variant] = sorted(points, key=lambda point: point[0])
    return curves


def _ends(points: Sequence[Point]) -> str:
    (shortest, low, _), (longest, high, _) = points[0], points[-1]
    if shortest == longest:
        return f"{milliseconds(low)} at {shortest} tokens"
    return f"{milliseconds(low)} at {shortest} to {milliseconds(high)} at {longest} tokens"


def memory_and_size(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return bars of model size and peak memory for every model."""
    estimated = comparison.record.estimated
    panels = {
        "Model file": {row.variant: row.model_bytes for row in comparison.rows},
        "Peak memory" + (", estimate" if estimated else ""): {
            row.variant: row.peak_rss_bytes for row in comparison.rows
        },
    }
    panels = {title: bars for title, bars in panels.items() if any(value is not None for value in bars.values())}
    if not panels:
        return None
    said = [
        f"{title}: " + "; ".join(f"{variant.label} {megabytes(value)}" for variant, value in bars.items())
        for title, bars in panels.items()
    ]
    alternative = ". ".join(said) + "."
    marks = Marks()
    with canvas(f"memory-{name}", height=max(1.6, 0.9 + 0.36 * len(comparison.rows))) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (title, bars) in zip(axes, panels.items(), strict=True):
            _bars(panel, title, bars, rows=comparison.rows, marks=marks)
        axes[0].set_yticks(range(len(comparison.rows)), [short(row.variant) for row in comparison.rows])
        axes[0].invert_yaxis()
        svg = to_svg(figure, alternative=alternative, marks=marks)
    caption = "Megabytes of 10⁶ bytes."
    if any(title.startswith("Peak") for title in panels):
        caption += (
            " Peak memory is an estimate with its interval."
            if estimated
            else " Peak memory is the most the fresh process held, interpreter and libraries included."
        )
    return Drawing("Memory and size", caption, alternative, svg)


def _bars(axes: Axes, title: str, bars: Mapping[Variant, float | None], *, rows: Sequence[Row], marks: Marks) -> None:
    spans = {row.variant: row.peak_rss_interval for row in rows} if title.startswith("Peak") else {}
    ends = [value for value in bars.values() if value is not None] + [span.high for span in spans.values() if span]
    top = max(ends) / 1e6 or 1.0
    for place, (row, (variant, value)) in enumerate(zip(rows, bars.items(), strict=True)):
        if value is None:
            words = " did not fit" if row.failed else " not measured"
            marks.add(axes.text(0, place, words, va="center", fontsize=8, color=INK, style="italic"), variant.key)
            continue
        (bar,) = axes.barh(place, value / 1e6, height=0.62, color=look(variant).color)
        marks.add(bar, variant.key, [f"{variant.label}, {title.lower()}: {megabytes(value)}"])
        end = value / 1e6
        if (span := spans.get(variant)) is not None:
            line = axes.hlines(place, span.low / 1e6, span.high / 1e6, color=INK, lw=1)
            marks.add(line, variant.key)
            end = max(end, span.high / 1e6)
        label = axes.text(end + top * 0.03, place, digits(value / 1e6), va="center", fontsize=8)
        marks.add(label, variant.key)
    axes.set_xlim(0, top * 1.28)
    axes.set_title(title)
    axes.set_xlabel("MB")
    axes.locator_params(axis="x", nbins=4)
    axes.grid(True, axis="x", color=GRID)
    axes.tick_params(axis="y", length=0)


def cold_start(comparison: Comparison, *, name: str) -> Drawing | None:
    """Return bars of the time from a fresh process to its first answer, in its parts."""
    record = comparison.record
    parts = {row.variant: _cold_parts(record, row.variant) for row in comparison.rows}
    known = {variant: times for variant, times in parts.items() if times}
    if not known:
        return None
    names = [part for part in COLD_NAMES if any(part in times for times in known.values())]
    said = "; ".join(
        f"{variant.label} {milliseconds(sum(times.values()))} ("
        + ", ".join(f"{part} {milliseconds(time)}" for part, time in times.items())
        + ")"
        for variant, times in known.items()
    )
    alternative = f"Cold start: {said}."
    marks = Marks()
    with canvas(f"cold-{name}", height=max(1.9, 1.2 + 0.36 * len(known))) as figure:
        axes = figure.subplots()
        starts = dict.fromkeys(known, 0.0)
        handles: dict[str, Any] = {}
        for part in names:
            for place, (variant, times) in enumerate(known.items()):
                if part not in times:
                    continue
                color = COLD_COLORS[COLD_NAMES.index(part)]
                (bar,) = axes.barh(
                    place, times[part], left=starts[variant], height=0.62, color=color, edgecolor="white", lw=0.6
                )
                marks.add(bar, variant.key, [f"{variant.label}, {part}: {milliseconds(times[part])}"])
                handles.setdefault(part, bar)
                starts[variant] += times[part]
        for place, (variant, total) in enumerate(starts.items()):
            text = axes.text(total + max(starts.values()) * 0.02, place, digits(total), va="center", fontsize=8)
            marks.add(text, variant.key)
        axes.set_yticks(range(len(known)), [short(variant) for variant in known])
        axes.invert_yaxis()
        axes.set_xlim(0, max(starts.values()) * 1.14)
        axes.set_xlabel("ms")
        axes.grid(True, axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        legend(figure, handles, columns=2 if len(names) > 3 else 3)
        svg = to_svg(figure, alternative=alternative, marks=marks)
    return Drawing(
        "Cold start",
        "From a fresh process to its first answer: importing the runtime, loading the model, one call."
        + (" The start of the process is what is left of the whole, seen from outside." if len(names) > 3 else ""),
        alternative,
        svg,
    )


def _cold_parts(record: Record, variant: Variant) -> dict[str, float]:
    """Return the parts of a cold start in ms, the process's own start first where the whole was measured; empty if unknown."""
    times = [number(record.fact(variant, "cold_start_ms", part)) for part in COLD_PARTS]
    known = [time for time in times if time is not None]
    if len(known) != len(times):
        return {}
    parts = dict(zip(COLD_NAMES[1:], known, strict=True))
    whole = number(record.fact(variant, "cold_start_ms", "process"))
    if whole is not None and whole > sum(known):
        return {COLD_NAMES[0]: whole - sum(known)} | parts
    return parts
