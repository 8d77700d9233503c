"""The bench record: what the passes found, stated as one JSON object that a report can be made from alone.

Units are in the names; a value that was not measured is None. A speed-up is against the model that `baseline` names and
`claimed` only if its whole interval lies above 1 and no other program took the CPUs it was measured on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.artifact import FASTEST_FIRST, NOT_SCORED, Artifact, DataSlice
from bertemd_deploy.bench import environment
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.passes import CellResult, Timing
from bertemd_deploy.bench.profiles import Profile
from bertemd_deploy.bench.statistics import speedup, summarize
from bertemd_deploy.churn import Churn, find_churn
from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.errors import MeasurementError, MemoryLimitError
from bertemd_deploy.metrics import evaluate_metrics

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

OUT_OF_MEMORY = "out of memory"
TEACHER_PARITY = 1e-2  # largest difference of the teacher's logits between PyTorch and its exported graph
LONG_LIST = 16
EXCERPT = (
    "task", "labels", "max_length", "student", "teacher", "metrics", "parity", "invariance", "quantization", "requires",
    "versions", "created", "commit",
)  # fmt: skip
MEASURED = (  # keys of a `models` entry that are None for a model that does not fit
    "metrics",
    "agreement_with_teacher",
    "evaluated_examples",
    "cold_start_ms",
    "peak_rss_bytes",
    "rss_after_import_bytes",
    "memory",
    "idle",
)
PACED_PERCENTILES = ("p50", "p90", "p95", "n", "samples")


@dataclass(frozen=True)
class Found:
    """What the passes found, by the models' names.

    Attributes:
        profiles: absent is a model that does not fit into memory.
        metrics: of the models that have a profile.
        failures: of the models that met their memory limit, before or while they were timed.
        results: by cell.
    """

    profiles: dict[str, Profile]
    metrics: dict[str, dict[str, float]]
    failures: dict[str, MemoryLimitError]
    results: list[CellResult]


def device_entry(device: Device | None, *, limits: Limits | None, found: Found) -> dict[str, Any]:
    """Return a record's `device`: this machine or, with limits, the place it stands in for.

    Args:
        device: the place; None is this machine.
        limits: what the models were confined to.
        found: what was measured.
    """
    facts = environment.device()
    if limits is not None:
        facts |= {
            "kind": "constrained",
            "host": {key: facts[key] for key in ("name", "cores", "threads", "memory_bytes")},
            "cores": limits.cpus or facts["cores"],
            "threads": limits.cpus or facts["threads"],
            "memory_bytes": limits.memory_bytes or facts["memory_bytes"],
            "limited_to": dataclasses.asdict(limits),
            "confinement": next((one.confinement for one in found.profiles.values()), None),
        }
    if device is not None:
        from bertemd_deploy.devices import device_record

        facts |= {"name": device.name, "target": device.target, "row": device_record(device)}
    return facts


def score(candidate: Candidate, measured: Profile, *, artifact: Artifact, part: DataSlice) -> dict[str, float]:
    """Return the task's metrics of one model.

    Raises:
        MeasurementError: its outputs are not finite.
    """
    try:
        return evaluate_metrics(artifact.metric_names, logits=measured.logits, part=part, label_names=artifact.labels)
    except ValueError as error:
        raise MeasurementError(
            f"bench, {candidate.name}: its outputs on the evaluation slice are not usable ({error}). Export it again."
        ) from error


def unmeasured_entry(candidate: Candidate) -> dict[str, Any]:
    """Return the `models` entry of a candidate of which nothing was measured: what it is, and None for the rest."""
    return {
        "name": candidate.name,
        "model": candidate.model,
        "backend": candidate.backend,
        "graph": candidate.graph,
        "precision": candidate.precision,
        "model_bytes": candidate.model_bytes,
        "layers": candidate.layers,
        "hidden": candidate.hidden,
        "parameters": candidate.parameters,
        **dict.fromkeys(MEASURED),
        "failed": None,
    }


def model_entries(candidates: Sequence[Candidate], found: Found, *, part: DataSlice) -> list[dict[str, Any]]:
    """Return one `models` entry per candidate: identity, size, metrics, memory, cold start, agreement, failure.

    Raises:
        MeasurementError: the teacher's exported graph is not the teacher.
    """
    profiles = found.profiles
    teachers = [one for one in candidates if one.model == "teacher" and one.name in profiles]
    reference = profiles[teachers[0].name].logits if teachers else None
    # The same weights in another file: what PyTorch counted holds for the graph as well.
    counts = [profiles[one.name].parameters for one in teachers]
    teacher_parameters = next((count for count in counts if count is not None), None)
    examples = len(part) if part.gold is None else len(part.gold.contexts)
    entries = []
    for candidate in candidates:
        entry = unmeasured_entry(candidate)
        entry["failed"] = _failure(found.failures.get(candidate.name))
        if candidate.model == "teacher":
            entry["parameters"] = teacher_parameters
        measured = profiles.get(candidate.name)
        if measured is not None:
            agreement = None
            if reference is not None and candidate is not teachers[0]:
                if candidate.model == "teacher":
                    _check_teacher_graph(reference, measured.logits)
                agreement = _agreement(reference, measured.logits, part=part)
            if candidate.model == "student":
                entry["parameters"] = measured.parameters
            entry |= {
                "metrics": found.metrics[candidate.name],
                "agreement_with_teacher": agreement,
                "evaluated_examples": examples,
                "cold_start_ms": measured.cold_start_ms,
                "peak_rss_bytes": measured.peak_rss_bytes,
                "rss_after_import_bytes": measured.rss_after_import_bytes,
                "memory": measured.memory,
                "idle": measured.idle,
            }
        entries.append(entry)
    return entries


def _failure(error: MemoryLimitError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"reason": OUT_OF_MEMORY, "limit_bytes": error.limit_bytes, "peak_bytes": error.peak_bytes}


def _agreement(reference: NDArray[np.float32], logits: NDArray[np.float32], *, part: DataSlice) -> float | None:
    """Return the share of decisions that are the teacher's (of scored tokens where each has one); None for regression."""
    if part.kind == "regression":
        return None
    same = same_decisions(part.kind, expected=reference, found=logits, offsets=part.examples.offsets)
    return float((same[part.labels != NOT_SCORED] if part.kind == "token-classification" else same).mean())


