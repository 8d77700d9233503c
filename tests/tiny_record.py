"""Bench records as `bertemd bench` writes them, from a seed: shapes and keys are real, numbers are made up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.bench.statistics import speedup, summarize

ROUNDS, SAMPLES = 5, 12
MB = 1_000_000
# model, backend, graph, precision -> ms at batch 1, 32 tokens, 1 thread; bytes; peak RSS; accuracy; agreement
MODELS: dict[tuple[str, str, str | None, str], tuple[float, int, int, float, float | None]] = {
    ("teacher", "pytorch", None, "fp32"): (44.0, 438 * MB, 1_130 * MB, 0.953, None),
    ("teacher", "onnxruntime", "fp32", "fp32"): (36.0, 438 * MB, 910 * MB, 0.953, 1.0),
    ("student", "onnxruntime", "fp32", "fp32"): (6.1, 58 * MB, 212 * MB, 0.944, 0.972),
    ("student", "onnxruntime", "int8", "int8"): (4.0, 15 * MB, 131 * MB, 0.940, 0.966),
    ("student", "onnxruntime", "fused", "fp32"): (5.2, 58 * MB, 205 * MB, 0.944, 0.972),
    ("student", "onnxruntime", "fused-int8", "int8"): (3.1, 15 * MB, 124 * MB, 0.941, 0.967),
}
LENGTHS = (16, 32, 64, 128)
STUDENTS = ("fp32", "int8", "fused", "fused-int8")


def _measurements(rng: np.random.Generator, factor: float, keys: list[tuple[str, str, str | None, str]]) -> list[Any]:
    found = []
    for threads in (1, 2):
        for batch in (1, 8):
            for sequence in (*LENGTHS, "replay"):
                tokens = 24 if sequence == "replay" else int(sequence)
                rounds = {}
                for key in keys:
                    base = factor * MODELS[key][0] * (0.25 + 0.75 * tokens / 32) * batch**0.9 / threads**0.75
                    rounds[key] = (base * rng.lognormal(0, 0.04, (ROUNDS, SAMPLES))).tolist()
                for key in keys:
                    latency = summarize(rounds[key])
                    compared = keys[0][0] == "teacher" and key != keys[0]
                    found.append(
                        dict(zip(("model", "backend", "graph", "precision"), key, strict=True))
                        | {
                            "model_bytes": MODELS[key][1],
                            "batch": batch,
                            "sequence": sequence,
                            "threads": threads,
                            "n": latency["n"],
                            "latency_ms": latency,
                            "end_to_end_ms": summarize((np.array(rounds[key]) + 0.2).tolist())
                            if sequence == "replay"
                            else None,
                            "throughput_per_s": 1000 * batch / latency["mean"],
                            "cold_start_ms": None,
                            "peak_rss_bytes": None,
                            "cpu_seconds_per_inference": threads * latency["mean"] / 1000,
                            "metric": MODELS[key][3],
                            "speedup_vs_teacher": speedup(rounds[keys[0]], rounds[key], seed=0) if compared else None,
                        }
                    )
    return found


def _models(keys: list[tuple[str, str, str | None, str]]) -> list[Any]:
    return [
        dict(zip(("model", "backend", "graph", "precision"), key, strict=True))
        | {
            "name": " ".join(filter(None, key)),
            "model_bytes": MODELS[key][1],
            "metrics": {"accuracy": MODELS[key][3], "f1": MODELS[key][3] - 0.02},
            "agreement_with_teacher": MODELS[key][4] if keys[0][0] == "teacher" else None,
            "evaluated_examples": 872,
            "cold_start_ms": {"import": 180.0, "load": MODELS[key][1] / MB, "first": 2 * MODELS[key][0], "n": 3},
            "peak_rss_bytes": MODELS[key][2],
        }
        for key in keys
    ]


def _flow(rng: np.random.Generator, rows: int, columns: int, *, noise: float) -> list[list[float]]:
    flow = np.zeros((rows, columns))
    for row in range(rows):
        flow[row, min(columns - 1, row * columns // rows)] = 1.0
    flow += noise * rng.random((rows, columns)) * (rng.random((rows, columns)) > 0.5)
    return (flow / flow.sum()).tolist()


def _distillation(rng: np.random.Generator, rows: int, columns: int) -> dict[str, Any]:
    def weights(size: int, share: float) -> list[float]:
        raw = 1 + share * np.sin(np.arange(size) * 1.7) * 0.5
        return (raw / raw.sum()).tolist()

    steps = list(range(10, 2010, 10))
    marginals = []
    for step in steps:
        share = step / steps[-1]
        teacher, student = weights(rows, share), weights(columns, share)
        marginals.append(
            {
                "step": step,
                "attention_teacher": teacher,
                "attention_student": student,
                "hidden_teacher": teacher,
                "hidden_student": student,
            }
        )
    return {
        "mapping": "emd",
        "teacher_layers": rows,
        "student_layers": columns,
        "epochs": 3,
        "steps": steps[-1],
        "seed": 7,
        "first": {
            "step": steps[0],
            "attention_flow": _flow(rng, rows, columns, noise=0.3),
            "hidden_flow": _flow(rng, rows, columns, noise=0.2),
        },
        "last": {
            "step": steps[-1],
            "attention_flow": _flow(rng, rows, columns, noise=0.8),
            "hidden_flow": _flow(rng, rows, columns, noise=0.6),
        },
        "marginals": marginals,
        "losses": [
            {
                "step": step,
                "total": 2 * np.exp(-step / 700) + 0.1,
                "prediction": 0.7 * np.exp(-step / 500) + 0.05,
                "embedding": 0.4 * np.exp(-step / 300) + 0.01,
                "attention": 40 * np.exp(-step / 900) + 3,
                "hidden": 5 * np.exp(-step / 800) + 0.4,
            }
            for step in steps
        ],
    }


def _trial(graph: str, *, per_channel: bool, metric: float) -> dict[str, Any]:
    drop = round(100 * (0.944 - metric), 6)
    return {
        "graph": graph,
        "per_channel": per_channel,
        "excluded": [],
        "metric": metric,
        "drop_points": drop,
        "passed": drop <= 1,
    }


def _invariance(scales: str, changed: float, allowed: float, difference: float) -> dict[str, Any]:
    ways = {"padded by 8 tokens": changed / 2, "with other batch mates": changed}
    return {
        "activation_scales": scales,
        "examples": 256,
        "decisions": 256,
        "max_abs_logit_difference": difference,
        "max_abs_logit_difference_allowed": None,
        "changed_decision_share": changed,
        "changed_decision_share_allowed": allowed,
        "changed_examples": {"count": 20} if changed else [],
        "arrangements": {
            name: {"max_abs_logit_difference": difference, "changed_decision_share": share, "changed_examples": []}
            for name, share in ways.items()
        },
    }


def _step(before: str, after: str, changed: int, lost: int, gained: int, p: float, difference: float) -> dict[str, Any]:
    return {
        "from": before,
        "to": after,
        "changed": changed,
        "right_to_right": 830 - lost,
        "right_to_wrong": lost,
        "wrong_to_right": gained,
        "wrong_to_same_wrong": 42 - gained,
        "wrong_to_other_wrong": 0,
        "mcnemar_p": p,
        "metric_differences": {
            "accuracy": {"difference": difference, "ci95": [difference - 0.006, difference + 0.004]},
            "f1": {"difference": difference / 2, "ci95": [difference / 2 - 0.005, difference / 2 + 0.005]},
        },
    }


def _churn() -> dict[str, Any]:
    roles = {"teacher": [1, 0.99], "student": [1, 0.81], "int8": [0, 0.52]}
    listed = [
        {
            "index": index,
            "text": f"a film of {index} hours",
            "text_pair": None,
            "gold": "positive",
            "decisions": {role: ("negative", "positive")[right] for role, (right, _) in roles.items()},
            "scores": {role: sure for role, (_, sure) in roles.items()},
            "right": {role: bool(right) for role, (right, _) in roles.items()},
            "changed": True,
        }
        for index in range(3, 163)
    ]
    return {
        "file": "churn.jsonl",
        "models": dict.fromkeys(roles, "name"),
        "unit": "example",
        "examples": 872,
        "changed": 160,
        "metrics": {},
        "right": {"teacher": 831, "student": 823, "int8": 821},
        "changed_beyond": None,
        "resamples": 1000,
        "steps": [
            _step("teacher", "student", 44, 26, 18, 0.291, -0.009),
            _step("student", "int8", 8, 5, 3, 0.7266, -0.002),
            _step("teacher", "int8", 48, 35, 13, 0.00021, -0.012),
        ],
        "listed": listed,
    }


def build_record(*, seed: int = 0, teacher: bool = True, factor: float = 1.0, layers: int = 12) -> dict[str, Any]:
    """Return a record of one device; `factor` scales every latency, `layers` is the teacher's depth."""
    rng = np.random.default_rng(seed)
    keys = [key for key in MODELS if teacher or key[0] == "student"]
    return {
        "schema_version": 1,
        "device": {
            "name": "AMD EPYC (2 cores, Linux x86_64)",
            "kind": "measured",
            "cpu": "AMD EPYC",
            "isa": ["avx", "avx2", "avx512f", "avx512_vnni"],
            "machine": "x86_64",
            "cores": 2,
            "threads": 4,
            "memory_bytes": 8_000_000_000,
            "governor": None,
            "frequency": {"current_mhz": 2250.0, "max_mhz": None},
            "container": {"cpu_quota": 2.0, "memory_limit_bytes": None},
            "limits": {"affinity": 4, "quota": 2.0, "physical": 2, "threads": 2},
        },
        "versions": {"bertemd": "0.1.0", "python": "3.11.9", "onnxruntime": "1.23.0", "torch": None},
        "started": "2026-03-04T05:06:07+00:00",
        "duration_seconds": 312.4,
        "conditions": {
            "before": {"load_1m": 0.1, "temperature_celsius": None},
            "after": {"load_1m": 1.9, "temperature_celsius": None},
        },
        "settings": {"rounds": ROUNDS, "seconds_per_cell": 0.4, "seed": 0},
        "notes": [],
        "baseline": "teacher pytorch fp32" if teacher else None,
        "artifact": {
            "task": {"name": "sst2", "kind": "classification", "metrics": ["accuracy", "f1"]},
            "labels": ["negative", "positive"],
            "max_length": 128,
            "student": {"layers": 4, "hidden": 312, "heads": 12, "intermediate": 1200, "parameters": 14_350_248},
            "teacher": {"name": "bert-base-sst2", "layers": layers, "sha256": "ab" * 32},
            "metrics": {"teacher": {"accuracy": 0.951, "f1": 0.93}},
            "parity": {
                "max_abs_logit_difference_allowed": 1e-3,
                "graphs": {
                    name: {
                        "max_abs_logit_difference": difference,
                        "decision_agreement": agreement,
                        "inputs": 264,
                        "beyond_tolerance": 0,
                        "single_rows": 8,
                        "shapes": [[1, 7], [16, 64]],
                    }
                    for name, difference, agreement in zip(
                        STUDENTS, (2.1e-6, 0.183, 3.4e-6, 0.201), (1.0, 0.988, 1.0, 0.986), strict=True
                    )
                },
            },
            "invariance": {
                "fp32": _invariance("float", 0.0, 0.0, 4.8e-7),
                "fused-int8": _invariance("per-tensor", 6 / 256, 0.05, 0.684),
            },
            "quantization": {
                "mode": "dynamic",
                "max_drop": 1.0,
                "activation_type": "QUInt8",
                "weight_type": "QInt8",
                "reduce_range": True,
                "per_channel": {"int8": True, "fused-int8": False},
                "operators": {"int8": {"count": 28}, "fused-int8": {"count": 24}},
                "excluded": {"int8": [], "fused-int8": []},
                "trials": [
                    _trial("int8", per_channel=False, metric=0.921),
                    _trial("int8", per_channel=True, metric=0.940),
                    _trial("fused-int8", per_channel=False, metric=0.941),
                ],
            },
            "files": {GRAPHS[name]: {"bytes": 1} for name in STUDENTS},
        },
        "distillation": _distillation(rng, layers, 4),
        "models": _models(keys),
        "churn": _churn() if teacher else None,
        "measurements": _measurements(rng, factor, keys),
    }


