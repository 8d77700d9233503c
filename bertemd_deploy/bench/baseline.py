"""Is a student worse than it was: a record against an earlier one of the same task, device and way of measuring.

Compared are the student's graphs, each with itself and the one that is used by default with the one that was, in the
cells that the report compares models in, of those that both records have: p50 and p95 of the latency, throughput's
median at the larger batch, peak memory, size, and the first metric. A graph that is gone is worse than it was. Two runs
on one machine never agree exactly, so a change is a regression only where its whole interval lies beyond what such runs
differ by anyway:

    change of a latency   [new low / old high, new high / old low] of the two 95% intervals (or estimates' intervals)
    noise                 5 %, or what the teacher, which is the same in both, became slower by in that cell, if that is more

Memory is one number per run and has the same 5 %; a size has 1 %; a score has the interval of a difference of two shares of
the evaluated examples (of two correlations, for those).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.bench.statistics import summarize
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.report.reading import check_schema
from bertemd_deploy.report.records import REPLAY, Cell, Record, Span, Variant
from bertemd_deploy.report.summary import Comparison, compare
from bertemd_deploy.report.text import dig, megabytes, milliseconds, number, points, ratio, score

NOISE = 0.05  # relative; what medians of two undisturbed runs on one machine differ by
SIZE_NOISE = 0.01  # a file's size does not vary, but a version number in it does
_Z95 = 1.96
_CORRELATIONS = ("matthews", "pearson", "spearman")


@dataclass(frozen=True)
class Regression:
    """One number that is worse than it was.

    Attributes:
        model: label of the graph.
        what: which number, in words.
        before, after: in the unit that `words` states; None, with the next four, for a model that fails or is missing now.
        change: how many times as much (latency, memory, size), or the difference (a score).
        low, high: interval of the change.
        noise: what the change has to lie beyond.
        words: all of it in a sentence.
    """

    model: str
    what: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    noise: float | None
    words: str


def compare_baseline(
    record: Mapping[str, Any], baseline: Mapping[str, Any], *, where: str = "baseline"
) -> list[Regression]:
    """Return in what a record is worse than its baseline, by graph; an empty list where it is in nothing.

    Args:
        record: a bench record.
        baseline: an earlier one.
        where: what to call the baseline in messages.

    Raises:
        ArtifactError: the baseline is of another schema version, task or device, or its numbers were got in another way, or no
            latency of the one can be held against one of the other.
    """
    check_schema(baseline, where=where)
    check_schema(record, where="the record")
    for what, mine, theirs in _must_agree(record, baseline):
        if mine != theirs:
            raise ArtifactError(
                f"{where}: its {what} is {theirs!r}, that of the record is {mine!r}. A baseline is an earlier record of the "
                "same task on the same device, got in the same way; name that one."
            )
    both = Record(record, "new"), Record(baseline, "old")
    shared = _timed_cells(both[0]) & _timed_cells(both[1])
    new, old = (compare(one, among=shared) for one in both)
    pairs = _pairs(new, old)
    found = _gone(new, old)
    for pair in pairs:
        found += _slower(pair, new, old)
        found += _larger(pair, new, old)
        found += _less_exact(pair, new, old)
    nothing_runs = bool(found) and not _timed_cells(both[0])  # said already, and worse than any latency
    if not nothing_runs and not any(_times(pair, *place, new, old) for pair in pairs for place in _statistics(new)):
        why = (
            "where both were measured a latency lacks its interval" if shared else "no graph was measured alike in both"
        )
        raise ArtifactError(
            f"{where}: no latency can be compared, {why}. The record has {_settings(both[0])}; the baseline has "
            f"{_settings(both[1])}. Measure with the settings of the baseline, or make a new baseline."
        )
    return found


@dataclass(frozen=True)
class _Pair:
    """A graph of the record, and the graph of the baseline that it is held against."""

    now: Variant
    was: Variant

    @property
    def label(self) -> str:
        """What to call it: by its graph, or as what is used by default where that is another graph now."""
        return self.now.label if self.now == self.was else f"the default graph ({self.now.label}, was {self.was.label})"

    @property
    def model(self) -> str:
        """The label of a regression."""
        return self.now.label if self.now == self.was else f"{self.now.label}, was {self.was.label}"


def _pairs(new: Comparison, old: Comparison) -> list[_Pair]:
    """Return what is held against what: each student graph of both, and the default where that is another one now."""
    pairs = [
        _Pair(row.variant, row.variant)
        for row in new.rows
        if not row.variant.is_teacher and old.row(row.variant) is not None
    ]
    now, was = new.record.default, old.record.default
    return pairs + ([_Pair(now, was)] if now is not None and was is not None and now != was else [])


def _timed_cells(record: Record) -> set[Cell]:
    """Return the cells in which a student has a latency."""
    return {
        cell for variant, cell in record.cells if not variant.is_teacher and record.latency(variant, cell) is not None
    }


def _settings(record: Record) -> str:
    """Return the cells of a record in words."""
    cells = _timed_cells(record)
    if not cells:
        return "none"
    lengths = {cell.sequence for cell in cells}
    said: list[tuple[str, Sequence[int | str]]] = [
        ("batch", sorted({cell.batch for cell in cells})),
        ("length", [*sorted(length for length in lengths if isinstance(length, int)), *lengths & {REPLAY}]),
        ("threads", sorted({cell.threads for cell in cells})),
    ]
    graphs = [variant.label for variant in record.variants if not variant.is_teacher]
    return ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in said) + f" ({', '.join(graphs)})"


def _must_agree(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    places = {
        "task": ("artifact", "task", "name"),
        "device": ("device", "name"),
        "kind of numbers": ("device", "kind"),
        "processor": ("device", "cpu"),
    }
    return [(what, dig(record, *keys), dig(baseline, *keys)) for what, keys in places.items()]


def baseline_entry(
    record: Mapping[str, Any], baseline: Mapping[str, Any], *, where: str = "baseline"
) -> dict[str, Any]:
    """Return what a record keeps of its baseline as `against_baseline`: when that `started`, and the `regressions`.

    Raises:
        ArtifactError: as `compare_baseline`.
    """
    found = compare_baseline(record, baseline, where=where)
    return {"started": baseline.get("started"), "regressions": [dataclasses.asdict(one) for one in found]}


def with_baseline(
    records: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any], *, where: str
) -> list[dict[str, Any]]:
    """Return the records, those of the baseline's device with `against_baseline`.

    Where several students were measured there and one is of the baseline's sizes, it alone is compared.

    Raises:
        ArtifactError: none of them is of that device, or the baseline does not fit the one that is.
    """
    there, student = _place(baseline), dig(baseline, "artifact", "student")
    chosen = [at for at, record in enumerate(records) if _place(record) == there]
    if not chosen:
        known = "; ".join(dict.fromkeys(f"{name} ({kind})" for name, kind in map(_place, records)))
        raise ArtifactError(
            f"{where}: is of the device {there[0]} ({there[1]}), the records are of {known}. Name a baseline of one of these."
        )
    chosen = [at for at in chosen if dig(records[at], "artifact", "student") == student] or chosen
    return [
        dict(record) | ({"against_baseline": baseline_entry(record, baseline, where=where)} if at in chosen else {})
        for at, record in enumerate(records)
    ]


def _place(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return dig(record, "device", "name"), dig(record, "device", "kind")


def _gone(new: Comparison, old: Comparison) -> list[Regression]:
    """Return the graphs that could be measured and now cannot, or are not in the record at all."""
    found = []
    for row in old.rows:
        variant = row.variant
        if variant.is_teacher or variant in old.record.failures:
            continue
        if (failure := new.record.failures.get(variant)) is not None:
            what = "whether it runs"
            words = f"{variant.label} was measured in the baseline and now could not be: {failure.reason}."
        elif new.row(variant) is None:
            what = "whether it is there"
            words = f"{variant.label} is in the baseline and missing from the record: export and measure it as well."
        else:
            continue
        found.append(Regression(variant.label, what, None, None, None, None, None, None, words))
    return found


def _statistics(new: Comparison) -> list[tuple[Cell | None, str]]:
    """Return the cells and statistics of the latency that are compared."""
    return [(new.cell, "p50"), (new.cell, "p95"), (new.batch_cell, "p50")]


def _times(
    pair: _Pair, cell: Cell | None, statistic: str, new: Comparison, old: Comparison
) -> tuple[tuple[float, Span], tuple[float, Span]] | None:
    """Return a statistic of the latency as it was and as it is, each with its interval; None where one is not known."""
    was, now = _timed(old.record, pair.was, cell, statistic), _timed(new.record, pair.now, cell, statistic)
    return None if was is None or now is None else (was, now)


def _slower(pair: _Pair, new: Comparison, old: Comparison) -> list[Regression]:
    """Return what became slower of one graph, in the cells that are compared."""
    found = []
    for cell, statistic in _statistics(new):
        times = _times(pair, cell, statistic, new, old)
        if cell is None or times is None:
            continue
        (was, was_span), (now, now_span) = times
        low, high = now_span.low / was_span.high, now_span.high / was_span.low
        noise = max(NOISE, _drift(new, old, cell))
        if low <= 1 + noise:
            continue
        how = "estimate " if new.record.estimated else ""
        words = (
            f"{statistic} of {pair.label} ({cell.label}) is {how}{milliseconds(now)}, was {milliseconds(was)}: "
            f"{ratio(now / was)} as long (interval {ratio(low)} to {ratio(high)}, noise up to {ratio(1 + noise)})."
        )
        found.append(Regression(pair.model, f"{statistic}, {cell.label}", was, now, now / was, low, high, noise, words))
    return found


def _timed(record: Record, variant: Variant, cell: Cell | None, statistic: str) -> tuple[float, Span] | None:
    """Return a statistic of the latency with its interval, or None where there is no interval above 0."""
    value = record.latency(variant, cell, statistic)
    span = record.interval(variant, cell, statistic) or _resampled(record, variant, cell, statistic)
    return None if value is None or span is None or min(value, span.low) <= 0 else (value, span)


def _resampled(record: Record, variant: Variant, cell: Cell | None, statistic: str) -> Span | None:
    """Return the interval from the samples, for a record written before it held intervals."""
    latency = dig(record.cells.get((variant, cell)) if cell else None, "latency_ms")
    samples, sizes = dig(latency, "samples"), dig(latency, "samples_per_round")
    if record.estimated or not isinstance(samples, list) or not isinstance(sizes, list):
        return None
    values, counts = [number(value) for value in samples], [number(size) for size in sizes]
    known = [value for value in values if value is not None and value >= 0]
    whole = [int(size) for size in counts if size is not None and size >= 1]
    if not known or len(known) != len(samples) or len(whole) != len(sizes) or sum(whole) != len(known):
        return None
    ends = list(itertools.accumulate(whole))
    rounds = [known[end - size : end] for end, size in zip(ends, whole, strict=True)]
    return Span.of(summarize(rounds)[f"{statistic}_ci95"])


def _drift(new: Comparison, old: Comparison, cell: Cell) -> float:
    """Return how much slower the teacher became, as a share; 0 where it did not, is another one, or was not measured."""
    teacher = new.record.teacher
    hashes = [dig(side.record.artifact, "teacher", "sha256") for side in (new, old)]
    if new.record.estimated or teacher is None or hashes[0] is None or hashes[0] != hashes[1]:
        return 0.0
    now, was = (side.record.latency(teacher, cell) for side in (new, old))
    return max(0.0, now / was - 1) if now and was else 0.0


def _larger(pair: _Pair, new: Comparison, old: Comparison) -> list[Regression]:
    """Return whether one graph's memory or file became larger."""
    now, was = new.row(pair.now), old.row(pair.was)
    if now is None or was is None:
        return []
    sizes = (
        ("peak memory", was.peak_rss_bytes, was.peak_rss_interval, now.peak_rss_bytes, now.peak_rss_interval, NOISE),
        ("size", was.model_bytes, None, now.model_bytes, None, SIZE_NOISE),
    )
    found = []
    for what, before, before_span, after, after_span, noise in sizes:
        if not before or not after:
            continue
        low = (after_span.low if after_span else after) / (before_span.high if before_span else before)
        high = (after_span.high if after_span else after) / (
            before_span.low if before_span and before_span.low > 0 else before
        )
        if low <= 1 + noise:
            continue
        how = "estimate " if after_span else ""
        words = (
            f"{what} of {pair.label} is {how}{megabytes(after)}, was {megabytes(before)}: {ratio(after / before)} as much "
            f"(noise up to {ratio(1 + noise)})."
        )
        found.append(Regression(pair.model, what, before, after, after / before, low, high, noise, words))
    return found


