"""What the measurements say, in sentences: the verdict, what the runtime gave, and whether int8 paid.

A ratio of latencies is called faster or slower where its 95% interval excludes 1, and nothing is claimed where the interval
covers 1 or is absent. Of an estimate every number is called so and stands beside its interval.
"""

from __future__ import annotations

import itertools

from bertemd_deploy.bench.statistics import speedup
from bertemd_deploy.report.gates import baseline_sentence, budget_sentence
from bertemd_deploy.report.kinds import failure_sentences, missing, noise_sentence, place
from bertemd_deploy.report.records import Cell, Record, Variant
from bertemd_deploy.report.summary import Comparison, Ratio, Row
from bertemd_deploy.report.text import (
    NOT_MEASURED,
    between,
    dig,
    megabytes,
    milliseconds,
    number,
    percent,
    points,
    ratio,
    score,
)

# CPU features that multiply 8-bit integers four at a time; without one, int8 is emulated with 16-bit products.
INT8_FEATURES = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX int8",
    "asimddp": "Arm dot product",
    "i8mm": "Arm int8 matrix multiply",
}


def verdict(comparison: Comparison) -> str:
    """Return what was gained and lost on one device, in one sentence."""
    record, student, teacher = comparison.record, comparison.student, comparison.teacher
    if student is None:
        why = missing(record)
        return f"{place(record)}, no student was measured{'' if why == NOT_MEASURED else f' ({why})'}."
    layers = number(dig(record.artifact, "student", "layers"))
    name = f"the {int(layers)}-layer " if layers else "the "
    speed = _estimated_speed if record.estimated else _speed
    facts = [_score_kept(record, student, teacher), speed(comparison, student, teacher)]
    said = [fact for fact in facts if fact]
    if not said:
        said = ["was estimated" if record.estimated else "was measured"]
    sentence = f"{place(record)}, {name}{student.variant.precision} student {' and '.join(said)}"
    if student.model_bytes is not None:
        sentence += f", in {megabytes(student.model_bytes)}"
        if teacher is not None and teacher.model_bytes is not None:
            sentence += f" instead of {megabytes(teacher.model_bytes)}"
    loss = excess_drop(comparison)
    return sentence + (f"; {loss}" if loss else "") + "."


def _score_kept(record: Record, student: Row, teacher: Row | None) -> str | None:
    name = next(iter(record.metric_names), None)
    own = student.metrics.get(name) if name else None
    if name is None or own is None:
        return None
    reference = teacher.metrics.get(name) if teacher else None
    if reference is None:
        stated = number(dig(record.artifact, "metrics", "teacher", name))
        said = NOT_MEASURED if stated is None else f"{NOT_MEASURED} here, {score(stated)} by the artifact"
        return f"scores {score(own)} {name} (teacher {said})"
    if student.retention is None:
        return f"scores {score(own)} {name} (teacher {score(reference)})"
    verb = "keeps" if student.retention <= 1 else "reaches"
    return f"{verb} {percent(student.retention)} of the teacher's {name} ({score(own)} of {score(reference)})"


def _speed(comparison: Comparison, student: Row, teacher: Row | None) -> str | None:
    if student.p50_ms is None or comparison.cell is None:
        return None
    own, where = f"p50 {milliseconds(student.p50_ms)}", comparison.cell.label
    if teacher is None or teacher.p50_ms is None:
        return f"answers in {milliseconds(student.p50_ms)} (p50, {where})"
    both = f"{own} instead of the teacher's {milliseconds(teacher.p50_ms)} in {teacher.variant.runtime}, {where}"
    gain = student.speedup
    if gain is None:
        return f"answers in {own} against the teacher's {milliseconds(teacher.p50_ms)} ({where}; no interval, no claim)"
    if gain.outcome == "faster":
        return f"answers {ratio(gain.value)} faster ({both})"
    if gain.outcome == "slower":
        return f"answers {ratio(gain.inverse.value)} slower ({both})"
    return f"is not claimed to be faster, for {_reason(gain)} ({both})"


