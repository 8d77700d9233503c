"""What the lines of `glue.py` state together: means over seeds, paired differences and ratios with intervals, McNemar counts.

A line is a finished student as `glue.run_cell` returns it, a `Grid` the lines of one grid beside its plan. Lines in, numbers
out; no files. Pairs are students of one task and seed, of two variants, with one teacher. Over S paired seeds and n dev rows,
with x of one variant and y of the other,

    difference            mean_sr(x_sr) - mean_sr(y_sr)
    pooled difference     the mean of the tasks' differences
    pooled ratio          exp(mean over tasks of log(mean_sr(x_sr) / mean_sr(y_sr))), for divergences

Intervals are the middle 95% of a paired bootstrap, as in `bertemd_deploy.resampling`: rows and seeds of each task are drawn
anew with replacement, the same ones for both sides. They say what another choice of rows and seeds would have changed; a task's
students share one teacher, whose own chance is not in them. With 2 or 3 seeds they are about right where seeds differ little
beside rows; where seeds differ as much as three tenths of what rows do, they hold the truth in about 7 or 8 of 10 cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from glue_plan import Cell, cells
from numpy.typing import NDArray

from bertemd_deploy.resampling import interval, mcnemar

Line = Mapping[str, Any]
Lines = Sequence[Line]
Sides = tuple[Lines, Lines]  # a variant's lines of one task, and the other's
Matrix = NDArray[np.float64]

RESAMPLES = 2000
SEED = 20201116  # any fixed number: the same lines give the same interval
LEAST_PAIRS = 2  # seeds of a task, for a verdict on a difference: one seed says nothing of how seeds differ
ROWS = {"accuracy": "right", "agreement": "agrees", "kl": "kls"}  # what holds a statistic's values by dev row


@dataclass(frozen=True)
class Estimate:
    """A difference or a ratio.

    Attributes:
        value: as measured.
        low: lower bound of the 95% interval.
        high: upper bound.
        pairs: number of pairs of students behind it, over all tasks.
        tasks: number of tasks behind it.
    """

    value: float
    low: float
    high: float
    pairs: int
    tasks: int = 1


@dataclass(frozen=True)
class Counts:
    """Dev rows by who has them right, over all pairs: `lost` only the other variant, `gained` only this one; McNemar's p."""

    lost: int
    gained: int
    p: float


@dataclass(frozen=True)
class Grid:
    """A grid's plan and its finished students.

    Attributes:
        name: its name.
        tasks: of the plan and of the lines.
        variants: of the plan and of the lines.
        planned: cells of the plan.
        found: lines by task and variant.
        left_out: number of lines that do not belong to the others, see `current`.
    """

    name: str
    tasks: tuple[str, ...]
    variants: tuple[str, ...]
    planned: tuple[Cell, ...]
    found: Mapping[tuple[str, str], Lines]
    left_out: int

    def lines(self, task: str, variant: str) -> Lines:
        """Return the lines of a variant on a task, none where it was not run."""
        return self.found.get((task, variant), ())

    def of_task(self, task: str) -> list[Line]:
        """Return all lines of a task."""
        return [line for variant in self.variants for line in self.lines(task, variant)]

    def seeds(self, task: str, variant: str) -> int:
        """Return how many seeds the plan asks of a variant, at least as many as there are lines."""
        planned = sum((cell.task, cell.variant) == (task, variant) for cell in self.planned)
        return max(planned, len(self.lines(task, variant)))

    def sides(self, variant: str, base: str, tasks: Sequence[str] = ()) -> list[Sides]:
        """Return a variant's lines beside another's, by task."""
        return [(self.lines(task, variant), self.lines(task, base)) for task in tasks or self.tasks]


def read_grid(name: str, plan: Mapping[str, Any], lines: Lines) -> Grid:
    """Return a grid with those of its lines that belong together."""
    entry = plan["grids"].get(name, {"tasks": {}, "variants": {}})
    tasks = tuple(dict.fromkeys([*entry["tasks"], *(line["task"] for line in lines)]))
    variants = tuple(dict.fromkeys([*entry["variants"], *(line["variant"] for line in lines)]))
    kept = [line for task in tasks for line in current([line for line in lines if line["task"] == task])]
    found: dict[tuple[str, str], list[Line]] = {}
    for line in kept:
        found.setdefault((line["task"], line["variant"]), []).append(line)
    planned = tuple(cells(plan, name, tuning=False)) if entry["tasks"] else ()
    return Grid(name, tasks, variants, planned, found, len(lines) - len(kept))


