"""Stages in a row and by themselves: what is skipped, what is done again, what is refused, what a failure leaves."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from bertemd_deploy import pipeline, stages
from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.places import Benched
from bertemd_deploy.config import Recipe, build_recipe
from bertemd_deploy.errors import (
    ArtifactError,
    BertemdError,
    BudgetError,
    MeasurementError,
    ModelError,
    RecipeError,
    TrainingError,
    UnfinishedError,
)
from bertemd_deploy.files import sha256_file, sha256_json
from bertemd_deploy.report import enforce

Task = Callable[..., tuple[Path, Path]]
Record = dict[str, Any]


def recipe(model: Path, folder: Path, **changes: dict[str, Any]) -> Recipe:
    content: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(model), "epochs": 1, "batch_size": 16, "learning_rate": 1e-6},
        "data": {"path": str(folder), "max_length": 32},
        "student": {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 32},
        "distill": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
    }
    for section, body in changes.items():
        content[section] = content.get(section, {}) | body
    return build_recipe(content, where="test")


def state(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "state.json").read_text())["stages"])


class Calls:
    """Which training stages really ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        for name in ("finetune", "distill"):
            patch.setattr(pipeline, f"{name}_stage", self._counted(name, getattr(pipeline, f"{name}_stage")))

    def _counted(self, name: str, stage: Callable[..., Record]) -> Callable[..., Record]:
        def run(*args: Any, **kwargs: Any) -> Record:
            self.done.append(name)
            return stage(*args, **kwargs)

        return run

    def take(self) -> list[str]:
        done, self.done = self.done, []
        return done


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_finished_stages_are_skipped_and_changed_ones_done_again(
    tiny_task: Task, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = tiny_task()
    always = {"finetune": "always"}
    out = tmp_path / "run"

    def run(**options: Any) -> Record:
        changes = {name: body for name, body in options.items() if isinstance(body, dict)}
        plain = {name: body for name, body in options.items() if not isinstance(body, dict)}
        settings = recipe(teacher, data, **({"teacher": always} | changes))
        return pipeline.run(settings, out=out, stop_after="distill", **plain)

    first = run()
    assert calls.take() == ["finetune", "distill"]
    assert (out / "teacher" / "model.safetensors").is_file()
    assert (out / "student" / "bertemd_student.json").is_file()
    assert not list((out / "checkpoints").iterdir())
    assert {name: entry["status"] for name, entry in state(out).items()} == {"finetune": "done", "distill": "done"}

    capsys.readouterr()
    assert run() == first
    assert calls.take() == []
    assert "finetune: unchanged, skipped" in capsys.readouterr().err

    assert run(distill={"epochs": 1})["finetune"] == first["finetune"]
    assert calls.take() == ["distill"]
    assert "distill: its inputs have changed (distill.epochs); it is done anew" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "distill.jsonl").read_text().splitlines()]
    assert {line["epoch"] for line in lines} == {1}  # the log of the first student is gone
    assert "epochs: 1" in (out / "recipe.yaml").read_text()

    run(distill={"epochs": 1, "logging_steps": 1, "checkpoint_seconds": 0})
    run(distill={"epochs": 1}, teacher=always | {"checkpoint_seconds": 0})
    assert calls.take() == []  # neither is part of the result

    run(distill={"epochs": 1}, from_stage="distill")
    assert calls.take() == ["distill"]
    (out / "student" / "model.safetensors").unlink()
    run(distill={"epochs": 1})
    assert calls.take() == ["distill"]
    run(distill={"epochs": 1}, force=True)
    assert calls.take() == ["finetune", "distill"]


def test_a_teacher_with_its_head_is_not_finetuned(tiny_task: Task, tmp_path: Path, calls: Calls) -> None:
    teacher, data = tiny_task()
    record = pipeline.run(recipe(teacher, data), out=tmp_path / "run", stop_after="distill")
    assert calls.take() == ["distill"]
    assert "finetune" not in record
    assert state(tmp_path / "run")["finetune"] == {"status": "skipped", "reason": "the teacher has its head"}
    never = recipe(teacher, data, teacher={"finetune": "never"})
    assert not pipeline.needs_finetuning(never, teacher)


def test_run_can_end_after_finetuning(
    tiny_bert: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path, calls: Calls
) -> None:
    settings = recipe(tiny_bert(layers=4, head=False), tiny_data())
    record = pipeline.run(settings, out=tmp_path / "run", stop_after="finetune")
    assert calls.take() == ["finetune"]
    assert list(record) == ["finetune"]
    assert (tmp_path / "run" / "teacher" / "model.safetensors").is_file()


