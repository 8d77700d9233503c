"""The `bench` stage: run every pass for the teacher and the student's graphs, and write the result as one record.

The record (`record.py`) holds everything a report needs, artifact and distillation included, so it can be carried from a
device alone; `churn.jsonl` beside it lists every dev example with what teacher, student and int8 decided. With the limits of
a device, this machine stands in for it: every model is confined to them, and one that does not fit is a result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertemd_deploy.artifact import SCHEMA_VERSION, Artifact
from bertemd_deploy.bench import environment
from bertemd_deploy.bench.candidates import Candidate, students, teachers
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.monitor import Monitor
from bertemd_deploy.bench.noise import judge_noise
from bertemd_deploy.bench.passes import CellResult, time_cells
from bertemd_deploy.bench.profiles import Profile, profile
from bertemd_deploy.bench.record import (
    Found,
    artifact_excerpt,
    changes,
    device_entry,
    measurements,
    model_entries,
    score,
)
from bertemd_deploy.bench.setup import Setup
from bertemd_deploy.bench.workload import Cell, paced_cells, plan_cells
from bertemd_deploy.console import note, progress, warn
from bertemd_deploy.errors import MemoryLimitError, NoisyError
from bertemd_deploy.files import claim_folder, write_json, write_text
from bertemd_deploy.handout import CARD
from bertemd_deploy.runtime import CpuLimits, cpu_limits
from bertemd_deploy.settings import BenchSettings

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

RECORD = "record.json"
CHURN = "churn.jsonl"


def bench(
    artifact: Path,
    *,
    teacher: Path | None,
    out: Path,
    settings: BenchSettings,
    force: bool = False,
    device: Device | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Measure an artifact's graphs, and its teacher, on this machine; write the record and the list, return the record.

    Args:
        artifact: an artifact folder.
        teacher: Hugging Face folder that the speed-ups are against; None measures the student alone.
        out: folder for `record.json` and `churn.jsonl`.
        settings: what to measure and for how long.
        force: write into `out` even if it holds something else.
        device: the place that is measured, whose session options are used; None is this machine as it is.
        limits: confine every model to these, and call the record "constrained".

    Returns:
        The record, as written to `out / "record.json"`.

    Raises:
        ArtifactError: the artifact is damaged, or `out` is in the way.
        ModelError: the teacher is incomplete or does not fit the artifact.
        BertemdError: a teacher was named and torch is not installed.
        NoisyError: the measurement was disturbed and `settings.strict` asks for a quiet one; the record is written.
        MeasurementError: nothing to measure, a worker died, or a model's outputs are not usable.
    """
    claim_folder(out, marker=RECORD, force=force)
    began = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    loaded = Artifact.load(artifact)
    for name in set(loaded.manifest["files"]) - {CARD}:
        loaded.file(name)
    cpus, most_threads = usable_threads(cpu_limits(), device=device, limits=limits)
    cells, notes = plan_cells(settings, max_length=loaded.max_length, cpus=cpus, most_threads=most_threads)
    setup = Setup(loaded, settings, limits)
    if device is not None:
        setup = dataclasses.replace(setup, spinning=device.session.spinning, arena=device.session.arena)
    with tempfile.TemporaryDirectory(prefix="bertemd-bench-") as scratch:
        graphs, absent = students(loaded, settings.graphs)
        notes += absent
        candidates = graphs
        if teacher:
            teaching, unnamed = teachers(teacher, loaded, scratch=Path(scratch))
            candidates, notes = teaching + graphs, notes + unnamed
        for line in notes:
            note(f"bench: {line}")
        monitor = Monitor()
        found = _run(candidates, cells, setup=setup, between=monitor.sample)
    entries = model_entries(candidates, found, part=loaded.evaluation())
    churn = changes(candidates, found, artifact=loaded, file=CHURN)
    timed = [candidate for candidate in candidates if candidate.name not in found.failures]
    baseline = next((one.name for one in timed if one.model == "teacher"), None)
    notes += _remarks(found)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "device": device_entry(device, limits=limits, found=found),
        "versions": environment.versions(),
        "started": started,
        "duration_seconds": time.monotonic() - began,
        "conditions": monitor.record(),
        "settings": dataclasses.asdict(settings),
        "notes": notes,
        "baseline": baseline,
        "artifact": artifact_excerpt(loaded),
        "distillation": loaded.manifest.get("distillation"),
        "models": entries,
        "churn": churn.record if churn else None,
        "measurements": measurements(
            entries, found, baseline=baseline, interval_ms=settings.paced_interval_ms, seed=settings.seed
        ),
    }
    record["noise"] = judge_noise(record)
    write_json(out / RECORD, record)
    if churn:
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in churn.lines)
        write_text(out / CHURN, "".join(f"{line}\n" for line in lines))
    else:
        (out / CHURN).unlink(missing_ok=True)  # of an earlier run
    _say_noise(record["noise"], strict=settings.strict, where=out / RECORD)
    return record


