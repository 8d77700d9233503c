"""The stages in a row: finetune -> distill -> export (with quantization) -> bench -> report; or one, with a folder of its own.

A run folder remembers in `state.json` what every stage was given (as hashes) and whether it finished. A finished stage with
the same inputs is skipped, a changed one is done again, a killed one continues from its checkpoint.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertemd_deploy import __version__
from bertemd_deploy.checkpoints import WEIGHTS, check_folder, find_model, has_head
from bertemd_deploy.config import Recipe
from bertemd_deploy.console import note
from bertemd_deploy.data import find_task
from bertemd_deploy.errors import ArtifactError, BertemdError, RecipeError, UnfinishedError
from bertemd_deploy.files import (
    PARTIAL,
    check_replaceable,
    claim_folder,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from bertemd_deploy.launch import stands_for_several
from bertemd_deploy.stage_inputs import (
    bench_inputs,
    changed_inputs,
    distill_inputs,
    export_inputs,
    finetune_inputs,
    is_same,
)
from bertemd_deploy.stages import Work, distill_stage, export_record, export_stage, finetune_stage, load_recipe_data

STATE = "state.json"
STAGE = "stage.json"
MEASURED = "bench/measured.json"  # the places that a bench has measured while it is not finished
STAGES = ("finetune", "distill", "export", "bench", "report")


def needs_finetuning(recipe: Recipe, folder: Path) -> bool:
    """Say whether the recipe's teacher is to be fine-tuned first."""
    mode, kind = recipe.teacher.finetune, find_task(recipe.data.path, recipe.data.task).kind
    return mode == "always" or (mode == "auto" and not has_head(folder, kind=kind))