def in_use(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with what newer benchmarks add: paced requests, idle threads, arena, energy, whole cold starts."""
    record = copy.deepcopy(record)
    rng = np.random.default_rng(5)
    for entry in record["measurements"]:
        alone = 1.6 * entry["latency_ms"]["p50"] * rng.lognormal(0, 0.08, (1, 20))
        paced = entry["batch"] == 1 and entry["sequence"] in ("replay", 32)
        entry["paced_ms"] = {"interval_ms": 100.0, **summarize(alone.tolist())} if paced else None
        energy = 0.02 * entry["latency_ms"]["p50"] / 44
        entry["energy_joules_per_inference"] = {"value": energy, "source": "rapl:package-0"}
    for entry in record["models"]:
        entry["cold_start_ms"]["process"] = 60 + sum(
            entry["cold_start_ms"][part] for part in ("import", "load", "first")
        )
        entry["idle"] = {"spinning": {"cpu_seconds_per_second": 0.94}, "stopped": {"cpu_seconds_per_second": 0.002}}
        arena = {"peak_rss_bytes": entry["peak_rss_bytes"], "final_rss_bytes": 0.9 * entry["peak_rss_bytes"]}
        less = {name: 0.7 * value for name, value in arena.items()}
        entry["memory"] = (
            {"arena": arena, "no_arena": less, "requests": 65} if entry["backend"] == "onnxruntime" else None
        )
    during = {"frequency_mhz": {"min": 2100.0, "max": 2250.0}, "temperature_celsius": {"max": 71.0}, "throttled": False}
    record["conditions"]["during"] = during | {"throttle_count_delta": 0, "stolen_cpu_seconds": 0.0}
    record["noise"] = {"noisy": False, "reasons": []}
    return record


def held(record: dict[str, Any], *, name: str = "small-container") -> dict[str, Any]:
    """Return a record as if this machine had stood for a device in which the teacher does not fit."""
    record = copy.deepcopy(record)
    record["device"] |= {
        "name": name,
        "kind": "constrained",
        "target": "x86-avx2",
        "limited_to": {"cpus": 1, "cpu_share": None, "memory_bytes": 512 * MB},
        "row": {"name": name, "sources": [{"fact": "memory", "url": "https://example.org/box"}]},
        "confinement": {"cpus": "affinity", "cpu_share": "not limited", "memory": "cgroup"},
    }
    failed = {"reason": "out of memory", "limit_bytes": 512 * MB, "peak_bytes": 511 * MB}
    for entry in record["models"]:
        if entry["model"] == "teacher":
            entry |= {"failed": failed, "metrics": {}, "cold_start_ms": None, "peak_rss_bytes": None}
    record["measurements"] = [entry for entry in record["measurements"] if entry["model"] != "teacher"]
    for entry in record["measurements"]:
        entry["speedup_vs_teacher"] = None
    return record | {"baseline": None, "churn": None}


def estimated(record: dict[str, Any], *, name: str = "raspberry-pi-5", factor: float = 3.0) -> dict[str, Any]:
    """Return a record as if a device's numbers had been estimated."""
    record = copy.deepcopy(record)
    record["device"] = {
        "name": name,
        "kind": "estimated",
        "target": "arm64",
        "cpu": "Cortex-A76",
        "isa": ["asimd", "asimddp"],
        "cores": 4,
        "threads": 4,
        "memory_bytes": 8_000_000_000,
        "sources": [{"fact": "cores", "url": "https://example.org/a76"}],
    }
    for entry in record["measurements"]:
        p50 = factor * entry["latency_ms"]["p50"]
        entry["latency_ms"] = dict.fromkeys(entry["latency_ms"]) | {"p50": p50, "samples": []}
        entry["estimate_ms"] = {"p50": p50, "low": 0.7 * p50, "high": 1.5 * p50}
        entry |= dict.fromkeys(
            ("n", "end_to_end_ms", "throughput_per_s", "cpu_seconds_per_inference", "peak_rss_bytes")
        )
        if (gain := entry["speedup_vs_teacher"]) is not None:
            entry["speedup_vs_teacher"] = {
                "p50": gain["p50"],
                "ci95": [0.6 * gain["p50"], 1.6 * gain["p50"]],
                "claimed": False,
            }
    for entry in record["models"]:
        peak = entry["peak_rss_bytes"]
        entry["memory_estimate_bytes"] = {
            "value": peak,
            "low": 0.9 * peak,
            "high": 1.2 * peak,
            "how": "weights and arena",
        }
        entry |= dict.fromkeys(("peak_rss_bytes", "cold_start_ms"))
    record["estimate"] = {
        "scaled_by": {"clock": 0.9},
        "error": {"median": 0.09, "worst": 0.31, "n": 160},
        "words": "rates of another machine, scaled by clock and width.",
    }
    return record | {"churn": None}


def other_student(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of a second student of the same teacher: six layers, slower and better."""
    record = copy.deepcopy(record)
    record["artifact"]["student"] = {
        "layers": 6,
        "hidden": 768,
        "heads": 12,
        "intermediate": 3072,
        "parameters": 66_000_000,
    }
    for entry in record["measurements"]:
        if entry["model"] == "student":
            rounds = np.split(np.array(entry["latency_ms"]["samples"]) * 1.9, ROUNDS)
            entry["latency_ms"] = summarize([part.tolist() for part in rounds])
    for entry in record["models"]:
        if entry["model"] == "student":
            entry["metrics"] = {name: value + 0.006 for name, value in entry["metrics"].items()}
            entry["model_bytes"] = 4 * entry["model_bytes"]
    return record