def _check_teacher_graph(torch_logits: NDArray[np.float32], graph_logits: NDArray[np.float32]) -> None:
    """Refuse to compare against an exported teacher that does not compute what the teacher does."""
    difference = float(np.abs(torch_logits - graph_logits).max())
    if not difference <= TEACHER_PARITY:
        raise MeasurementError(
            f"bench: the teacher's ONNX graph differs from PyTorch by {difference:.1e} on its logits (allowed "
            f"{TEACHER_PARITY:.0e}), so it is not the teacher. Check the versions of torch and onnxruntime."
        )


def changes(candidates: Sequence[Candidate], found: Found, *, artifact: Artifact, file: str) -> Churn | None:
    """Return what changed from teacher to student to int8, as far as these were measured; None of one model alone.

    Args:
        candidates: the models.
        found: what the passes found.
        artifact: whose evaluation slice was run.
        file: name of the list beside the record.
    """
    known = [candidate for candidate in candidates if candidate.name in found.profiles]
    chosen = _steps(known) if known else {}
    if len(chosen) < 2:
        return None
    churn = find_churn(
        {role: found.profiles[known[at].name].logits for role, at in chosen.items()},
        part=artifact.evaluation(),
        labels=artifact.labels,
        metrics=artifact.metric_names,
        tokenizer=Tokenizer.from_file(str(artifact.file("tokenizer.json"))),
    )
    names = {role: known[at].name for role, at in chosen.items()}
    return Churn({"file": file, "models": names} | churn.record, churn.lines)