def current(lines: Lines) -> list[Line]:
    """Return the lines that belong together, by seed: of a variant those with the settings of its last finished line.

    Lines are of one task. Left out are those whose teacher or data are set otherwise than in the last finished line of all, or
    whose int8 was made without smoothing and that one's with it, and all but the last of a variant's lines of one seed.
    """
    ordered = sorted(lines, key=lambda line: str(line["finished"]))
    kept = [line for line in ordered if _origin(line) == _origin(ordered[-1])]
    keys = {line["variant"]: line["key"] for line in kept}
    found = {(line["variant"], line["seed"]): line for line in kept if line["key"] == keys[line["variant"]]}
    return [found[at] for at in sorted(found)]


def same_origin(lines: Lines) -> list[Line]:
    """Return the lines of one task that have the teacher's settings and the data of the last finished one."""
    ordered = sorted(lines, key=lambda line: str(line["finished"]))
    return [line for line in ordered if _origin(line) == _origin(ordered[-1])]


def _origin(line: Line) -> tuple[Any, ...]:
    return line["recipe"]["teacher"], line["recipe"]["data"], line["held_out"], smooths(line)


def smooths(line: Line) -> bool:
    """Say whether the line's int8 was made by an export that smooths what stands out; older ones lose more."""
    return "smoothed_activations" in line.get("int8", {})


def row_values(line: Line, statistic: str, *, model: str = "torch") -> Matrix:
    """Return (n,) values by dev row: 1 where right ("accuracy") or as the teacher ("agreement"), else 0; the "kl" in nats."""
    values = line["models"][model][ROWS[statistic]]
    if isinstance(values, str):
        return np.frombuffer(values.encode(), dtype=np.uint8).astype(np.float64) - ord("0")
    return np.array(values, dtype=np.float64)


def paired_lines(ours: Lines, theirs: Lines) -> list[tuple[Line, Line]]:
    """Return the lines of either side that have seed, teacher's weights and start in common, in the order of seeds.

    Raises:
        ValueError: they are not of one grid and task.
    """
    if len({(line["grid"], line["task"]) for line in (*ours, *theirs)}) > 1:
        raise ValueError("pairs are of one grid and task")
    left, right = ({line["seed"]: line for line in side} for side in (ours, theirs))
    pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
    return [(one, other) for one, other in pairs if weights_around(one) == weights_around(other)]


def weights_around(line: Line) -> tuple[str, str | None]:
    """Return the hashes of the teacher's weights and of the checkpoint that the student started from, if any."""
    return line["sha256"]["teacher"], line["sha256"].get("start")


def _values(sides: Sides, statistic: str, *, model: str) -> Matrix | None:
    """Return (2, S, n) values of the pairs, or None without any."""
    pairs = paired_lines(*sides)
    if not pairs:
        return None
    return np.array([[row_values(pair[side], statistic, model=model) for pair in pairs] for side in (0, 1)])


@lru_cache(maxsize=8)
def _weights(rows: int, seeds: int, stream: int) -> tuple[Matrix, Matrix]:
    """Return what each row (R, n) and each seed (R, S) weighs in every draw; a draw's weights sum to 1."""
    generator = np.random.default_rng([SEED, stream])
    return _shares(generator, rows), _shares(generator, seeds)


def _shares(generator: np.random.Generator, amount: int) -> Matrix:
    chosen = generator.integers(amount, size=(RESAMPLES, amount)) + amount * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=RESAMPLES * amount)
    return counts.reshape(RESAMPLES, amount) / amount


def _draws(values: Matrix, *, stream: int = 0) -> Matrix:
    """Return (2, R) means of both sides (2, S, n) on the same resampled rows and seeds; each stream has draws of its own."""
    rows, seeds = _weights(values.shape[2], values.shape[1], stream)
    found: Matrix = np.einsum("rs,ksr->kr", seeds, values @ rows.T)
    return found


