"""Does the student hold up on real tasks, and does EMD earn its keep? A grid of task, mapping and seed, run until it is full.

    python benchmarks/glue.py --grid minilm-4l --data GLUE --encoder FOLDER --work runs/glue --jobs 2

GLUE holds one folder a task (MRPC, SST-2, CoLA, RTE) with train.tsv and dev.tsv; FOLDER is the pretrained encoder that the
teachers are fine-tuned from. `glue.yaml` says what a grid consists of; where its students start from another checkpoint,
--start is that one's folder. Each finished student is one line in `results/glue.jsonl` (with --tuning, on a part of train in
the place of dev, in `results/glue-tuning.jsonl`): recipe and its hash, seed, commit, machine, time, metrics of every epoch,
flows and marginals at the end, metrics and fidelity to the teacher in PyTorch and of every exported graph, by dev row what
paired tests need. What has its line is not run again; killed at any moment, the same command goes on. Several may work on
one folder at once; --jobs starts them. `--plan` lists what there is to do. `--table` writes RESULTS.md from the lines alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT), str(HERE)]

from glue_plan import (  # noqa: E402
    GATE_ROWS,
    ROWS_SEED,
    Cell,
    cell_data,
    cells,
    is_whole,
    read_lines,
    read_plan,
    starts_elsewhere,
)


def main() -> None:
    """Read the command line and fill the grid, or show what there is."""
    from bertemd_deploy.checkpoints import find_model
    from bertemd_deploy.errors import BertemdError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = read_plan()
    parser.add_argument("--grid", choices=plan["grids"])
    parser.add_argument("--data", type=Path, help="folder of the tasks' folders")
    parser.add_argument("--encoder", type=Path, help="pretrained encoder of the grid's teachers")
    parser.add_argument("--start", type=Path, help="checkpoint that the grid's students start from, where they do")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "glue", help="teachers, students, artifacts")
    parser.add_argument("--out", type=Path, help="lines of finished students [results/glue.jsonl or glue-tuning.jsonl]")
    parser.add_argument("--tuning", action="store_true", help="the settings to choose from, on a part of train")
    parser.add_argument("--task", action="append", help="this task only; may be repeated")
    parser.add_argument("--variant", action="append", help="this variant only; may be repeated")
    parser.add_argument("--minutes", type=float, help="stop after so long, to be continued")
    parser.add_argument("--jobs", type=int, default=1, help="students at a time; threads are shared out among them")
    parser.add_argument("--plan", action="store_true", help="list the cells and which are done")
    parser.add_argument("--table", action="store_true", help="write RESULTS.md and its figures from the lines")
    options = parser.parse_args()
    if options.table:
        from glue_tables import write_results

        write_results()
        return
    if not options.grid or not (options.plan or (options.data and options.encoder)):
        parser.error("name --grid with --data and --encoder, or --grid with --plan, or --table")
    if not options.plan and (options.start is None) == starts_elsewhere(plan["grids"][options.grid]["student"]):
        parser.error(
            f"--start: the students of {options.grid} {'need it' if options.start is None else 'have no use for it'}"
        )
    for place in () if options.plan else (options.data, options.encoder, options.start):
        if place is not None and not place.is_dir():
            parser.error(f"{place}: there is no such folder")
    for place in () if options.plan else (options.encoder, options.start):
        try:
            if place is not None:
                find_model(str(place))  # before a teacher is trained for hours
        except BertemdError as error:
            parser.error(str(error))
    options.commit = commit()  # of the code that runs; the folder may move on while it does
    if options.out is None:
        options.out = HERE / "results" / ("glue-tuning.jsonl" if options.tuning else "glue.jsonl")
    todo = [
        cell
        for cell in cells(plan, options.grid, tuning=options.tuning)
        if (not options.task or cell.task in options.task) and (not options.variant or cell.variant in options.variant)
    ]
    if options.plan:
        done = finished(options.out)
        for cell in todo:
            print("done" if (cell.key, cell.seed) in done else "    ", cell.name, settings_text(cell))
    elif options.jobs > 1:
        sys.exit(share_out(options.jobs))
    else:
        sys.exit(fill(todo, options))


def settings_text(cell: Cell) -> str:
    """Return what tells a cell's distillation from the defaults, in a line."""
    from glue_settings import PLAIN, distill_settings

    own = distill_settings(cell.recipe.to_dict())
    return " ".join(f"{name}={own[name]}" for name in own if name != "mapping" and own[name] != PLAIN[name])


