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
from bertemd_deploy.remote.folder import MANIFEST, PINS, needed_modules, requirements, write_programs, write_runner

PI = load_devices()["raspberry-pi-4"]


def test_the_folder_holds_all_it_needs(runner_folder, tmp_path):
    names = {path.name for path in runner_folder.iterdir()}
    assert names == {
        "MANIFEST", "README.txt", "artifact", "keeper.py", "lib", "measure.py", "prepare.py", "requirements.txt", "run.py",
        "settings.json", "standins",
    }  # fmt: skip
    loaded = Artifact.load(runner_folder / "artifact")
    assert loaded.graphs() == ["fp32", "int8"]
    for name in loaded.manifest["files"]:
        loaded.file(name)
    given = json.loads((runner_folder / "settings.json").read_text())
    assert given["settings"]["sequence_lengths"] == [4]
    assert (given["device"], given["notes"]) == (None, [])
    assert "python3 run.py --quick" in (runner_folder / "README.txt").read_text()
    assert not any(part in str(path) for path in runner_folder.rglob("*") for part in ("torch", "rich", "__pycache__"))


def test_the_manifest_names_every_other_file(runner_folder):
    lines = (runner_folder / MANIFEST).read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    there = [path for path in runner_folder.rglob("*") if path.is_file() and path.name != MANIFEST]
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


def test_a_finished_folder_is_replaced_and_nothing_else(artifact_folder, tmp_path):
    out = tmp_path / "out"
    assert write_runner(artifact_folder, out, settings=SMALL) == out
    write_runner(artifact_folder, out, settings=replace(SMALL, rounds=3))
    assert json.loads((out / "settings.json").read_text())["settings"]["rounds"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"other: holds something else \(mine\.txt\) and no MANIFEST"):
        write_runner(artifact_folder, other, settings=SMALL)
    write_runner(artifact_folder, other, settings=SMALL, force=True)
    assert not (other / "mine.txt").exists()


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
    assert list((tmp_path / "out").iterdir()) == []


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
