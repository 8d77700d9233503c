from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from remote_parts import SMALL
from tiny_artifact import write_manifest

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.devices import Runtimes, load_devices
from bertemd_deploy.errors import ArtifactError, MeasurementError, ModelError, RecipeError
from bertemd_deploy.remote import folder
from bertemd_deploy.remote.folder import LISTING, PINS, needed_modules, requirements, write_programs, write_runner
from bertemd_deploy.remote.runner import prepare

PI = load_devices()["raspberry-pi-4"]


def test_the_folder_holds_all_it_needs(runner_folder, tmp_path):
    names = {path.name for path in runner_folder.iterdir()}
    assert names == {
        "README.txt", "artifact", "bertemd-files.txt", "keeper.py", "lib", "measure.py", "prepare.py", "requirements.txt",
        "run.py", "settings.json", "standins",
    }  # fmt: skip
    loaded = Artifact.load(runner_folder / "artifact")
    assert loaded.graphs() == ["fp32", "int8"]
    for name in loaded.manifest["files"]:
        loaded.file(name)
    given = json.loads((runner_folder / "settings.json").read_text())
    assert given["settings"]["sequence_lengths"] == [4]
    assert (given["device"], given["notes"]) == (None, [])
    assert "python3 run.py --quick" in (runner_folder / "README.txt").read_text()
    assert f"sha256sum --check {LISTING}`" in (runner_folder / "README.txt").read_text()
    assert not any(part in str(path) for path in runner_folder.rglob("*") for part in ("torch", "rich", "__pycache__"))


def test_the_list_names_every_other_file(runner_folder):
    lines = (runner_folder / LISTING).read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    there = [path for path in runner_folder.rglob("*") if path.is_file() and path.name != LISTING]
    assert sorted(listed) == sorted(path.relative_to(runner_folder).as_posix() for path in there)
    for name, digest in listed.items():
        assert hashlib.sha256((runner_folder / name).read_bytes()).hexdigest() == digest


