"""What was asked of the GLUE grids before they were run, and whether their lines meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glue_stats import (
    LEAST_PAIRS,
    ROWS,
    Grid,
    Line,
    mean_over_tasks,
    metric_names,
    paired_lines,
    pooled_difference,
    pooled_kl_ratio,
    retention,
    weights_around,
)
from glue_words import listed, ratio_text, signed

TIE = 1e-9  # what rounding may take from a value that equals its bar
NEEDS = {"accuracy": "accuracy", "agreement": "agreement", "kl": "KL"}


@dataclass(frozen=True)
class Bar:
    """What was asked of a grid before it was run.

    Attributes:
        grid: name of the grid.
        tasks: the tasks it holds for; empty for all of the grid together.
        what: "kept", the int8 student of mapping emd in percent of its teacher; "mean", emd less the best of `against` on the
            mean over tasks of each task's first metric; or "ahead", the difference of emd to another mapping (for "kl" the
            fall of the ratio below 1), of which the whole interval has to be above `least`.
        of: metric for "kept" and "mean" ("first": each task's), statistic for "ahead".
        least: the bar.
        against: the other mappings; one for "ahead".
    """

    grid: str
    tasks: tuple[str, ...]
    what: str
    of: str
    least: float
    against: tuple[str, ...] = ()


def _of_mappings(grid: str, *, fixed: tuple[str, ...], tasks: tuple[str, ...] = ()) -> tuple[Bar, ...]:
    ahead = (Bar(grid, tasks, "ahead", of, 0.0, (against,)) for against in ("none", "uniform") for of in ROWS)
    return (Bar(grid, (), "mean", "first", 0.0, fixed), *ahead)


BARS = (
    Bar("minilm-4l", ("sst2",), "kept", "accuracy", 97.0),
    Bar("minilm-4l", ("mrpc",), "kept", "accuracy", 97.0),
    Bar("minilm-4l", ("mrpc",), "kept", "f1", 97.0),
    *_of_mappings("minilm-4l", fixed=("uniform", "skip")),
    Bar("mpnet-6l", ("mrpc",), "kept", "accuracy", 95.0),
    Bar("mpnet-6l", ("mrpc",), "kept", "f1", 95.0),
    Bar("mpnet-6l", ("rte",), "kept", "accuracy", 95.0),
    Bar("mpnet-6l", ("cola",), "kept", "matthews", 90.0),
    *_of_mappings("mpnet-6l", fixed=("uniform",), tasks=("cola", "rte")),  # of mrpc one seed was asked for
)


def verdict_lines(grids: Sequence[Grid]) -> list[str]:
    """Return the page's section of every bar and whether it is met."""
    found = [verdict(bar, {grid.name: grid for grid in grids}) for bar in BARS]
    counts = [sum(word == said for word, _ in found) for said in ("met", "missed", "not measured yet")]
    return [
        "",
        "## Verdict",
        "",
        f"Bars: {len(found)}; met: {counts[0]}; missed: {counts[1]}; not measured yet: {counts[2]}.",
        "Where fewer seeds than planned are finished, a verdict holds for those alone and may change.",
        "",
        *(f"- {words}: **{word}**." for word, words in found),
    ]


def verdict(bar: Bar, grids: Mapping[str, Grid]) -> tuple[str, str]:
    """Return "met", "missed" or "not measured yet", and the number and the bar in words."""
    grid = grids.get(bar.grid)
    value, words = {"kept": _kept, "mean": _mean, "ahead": _ahead}[bar.what](bar, grid)
    if value is None:
        return "not measured yet", words
    good = value > bar.least if bar.what == "ahead" else value >= bar.least - TIE
    return "met" if good else "missed", words


def _kept(bar: Bar, grid: Grid | None) -> tuple[float | None, str]:
    (task,) = bar.tasks
    lines = grid.lines(task, "emd") if grid else ()
    value = retention(lines, bar.of)
    subject = (
        f"`{bar.grid}`, {task}: the int8 student of `emd` is to keep at least {bar.least:g}% of its teacher's {bar.of}"
    )
    if value is None or grid is None:
        return None, subject
    return value, f"{subject}; it keeps {value:.2f}% ({len(lines)} of {grid.seeds(task, 'emd')} seeds)"


def _mean(bar: Bar, grid: Grid | None) -> tuple[float | None, str]:
    subject = (
        f"`{bar.grid}`: on the mean over tasks of their first metrics `emd` is to be at least as good as "
        f"{listed([f'`{name}`' for name in bar.against])}"
    )
    if grid is None or not grid.tasks:
        return None, subject
    names = ("emd", *bar.against)
    shared = {
        task: set.intersection(*({_pupil(line) for line in grid.lines(task, name)} for name in names))
        for task in grid.tasks
    }
    if missing := [task for task, pupils in shared.items() if not pupils]:
        return None, f"{subject}; without a seed of all of them so far: {listed(missing)}"
    first = {task: metric_names(grid.of_task(task))[0] for task in grid.tasks}
    means = {
        name: mean_over_tasks(
            {task: [line for line in grid.lines(task, name) if _pupil(line) in shared[task]] for task in grid.tasks},
            first,
        )
        for name in names
    }
    best = max(bar.against, key=means.__getitem__)
    count, planned = sum(map(len, shared.values())), sum(grid.seeds(task, "emd") for task in grid.tasks)
    return means["emd"] - means[best], (
        f"{subject}; it reaches {means['emd']:.4f}, "
        f"{'the best of them, ' if len(bar.against) > 1 else ''}`{best}`, {means[best]:.4f} "
        f"({count} of {planned} seeds over {listed(grid.tasks)})"
    )


def _pupil(line: Line) -> tuple[object, ...]:
    """Return what lines of several mappings have to share to be set against each other: seed, teacher and start."""
    return line["seed"], *weights_around(line)


def _ahead(bar: Bar, grid: Grid | None) -> tuple[float | None, str]:
    ratio, (against,) = bar.of == "kl", bar.against
    asked = "the interval of the ratio is to lie below 1" if ratio else "the interval is to lie above 0"
    over = listed(bar.tasks) if bar.tasks else "tasks"
    subject = f"`{bar.grid}`: `emd` against `{against}` in {NEEDS[bar.of]}, pooled over {over}, {asked}"
    if grid is None or not grid.tasks:
        return None, subject
    sides = grid.sides("emd", against, bar.tasks)
    counts = [len(paired_lines(*of_task)) for of_task in sides]
    if not all(counts):
        return None, f"{subject}; {sum(map(bool, counts))} of {len(sides)} tasks have pairs"
    if min(counts) < LEAST_PAIRS:
        return None, f"{subject}; a task has fewer than {LEAST_PAIRS} seeds"
    found = pooled_kl_ratio(sides) if ratio else pooled_difference(sides, bar.of)
    if found is None:
        return None, f"{subject}; a divergence of 0 leaves no ratio"
    shown = ratio_text(found) if ratio else signed(found, bar.of)
    planned = sum(grid.seeds(task, "emd") for task in bar.tasks or grid.tasks)
    return 1 - found.high if ratio else found.low, f"{subject}; it is {shown} ({found.pairs} of {planned} pairs)"
