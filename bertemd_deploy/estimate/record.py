"""A whole bench record of a device that is not here: every time in it an estimate, and nothing in it measured.

The record has the schema of `bench`'s, with device kind "estimated". Measured are this machine's tables, the artifact's metrics
(on export) and file sizes; times and memory have an interval, and what cannot be estimated is None. A model that is expected to
need more memory than the device has is `failed` and has no times, as one that was measured and did not fit.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertemd_deploy.artifact import SCHEMA_VERSION, Artifact
from bertemd_deploy.bench.candidates import Candidate, students, teachers
from bertemd_deploy.bench.environment import versions
from bertemd_deploy.bench.record import OUT_OF_MEMORY, artifact_excerpt, unmeasured_entry
from bertemd_deploy.bench.workload import Cell, plan_cells
from bertemd_deploy.console import note, progress
from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.estimate.calibration import ROUNDS, calibrate
from bertemd_deploy.estimate.cases import plan
from bertemd_deploy.estimate.cells import Lengths, Model, measurement
from bertemd_deploy.estimate.model import ACCURACY
from bertemd_deploy.estimate.operators import OperatorCost, costs
from bertemd_deploy.estimate.scaling import PRODUCT_REACH, check_facts, scale
from bertemd_deploy.estimate.speeds import Calibration
from bertemd_deploy.estimate.tracing import Trace, trace
from bertemd_deploy.runtime import cpu_limits
from bertemd_deploy.settings import BenchSettings
from bertemd_deploy.targets import check_isa

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

ESTIMATED = ("fp32", "int8")  # precisions
MEMORY = (
    "resident after the imports, measured on another machine, plus the file, plus product weights once more (packed), plus "
    "twice the largest operator's activations at the largest batch and length; the interval is what measured peaks kept to"
)
# Measured peaks were 0.89 to 1.30 times the estimates: 17 fp32 and int8 graphs of 19 to 268 MB, batches of 1 and 8, on one
# x86-64 machine.
MEMORY_LOW, MEMORY_HIGH = 0.85, 1.35


def estimate_record(
    artifact: Path,
    *,
    teacher: Path | None,
    settings: BenchSettings,
    device: Device,
    here: Device,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Return the bench record of an artifact, and its teacher, on a device that is not here, estimated.

    Args:
        artifact: an artifact folder.
        teacher: Hugging Face folder that the speed-ups are against; None estimates the student alone.
        settings: which graphs, lengths, batch sizes and threads.
        device: the place asked about.
        here: this machine (`devices.local_device()`).
        calibration: this machine's tables; None makes them, which takes about a minute.

    Raises:
        ArtifactError: the artifact is damaged, or a graph cannot be run here.
        ModelError: the teacher is incomplete or does not fit the artifact.
        RecipeError: the device lacks a fact that this needs.
        MeasurementError: nothing is left to estimate, an operator is unknown, or this machine could not be calibrated.
        BertemdError: onnx is not installed, or torch where a teacher was named that has no graph.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    loaded = Artifact.load(artifact)
    check_facts(device)
    cells, notes = plan_cells(
        settings, max_length=loaded.max_length, cpus=device.session.threads, most_threads=device.threads
    )
    with tempfile.TemporaryDirectory(prefix="bertemd-estimate-") as scratch:
        candidates, remarks = _candidates(loaded, teacher, settings=settings, device=device, scratch=Path(scratch))
        traced = [trace(candidate.path) for candidate in candidates]
    notes += remarks
    scaled = scale(calibration or calibrate_here(), here=here, device=device)
    cells, beyond = _possible(cells, scaled)
    notes += beyond
    found = [
        Model(one, work, _memory(one, work, cells, loaded, scaled))
        for one, work in zip(candidates, traced, strict=True)
    ]
    notes += _tight(found, device)
    for line in notes:
        note(f"estimate, {device.name}: {line}")
    entries = [_entry(model, artifact=loaded, device=device) for model in found]
    timed = [(entry, model) for entry, model in zip(entries, found, strict=True) if entry["failed"] is None]
    baseline = next((model for _, model in timed if model.candidate.model == "teacher"), None)
    lengths = Lengths(loaded, seed=settings.seed)
    return {
        "schema_version": SCHEMA_VERSION,
        "device": _device(device),
        "versions": versions(),
        "started": started,
        "duration_seconds": time.monotonic() - began,
        "conditions": None,
        "settings": dataclasses.asdict(settings),
        "notes": notes,
        "baseline": baseline.candidate.name if baseline else None,
        "artifact": artifact_excerpt(loaded),
        "distillation": loaded.manifest.get("distillation"),
        "models": entries,
        "churn": None,
        "noise": None,
        "measurements": [
            measurement(entry, model, cell, baseline=baseline, lengths=lengths, calibration=scaled)
            for cell in cells
            for entry, model in timed
        ],
        "estimate": {
            "calibration": scaled.record(),
            "scaled_by": dict(scaled.factors),
            "error": ACCURACY.record(),
            "words": _words(scaled, device),
        },
    }


def calibrate_here() -> Calibration:
    """Calibrate this machine with one thread and with all it has."""
    counts = sorted({1, cpu_limits().threads})
    with progress("calibrating", ROUNDS * len(plan())) as bar:
        return calibrate(threads=counts, done=bar.advance)


def _candidates(
    artifact: Artifact, teacher: Path | None, *, settings: BenchSettings, device: Device, scratch: Path
) -> tuple[list[Candidate], list[str]]:
    """Return the models that can be estimated, the teacher first, and notes on those that cannot.

    Raises:
        MeasurementError: there is none.
    """
    graphs, notes = students(artifact, settings.graphs, here=False)
    found = []
    for candidate in graphs:
        assert candidate.graph is not None
        if candidate.precision not in ESTIMATED:
            kinds = " and ".join(ESTIMATED)
            notes.append(f"graph {candidate.graph} left out: only {kinds} are estimated, it is {candidate.precision}")
            continue
        try:
            check_isa(artifact.manifest.get("requires"), graph=candidate.graph, found=device.isa)
        except ArtifactError as error:
            notes.append(f"graph {candidate.graph} left out: on {device.name} {error}")
        else:
            found.append(candidate)
    if not found:
        raise MeasurementError(f"estimate, {device.name}: no graph of {artifact.folder} is for it. {' '.join(notes)}")
    if teacher is None:
        return found, notes
    teaching, remarks = teachers(teacher, artifact, scratch=scratch)
    exported = [candidate for candidate in teaching if candidate.backend == "onnxruntime"]
    if len(exported) < len(teaching):
        remarks.append("the teacher is estimated in ONNX Runtime only: PyTorch's operators are not")
    return exported + found, notes + remarks


def _possible(cells: Sequence[Cell], calibration: Calibration) -> tuple[list[Cell], list[str]]:
    """Return the cells whose threads the calibration covers, and a note on the others.

    Raises:
        MeasurementError: it covers none.
    """
    kept, notes = [], {}
    for cell in cells:
        try:
            calibration.at(cell.threads)
        except MeasurementError as error:
            notes[cell.threads] = error
        else:
            kept.append(cell)
    if not kept:
        raise next(iter(notes.values()))
    return kept, [str(error) for error in notes.values()]


def _memory(
    candidate: Candidate, traced: Trace, cells: Sequence[Cell], artifact: Artifact, calibration: Calibration
) -> int:
    """Return the bytes that a process of one model is expected to have at most (`MEMORY`)."""
    operators = costs(traced, batch=max(cell.batch for cell in cells), sequence=artifact.max_length)
    return int(
        calibration.machine["rss_after_import_bytes"]
        + candidate.model_bytes
        + sum(part.weight_bytes for operator in operators for part in operator.parts)
        + 2 * max(map(_activation_bytes, operators))
    )


def _activation_bytes(operator: OperatorCost) -> int:
    return operator.bytes_read - operator.constant_bytes + operator.bytes_written


def _limit(device: Device) -> int:
    return device.memory_limit_bytes or device.memory_bytes


def _tight(models: Sequence[Model], device: Device) -> list[str]:
    """Return a note on each model that does not fit the device, or might not."""
    limit, notes = _limit(device), []
    for model in models:
        needed, most = model.memory_bytes, MEMORY_HIGH * model.memory_bytes
        has = f"and {device.name} has {limit / 2**20:,.0f} MiB"
        if needed > limit:
            notes.append(f"{model.candidate.name}: about {needed / 2**20:,.0f} MiB are needed, {has}; no times for it")
        elif most > limit:
            notes.append(f"{model.candidate.name}: up to {most / 2**20:,.0f} MiB may be needed, {has}")
    return notes


def _device(device: Device) -> dict[str, Any]:
    """Return a record's `device`, all of it from the table of devices."""
    from bertemd_deploy.devices import architecture, device_record

    row = device_record(device)
    return {
        "name": device.name,
        "kind": "estimated",
        **{key: row[key] for key in ("title", "target", "cpu", "isa", "cores", "threads", "memory_bytes", "sources")},
        "machine": architecture(device),
        "governor": None,
        "frequency": {"current_mhz": None, "max_mhz": device.clock_mhz},
        "container": {"cpu_quota": device.cpu_share, "memory_limit_bytes": device.memory_limit_bytes},
        "row": row,
    }