def _estimated_speed(comparison: Comparison, student: Row, teacher: Row | None) -> str | None:
    if student.p50_ms is None or student.p50_interval is None or comparison.cell is None:
        return None
    said = f"is estimated to answer in {_estimate(student)} (p50 and its interval, {comparison.cell.label})"
    if student.speedup is not None and teacher is not None:
        gain = student.speedup
        said += (
            f", an estimate of {ratio(gain.value)} ({gain.interval}) the teacher's speed in {teacher.variant.runtime}"
        )
    return said


def _estimate(row: Row) -> str:
    interval = row.p50_interval
    return f"{milliseconds(row.p50_ms)} ({between(*interval, write=milliseconds)})" if interval else ""


def _reason(judged: Ratio) -> str:
    """Say why a ratio is not called a gain."""
    if judged.held_back:
        return f"other programs took CPU time meanwhile (95% interval of the ratio {judged.interval})"
    return f"the 95% interval of the ratio, {judged.interval}, covers 1"


def excess_drop(comparison: Comparison) -> str | None:
    """Say so when int8 loses more of the gating metric than the artifact was allowed to."""
    student, allowed = comparison.student, number(dig(comparison.record.artifact, "quantization", "max_drop"))
    drop = _int8_drop(comparison)
    if drop is None or allowed is None or student is None or student.variant.precision != "int8":
        return None
    name, change = drop
    if -100 * change <= allowed:
        return None
    return f"its {name} is {abs(100 * change):.1f} points below the fp32 student, more than the {allowed:g} allowed"


def _int8_drop(comparison: Comparison) -> tuple[str, float] | None:
    pair = _quantized_pair(comparison)
    name = next(iter(comparison.record.metric_names), None)
    if pair is None or name is None:
        return None
    full, quantized = pair[0].metrics.get(name), pair[1].metrics.get(name)
    return None if full is None or quantized is None else (name, quantized - full)


def _quantized_pair(comparison: Comparison) -> tuple[Row, Row] | None:
    for full_name, quantized_name in (("fused", "fused-int8"), ("fp32", "int8")):
        full, quantized = comparison.graph(full_name), comparison.graph(quantized_name)
        if full and quantized and full.p50_ms is not None and quantized.p50_ms is not None:
            return full, quantized
    return None


def remarks(comparison: Comparison) -> list[str]:
    """Return the sentences below the verdict: budget, baseline, what runtime and quantization gave, failures and noise."""
    record = comparison.record
    found = (
        budget_sentence(record),
        baseline_sentence(record),
        runtime_verdict(comparison),
        quantization_verdict(comparison),
        *failure_sentences(record),
        noise_sentence(record),
    )
    return [said for said in found if said]


def runtime_verdict(comparison: Comparison) -> str | None:
    """Return the speed-up over the teacher in the student's own runtime, where the main one is over PyTorch.

    It tells what the smaller model gains apart from what leaving PyTorch gains.
    """
    student, teacher = comparison.student, comparison.teacher
    other = next((row for row in comparison.rows if row.variant.is_teacher and row is not teacher), None)
    if student is None or other is None or student.p50_ms is None or other.p50_ms is None:
        return None
    if student.variant.backend != other.variant.backend:
        return None
    judged = _measured_ratio(comparison, other, student)
    if judged is None:
        return None
    numbers = f"p50 {milliseconds(student.p50_ms)} against {milliseconds(other.p50_ms)}"
    if judged.outcome == "same":
        said = f"it is not claimed to be faster, for {_reason(judged)} ({numbers})"
    else:
        shown = judged if judged.outcome == "faster" else judged.inverse
        said = f"it is {ratio(shown.value)} {judged.outcome} ({numbers}; 95% interval {shown.interval})"
    return f"Same runtime: against the teacher exported to {other.variant.runtime}, {said}."