def _steps(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Return the places of teacher, fp32 student and int8 student: the int8 graph used by default, and what it came from."""
    place = {candidate.graph: at for at, candidate in enumerate(candidates) if candidate.model == "student"}
    present = [graph for graph in FASTEST_FIRST if graph in place]
    quantized = next((graph for graph in present if candidates[place[graph]].precision == "int8"), None)
    full = [graph for graph in present if candidates[place[graph]].precision == "fp32"]
    full.sort(key=lambda graph: graph.startswith("fused") != (quantized or graph).startswith("fused"))
    chosen = {"teacher": 0} if candidates[0].model == "teacher" else {}
    chosen |= {"student": place[full[0]]} if full else {}
    return chosen | ({"int8": place[quantized]} if quantized else {})


def measurements(
    entries: Sequence[Mapping[str, Any]], found: Found, *, baseline: str | None, interval_ms: float, seed: int
) -> list[dict[str, Any]]:
    """Return one measurement per cell and model that was timed to the end.

    Args:
        entries: the `models` entries.
        found: what the passes found.
        baseline: the model that speed-ups are against, or None.
        interval_ms: between two paced requests.
        seed: of the bootstrap.
    """
    timed = [entry for entry in entries if entry["failed"] is None]
    return [
        _measurement(entry, result, baseline=baseline, interval_ms=interval_ms, seed=seed)
        for result in found.results
        for entry in timed
    ]


def _measurement(
    entry: Mapping[str, Any], result: CellResult, *, baseline: str | None, interval_ms: float, seed: int
) -> dict[str, Any]:
    name, cell = entry["name"], result.cell
    timing = result.alone[name]
    latency = summarize(timing.rounds, seed=seed)
    gain = None
    if baseline is not None and name != baseline:
        gain = speedup(result.alone[baseline].rounds, timing.rounds, seed=seed)
        gain["claimed"] = gain["claimed"] and not result.disturbed
    return {
        **{key: entry[key] for key in ("model", "backend", "graph", "precision", "model_bytes")},
        "batch": cell.batch,
        "sequence": cell.sequence,
        "threads": cell.threads,
        "n": latency["n"],
        "latency_ms": latency,
        "paced_ms": _paced(result.paced_ms[name], interval_ms=interval_ms) if result.paced_ms else None,
        "end_to_end_ms": summarize(result.whole[name].rounds, seed=seed) if result.whole else None,
        "throughput_per_s": 1000 * cell.batch / latency["mean"],
        "cold_start_ms": entry["cold_start_ms"],
        "peak_rss_bytes": entry["peak_rss_bytes"],
        "cpu_seconds_per_inference": timing.cpu_seconds / latency["n"],
        "energy_joules_per_inference": _energy(timing, source=result.energy_source, count=latency["n"]),
        "metric": next(iter(entry["metrics"].values())),
        "speedup_vs_teacher": gain,
        "warm_up": timing.warm_up,
        "other_cpus_busy": result.other_cpus_busy,
        "disturbed": result.disturbed,
    }


def _paced(samples_ms: Sequence[float], *, interval_ms: float) -> dict[str, Any]:
    """Return what is told of requests that came one by one; they have no rounds, and so no intervals."""
    summary = summarize([samples_ms])
    return {"interval_ms": interval_ms} | {key: summary[key] for key in PACED_PERCENTILES}


def _energy(timing: Timing, *, source: str | None, count: int) -> dict[str, Any] | None:
    """Return the energy of one call and where it was read, or None."""
    return None if timing.energy_joules is None else {"value": timing.energy_joules / count, "source": source}


def artifact_excerpt(artifact: Artifact) -> dict[str, Any]:
    """Return what a report tells about the artifact: parts of its manifest, long lists as counts, bytes per file."""
    excerpt = {key: _shortened(artifact.manifest.get(key)) for key in EXCERPT if key != "labels"}
    files = {name: entry.get("bytes") for name, entry in artifact.manifest["files"].items()}
    return excerpt | {"labels": artifact.labels, "files": files}


def _shortened(value: Any) -> Any:
    """Return `value` with each list of more than 16 names or numbers, at any depth, replaced by {"count": its length}."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        long = len(value) > LONG_LIST and not any(isinstance(item, dict | list) for item in value)
        return {"count": len(value)} if long else [_shortened(item) for item in value]
    return value