def share_out(jobs: int) -> int:
    """Start `jobs` copies of this command, each with its share of the CPUs; return the worst exit status."""
    cpus = len(os.sched_getaffinity(0))
    threads = str(max(1, cpus // jobs))
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--jobs", "1"]
    running = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": threads}) for _ in range(jobs)]
    for number in (signal.SIGINT, signal.SIGTERM):  # each keeps its checkpoint and ends
        signal.signal(number, lambda number, _frame: [one.send_signal(number) for one in running])
    return max(abs(one.wait()) for one in running)


def finished(path: Path) -> set[tuple[str, int]]:
    """Return (key, seed) of the students that have their line."""
    return {(line["key"], line["seed"]) for line in read_lines(path)}


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; yield False where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def fill(todo: list[Cell], options: argparse.Namespace) -> int:
    """Train, export and measure every cell that has no line yet and that nobody else is at; return the exit status.

    It is 3 where a cell failed or time is over: the same command goes on.
    """
    from bertemd_deploy.console import note
    from bertemd_deploy.errors import BertemdError, UnfinishedError

    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    unfinished = False
    for cell in todo:
        with claimed(options.work / "locks" / cell.name) as ours:
            if not ours or (cell.key, cell.seed) in finished(options.out):
                continue
            if deadline is not None and time.monotonic() >= deadline:
                unfinished = True
                break
            note(f"glue: {cell.name}: {settings_text(cell)}")
            try:
                line = run_cell(cell, options, deadline=deadline)
            except UnfinishedError:
                unfinished = True
                break
            except BertemdError as error:
                print(f"error: {cell.name}: {error}", file=sys.stderr)
                unfinished = True
                continue
            append(options.out, line)
            models = line["models"]
            shown = {
                name: {**one["metrics"], "kl": one["kl"], "agreement": one["agreement"]} for name, one in models.items()
            }
            note(
                f"glue: {cell.name}: " + json.dumps({name: shown[name] for name in ("torch", "int8") if name in shown})
            )
    return 3 if unfinished else 0


def minutes_until(deadline: float | None) -> float | None:
    """Return the minutes left, or None where there is no deadline."""
    return None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)


def run_cell(cell: Cell, options: argparse.Namespace, *, deadline: float | None) -> dict[str, Any]:
    """Return the line of a cell, its teacher fine-tuned first if need be."""
    import torch
    from glue_measure import measure

    from bertemd_deploy import pipeline, stages
    from bertemd_deploy.bench import environment
    from bertemd_deploy.checkpoints import WEIGHTS
    from bertemd_deploy.facts import read_student
    from bertemd_deploy.files import sha256_file
    from bertemd_deploy.stage_inputs import distill_inputs

    data = cell_data(cell, options.data / cell.folder)
    recipe = replace(cell.recipe, teacher=replace(cell.recipe.teacher, model=str(options.encoder)))
    if options.start is not None:
        recipe = replace(recipe, student=replace(recipe.student, init=str(options.start)))
    max_length = recipe.data.max_length or data.task.max_length
    teacher = fine_tuned(cell, recipe, data, max_length, options, deadline=deadline)
    out = options.work / "students" / cell.name

    def train(work: Any, *, beside: Any) -> dict[str, Any]:
        made_by = {"commit": options.commit}
        limits = {"max_minutes": minutes_until(deadline), "fits": options.work / "fits"}
        write = {"beside": lambda folder, record: beside(folder, record | made_by)}
        return stages.distill_stage(recipe, teacher, data, max_length, work, **limits, **write) | made_by

    inputs = distill_inputs(recipe, teacher, {"data": data.sha256, "max_length": max_length})
    trained = pipeline.stand_alone("distill", out, inputs=inputs, force=False, train=train)
    artifact: Path | None = None
    if not cell.held_out:  # settings are chosen by the student alone
        artifact = cell.artifact_folder(options.work)
        with judged_on_train(out, data, max_length) as student:
            stages.export_stage(recipe, student, artifact, force=True)
    measured = measure(out, artifact, teacher)
    if artifact is not None:
        measured["int8"] = int8_facts(artifact) | {
            "commit": options.commit
        }  # of what exported it, training may be older
    if artifact is not None and not cell.first:  # one of each is kept, to be timed
        shutil.rmtree(artifact)
    distillation = read_student(out).distillation
    device = environment.device()
    kept = ("task", "variant", "seed", "key")
    return {
        "grid": cell.grid,
        **{name: getattr(cell, name) for name in kept},
        "held_out": cell.held_out,
        "recipe": cell.recipe.to_dict(),
        "sha256": {
            "data": data.sha256,
            "encoder": sha256_file(options.encoder / WEIGHTS),
            "teacher": sha256_file(teacher / WEIGHTS),
        }
        | ({} if options.start is None else {"start": sha256_file(options.start / WEIGHTS)}),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {name: device.get(name) for name in ("cpu", "isa", "cores", "threads")},
        "threads": torch.get_num_threads(),
        **{
            name: trained[name]
            for name in ("commit", "steps", "tokens", "seconds", "train_rows", "precision", "best_epoch")
        },
        "epochs": distillation["dev"],
        "flows": {name: distillation[name] for name in ("first", "last")}
        | {"marginals": distillation["marginals"][-1:]},
        "int8_judged_on": "train",
        **measured,
    }


def int8_facts(artifact: Path) -> dict[str, Any]:
    """Return by graph where activations get their scales, how many are smoothed, and which operators stayed in fp32."""
    from bertemd_deploy.artifact import Artifact

    found = Artifact.load(artifact).manifest["quantization"]
    return {name: found[name] for name in ("activations", "smoothed_activations", "excluded")}


@contextlib.contextmanager
def judged_on_train(folder: Path, data: Any, max_length: int) -> Iterator[Path]:
    """Yield a student's folder whose gates judge on rows of train in the place of dev, on which nothing is to be chosen."""
    from bertemd_deploy.artifact import write_slices
    from bertemd_deploy.checkpoints import checked_encoder
    from bertemd_deploy.facts import SLICES, read_student

    train = data.splits["train"]
    order = np.random.default_rng(ROWS_SEED).permutation(len(train))
    encoder = checked_encoder(folder, max_length=max_length)
    rows = train.select(sorted(order[:GATE_ROWS].tolist())).encode(encoder)
    copy = folder.with_name(f"{folder.name}-judged")
    shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed
    try:
        shutil.copytree(folder, copy, copy_function=os.link)
        (copy / SLICES).unlink()  # the link, not the student's own
        write_slices(copy / SLICES, {"evaluation": rows, "calibration": read_student(folder).calibration})
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def fine_tuned(
    cell: Cell, recipe: Any, data: Any, max_length: int, options: argparse.Namespace, *, deadline: float | None
) -> Path:
    """Return the folder of a cell's teacher, one for all that share it; waits for another process that is at it."""
    from bertemd_deploy import pipeline, stages
    from bertemd_deploy.stage_inputs import finetune_inputs

    if recipe.teacher.finetune == "never":
        encoder: Path = options.encoder
        return encoder
    out = cell.teacher_folder(options.work)
    lock = options.work / "locks" / out.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pipeline.stand_alone(
            "finetune",
            out,
            inputs=finetune_inputs(cell.recipe, options.encoder, {"data": data.sha256, "max_length": max_length}),
            force=False,
            train=lambda work, **extra: stages.finetune_stage(
                recipe, data, max_length, work, max_minutes=minutes_until(deadline), **extra
            ),
        )
    return out


def commit() -> str | None:
    """Return the commit at hand, with a plus sign where files differ from it; None where there is none."""
    if not (ROOT / ".git").exists():
        return None
    known = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return known.stdout.strip() + ("+" if changed.stdout.strip() else "")


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line to a results file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        last = content[start:].decode(errors="replace")
        if last and is_whole(last):
            file.write(b"\n")
        elif last:
            file.truncate(start)  # what a killed process left of its line
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