def test_the_copied_modules_import_alone(runner_folder):
    """Without this package, rich, yaml, typer, psutil or tokenizers: with the stand-ins for the last two."""
    code = """
import sys
for name in ("rich", "yaml", "typer", "torch", "transformers", "onnx", "psutil", "tokenizers"):
    sys.modules[name] = None
for name in ("psutil", "tokenizers"):
    del sys.modules[name]
root = sys.argv[1]
sys.path[:0] = [f"{root}/lib", f"{root}/standins/psutil", f"{root}/standins/tokenizers"]
import bertemd_deploy.bench.compare, bertemd_deploy.bench.worker, bertemd_deploy.bench.end_to_end, bertemd_deploy.devices
import psutil, tokenizers
own = [module.__file__ for name, module in sys.modules.items() if name.startswith("bertemd_deploy")]
assert all(path.startswith(f"{root}/lib/") for path in own), own
assert "standins" in psutil.__file__ and "standins" in tokenizers.__file__
print(len(own))
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(runner_folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 25


def test_measuring_needs_no_training_module():
    found = set(needed_modules())
    assert {
        "",
        "bench",
        "bench.compare",
        "bench.worker",
        "bench.statistics",
        "artifact",
        "settings",
        "devices",
    } <= found
    assert not found & {"console", "models", "export", "cli", "config", "device_rows", "emd", "report"}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_folder_is_replaced_with_force(artifact_folder, tmp_path):
    out = tmp_path / "out"
    assert write_runner(artifact_folder, out, settings=SMALL) == out
    before = contents(out)
    with pytest.raises(ArtifactError, match=r"out: is not empty \(README\.txt, artifact, .* or add --force to write"):
        write_runner(artifact_folder, out, settings=replace(SMALL, rounds=3))
    assert contents(out) == before
    write_runner(artifact_folder, out, settings=replace(SMALL, rounds=3), force=True)
    assert json.loads((out / "settings.json").read_text())["settings"]["rounds"] == 3
    assert set(contents(out)) == set(before)


def test_what_the_bundle_did_not_write_stays(artifact_folder, tmp_path):
    """A folder of sources with a MANIFEST of its own, as many have."""
    out = tmp_path / "project"
    mine = {"MANIFEST": "src/thesis.txt", "src/thesis.txt": "years of work", "lib/mine.py": "x = 1"}
    for name, text in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    with pytest.raises(ArtifactError, match=r"project: is not empty \(MANIFEST, lib, src\)\. Choose an empty"):
        write_runner(artifact_folder, out, settings=SMALL)
    assert contents(out) == {name: text.encode() for name, text in mine.items()}
    write_runner(artifact_folder, out, settings=SMALL, force=True)
    assert {name: (out / name).read_text() for name in mine} == mine
    prepare.check_files(out)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_torch")
def test_records_and_wheels_outlive_another_bundle(artifact_folder, graph_teacher, tmp_path):
    """What run.py and the user put there stays; what only the earlier bundle brought goes."""
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL, teacher=graph_teacher)
    (out / "record.json").write_text("{}")
    (out / "wheels").mkdir()
    (out / "wheels" / "numpy.whl").write_bytes(b"wheel")
    write_runner(artifact_folder, out, settings=replace(SMALL, graphs=("int8",)), force=True)
    fresh = write_runner(artifact_folder, tmp_path / "fresh", settings=replace(SMALL, graphs=("int8",)))
    assert contents(out) == contents(fresh) | {"record.json": b"{}", "wheels/numpy.whl": b"wheel"}
    assert not (out / "teacher").exists()


def test_an_empty_folder_of_the_users_is_not_removed(artifact_folder, tmp_path):
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL)
    (out / "wheels").mkdir()
    write_runner(artifact_folder, out, settings=SMALL, force=True)
    assert (out / "wheels").is_dir()


def test_of_a_list_that_cannot_be_read_no_file_is_lost(artifact_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / LISTING).write_bytes(b"\xff")
    (out / "notes.txt").write_text("mine")
    write_runner(artifact_folder, out, settings=SMALL, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    prepare.check_files(out)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("", "artifact"),
        ("artifact", "artifact"),
        ("artifact/bundle", "artifact"),
        ("teacher", "teacher"),
        ("teacher/onnx", "teacher"),
    ],
)
def test_the_artifact_and_the_teacher_are_never_written_over(place, what, artifact_folder, graph_teacher, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=rf"is, holds or lies in the {what} itself\. Choose another --out"):
        write_runner(artifact_folder, tmp_path / place, settings=SMALL, teacher=graph_teacher, force=True)
    assert contents(tmp_path) == before


def test_a_model_card_edited_by_hand_is_no_damage(artifact_folder, tmp_path):
    (artifact_folder / "README.md").write_text("as exported")
    names = json.loads((artifact_folder / "bertemd.json").read_text())["files"]
    digest = hashlib.sha256(b"as exported").hexdigest()
    write_manifest(artifact_folder, files=names | {"README.md": {"sha256": digest}})
    (artifact_folder / "README.md").write_text("as exported, and more")
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL)
    loaded = Artifact.load(out / "artifact")
    assert sorted(loaded.manifest["files"]) == sorted(names)
    for name in loaded.manifest["files"]:
        loaded.file(name)


def test_no_path_of_this_machine_travels(artifact_folder, tmp_path):
    asked = replace(SMALL, device_file=str(tmp_path / "boards.yaml"), devices=("local", "ssh://pi@board"))
    out = write_runner(artifact_folder, tmp_path / "out", settings=asked)
    text = (out / "settings.json").read_text()
    assert str(tmp_path) not in text
    assert "board" not in text
    given = json.loads(text)["settings"]
    assert (given["device_file"], given["devices"], given["rounds"]) == (None, ["local"], SMALL.rounds)


def test_only_the_graphs_that_are_measured_travel(artifact_folder, artifact, tmp_path):
    out = write_runner(artifact_folder, tmp_path / "out", settings=replace(SMALL, graphs=("int8",)))
    assert [path.name for path in (out / "artifact" / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert Artifact.load(out / "artifact").graphs() == ["int8"]
    given = json.loads((out / "settings.json").read_text())
    assert set(given["artifact"]["files"]) == set(artifact.manifest["files"])
    whole = write_runner(artifact_folder, tmp_path / "whole", settings=replace(SMALL, graphs=None))
    assert Artifact.load(whole / "artifact").graphs() == ["fp32", "int8"]
    with pytest.raises(
        MeasurementError, match=r"has none of the graphs asked for \(fp16\); it has: fp32, int8\. Choose"
    ):
        write_runner(artifact_folder, tmp_path / "none", settings=replace(SMALL, graphs=("fp16",)))


def test_a_damaged_artifact_writes_nothing(artifact_folder, tmp_path):
    (artifact_folder / "onnx" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"model\.onnx: its SHA-256 is"):
        write_runner(artifact_folder, tmp_path / "out", settings=SMALL)
    assert not (tmp_path / "out").exists()


def test_a_manifest_cannot_name_files_outside(artifact_folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    write_manifest(artifact_folder, files={"../secret": {"sha256": hashlib.sha256(b"secret").hexdigest()}})
    with pytest.raises(ArtifactError, match=r"the file name '\.\./secret' points outside the folder"):
        write_runner(artifact_folder, tmp_path / "out", settings=replace(SMALL, graphs=None))


@pytest.mark.usefixtures("no_torch")
def test_the_teachers_graph_travels(artifact_folder, graph_teacher, tmp_path):
    (graph_teacher / "model.safetensors").write_bytes(b"weights stay at home")
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL, teacher=graph_teacher)
    there = sorted(
        path.relative_to(out / "teacher").as_posix() for path in (out / "teacher").rglob("*") if path.is_file()
    )
    assert there == ["config.json", "onnx/model.onnx", "tokenizer.json"]
    assert (out / "teacher/onnx/model.onnx").read_bytes() == (graph_teacher / "onnx/model.onnx").read_bytes()


@pytest.mark.usefixtures("no_torch")
def test_external_weights_of_the_teacher_travel(artifact_folder, graph_teacher, tmp_path):
    (graph_teacher / "onnx" / "model.onnx_data").write_bytes(b"more")
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL, teacher=graph_teacher)
    assert (out / "teacher/onnx/model.onnx_data").read_bytes() == b"more"


def test_a_teacher_without_a_graph_is_left_out_and_said(artifact_folder, graph_teacher, tmp_path, monkeypatch):
    in_torch = Candidate("teacher", "pytorch", None, "fp32", graph_teacher, 1, 2, 2, 2, (0, 1))
    monkeypatch.setattr(folder, "teachers", lambda *_, **__: ([in_torch], []))
    config = json.loads((graph_teacher / "config.json").read_text())
    (graph_teacher / "config.json").write_text(json.dumps(config | {"model_type": "deberta"}))
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL, teacher=graph_teacher)
    given = json.loads((out / "settings.json").read_text())
    assert given["notes"] == ["the teacher is not measured there: the graph of a deberta is not written"]
    assert not (out / "teacher").exists()


def test_another_teacher_is_refused(artifact_folder, graph_teacher, tmp_path):
    config = json.loads((graph_teacher / "config.json").read_text())
    (graph_teacher / "config.json").write_text(json.dumps(config | {"id2label": {"0": "cat", "1": "dog"}}))
    with pytest.raises(ModelError, match="the teacher's labels are cat, dog; the artifact's are negative, positive"):
        write_runner(artifact_folder, tmp_path / "out", settings=SMALL, teacher=graph_teacher)


def test_requirements_pin_every_package_for_every_python():
    lines = requirements(None).splitlines()
    assert lines == [f"{package}=={version}; {python}" for package, version, python in PINS]
    for package in ("numpy", "onnxruntime", "tokenizers", "psutil"):
        assert any(line.startswith(f"{package}==") for line in lines)
    assert "bertemd" not in requirements(None)


def test_the_newest_pins_are_what_is_tested():
    path = Path(__file__).resolve().parents[2] / "constraints.txt"
    tested = dict(line.split("==") for line in path.read_text().split() if "==" in line)
    for package in {name for name, _, _ in PINS}:
        assert [version for name, version, _ in PINS if name == package][-1] == tested[package]


def test_bad_releases_of_a_device_are_avoided():
    pinned = [version for package, version, _ in PINS if package == "onnxruntime"]
    bad = tuple((version, "dies on import") for version in set(pinned))
    avoided = replace(PI, onnxruntime=Runtimes(good=("1.9.0", "1.18.1", pinned[0]), bad=bad))
    found = [line for line in requirements(avoided).splitlines() if line.startswith("onnxruntime==")]
    assert [line.partition(";")[0] for line in found] == ["onnxruntime==1.18.1"] * len(pinned)
    with pytest.raises(
        RecipeError, match=r"raspberry-pi-4: onnxruntime .* is bad there \(dies on import\), and no release"
    ):
        requirements(replace(PI, onnxruntime=Runtimes(good=(), bad=bad)))


def test_no_built_in_device_is_without_a_release():
    for device in load_devices().values():
        assert "onnxruntime==" in requirements(device)


def test_the_device_travels(artifact_folder, tmp_path):
    out = write_runner(artifact_folder, tmp_path / "out", settings=SMALL, device=PI)
    given = json.loads((out / "settings.json").read_text())["device"]
    assert (given["name"], given["session"]) == (PI.name, {**vars(PI.session)})


def test_programs_are_the_runners_own(tmp_path):
    write_programs(tmp_path)
    console = (tmp_path / "lib/bertemd_deploy/console.py").read_text()
    assert "without rich" in console
    package = (tmp_path / "lib/bertemd_deploy/__init__.py").read_text()
    first = next(
        line for line in package.splitlines() if line.startswith(("import", "from")) and "__future__" not in line
    )
    assert first.startswith("import bertemd_deploy.older")
    assert Path(folder.RUNNER, "run.py").read_bytes() == (tmp_path / "run.py").read_bytes()
