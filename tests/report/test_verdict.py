from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_record import estimated, held

from bertemd_deploy.bench.statistics import summarize
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import Comparison, compare
from bertemd_deploy.report.verdict import excess_drop, quantization_verdict, remarks, runtime_verdict, verdict

FASTEST = "fused-int8"


def comparison_of(record: dict[str, Any]) -> Comparison:
    return compare(Record(record, "device"))


def compared_cell(record: dict[str, Any], model: str, backend: str, graph: str | None) -> dict[str, Any]:
    (entry,) = (
        entry
        for entry in record["measurements"]
        if (entry["model"], entry["backend"], entry["graph"]) == (model, backend, graph)
        and (entry["batch"], entry["sequence"], entry["threads"]) == (1, "replay", 2)
    )
    return entry


def set_latency(entry: dict[str, Any], median: float) -> None:
    entry["latency_ms"] = summarize((median * np.linspace(0.98, 1.02, 55).reshape(5, 11)).tolist())


def set_speedup(record: dict[str, Any], p50: float, low: float, high: float, *, claimed: bool) -> None:
    entry = compared_cell(record, "student", "onnxruntime", FASTEST)
    entry["speedup_vs_teacher"] = {"p50": p50, "ci95": [low, high], "claimed": claimed}


@pytest.fixture
def exact(record) -> dict[str, Any]:
    """A record whose compared cell holds round numbers."""
    set_latency(compared_cell(record, "teacher", "pytorch", None), 44.0)
    set_latency(compared_cell(record, "teacher", "onnxruntime", "fp32"), 31.0)
    set_latency(compared_cell(record, "student", "onnxruntime", "fused"), 6.2)
    set_latency(compared_cell(record, "student", "onnxruntime", FASTEST), 3.1)
    set_speedup(record, 14.2, 13.9, 14.6, claimed=True)
    return record


def test_verdict_states_the_measured_facts(exact) -> None:
    assert verdict(comparison_of(exact)) == (
        "On this 2-core AMD EPYC, the 4-layer int8 student keeps 98.7% of the teacher's accuracy (0.941 of 0.953) and "
        "answers 14.2× faster (p50 3.10 ms instead of the teacher's 44.0 ms in PyTorch, batch 1, replay of real lengths, "
        "2 threads), in 15 MB instead of 438 MB."
    )


def test_interval_over_1_claims_nothing(exact) -> None:
    set_speedup(exact, 1.03, 0.97, 1.08, claimed=False)
    said = verdict(comparison_of(exact))
    assert "is not claimed to be faster, for the 95% interval of the ratio, 0.97× to 1.08×, covers 1" in said
    assert "× faster" not in said


def test_speed_up_on_a_disturbed_machine_is_not_claimed(exact) -> None:
    set_speedup(exact, 1.5, 1.4, 1.6, claimed=False)
    comparison = comparison_of(exact)
    reason = "not claimed to be faster, for other programs took CPU time meanwhile (95% interval of the ratio 1.40× to 1.60×)"
    assert reason in verdict(comparison)
    for said in (runtime_verdict(comparison), quantization_verdict(comparison)):
        assert said is not None
        assert "not claimed to be faster" in said
        assert "for other programs took CPU time meanwhile" in said


def test_slower_is_said(exact) -> None:
    set_speedup(exact, 0.5, 0.48, 0.52, claimed=False)
    assert "answers 2.0× slower (p50 3.10 ms" in verdict(comparison_of(exact))


def test_no_interval_no_claim(exact) -> None:
    compared_cell(exact, "student", "onnxruntime", FASTEST)["speedup_vs_teacher"] = {
        "p50": 14.2, "ci95": None, "claimed": False,
    }  # fmt: skip
    assert "no interval, no claim" in verdict(comparison_of(exact))


def test_student_above_the_teacher(exact) -> None:
    next(entry for entry in exact["models"] if entry["graph"] == FASTEST)["metrics"]["accuracy"] = 0.962
    assert "student reaches 100.9% of the teacher's accuracy (0.962 of 0.953)" in verdict(comparison_of(exact))


def test_teacher_score_of_zero_gives_no_share(exact) -> None:
    exact["models"][0]["metrics"]["accuracy"] = 0.0
    assert "student scores 0.941 accuracy (teacher 0.000)" in verdict(comparison_of(exact))


def test_drop_beyond_the_allowed_is_said(exact) -> None:
    assert excess_drop(comparison_of(exact)) is None
    next(entry for entry in exact["models"] if entry["graph"] == FASTEST)["metrics"]["accuracy"] = 0.913
    assert verdict(comparison_of(exact)).endswith(
        "; its accuracy is 3.1 points below the fp32 student, more than the 1 allowed."
    )


def test_no_teacher(bare) -> None:
    said = verdict(comparison_of(bare))
    assert "scores 0.941 accuracy (teacher not measured here, 0.951 by the artifact)" in said
    assert "faster" not in said
    assert "instead" not in said


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("measured", "On this 2-core AMD EPYC, "),
        ("constrained", "On this AMD EPYC, held to the limits of pi (constrained), "),
        ("remote", "On the 2-core AMD EPYC of pi (remote), "),
        ("estimated", "Estimated, not measured, for the 2-core AMD EPYC of pi, "),
    ],
)
def test_kind_of_device_is_said(exact, kind, start) -> None:
    exact["device"] |= {"kind": kind, "name": "pi"}
    assert verdict(comparison_of(exact)).startswith(start)