def stand_alone(
    name: str, out: Path, *, inputs: dict[str, Any], force: bool, train: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Run one training stage in a folder of its own: continue it, skip it when done, refuse a different one.

    Args:
        name: of the stage and its log.
        out: the model folder to be; holds checkpoints and log while it trains.
        inputs: everything the result depends on.
        force: start over whatever is there.
        train: called with (work, beside=...), returns the record; what `beside` writes appears together with the model.

    Raises:
        ArtifactError: `out` holds something else, or the same stage with other inputs.
    """
    from bertemd_deploy.processes import join_processes

    processes = join_processes()
    header = {"stage": name, "inputs": sha256_json(inputs), "given": inputs, "version": __version__}
    if processes.main:
        _claim_stage(out, header, force=force)
    processes.wait()  # the others read what the main process found or wrote
    state = read_json(out / STAGE, what="stage record")
    if state["status"] == "done":
        note(f"{name}: {out} is finished and its inputs are the same; nothing to do")
        return dict(state["record"])
    work = Work(out, out / "checkpoints", out / f"{name}.jsonl")

    def beside(folder: Path, record: dict[str, Any]) -> None:
        shutil.copyfile(work.log, folder / work.log.name)
        write_json(folder / STAGE, header | {"status": "done", "record": record})
        _keep_foreign(out, folder)

    return train(work, beside=beside)


def _claim_stage(out: Path, header: dict[str, Any], *, force: bool) -> None:
    """Take `out` for a stage that is to begin or go on; leave the record of one that is done with the same inputs.

    Raises:
        ArtifactError: `out` holds something else, or the same stage with other inputs.
    """
    check_replaceable(out)
    marker = out / STAGE
    claim_folder(out, marker=STAGE, force=force)
    if force:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        marker.unlink(missing_ok=True)
    if marker.exists():
        state = read_json(marker, what="stage record")
        made = (out / WEIGHTS).exists() or any((out / "checkpoints").glob("*.safetensors"))
        nothing = state.get("status") == "running" and not made
        if not is_same(state.get("inputs"), header["given"]) and not nothing:  # one that never began is in nobody's way
            raise ArtifactError(
                f"{out}: holds a {state.get('stage')} of other inputs ({changed_inputs(state.get('given'), header['given'])}). "
                "Choose another --out, or add --force to start over."
            )
        if state.get("status") == "done" and (out / WEIGHTS).is_file():
            return
    write_json(marker, header | {"status": "running"})
    if not (out / "checkpoints").exists():
        (out / f"{header['stage']}.jsonl").unlink(missing_ok=True)


def _keep_foreign(old: Path, new: Path) -> None:
    """Link what a person put into `old` into `new`, the folder about to replace it; what a stage wrote there ends with it."""
    from bertemd_deploy.facts import FACTS, SLICES
    from bertemd_deploy.models import TOKENIZER_FILES

    ours = {STAGE, "checkpoints", FACTS, SLICES, *TOKENIZER_FILES, *(f"{stage}.jsonl" for stage in STAGES)}
    for path in old.iterdir():
        if path.name in ours or path.name.startswith(PARTIAL) or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=os.link)
        else:
            os.link(path, new / path.name, follow_symlinks=False)


def run(
    recipe: Recipe,
    *,
    out: Path,
    from_stage: str | None = None,
    force: bool = False,
    stop_after: str | None = None,
    max_minutes: float | None = None,
) -> dict[str, Any]:
    """Run the whole pipeline of a recipe in the run folder `out`; finished stages with unchanged inputs are skipped.

    Args:
        recipe: resolved recipe.
        out: run folder.
        from_stage: do this stage and the later ones again.
        force: use a folder that holds something else, and start over (`from_stage` says where, if given).
        stop_after: last stage to run.
        max_minutes: stop training after so long, to be continued; None never stops.

    Returns:
        The record: every stage's record, and the paths of artifact and report as far as they were made.

    Raises:
        BertemdError: as the stages do; what is finished stays finished.
    """
    if stop_after is not None and stop_after not in STAGES:
        raise RecipeError(f"--to: unknown stage {stop_after!r}; known: {', '.join(STAGES)}.")
    if os.environ.get("WORLD_SIZE", "1") != "1" or stands_for_several():
        raise RecipeError(
            "run: its stages measure and export, which is for one process. On several processes use `bertemd finetune` and "
            "`bertemd distill`, then `bertemd export` and `bertemd bench` on one."
        )
    return _Run(recipe, out, from_stage=from_stage, force=force, max_minutes=max_minutes).all(stop_after=stop_after)


class _Run:
    """One run folder and its state file."""

    def __init__(
        self, recipe: Recipe, out: Path, *, from_stage: str | None, force: bool, max_minutes: float | None
    ) -> None:
        self.max_minutes, self.started = max_minutes, time.monotonic()
        claim_folder(out, marker=STATE, force=force)
        self.recipe, self.out = recipe, out
        self.state: dict[str, Any] = {"schema_version": 1, "version": __version__, "stages": {}}
        if (out / STATE).exists():
            self.state = read_json(out / STATE, what="run state")
        if from_stage is not None:
            self._forget(from_stage)
        elif force:
            self._forget(STAGES[0])
        write_text(out / "recipe.yaml", recipe.to_yaml())
        self._save()

    def _minutes_left(self) -> float | None:
        spent = (time.monotonic() - self.started) / 60
        return None if self.max_minutes is None else max(0.0, self.max_minutes - spent)

    def _save(self) -> None:
        write_json(self.out / STATE, self.state)

    def _forget(self, stage: str) -> None:
        if stage not in STAGES:
            raise RecipeError(f"--from: unknown stage {stage!r}; known: {', '.join(STAGES)}.")
        at = STAGES.index(stage)
        unfinished = [
            name for name in STAGES[:at] if self.state["stages"].get(name, {}).get("status") not in ("done", "skipped")
        ]
        if unfinished:
            raise RecipeError(
                f"--from {stage}: {', '.join(unfinished)} did not finish in {self.out}; leave out --from."
            )
        for name in STAGES[at:]:
            self.state["stages"].pop(name, None)
            shutil.rmtree(self.out / "checkpoints" / name, ignore_errors=True)
        if "bench" in STAGES[at:]:
            (self.out / MEASURED).unlink(missing_ok=True)

    def _stage(
        self, name: str, inputs: dict[str, Any], product: Path, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Do one stage unless it is done with the same inputs and its product is there."""
        digest = sha256_json(inputs)
        known = self.state["stages"].get(name, {})
        same = is_same(known.get("inputs"), inputs)
        if same and known.get("status") == "done" and product.exists():
            note(f"{name}: unchanged, skipped")
            return dict(known["record"])
        if not same or known.get("status") == "done":
            if known and not same:
                left = any((self.out / "checkpoints" / name).glob("step-*"))
                what = "its checkpoint is discarded and it starts over" if left else "it is done anew"
                note(f"{name}: its inputs have changed ({changed_inputs(known.get('given'), inputs)}); {what}")
            shutil.rmtree(self.out / "checkpoints" / name, ignore_errors=True)
            (self.out / f"{name}.jsonl").unlink(missing_ok=True)
        entry: dict[str, Any] = {"inputs": digest, "given": inputs, "status": "running"}
        self.state["stages"][name] = entry
        self._save()
        started = time.monotonic()
        note(f"{name}: started")
        try:
            record = work()
        except BertemdError as error:
            status = "stopped" if isinstance(error, UnfinishedError) else "failed"
            self.state["stages"][name] = entry | {"status": status, "error": str(error)}
            self._save()
            raise
        seconds = round(time.monotonic() - started, 1)
        self.state["stages"][name] = entry | {"status": "done", "seconds": seconds, "record": record}
        self._save()
        shutil.rmtree(self.out / "checkpoints" / name, ignore_errors=True)
        note(f"{name}: done in {seconds:.0f} s")
        return record

    def _measured(self, here: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Return the records, by place, of an unfinished bench of the same inputs, machine and software."""
        if not (self.out / MEASURED).is_file():
            return {}
        before = read_json(self.out / MEASURED, what="list of measured places")
        if {name: before.get(name) for name in here} != here or not isinstance(before.get("places"), dict):
            return {}
        return {
            name: made
            for name, made in before["places"].items()
            if isinstance(made, dict)
            and made.keys() == {"record", "sha256"}
            and (self.out / made["record"]).is_file()
            and sha256_file(self.out / made["record"]) == made["sha256"]
        }

    def all(self, *, stop_after: str | None) -> dict[str, Any]:
        from bertemd_deploy.students import student_shape, uneven_layers

        recipe, out = self.recipe, self.out
        data, max_length = load_recipe_data(recipe.data)
        source = find_model(recipe.teacher.model, sha256=recipe.teacher.sha256)
        for check in (student_shape, uneven_layers):  # what cannot be is said before hours of fine-tuning
            check(recipe.student, check_folder(source))
        shared = {"data": data.sha256, "max_length": max_length}
        records: dict[str, Any] = {}
        teacher = source
        if needs_finetuning(recipe, source):
            teacher = out / "teacher"
            inputs = finetune_inputs(recipe, source, shared)
            work = Work(teacher, out / "checkpoints" / "finetune", out / "finetune.jsonl")
            records["finetune"] = self._stage(
                "finetune",
                inputs,
                teacher / WEIGHTS,
                lambda: finetune_stage(recipe, data, max_length, work, max_minutes=self._minutes_left()),
            )
        else:
            self.state["stages"]["finetune"] = {"status": "skipped", "reason": "the teacher has its head"}
        if stop_after == "finetune":
            return records
        student = out / "student"
        inputs = distill_inputs(recipe, teacher, shared)
        student_work = Work(student, out / "checkpoints" / "distill", out / "distill.jsonl")
        records["distill"] = self._stage(
            "distill",
            inputs,
            student / WEIGHTS,
            lambda: distill_stage(recipe, teacher, data, max_length, student_work, max_minutes=self._minutes_left()),
        )
        if stop_after == "distill":
            return records
        return records | self._after_training(teacher, student, stop_after=stop_after)

    def _after_training(self, teacher: Path, student: Path, *, stop_after: str | None) -> dict[str, Any]:
        from bertemd_deploy.artifact import MANIFEST, Artifact
        from bertemd_deploy.bench import environment
        from bertemd_deploy.bench.places import bench_places, judge_again
        from bertemd_deploy.budget import read_budget
        from bertemd_deploy.handout import CARD, add_measured
        from bertemd_deploy.report import model_card_table, report

        recipe, out = self.recipe, self.out
        artifact = out / "artifact"
        inputs = export_inputs(recipe, student)

        def make_artifact() -> dict[str, Any]:
            export_stage(recipe, student, artifact, own_data=True, force=True)
            return export_record(Artifact.load(artifact))

        records: dict[str, Any] = {"export": self._stage("export", inputs, artifact / MANIFEST, make_artifact)}
        records["artifact"] = str(artifact)
        if stop_after == "export":
            return records
        files = Artifact.load(artifact).manifest["files"]
        place = out / "report"
        inputs = {
            "artifact": {name: entry["sha256"] for name, entry in files.items() if name != CARD},
            "teacher": sha256_file(teacher / WEIGHTS),
            "bench": bench_inputs(recipe),
        }

        here = {
            "inputs": sha256_json(inputs),
            "device": environment.device()["name"],
            "versions": environment.versions(),
        }
        places = self._measured(here)

        def keep(name: str, path: Path) -> None:
            places[name] = {"record": path.relative_to(out).as_posix(), "sha256": sha256_file(path)}
            write_json(out / MEASURED, here | {"places": places})

        def measure() -> dict[str, Any]:
            found = bench_places(
                artifact,
                teacher=teacher,
                out=out / "bench",
                settings=recipe.bench,
                force=True,
                reuse=places,
                done=keep,
            )
            found.check()
            (out / MEASURED).unlink(missing_ok=True)
            return {
                "record": "bench/record.json",
                "records": [path.relative_to(out).as_posix() for path in found.paths],
            }

        known = self.state["stages"].get("bench", {}).get("record", {}).get("records", ["bench/record.json"])
        lost = [out / name for name in known if not (out / name).is_file()]
        records["bench"] = self._stage("bench", inputs, [*lost, out / "bench" / "record.json"][0], measure)
        measured = [out / name for name in records["bench"].get("records", ["bench/record.json"])]
        judge_again(measured, budgets=read_budget(recipe.budget), settings=recipe.bench)
        if stop_after == "bench":
            return records
        created = Artifact.load(artifact).manifest.get("created")
        inputs = {"records": [sha256_file(path) for path in measured], "artifact": created, "version": __version__}

        def write_report() -> dict[str, Any]:
            page = report(measured, out=place, force=True)
            add_measured(artifact, model_card_table([read_json(path, what="bench record") for path in measured]))
            return {"page": str(page.relative_to(out))}

        records["report"] = self._stage("report", inputs, place / "index.html", write_report)
        return records | {"page": str(place / "index.html")}