def quantization_verdict(comparison: Comparison) -> str | None:
    """Return whether int8 is faster, the same or slower than fp32 on this device, what it costs, and why it may be so."""
    pair, cell = _quantized_pair(comparison), comparison.cell
    if pair is None or cell is None or pair[0].p50_ms is None or pair[1].p50_ms is None:
        return None
    full, quantized = pair
    if comparison.record.estimated:
        return _estimated_quantization(comparison, full, quantized)
    kind = "fused " if quantized.variant.graph == "fused-int8" else ""
    numbers = f"p50 {milliseconds(quantized.p50_ms)} against {milliseconds(full.p50_ms)}, {cell.label}"
    judged = _measured_ratio(comparison, full, quantized)
    if judged is None:
        outcome = f"int8 is not judged against fp32, for want of samples ({kind}graph, {numbers})"
    elif judged.outcome == "same":
        outcome = f"int8 is not claimed to be faster than fp32 here, for {_reason(judged)} ({numbers})"
    else:
        shown = judged if judged.outcome == "faster" else judged.inverse
        outcome = (
            f"int8 is {ratio(shown.value)} {judged.outcome} than fp32 here ({numbers}; 95% interval {shown.interval})"
        )
    drop = _int8_drop(comparison)
    cost = f", and changes {drop[0]} by {points(drop[1])} points" if drop else ""
    faster = judged is not None and judged.outcome == "faster"
    return f"Quantization: {outcome}{cost}. {_why(comparison.record, faster=faster)}".strip()


def _estimated_quantization(comparison: Comparison, full: Row, quantized: Row) -> str | None:
    before, after = full.p50_interval, quantized.p50_interval
    if before is None or after is None or comparison.cell is None:
        return None
    numbers = f"estimates {_estimate(quantized)} against {_estimate(full)}, {comparison.cell.label}"
    outcome = f"whether int8 is faster than fp32 there is open, for the intervals of the two overlap ({numbers})"
    if after.high < before.low:
        outcome = f"int8 is estimated to be faster than fp32 there ({numbers})"
    elif before.high < after.low:
        outcome = f"int8 is estimated to be slower than fp32 there ({numbers})"
    return f"Quantization: {outcome}. {_why(comparison.record, faster=after.high < before.low)}".strip()


def _why(record: Record, *, faster: bool) -> str:
    features = record.device.get("isa")
    if not isinstance(features, list):
        return ""
    found = [name for flag, name in INT8_FEATURES.items() if flag in features]
    if found:
        have = f"This CPU multiplies 8-bit integers directly ({', '.join(found)})"
        rest = "." if faster else "; quantizing the activations of short inputs can cost as much as that saves."
        return have + rest
    lack = "This CPU has no 8-bit dot product (VNNI, AMX or Arm dot product)"
    return lack + ("; the gain comes from smaller weights." if faster else ", so int8 has little to gain here.")


def _measured_ratio(comparison: Comparison, baseline: Row, candidate: Row) -> Ratio | None:
    """Ratio of two medians in the compared cell, judged from the recorded rounds as the speed-up over the teacher is."""
    if comparison.cell is None:
        return None
    slow, fast = (_rounds(comparison.record, row.variant, comparison.cell) for row in (baseline, candidate))
    if not slow or len(slow) != len(fast):
        return None
    found = speedup(slow, fast, seed=0)
    if found["ci95"] is None:
        return None
    low, high = found["ci95"]
    return Ratio(found["p50"], low, high, claimed=not comparison.disturbed)


def _rounds(record: Record, variant: Variant, cell: Cell) -> list[list[float]]:
    """The raw samples of one cell, split into rounds; empty where they were not kept whole."""
    latency = dig(record.cells.get((variant, cell)), "latency_ms")
    samples, sizes = dig(latency, "samples"), dig(latency, "samples_per_round")
    if not isinstance(samples, list) or not isinstance(sizes, list):
        return []
    values = [value for value in map(number, samples) if value is not None and value > 0]
    counts = [int(size) for size in map(number, sizes) if size is not None and size >= 1]
    if len(values) != len(samples) or len(counts) != len(sizes) or sum(counts) != len(values):
        return []
    ends = list(itertools.accumulate(counts))
    return [values[end - size : end] for end, size in zip(ends, counts, strict=True)]