def test_an_estimate_is_never_said_without_its_interval(exact) -> None:
    comparison = comparison_of(estimated(exact, factor=10.0))
    said = verdict(comparison)
    assert (
        "is estimated to answer in 31.0 ms (21.7–46.5 ms) (p50 and its interval, batch 1, replay of real lengths, "
        "2 threads), an estimate of 14.2× (8.5× to 22.7×) the teacher's speed in PyTorch, in 15 MB instead of 438 MB."
        in said
    )
    assert "faster" not in said
    assert not comparison.disturbed
    int8 = quantization_verdict(comparison)
    assert int8 is not None
    assert (
        "whether int8 is faster than fp32 there is open, for the intervals of the two overlap (estimates 31.0 ms"
        in int8
    )
    assert runtime_verdict(comparison) is None


def test_estimates_far_apart_are_called_faster_or_slower(exact) -> None:
    guessed = estimated(exact, factor=10.0)
    entry = compared_cell(guessed, "student", "onnxruntime", FASTEST)
    entry["estimate_ms"] |= {"low": 10.0, "high": 40.0}
    said = quantization_verdict(comparison_of(guessed))
    assert said is not None
    assert "int8 is estimated to be faster than fp32 there" in said
    entry["estimate_ms"] |= {"low": 100.0, "high": 400.0}
    said = quantization_verdict(comparison_of(guessed))
    assert said is not None
    assert "int8 is estimated to be slower than fp32 there" in said


def test_an_estimate_without_an_interval_is_not_stated(exact) -> None:
    guessed = estimated(exact)
    for entry in guessed["measurements"]:
        del entry["estimate_ms"]
    assert " ms" not in verdict(comparison_of(guessed))
    assert quantization_verdict(comparison_of(guessed)) is None


def test_a_student_that_does_not_fit_is_said_so(exact) -> None:
    exact["measurements"] = []
    for entry in exact["models"]:
        entry["failed"] = {"reason": "out of memory"}
    said = verdict(comparison_of(exact))
    assert said == "On this 2-core AMD EPYC, no student was measured (out of memory)."


def test_remarks_tell_of_failures_and_noise(exact) -> None:
    exact["noise"] = {"noisy": True, "reasons": ["throttled", "drift of 8 %"]}
    found = remarks(comparison_of(held(exact)))
    assert "Teacher, PyTorch: not measured, out of memory; it does not fit in 512 MB (it had reached 511 MB)." in found
    assert found[-1] == "Noisy measurement: throttled; drift of 8 %. Measure again on an idle machine."


def test_nothing_measured(exact) -> None:
    assert verdict(comparison_of(exact | {"measurements": [], "models": []})) == (
        "On this 2-core AMD EPYC, no student was measured."
    )


def test_same_runtime_tells_the_model_from_the_runtime(exact) -> None:
    said = runtime_verdict(comparison_of(exact))
    assert said is not None
    assert said.startswith(
        "Same runtime: against the teacher exported to ONNX Runtime, it is 10.0× faster (p50 3.10 ms against 31.0 ms; 95%"
    )


def test_same_runtime_is_silent_without_a_second_teacher(exact) -> None:
    exact["measurements"] = [entry for entry in exact["measurements"] if entry["backend"] != "pytorch"]
    exact["models"] = [entry for entry in exact["models"] if entry["backend"] != "pytorch"]
    assert runtime_verdict(comparison_of(exact)) is None


def test_int8_faster(exact) -> None:
    said = quantization_verdict(comparison_of(exact))
    assert said is not None
    assert said.startswith("Quantization: int8 is 2.0× faster than fp32 here (p50 3.10 ms against 6.20 ms, batch 1")
    assert said.endswith("changes accuracy by −0.3 points. This CPU multiplies 8-bit integers directly (AVX-512 VNNI).")


def test_int8_slower_without_dot_product(exact) -> None:
    set_latency(compared_cell(exact, "student", "onnxruntime", FASTEST), 12.4)
    exact["device"]["isa"] = ["avx2"]
    said = quantization_verdict(comparison_of(exact))
    assert said is not None
    assert "int8 is 2.0× slower than fp32 here" in said
    assert said.endswith(
        "This CPU has no 8-bit dot product (VNNI, AMX or Arm dot product), so int8 has little to gain here."
    )


def test_int8_the_same(exact) -> None:
    set_latency(compared_cell(exact, "student", "onnxruntime", FASTEST), 6.2)
    said = quantization_verdict(comparison_of(exact))
    assert said is not None
    assert (
        "int8 is not claimed to be faster than fp32 here, for the 95% interval of the ratio, 1.00× to 1.00×, covers 1"
        in said
    )
    assert said.endswith("quantizing the activations of short inputs can cost as much as that saves.")


def test_int8_without_samples_is_not_judged(exact) -> None:
    compared_cell(exact, "student", "onnxruntime", FASTEST)["latency_ms"]["samples"] = None
    said = quantization_verdict(comparison_of(exact))
    assert said is not None
    assert "int8 is not judged against fp32, for want of samples" in said


def test_unknown_instruction_sets_give_no_reason(exact) -> None:
    exact["device"]["isa"] = None
    said = quantization_verdict(comparison_of(exact))
    assert said is not None
    assert said.endswith("points.")


def test_no_int8_no_quantization_verdict(exact) -> None:
    exact["measurements"] = [entry for entry in exact["measurements"] if entry["precision"] == "fp32"]
    assert quantization_verdict(comparison_of(exact)) is None