def _less_exact(pair: _Pair, new: Comparison, old: Comparison) -> list[Regression]:
    """Return whether one graph's first metric fell by more than another choice of examples would make it fall."""
    now, was = new.row(pair.now), old.row(pair.was)
    metric = next(iter(new.record.metric_names), None)
    if now is None or was is None or metric is None:
        return []
    after, before = now.metrics.get(metric), was.metrics.get(metric)
    counts = [
        number(side.record.fact(variant, "evaluated_examples")) for side, variant in ((new, pair.now), (old, pair.was))
    ]
    if after is None or before is None or not counts[0] or not counts[1]:
        return []
    difference = after - before
    variance = sum(
        _variance(metric, value) / count for value, count in zip((after, before), counts, strict=True) if count
    )
    half = _Z95 * math.sqrt(variance)
    if difference + half >= 0:
        return []
    words = (
        f"{metric} of {pair.label} is {score(after)}, was {score(before)}: {points(difference)} points (95% interval "
        f"{points(difference - half)} to {points(difference + half)})."
    )
    return [Regression(pair.model, metric, before, after, difference, difference - half, difference + half, 0.0, words)]


def _variance(metric: str, value: float) -> float:
    """Return the variance of one example's share in a metric: of right and wrong, or of a correlation."""
    if metric in _CORRELATIONS:
        return (1 - min(1.0, value * value)) ** 2
    share = min(1.0, max(0.0, value))
    return share * (1 - share)