def test_from_needs_a_known_stage_whose_predecessors_finished(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    settings = recipe(teacher, data)
    with pytest.raises(RecipeError, match="--from: unknown stage 'dream'; known: finetune, distill, export, bench"):
        pipeline.run(settings, out=tmp_path / "run", from_stage="dream")
    with pytest.raises(
        RecipeError, match=r"--from export: finetune, distill did not finish in .*run; leave out --from"
    ):
        pipeline.run(settings, out=tmp_path / "run", from_stage="export")


def test_a_failed_stage_is_recorded_and_goes_on_where_it_failed(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bertemd_deploy import training

    teacher, data = tiny_task()
    settings = recipe(teacher, data, distill={"checkpoint_seconds": 0})
    whole = tmp_path / "whole"
    pipeline.run(settings, out=whole, stop_after="distill")
    step = training._Run.step

    def fail(*args: Any) -> Any:
        if args[1].number == 4:
            raise TrainingError("step 5: the loss is nan.")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "step", fail)
        with pytest.raises(TrainingError):
            pipeline.run(settings, out=tmp_path / "run", stop_after="distill")
    failed = state(tmp_path / "run")["distill"]
    assert (failed["status"], failed["error"]) == ("failed", "step 5: the loss is nan.")
    numbers = []

    def watch(*args: Any) -> Any:
        numbers.append(args[1].number)
        return step(*args)

    monkeypatch.setattr(training._Run, "step", watch)
    pipeline.run(settings, out=tmp_path / "run", stop_after="distill")
    assert numbers == [4, 5]
    assert state(tmp_path / "run")["distill"]["status"] == "done"
    hashes = {sha256_file(run / "student" / "model.safetensors") for run in (whole, tmp_path / "run")}
    assert len(hashes) == 1


def test_a_run_of_an_earlier_version_goes_on_and_one_of_other_inputs_says_what_it_discards(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "run"

    def stopped(**changes: Any) -> None:
        settings = recipe(teacher, data, distill={"checkpoint_seconds": 0} | changes)
        with pytest.raises(UnfinishedError):
            pipeline.run(settings, out=out, stop_after="distill", max_minutes=0.0)

    stopped()
    content = json.loads((out / "state.json").read_text())
    entry = content["stages"]["distill"]
    earlier = {key: value for key, value in entry.pop("given").items() if key != "model_files"}
    entry["inputs"] = sha256_json(earlier)
    (out / "state.json").write_text(json.dumps(content))
    capsys.readouterr()
    stopped(micro_batch_size=4, teacher_cache_bytes=10**9)
    said = capsys.readouterr().err
    assert "distill: continuing after step 1" in said
    assert "discarded" not in said
    stopped(learning_rate=1e-4)
    told = "distill: its inputs have changed (distill.learning_rate); its checkpoint is discarded and it starts over"
    assert told in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints" / "distill").glob("step-*")] == ["step-00000001.safetensors"]


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"},
    ],
)
def test_run_is_for_one_process(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"run: its stages measure and export, which is for one process"):
        pipeline.run(recipe(*tiny_task()), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_left_behind_with_force(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    settings = recipe(teacher, data, distill={"checkpoint_seconds": 0})

    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("bertemd_deploy.distill.save_model", fail)
        with pytest.raises(TrainingError, match="stopped"):
            pipeline.run(settings, out=tmp_path / "run", stop_after="distill")
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "distill").glob("step-*")
    checkpoint.write_bytes(checkpoint.read_bytes()[:99])
    with pytest.raises(TrainingError, match="Add --force to start over"):
        pipeline.run(settings, out=tmp_path / "run", stop_after="distill")
    pipeline.run(settings, out=tmp_path / "run", stop_after="distill", force=True)
    assert state(tmp_path / "run")["distill"]["status"] == "done"


def test_a_folder_that_holds_something_else_is_left_alone(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.txt\) and no state\.json"):
        pipeline.run(recipe(teacher, data), out=tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


class Trainer:
    """A stand-in for a training stage: counts its runs and writes a model as the real one does."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, work: stages.Work, *, beside: Callable[[Path, Record], None]) -> Record:
        from bertemd_deploy.files import new_folder

        self.runs += 1
        record = {"run": self.runs}
        work.checkpoints.mkdir(exist_ok=True)
        work.log.write_text('{"step": 1}\n')
        with new_folder(work.out) as folder:
            (folder / "model.safetensors").write_text(f"weights {self.runs}")
            beside(folder, record)
        return record


def test_stand_alone_does_nothing_twice_and_starts_over_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, train = tmp_path / "out", Trainer()
    inputs: dict[str, Any] = {"data": "abc", "distill": {"epochs": 2, "seed": 1}}
    assert pipeline.stand_alone("distill", out, inputs=inputs, force=False, train=train) == {"run": 1}
    assert sorted(path.name for path in out.iterdir()) == ["distill.jsonl", "model.safetensors", "stage.json"]
    assert pipeline.stand_alone("distill", out, inputs=inputs, force=False, train=train) == {"run": 1}
    assert train.runs == 1
    assert "is finished and its inputs are the same; nothing to do" in capsys.readouterr().err

    other = {"data": "abd", "distill": {"epochs": 3, "seed": 1}}
    with pytest.raises(ArtifactError) as raised:
        pipeline.stand_alone("distill", out, inputs=other, force=False, train=train)
    assert "holds a distill of other inputs (data, distill.epochs)" in str(raised.value)
    assert (out / "model.safetensors").read_text() == "weights 1"
    assert pipeline.stand_alone("distill", out, inputs=other, force=True, train=train) == {"run": 2}

    (out / "model.safetensors").unlink()
    assert pipeline.stand_alone("distill", out, inputs=other, force=False, train=train) == {"run": 3}


def test_a_stage_that_never_began_is_in_nobodys_way(tmp_path: Path) -> None:
    out, train = tmp_path / "out", Trainer()

    def refused(work: Any, beside: Any) -> Any:
        raise ModelError("the teacher is refused")

    with pytest.raises(ModelError, match="the teacher is refused"):
        pipeline.stand_alone("distill", out, inputs={"student": "9L"}, force=False, train=refused)
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "step-00000001.safetensors").write_text("one step of work")
    with pytest.raises(ArtifactError, match=r"holds a distill of other inputs \(student\)"):
        pipeline.stand_alone("distill", out, inputs={"student": "4L"}, force=False, train=train)
    (out / "checkpoints" / "step-00000001.safetensors").unlink()
    assert pipeline.stand_alone("distill", out, inputs={"student": "4L"}, force=False, train=train) == {"run": 1}


def test_a_student_of_more_layers_than_there_are_is_refused_before_any_stage(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    deep = recipe(teacher, data, student={"name": None, "layers": 9, "hidden": 16, "heads": 2, "intermediate": 32})
    with pytest.raises(RecipeError, match=r"student: 9 layers, the teacher has \d+; a student is not deeper"):
        pipeline.run(deep, out=tmp_path / "run")
    sizes = {"name": None, "layers": 2, "hidden": 16, "heads": 2, "intermediate": 32}
    absent = recipe(teacher, data, student=sizes | {"init_layers": [1, 99]})
    with pytest.raises(RecipeError, match=r"found \[1, 99\], allowed: 2 different layers of 1 to \d+ of the teacher"):
        pipeline.run(absent, out=tmp_path / "run")
    assert not (tmp_path / "run" / "finetune.jsonl").exists()


def test_stand_alone_keeps_what_a_person_put_there(tmp_path: Path) -> None:
    out, train = tmp_path / "out", Trainer()
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "one.txt").write_text("mine")
    (out / "two.txt").write_text("mine too")
    with pytest.raises(ArtifactError, match=r"holds something else \(notes, two\.txt\) and no stage\.json"):
        pipeline.stand_alone("distill", out, inputs={}, force=False, train=train)
    assert train.runs == 0
    pipeline.stand_alone("distill", out, inputs={}, force=True, train=train)
    assert (out / "notes" / "one.txt").read_text() == "mine"
    assert (out / "two.txt").read_text() == "mine too"
    assert (out / "model.safetensors").read_text() == "weights 1"


def test_stand_alone_leaves_no_files_of_another_stage_behind(tmp_path: Path) -> None:
    out, train = tmp_path / "out", Trainer()
    out.mkdir()
    stale = ("bertemd_student.json", "eval.npz", "distill.jsonl", "vocab.txt", "tokenizer.json", "stage.json")
    for name in (*stale, "notes.txt"):
        (out / name).write_text("{}")
    pipeline.stand_alone("finetune", out, inputs={}, force=True, train=train)
    kept = sorted(path.name for path in out.iterdir())
    assert kept == ["finetune.jsonl", "model.safetensors", "notes.txt", "stage.json"]


@pytest.mark.parametrize("force", [False, True])
def test_stand_alone_refuses_a_file(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match="is a file; --out needs a folder"):
        pipeline.stand_alone("distill", tmp_path / "out", inputs={}, force=force, train=Trainer())
    assert (tmp_path / "out").read_text() == "a file"


def test_stand_alone_names_a_damaged_record(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stage.json").write_text("{")
    with pytest.raises(ArtifactError, match="the stage record cannot be read"):
        pipeline.stand_alone("distill", out, inputs={}, force=False, train=Trainer())
    (out / "stage.json").write_text('{"stage": "finetune", "inputs": "0"}')
    with pytest.raises(ArtifactError, match=r"holds a finetune of other inputs \(unknown\)"):
        pipeline.stand_alone("distill", out, inputs={}, force=False, train=Trainer())


def test_export_needs_slices_or_data(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    with pytest.raises(
        ModelError, match=r"carries no bertemd_student\.json, so there are no dev examples .* Add --data"
    ):
        stages.export_stage(recipe(teacher, data), teacher, tmp_path / "artifact")
    with pytest.raises(BertemdError, match="there is no such folder"):
        stages.export_stage(recipe(teacher, data), tmp_path / "absent", tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_a_vocabulary_is_trimmed_to_what_the_train_texts_use(
    tiny_task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = tiny_task()
    settings = {"export": {"vocabulary": "corpus"}, "quantize": {"mode": "none"}}
    out = stages.export_stage(recipe(teacher, data, **settings), teacher, tmp_path / "artifact", data=str(data))
    made = Artifact.load(out)
    vocabulary = made.manifest["vocabulary"]
    assert vocabulary["kept"] < vocabulary["total"]
    assert vocabulary["coverage"]["train"]["identical_share"] == 1
    assert f"vocabulary: {vocabulary['kept']:,} of {vocabulary['total']:,} tokens" in capsys.readouterr().err
    whole = stages.export_stage(
        recipe(teacher, data, quantize={"mode": "none"}), teacher, tmp_path / "whole", data=str(data)
    )
    covered = made.evaluation().examples.tokens
    assert covered.max() < vocabulary["kept"]
    sizes = [Artifact.load(folder).manifest["files"]["onnx/model.onnx"]["components"] for folder in (out, whole)]
    assert sizes[0]["embedding"] < sizes[1]["embedding"]
    assert sizes[0]["encoder"] == sizes[1]["encoder"]


def test_a_vocabulary_is_not_trimmed_without_texts(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    asked = recipe(teacher, data, distill={"epochs": 1}, quantize={"mode": "none"}, export={"vocabulary": "corpus"})
    run = tmp_path / "run"
    pipeline.run(asked, out=run, stop_after="distill")
    with pytest.raises(
        RecipeError, match=r"export\.vocabulary: which tokens stay is read off train texts\. Add --data"
    ):
        stages.export_stage(asked, run / "student", tmp_path / "artifact")
    pipeline.run(asked, out=run, stop_after="export")
    assert Artifact.load(run / "artifact").manifest["vocabulary"]["asked"] == "corpus"


def test_an_artifact_does_not_go_into_its_student(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    for out in (teacher, teacher / "artifact", teacher.parent):
        with pytest.raises(RecipeError, match="the artifact would lie with the student's own files"):
            stages.export_stage(recipe(teacher, data), teacher, out, data=str(data))


def test_a_place_that_failed_is_measured_again_and_no_other(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    reused: list[set[str]] = []
    failing = {"raspberry-pi-5": MeasurementError("it went away.")}
    dies: list[bool] = []

    def measure(_artifact: Path, *, out: Path, reuse: Any, done: Any, settings: Any, **_: Any) -> Benched:
        reused.append(set(reuse))
        made = {}
        for name in settings.devices:
            if name not in failing:
                made[name] = out / name / "record.json"
                made[name].parent.mkdir(parents=True, exist_ok=True)
                made[name].write_text(json.dumps({"schema_version": 1, "device": {"name": name}}))
                done(name, made[name])
            elif dies:
                raise KeyboardInterrupt
        return Benched(made, {name: error for name, error in failing.items() if name in settings.devices})

    real = "bertemd_deploy.bench.places.bench_places"
    monkeypatch.setattr(real, create_autospec(pkgutil.resolve_name(real), side_effect=measure))
    devices = ["local", "raspberry-pi-5", "raspberry-pi-4"]
    settings = recipe(teacher, data, quantize={"mode": "none"}, bench={"devices": devices})
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(MeasurementError, match="it went away"):
            pipeline.run(settings, out=out, stop_after="bench")
    dies.append(True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings, out=out, stop_after="bench")
    dies.clear()
    with pytest.raises(MeasurementError):
        pipeline.run(settings, out=out, stop_after="bench")
    assert reused == [set(), *3 * [{"local", "raspberry-pi-4"}]]
    reused[2:] = []
    (out / "bench/local/record.json").write_text("{}")  # not what was measured
    other = recipe(teacher, data, quantize={"mode": "none"}, bench={"devices": devices, "rounds": 3})
    with pytest.raises(MeasurementError):
        pipeline.run(settings, out=out, stop_after="bench")
    assert reused[2:] == [{"raspberry-pi-4"}]
    with pytest.raises(MeasurementError):
        pipeline.run(other, out=out, stop_after="bench")
    failing.clear()
    pipeline.run(other, out=out, stop_after="bench", from_stage="bench")
    assert reused[3:] == [set(), set()]
    assert state(out)["bench"]["status"] == "done"
    assert not (out / "bench/measured.json").exists()


def test_the_whole_pipeline_ends_in_a_report_and_a_second_run_does_nothing(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = tiny_task()

    def measure(_artifact: Path, *, teacher: Path | None, out: Path, settings: Any, **_: Any) -> list[Path]:
        out.mkdir()
        made = {"schema_version": 1, "device": {"name": "here"}, "artifact": {}, "measurements": []}
        (out / "record.json").write_text(json.dumps(made | {"rounds": settings.rounds, "teacher": str(teacher)}))
        return Benched({"local": out / "record.json"}, {})

    def write_page(records: list[Path], *, out: Path, **_: Any) -> Path:
        out.mkdir(exist_ok=True)
        (out / "index.html").write_text(records[0].read_text())
        (out / "report.json").write_text(f"[{records[0].read_text()}]")
        return out / "index.html"

    for real, stand_in in (
        ("bertemd_deploy.bench.places.bench_places", measure),
        ("bertemd_deploy.report.report", write_page),
    ):
        monkeypatch.setattr(real, create_autospec(pkgutil.resolve_name(real), side_effect=stand_in))
    settings = recipe(teacher, data, quantize={"mode": "none"}, bench={"rounds": 3})
    out = tmp_path / "run"
    record = pipeline.run(settings, out=out)
    assert {name: entry["status"] for name, entry in state(out).items()} == {
        "finetune": "skipped",
        "distill": "done",
        "export": "done",
        "bench": "done",
        "report": "done",
    }
    assert record["export"]["metrics"]["student"] == record["distill"]["metrics"]["student"]
    assert Path(record["artifact"], "onnx", "model.onnx").is_file()
    page = json.loads(Path(record["page"]).read_text())
    assert (page["rounds"], page["teacher"]) == (3, str(teacher))
    assert record["bench"] == {"record": "bench/record.json", "records": ["bench/record.json"]}
    capsys.readouterr()
    assert pipeline.run(settings, out=out) == record
    assert capsys.readouterr().err.count("unchanged, skipped") == 4
    strict = recipe(teacher, data, quantize={"mode": "none"}, bench={"rounds": 3}, budget={"max_size_mb": 1})
    for skipped in (3, 4):  # the report is written again; then the miss is all that is left
        pipeline.run(strict, out=out)
        with pytest.raises(BudgetError, match=r"1 line\(s\) of budget or baseline missed"):
            enforce(out / "report")
        assert capsys.readouterr().err.count("unchanged, skipped") == skipped
        assert json.loads((out / "report/index.html").read_text())["budget"]["limits"] == {"max_size_mb": 1.0}


def test_a_stage_to_stop_after_that_does_not_exist_is_refused(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    with pytest.raises(
        RecipeError, match=r"--to: unknown stage 'dream'; known: finetune, distill, export, bench, report"
    ):
        pipeline.run(recipe(teacher, data), out=tmp_path / "run", stop_after="dream")
    assert not (tmp_path / "run").exists()


def test_a_run_can_stop_after_its_export_and_go_on_later(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    settings = recipe(teacher, data)
    record = pipeline.run(settings, out=tmp_path / "run", stop_after="export")
    assert record["artifact"] == str(tmp_path / "run" / "artifact")
    assert "page" not in record
    assert "bench" not in record
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["stages"]["export"]["status"] == "done"
    assert "bench" not in state["stages"]