def _entry(model: Model, *, artifact: Artifact, device: Device) -> dict[str, Any]:
    """Return the `models` entry: what is known without the device, and the memory it is expected to take.

    Of a model that does not fit there are no metrics, as there are none of one that was measured and did not fit.
    """
    candidate, limit = model.candidate, _limit(device)
    fits = model.memory_bytes <= limit
    metrics = artifact.manifest.get("metrics") or {}
    known = metrics.get("teacher" if candidate.model == "teacher" else candidate.graph)
    return {
        **unmeasured_entry(candidate),
        "metrics": known if fits and isinstance(known, dict) and known else None,
        "failed": None if fits else {"reason": OUT_OF_MEMORY, "limit_bytes": limit, "peak_bytes": model.memory_bytes},
        "memory_estimate_bytes": {
            "value": model.memory_bytes,
            "low": int(MEMORY_LOW * model.memory_bytes),
            "high": int(MEMORY_HIGH * model.memory_bytes),
            "how": MEMORY,
        },
    }


def _words(calibration: Calibration, device: Device) -> str:
    """Return how the record's times were made, for people."""
    machine = calibration.machine
    known = device.bandwidth_gb_s
    memory = f"{known:g} GB/s of memory" if known else "memory as fast as there, since its own speed is not known"
    fp32, int8 = (f"{PRODUCT_REACH[table]:.0%}" for table in ("fp32_product", "int8_product"))
    return (
        f"These are estimates, not measurements. The graphs' operators as ONNX Runtime {machine['onnxruntime']} runs them were "
        f"counted, timed one by one on {machine['cpu'] or 'another machine'}, and scaled to {device.name}: "
        f"{device.clock_mhz:g} MHz, {device.fp32_flop_per_cycle:g} fp32 and {device.int8_op_per_cycle:g} int8 operations per "
        f"cycle and core, of which {fp32} and {int8} are reached, and {memory}. On the machine it was made for the model was "
        f"off by {ACCURACY.median:.0%} in the median and {ACCURACY.worst:.0%} at worst of {ACCURACY.n} cells; for another CPU "
        "no such number is known, and the interval is stretched by how far published kernels are from their CPUs' peaks. "
        "Heat, power modes and other programs are not in it."
    )
