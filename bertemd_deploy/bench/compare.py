"""The `bench` stage: run every pass for the teacher and the student's graphs, and state the result as one record.

The record holds everything a report needs, artifact and distillation included, so it can be carried from a device alone;
`churn.jsonl` beside it lists every dev example with what teacher, student and int8 decided.
Units are in the names; a value that was not measured is None. A speed-up is against the model that `baseline` names and
`claimed` only if its whole interval lies above 1 and no other program took the CPUs it was measured on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.artifact import FASTEST_FIRST, NOT_SCORED, SCHEMA_VERSION, Artifact, DataSlice
from bertemd_deploy.bench import environment
from bertemd_deploy.bench.candidates import Candidate, students, teachers
from bertemd_deploy.bench.passes import CellResult, Profile, profile, time_cells
from bertemd_deploy.bench.statistics import speedup, summarize
from bertemd_deploy.bench.workload import Cell, plan_cells
from bertemd_deploy.churn import Churn, find_churn
from bertemd_deploy.console import note, progress, warn
from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.files import claim_folder, write_json, write_text
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.runtime import CpuLimits, cpu_limits
from bertemd_deploy.settings import BenchSettings

RECORD = "record.json"
CHURN = "churn.jsonl"
TEACHER_PARITY = 1e-2  # largest difference of the teacher's logits between PyTorch and its exported graph
LONG_LIST = 16
EXCERPT = (
    "task", "labels", "max_length", "student", "teacher", "metrics", "parity", "invariance", "quantization", "requires",
    "versions", "created", "commit",
)  # fmt: skip


def bench(
    artifact: Path, *, teacher: Path | None, out: Path, settings: BenchSettings, force: bool = False
) -> dict[str, Any]:
    """Measure an artifact's graphs, and its teacher, on this machine; write the record and the list, return the record.

    Args:
        artifact: an artifact folder.
        teacher: Hugging Face folder that the speed-ups are against; None measures the student alone.
        out: folder for `record.json` and `churn.jsonl`.
        settings: what to measure and for how long.
        force: write into `out` even if it holds something else.

    Returns:
        The record, as written to `out / "record.json"`.

    Raises:
        ArtifactError: the artifact is damaged, or `out` is in the way.
        ModelError: the teacher is incomplete or does not fit the artifact.
        BertemdError: a teacher was named and torch is not installed.
        MeasurementError: nothing to measure, a worker died, or a model's outputs are not usable.
    """
    claim_folder(out, marker=RECORD, force=force)
    began = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    loaded = Artifact.load(artifact)
    for name in loaded.manifest["files"]:
        loaded.file(name)
    limits = cpu_limits()
    cells, notes = plan_cells(
        settings, max_length=loaded.max_length, cpus=limits.threads, most_threads=_usable_cpus(limits)
    )
    with tempfile.TemporaryDirectory(prefix="bertemd-bench-") as scratch:
        graphs, absent = students(loaded, settings.graphs)
        notes += absent
        candidates = graphs
        if teacher:
            found, unnamed = teachers(teacher, loaded, scratch=Path(scratch))
            candidates, notes = found + graphs, notes + unnamed
        for line in notes:
            note(f"bench: {line}")
        before = environment.conditions()
        profiles, metrics, results = _run(candidates, cells, artifact=loaded, settings=settings)
    if disturbed := sum(result.disturbed for result in results):
        notes.append(
            f"other programs took CPU time in {disturbed} of {len(results)} cells; no speed-up is claimed there. "
            "Measure again on an idle machine"
        )
        warn(f"bench: {notes[-1]}.")
    entries = _model_entries(candidates, profiles, metrics, part=loaded.evaluation())
    churn = _churn(candidates, profiles, artifact=loaded)
    baseline = candidates[0] if teacher else None
    record = {
        "schema_version": SCHEMA_VERSION,
        "device": environment.device(),
        "versions": environment.versions(),
        "started": started,
        "duration_seconds": time.monotonic() - began,
        "conditions": {"before": before, "after": environment.conditions()},
        "settings": dataclasses.asdict(settings),
        "notes": notes,
        "baseline": baseline.name if baseline else None,
        "artifact": artifact_excerpt(loaded),
        "distillation": loaded.manifest.get("distillation"),
        "models": entries,
        "churn": churn.record if churn else None,
        "measurements": [
            _measurement(entries[at], result, at=at, baseline=bool(baseline), seed=settings.seed)
            for result in results
            for at in range(len(candidates))
        ],
    }
    write_json(out / RECORD, record)
    if churn:
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in churn.lines)
        write_text(out / CHURN, "".join(f"{line}\n" for line in lines))
    else:
        (out / CHURN).unlink(missing_ok=True)  # of an earlier run
    return record


def _usable_cpus(limits: CpuLimits) -> int:
    """Return how many threads can run at once, hardware threads included."""
    return max(1, min(limits.affinity, math.ceil(limits.quota)) if limits.quota else limits.affinity)


def _run(
    candidates: Sequence[Candidate], cells: Sequence[Cell], *, artifact: Artifact, settings: BenchSettings
) -> tuple[list[Profile], list[dict[str, float]], list[CellResult]]:
    """Run all passes under one progress bar; return profiles and metrics by model, and the cells' timings.

    Raises:
        MeasurementError: a worker died, or outputs are not finite, which is known before anything is timed.
    """
    most_threads = max(cell.threads for cell in cells)
    part = artifact.evaluation()
    profiles: list[Profile] = []
    metrics: list[dict[str, float]] = []
    results: list[CellResult] = []
    with progress("measuring", len(candidates) + len(cells)) as bar:
        for candidate in candidates:
            measured = profile(candidate, artifact=artifact, settings=settings, threads=most_threads)
            profiles.append(measured)
            metrics.append(_metrics(candidate, measured, artifact=artifact, part=part))
            bar.advance(detail=f"memory, scores, cold start: {candidate.name}")

        def done(cell: Cell) -> None:
            bar.advance(detail=f"batch {cell.batch}, {cell.sequence} tokens, {cell.threads} threads")

        for _, group in groupby(cells, key=lambda cell: cell.threads):
            results += time_cells(candidates, list(group), artifact=artifact, settings=settings, done=done)
    return profiles, metrics, results


def _metrics(candidate: Candidate, measured: Profile, *, artifact: Artifact, part: DataSlice) -> dict[str, float]:
    names = artifact.metric_names
    try:
        return evaluate_metrics(names, logits=measured.logits, part=part, label_names=artifact.labels)
    except ValueError as error:
        raise MeasurementError(
            f"bench, {candidate.name}: its outputs on the evaluation slice are not usable ({error}). Export it again."
        ) from error


def _model_entries(
    candidates: Sequence[Candidate],
    profiles: Sequence[Profile],
    metrics: Sequence[dict[str, float]],
    *,
    part: DataSlice,
) -> list[dict[str, Any]]:
    """Return one `models` entry per candidate: identity, size, metrics, memory, cold start, agreement.

    Raises:
        MeasurementError: the teacher's exported graph is not the teacher.
    """
    reference = profiles[0].logits if candidates[0].model == "teacher" else None
    # The same weights in another file: what PyTorch counted holds for the graph as well.
    teacher_parameters = next((one.parameters for one in profiles if one.parameters is not None), None)
    entries = []
    for at, (candidate, measured) in enumerate(zip(candidates, profiles, strict=True)):
        agreement = None
        if reference is not None and at > 0:
            if candidate.model == "teacher":
                _check_teacher_graph(reference, measured.logits)
            agreement = _agreement(reference, measured.logits, part=part)
        entries.append(
            {
                "name": candidate.name,
                "model": candidate.model,
                "backend": candidate.backend,
                "graph": candidate.graph,
                "precision": candidate.precision,
                "model_bytes": candidate.model_bytes,
                "layers": candidate.layers,
                "hidden": candidate.hidden,
                "parameters": teacher_parameters if candidate.model == "teacher" else measured.parameters,
                "metrics": metrics[at],
                "agreement_with_teacher": agreement,
                "evaluated_examples": len(part) if part.gold is None else len(part.gold.contexts),
                "cold_start_ms": measured.cold_start_ms,
                "peak_rss_bytes": measured.peak_rss_bytes,
                "rss_after_import_bytes": measured.rss_after_import_bytes,
            }
        )
    return entries


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


def _churn(candidates: Sequence[Candidate], profiles: Sequence[Profile], *, artifact: Artifact) -> Churn | None:
    """Return what changed from teacher to student to int8, as far as these were measured; None of one model alone."""
    chosen = _steps(candidates)
    if len(chosen) < 2:
        return None
    found = find_churn(
        {role: profiles[at].logits for role, at in chosen.items()},
        part=artifact.evaluation(),
        labels=artifact.labels,
        metrics=artifact.metric_names,
        tokenizer=Tokenizer.from_file(str(artifact.file("tokenizer.json"))),
    )
    names = {role: candidates[at].name for role, at in chosen.items()}
    return Churn({"file": CHURN, "models": names} | found.record, found.lines)


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


def _measurement(entry: dict[str, Any], result: CellResult, *, at: int, baseline: bool, seed: int) -> dict[str, Any]:
    """Return one measurement.

    Args:
        entry: the model's `models` entry.
        result: all models in one cell.
        at: the model's place in it.
        baseline: whether the model at place 0 is the teacher to compare against.
        seed: of the bootstrap.
    """
    cell, timing = result.cell, result.alone[at]
    latency = summarize(timing.rounds)
    gain = None
    if baseline and at > 0:
        gain = speedup(result.alone[0].rounds, timing.rounds, seed=seed)
        gain["claimed"] = gain["claimed"] and not result.disturbed
    return {
        **{key: entry[key] for key in ("model", "backend", "graph", "precision", "model_bytes")},
        "batch": cell.batch,
        "sequence": cell.sequence,
        "threads": cell.threads,
        "n": latency["n"],
        "latency_ms": latency,
        "end_to_end_ms": summarize(result.whole[at].rounds) if result.whole else None,
        "throughput_per_s": 1000 * cell.batch / latency["mean"],
        "cold_start_ms": entry["cold_start_ms"],
        "peak_rss_bytes": entry["peak_rss_bytes"],
        "cpu_seconds_per_inference": timing.cpu_seconds / latency["n"],
        "metric": next(iter(entry["metrics"].values())),
        "speedup_vs_teacher": gain,
        "warm_up": timing.warm_up,
        "other_cpus_busy": result.other_cpus_busy,
    }


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