def usable_threads(cpus: CpuLimits, *, device: Device | None, limits: Limits | None) -> tuple[int, int]:
    """Return the threads that "all" stands for, and how many can run at once, hardware threads included.

    Args:
        cpus: what this process may use.
        device: the place measured, whose own choice of threads is taken.
        limits: what the models will be confined to.
    """
    most = max(1, min(cpus.affinity, math.ceil(cpus.quota)) if cpus.quota else cpus.affinity)
    if limits is not None:
        bounds = [limits.cpus, math.ceil(limits.cpu_share) if limits.cpu_share else None]
        most = min([most, *(bound for bound in bounds if bound)])
    wanted = cpus.threads if device is None else device.session.threads
    return min(wanted, most), most


def _run(candidates: Sequence[Candidate], cells: Sequence[Cell], *, setup: Setup, between: Callable[[], None]) -> Found:
    """Run all passes under one progress bar.

    Args:
        candidates: the models.
        cells: what to time.
        setup: how models are opened.
        between: called when no model is running.

    Raises:
        MeasurementError: a worker died, or outputs are not finite, which is known before anything is timed.
    """
    most_threads = max(cell.threads for cell in cells)
    part = setup.artifact.evaluation()
    paced = paced_cells(cells) if setup.settings.paced_interval_ms else []
    profiles: dict[str, Profile] = {}
    metrics: dict[str, dict[str, float]] = {}
    failures: dict[str, MemoryLimitError] = {}
    results: list[CellResult] = []
    with progress("measuring", len(candidates) + len(cells)) as bar:
        for candidate in candidates:
            name = candidate.name
            try:
                profiles[name] = profile(candidate, setup=setup, threads=most_threads)
                metrics[name] = score(candidate, profiles[name], artifact=setup.artifact, part=part)
            except MemoryLimitError as error:
                failures[name] = error
            between()
            bar.advance(detail=f"memory, scores, cold start: {name}")

        def done(cell: Cell) -> None:
            bar.advance(detail=f"batch {cell.batch}, {cell.sequence} tokens, {cell.threads} threads")

        for _, group in groupby(cells, key=lambda cell: cell.threads):
            left = [candidate for candidate in candidates if candidate.name not in failures]
            timed, failed = time_cells(left, list(group), setup=setup, paced=paced, done=done, between=between)
            results += timed
            failures |= failed
    return Found(profiles, metrics, failures, results)


def _remarks(found: Found) -> list[str]:
    """Return what a reader of the record has to know about its numbers; say aloud which models do not fit."""
    remarks = [str(error).removeprefix("bench, ").rstrip(".") for error in found.failures.values()]
    for remark in remarks:
        warn(f"bench: {remark}.")
    if disturbed := sum(result.disturbed for result in found.results):
        remarks.append(
            f"other programs took CPU time in {disturbed} of {len(found.results)} cells; no speed-up is claimed there. "
            "Measure again on an idle machine"
        )
    return remarks


def _say_noise(noise: dict[str, Any], *, strict: bool, where: Path) -> None:
    """Warn of a noisy measurement.

    Raises:
        NoisyError: it is noisy and `strict`.
    """
    if not noise["noisy"]:
        return
    reasons = "; ".join(noise["reasons"])
    if strict:
        raise NoisyError(
            f"bench: the measurement is noisy: {reasons}. {where} is written all the same. Measure again on an idle machine "
            "that is cool and plugged in, with a larger bench.seconds_per_cell, or without --strict."
        )
    warn(f"bench: the measurement is noisy: {reasons}.")