def difference(ours: Lines, theirs: Lines, statistic: str, *, model: str = "torch") -> Estimate | None:
    """Return how much higher `ours` are than `theirs` on one task, or None without a pair.

    Args:
        ours: lines of one variant.
        theirs: lines of the other; seeds of one side only are left out.
        statistic: key of `ROWS`.
        model: "torch" or a graph's name.
    """
    return pooled_difference([(ours, theirs)], statistic, model=model)


def pooled_difference(tasks: Sequence[Sides], statistic: str, *, model: str = "torch") -> Estimate | None:
    """Return the mean over tasks of their differences; tasks without a pair are left out, None where all are."""
    found = [values for sides in tasks if (values := _values(sides, statistic, model=model)) is not None]
    if not found:
        return None
    drawn = [_draws(values, stream=stream) for stream, values in enumerate(found)]
    value = np.mean([values[0].mean() - values[1].mean() for values in found])
    return _estimate(float(value), np.mean([sides[0] - sides[1] for sides in drawn], axis=0), found)


def pooled_kl_ratio(tasks: Sequence[Sides], *, model: str = "torch") -> Estimate | None:
    """Return the geometric mean over tasks of mean divergences, ours / theirs; below 1 is nearer to the teacher.

    Tasks without a pair are left out. None where all are, or where a mean divergence is not above 0.
    """
    found = [values for sides in tasks if (values := _values(sides, "kl", model=model)) is not None]
    drawn = [_draws(values, stream=stream) for stream, values in enumerate(found)]
    means = [values.mean((1, 2)) for values in found]
    if not found or min(float(part.min()) for part in (*means, *drawn)) <= 0:
        return None
    value = np.mean([np.log(ours / theirs) for ours, theirs in means])
    return _estimate(float(np.exp(value)), np.exp(np.mean([np.log(ours / theirs) for ours, theirs in drawn], 0)), found)


def _estimate(value: float, draws: Matrix, found: Sequence[Matrix]) -> Estimate:
    return Estimate(value, *interval(draws), pairs=sum(values.shape[1] for values in found), tasks=len(found))


def pooled_mcnemar(tasks: Sequence[Sides], *, model: str = "torch") -> Counts | None:
    """Return McNemar's counts and p over rows, seeds and tasks, or None without a pair.

    A row counts once per seed. What several seeds make of one row is not independent, as the test takes it to be, so the p is
    rather too small: it describes, the intervals decide.
    """
    found = [values for sides in tasks if (values := _values(sides, "accuracy", model=model)) is not None]
    if not found:
        return None
    lost = sum(int((values[0] < values[1]).sum()) for values in found)
    gained = sum(int((values[0] > values[1]).sum()) for values in found)
    return Counts(lost, gained, mcnemar(lost, gained))


def metric_names(lines: Lines) -> list[str]:
    """Return the metrics of a task's lines, its main one first."""
    return list(lines[0]["models"]["torch"]["metrics"])


def score(line: Line, metric: str, *, model: str = "torch") -> float | None:
    """Return a metric, "agreement", "kl" or "teacher" metrics of a line, or None where it does not hold the model."""
    found = line["teacher"] if model == "teacher" else line["models"].get(model)
    if found is None:
        return None
    return float(found[metric] if metric in ("agreement", "kl") else found["metrics"][metric])


def mean_sd(lines: Lines, metric: str, *, model: str = "torch") -> tuple[float, float | None] | None:
    """Return mean and standard deviation (n - 1; None of one seed) over seeds, or None without values; see `score`."""
    values = [value for line in lines if (value := score(line, metric, model=model)) is not None]
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def retention(lines: Lines, metric: str, *, model: str = "int8") -> float | None:
    """Return the student's metric in percent of its teacher's, the mean over seeds.

    None without values, or where a teacher's is not above 0, which leaves no share to state.
    """
    pairs = [(score(line, metric, model=model), score(line, metric, model="teacher")) for line in lines]
    shares = [100 * own / whole for own, whole in pairs if own is not None and whole is not None and whole > 0]
    return float(np.mean(shares)) if shares and len(shares) == len(pairs) else None


def mean_over_tasks(tasks: Mapping[str, Lines], metrics: Mapping[str, str]) -> float:
    """Return the mean over tasks of the mean over lines of each task's metric in PyTorch.

    Args:
        tasks: a variant's lines by task, at least one each.
        metrics: metric by task.
    """
    return float(np.mean([np.mean([score(line, metrics[task]) for line in lines]) for task, lines in tasks.items()]))
