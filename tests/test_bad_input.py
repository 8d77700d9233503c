"""What people give wrong, through the command line: one message with where and what, the exit code, nothing harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.cli import app
from bertemd_deploy.files import sha256_file, sha256_folder

Task = Callable[..., tuple[Path, Path]]
Make = Callable[..., Path]
SIZES = {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 32}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *, code: int = 3) -> str:
    """Return the one message of a command that ended with `code`; its result must not be on stdout."""
    assert result.exit_code == code, (result.exception, result.stderr)
    assert result.stdout == ""
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def distill(teacher: Path, data: Path, out: Path, *settings: str, force: bool = False) -> Result:
    plain = ["data.max_length=32", "distill.epochs=2", "distill.batch_size=8", "distill.checkpoint_seconds=0"]
    recipe = out.with_name(f"{out.name}.yaml")
    recipe.write_text(
        json.dumps({"teacher": {"model": str(teacher)}, "data": {"path": str(data)}, "student": SIZES})  # JSON is YAML
    )
    overrides = [part for setting in (*plain, *settings) for part in ("--set", setting)]
    return call("distill", recipe, "--out", out, *overrides, *(["--force"] if force else []))


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def damage_data(folder: Path, kind: str) -> None:
    train, dev = folder / "train.tsv", folder / "dev.tsv"
    if kind == "missing":
        dev.unlink()
    elif kind == "empty":
        train.write_text("")
    elif kind == "header only":
        dev.write_text("sentence\tlabel\n")
    elif kind == "no label column":
        rewrite(train, lambda lines: [lines[0].replace("label", "mood"), *lines[1:]])
    elif kind == "no text column":
        rewrite(train, lambda lines: [lines[0].replace("sentence", "review"), *lines[1:]])
    elif kind == "other label":
        rewrite(dev, lambda lines: [*lines[:5], "the film was good\tmaybe"])
    elif kind == "short row":
        rewrite(train, lambda lines: [*lines[:4], "no tab in this line", *lines[4:]])
    elif kind == "latin-1":
        train.write_bytes(train.read_bytes() + "café\tyes\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("missing", ("needs exactly one dev file", "found none")),
        ("empty", ("train.tsv", "empty")),
        ("header only", ("dev.tsv: holds no rows. Give it a header line and at least one row.",)),
        ("no label column", ("train.tsv: no column 'label'; found: sentence, mood. Name yours in data.label.",)),
        ("no text column", ("train.tsv: needs the column(s)", "found: review, label", "data.sentence1")),
        ("other label", ("dev.tsv line 6: unknown label 'maybe'; known from the train split or the task: no, yes.",)),
        ("short row", ("train.tsv line 5:",)),
        ("latin-1", ("train.tsv line 50: not UTF-8 (byte 0xe9)", "iconv -t UTF-8")),
    ],
)
def test_data_that_cannot_be_read(tiny_task: Task, tmp_path: Path, kind: str, parts: tuple[str, ...]) -> None:
    teacher, data = tiny_task()
    damage_data(data, kind)
    told = refused(distill(teacher, data, tmp_path / "out"))
    for part in parts:
        assert part in told
    assert not (tmp_path / "out").exists()


def test_an_absent_data_folder(tiny_task: Task, tmp_path: Path) -> None:
    teacher, _ = tiny_task()
    told = refused(distill(teacher, tmp_path / "absent", tmp_path / "out"))
    assert f"{tmp_path / 'absent'}: there is no such data folder." in told


def test_a_regression_label_that_is_no_number(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task("regression")
    rewrite(data / "dev.tsv", lambda lines: [*lines[:3], "the film\tgreat", *lines[3:]])
    told = refused(distill(teacher, data, tmp_path / "out", "data.task=regression"))
    assert "dev.tsv line 4: the label 'great' is not a finite number, as regression needs." in told


def break_model(folder: Path, kind: str) -> None:
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "no head":
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "two labels of three":
        config = json.loads((folder / "config.json").read_text())
        labels = {"0": "no", "1": "yes", "2": "maybe"}
        (folder / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    elif kind == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("no config", "no config.json, so this is not a Hugging Face model folder."),
        ("pickle", "only pickle weights (pytorch_model.bin), which can run code when loaded."),
        ("no head", "no classification head (classifier.bias, classifier.weight missing). Fine-tune it first"),
        ("two labels of three", "the model has 3 labels (no, yes, maybe), the data 2 (no, yes)."),
        ("truncated", "not a readable safetensors file ("),
    ],
)
def test_a_teacher_that_cannot_be_used(tiny_task: Task, tmp_path: Path, kind: str, part: str) -> None:
    teacher, data = tiny_task()
    break_model(teacher, kind)
    told = refused(distill(teacher, data, tmp_path / "out"))
    assert part in told
    assert str(teacher) in told


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("graph", "student.onnx: an ONNX graph, which is exported already. Name the student's folder"),
        ("folder of graphs", "holds onnx/model.onnx, which is exported already, and no model.safetensors."),
        ("artifact", "an artifact, which is exported already. Name the student's folder"),
        (
            "quantized",
            "config.json: its weights are quantized already (bitsandbytes); int8 is made here from weights of full",
        ),
    ],
)
def test_a_student_that_is_exported_or_quantized_already(
    tiny_bert: Make, tiny_artifact: Make, tmp_path: Path, kind: str, part: str
) -> None:
    student = tmp_path / "student.onnx" if kind == "graph" else tmp_path / "given"
    if kind == "artifact":
        student = tiny_artifact()
    elif kind == "quantized":
        student = tiny_bert("student")
        config = json.loads((student / "config.json").read_text())
        method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (student / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    elif kind == "folder of graphs":
        (student / "onnx").mkdir(parents=True)
        (student / "onnx/model.onnx").write_bytes(b"")
    else:
        student.write_bytes(b"")
    told = refused(call("export", student, "--out", tmp_path / "out"))
    assert told.startswith(f"error: {student}")
    assert part in told
    assert not (tmp_path / "out").exists()


def test_a_student_checkpoint_with_another_tokenizer(tiny_task: Task, tiny_bert: Make, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    small = tiny_bert("small", layers=2, head=False)
    content = json.loads((small / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["filmy"] = vocabulary.pop("film")
    (small / "tokenizer.json").write_text(json.dumps(content))
    told = refused(distill(teacher, data, tmp_path / "out", f"student.init={small}"))
    assert f"{small}: its tokenizer has {len(vocabulary) - 1} of the teacher's {len(vocabulary)} tokens" in told
    assert "it lacks 'film'" in told


def test_a_hub_id_without_network(tiny_task: Task, tmp_path: Path) -> None:
    _, data = tiny_task()
    told = refused(distill(Path("nobody/no-such-model"), data, tmp_path / "out"))
    assert "nobody/no-such-model: could not be fetched from the model hub" in told
    assert "download the model elsewhere and name its folder instead" in told


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("teacher: {model: t, epoch: 3}", ("teacher.epoch: unknown key; known: model, sha256",)),
        ("teachers: {model: t}", ("unknown section 'teachers'; known: teacher, data, student",)),
        ("distill: {epochs: ten}", ("distill.epochs: found str 'ten', allowed: a whole number",)),
        ("distill: {epochs: 0, mapping: best}", ("distill.epochs: found 0", "distill.mapping: found str 'best'")),
        ("distill: {epochs: [1", ("line 2 not valid YAML",)),
        ("- a\n- b", ("a recipe is a mapping of sections",)),
    ],
)
def test_a_recipe_with_faults(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "\n")
    told = refused(call("check", path), code=2)
    assert told.startswith(f"error: {path}:")
    for part in parts:
        assert part in told


def test_an_override_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("teacher: {model: t}\ndata: {path: demo}\nstudent: {name: 4L}\n")
    told = refused(call("check", tmp_path / "recipe.yaml", "--set", "epochs=3"), code=2)
    assert "--set 'epochs=3': write it as section.key=value" in told
    assert "there is no such recipe" in refused(call("run", tmp_path / "absent.yaml"), code=2)


@pytest.mark.parametrize("command", ["distill", "run", "export"])
def test_an_output_folder_of_something_else_is_left_as_it_was(tiny_task: Task, tmp_path: Path, command: str) -> None:
    teacher, data = tiny_task()
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "one.jpg").write_bytes(b"\xff\xd8")
    (home / "thesis.txt").write_text("mine")
    before = sha256_folder(home)
    if command == "distill":
        result = distill(teacher, data, home)
    elif command == "run":
        (tmp_path / "r.yaml").write_text(
            json.dumps({"teacher": {"model": str(teacher)}, "data": {"path": str(data)}, "student": SIZES})
        )
        result = call("run", tmp_path / "r.yaml", "--out", home)
    else:
        result = call("export", teacher, "--out", home, "--data", data, "--set", "data.max_length=32")
    told = refused(result)
    assert f"{home}: holds something else (photos, thesis.txt)" in told
    assert "Choose an empty or new folder, or add --force" in told
    assert sha256_folder(home) == before


def test_force_adds_a_student_beside_what_was_there(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    assert distill(teacher, data, home, force=True).exit_code == 0
    assert (home / "thesis.txt").read_text() == "mine"
    assert (home / "model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a 2 MiB file system; skip where mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Write until the disk is full."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as handle:
        try:
            while True:
                handle.write(b"\0" * 4096)
        except OSError:
            return ballast


@pytest.mark.parametrize("moment", ["training", "final save"])
def test_a_full_disk_keeps_what_was_there(
    tiny_task: Task, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from bertemd_deploy import distill as module
    from bertemd_deploy import training

    teacher, data = tiny_task()
    assert distill(teacher, data, tmp_path / "whole").exit_code == 0
    out = small_disk / "student"
    step, save, numbers = training._Run.step, module.save_model, []

    def full_at_step_five(*args: Any) -> Any:
        numbers.append(args[1].number)
        if moment == "training" and args[1].number == 4:
            fill(small_disk)
        return step(*args)

    def full_at_the_save(*args: Any, **kwargs: Any) -> None:
        fill(small_disk)
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "step", full_at_step_five)
        if moment == "final save":
            patch.setattr(module, "save_model", full_at_the_save)
        told = refused(distill(teacher, data, out))
    assert "could not be written (" in told
    assert "o space left on device" in told
    assert "Free space or choose another --out, then run the same command again." in told
    assert [path.name for path in out.glob("checkpoints/step-*")] == [
        f"step-{4 if moment == 'training' else 12:08d}.safetensors"
    ]
    assert not (out / "model.safetensors").exists()
    assert not list(small_disk.rglob(".partial-*"))
    (small_disk / "ballast").unlink()
    numbers.clear()
    monkeypatch.setattr(training._Run, "step", full_at_step_five)
    monkeypatch.setattr(f"{__name__}.fill", lambda _disk: None)
    assert distill(teacher, data, out).exit_code == 0
    assert numbers == (list(range(4, 12)) if moment == "training" else [])
    assert sha256_file(out / "model.safetensors") == sha256_file(tmp_path / "whole" / "model.safetensors")


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "bertemd.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("truncated graph", "model_fused.onnx: its SHA-256 is"),
        ("truncated graph, hash corrected", "cannot load this file"),
        ("missing graph", "model_fused.onnx: missing, though the manifest names it."),
        ("other tokenizer", "tokenizer.json: its SHA-256 is"),
        ("truncated manifest", "bertemd.json: the artifact's manifest cannot be read"),
        ("missing manifest", "bertemd.json: the artifact's manifest is missing."),
        ("later version", "schema_version is 99, this bertemd reads 1."),
        ("wrong shape", "'labels' should be a list."),
        ("climbing name", "'../secret' points outside the folder; refused."),
        ("no folder", "there is no such folder. An artifact is what `bertemd export` wrote."),
    ],
)
def test_an_artifact_that_was_damaged(
    tiny_artifact: Make, kind: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_artifact()
    graph = folder / "onnx" / "model_fused.onnx"
    files = json.loads((folder / "bertemd.json").read_text())["files"]
    if kind.startswith("truncated graph"):
        graph.write_bytes(graph.read_bytes()[:-500])
        if "corrected" in kind:
            files["onnx/model_fused.onnx"]["sha256"] = sha256_file(graph)
            edit_manifest(folder, files=files)
    elif kind == "missing graph":
        graph.unlink()
    elif kind == "other tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "truncated manifest":
        (folder / "bertemd.json").write_text((folder / "bertemd.json").read_text()[:200])
    elif kind == "missing manifest":
        (folder / "bertemd.json").unlink()
    elif kind == "later version":
        edit_manifest(folder, schema_version=99)
    elif kind == "wrong shape":
        edit_manifest(folder, labels="no, yes")
    elif kind == "climbing name":
        monkeypatch.setitem(GRAPHS, "fused", "../secret")
        edit_manifest(folder, files=files | {"../secret": files["onnx/model_fused.onnx"]})
    elif kind == "no folder":
        folder = folder.with_name("absent")
    assert part in refused(call("predict", folder, "--graph", "auto" if kind == "no folder" else "fused", "a text"))


def test_an_absent_graph_names_those_present(tiny_artifact: Make) -> None:
    told = refused(call("predict", tiny_artifact(), "--graph", "int8", "a text"))
    assert "no graph 'int8'; this artifact has: fp32, fused." in told


def test_an_artifact_evaluated_on_other_labels(tiny_artifact: Make, tiny_data: Make) -> None:
    data = tiny_data(labels=("bad", "good"))
    told = refused(call("evaluate", tiny_artifact(), "--data", data))
    assert "dev.tsv line 2: unknown label 'bad'; known from the artifact or model: no, yes." in told


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export"])
def test_the_demo_for_a_task_of_another_kind(tiny_bert: Make, tmp_path: Path, command: str) -> None:
    out = () if command == "evaluate" else ("--out", tmp_path / "out")
    model = ("--model", tiny_bert()) if command == "finetune" else (tiny_bert(),)
    told = refused(call(command, *model, "--data", "demo", "--task", "question-answering", *out), code=2)
    assert "demo: it is a classification of single texts, no data for the task question-answering." in told


def test_weights_that_give_no_number(tiny_task: Task, tiny_bert: Make, tmp_path: Path) -> None:
    _, data = tiny_task()
    model = tiny_bert("broken", layers=2, head=False)
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = call(
        "finetune", "--model", model, "--data", data, "--out", tmp_path / "out", "--set", "data.max_length=32"
    )
    assert "step 1: the loss is nan. Lower the learning rate" in refused(result)
    assert not (tmp_path / "out" / "model.safetensors").exists()


WITHOUT_TORCH = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "datasets", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from typer.testing import CliRunner
from bertemd_deploy.cli import app

for arguments in __import__("json").loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(result.exit_code, (result.stderr or result.stdout).strip().splitlines()[-1], sep="|")
"""


def test_without_the_train_extra_its_one_install_command_is_named(
    tiny_task: Task, tiny_artifact: Make, tmp_path: Path
) -> None:
    artifact, (teacher, data) = tiny_artifact(), tiny_task("single", name="other")
    root = Path(__file__).resolve().parents[1]
    recipe = root / "recipes" / "quickstart.yaml"
    out = str(tmp_path / "out")
    commands = [
        ["distill", "--teacher", str(teacher), "--data", str(data), "--student", "4L", "--out", out],
        ["evaluate", str(teacher), "--data", str(data)],
        ["export", str(teacher), "--data", str(data), "--out", f"{out}-artifact"],
        ["check", str(recipe)],
        ["evaluate", str(artifact), "--data", str(data)],
        ["predict", str(artifact), "good film"],
    ]
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ).stdout.splitlines()
    for line in told[:3]:
        code, message = line.split("|", 1)
        assert code == "3"
        assert message.startswith("error: this needs the 'train' extra (")
        assert message.endswith("is not installed). Install it with: pip install 'bertemd-deploy[train]'")
    assert [line.split("|")[0] for line in told[3:]] == ["0", "0", "0"]
