"""The runner folder on the oldest Python it is for, and on 64-bit Arm under emulation with numpy and ONNX Runtime alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compat_asking import INSTALLED, LIMIT, executable, installed
from compat_cases import DESIGNS, Case

from bertemd_deploy.remote.folder import PINS, write_runner
from bertemd_deploy.remote.received import checked_record
from bertemd_deploy.remote.session import bench_remote
from bertemd_deploy.settings import BenchSettings

pytestmark = pytest.mark.compat
SMALL = BenchSettings(
    sequence_lengths=(16,),
    batch_sizes=(1,),
    threads=(1,),
    rounds=2,
    seconds_per_cell=0.01,
    paced_interval_ms=0,
    idle_seconds=0,
    arena=False,
)
# Every kind of task, and what differs in the graphs or the tokenizer; each takes a while.
MEASURED = (
    "classification",
    "regression",
    "multilabel",
    "token-classification",
    "question-answering",
    "roberta-tokenizer",
    "static",
    "float16",
)
FAKE_SSH = Path(__file__).resolve().parents[1] / "remote" / "fake_ssh.py"


def run(python: Path, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a runner folder by hand, with no variable of this process."""
    return subprocess.run(
        [str(python), str(folder / "run.py"), *options],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def oldest() -> Path:
    return installed("python3.9", program="bin/python") / "bin" / "python"


def pinned(package: str) -> str:
    return next(version for name, version, python in PINS if name == package and ("<" in python or package == "psutil"))


@pytest.mark.parametrize("name", MEASURED)
def test_python_3_9_measures(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = oldest()
    case: Case = request.getfixturevalue("cases")[name]
    folder = write_runner(case.artifact.folder, tmp_path / "bundle", settings=SMALL)
    done = run(python, folder, "--no-install")
    assert done.returncode == 0, done.stderr
    record = checked_record((folder / "record.json").read_text(encoding="utf-8"), artifact=case.artifact, where=name)
    assert record["versions"]["python"].startswith("3.9.")
    assert record["versions"]["onnxruntime"] == pinned("onnxruntime")
    assert record["runner"]["stand_ins"] == []
    assert {entry["graph"] for entry in record["measurements"]} == set(case.artifact.graphs())
    assert all(entry["end_to_end_ms"]["n"] > 0 for entry in record["measurements"] if entry["sequence"] == "replay")


def test_python_3_9_measures_with_the_stand_ins(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = oldest()
    case: Case = request.getfixturevalue("cases")[next(iter(DESIGNS))]
    folder = write_runner(case.artifact.folder, tmp_path / "bundle", settings=SMALL)
    for package in ("tokenizers", "psutil"):
        (tmp_path / "broken" / package).mkdir(parents=True)
        (tmp_path / "broken" / package / "__init__.py").write_text("raise ImportError('broken here')")
    done = run(python, folder, "--no-install", "--quick", PYTHONPATH=str(tmp_path / "broken"))
    assert done.returncode == 0, done.stderr
    record = checked_record((folder / "record.json").read_text(encoding="utf-8"), artifact=case.artifact, where="here")
    assert record["runner"]["stand_ins"] == ["tokenizers", "psutil"]


@pytest.mark.network
def test_python_3_9_installs_what_is_pinned(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A Python with pip and nothing else: all is installed into the folder, and nowhere else."""
    bare = tmp_path / "bare"
    subprocess.run([str(oldest()), "-m", "venv", str(bare)], check=True)
    case: Case = request.getfixturevalue("cases")[next(iter(DESIGNS))]
    home = tmp_path / "home"
    folder = write_runner(case.artifact.folder, home / "bundle", settings=SMALL)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    kept |= {name: os.environ[name] for name in ("https_proxy", "HTTPS_PROXY", "no_proxy") if name in os.environ}
    done = run(bare / "bin" / "python", folder, "--quick", **kept)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["runner"]["installed"] == ["numpy", "onnxruntime", "tokenizers", "psutil"]
    assert record["versions"]["numpy"] == pinned("numpy")
    assert [path.name for path in home.iterdir()] == ["bundle"]
    assert not (folder / "scratch").exists()


@pytest.fixture
def arm(tmp_path: Path) -> dict[str, str]:
    """Return what a session on an emulated Arm device starts with: its python3 is found first."""
    root = installed("arm64", program="usr/bin/python3")
    own = root / "qemu-aarch64"
    qemu = str(own) if own.exists() else executable("qemu-aarch64")
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "python3"
    # -0: what Python takes for its own name, and starts further processes by
    program.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{root}/site" PYTHONHOME={root}/usr\n'
        f'exec {qemu} -cpu neoverse-n1 -L {root} -0 {program} {root}/usr/bin/python3 "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "temporary"),
        "OPENBLAS_NUM_THREADS": "1",
    }


@pytest.mark.slow
def test_an_arm_device_measures(arm: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The whole visit, the device's end of it emulated: keeper, preparation, measurement."""
    name, design = next((name, design) for name, design in DESIGNS.items() if "int8" in design.graphs)
    case: Case = request.getfixturevalue("cases")[name]
    state = tmp_path / "state"
    state.mkdir()
    (state / "device.json").write_text(json.dumps({"environment": arm}))
    record: dict[str, Any] = bench_remote(
        case.artifact.folder,
        url="ssh://arm",
        teacher=None,
        out=tmp_path / "out",
        settings=dataclasses.replace(SMALL, graphs=("int8",)),
        ssh=(shutil.which("python3") or "python3", str(FAKE_SSH), str(state)),
    )
    assert "int8" in design.graphs
    assert record["device"]["machine"] == "aarch64"
    assert record["runner"]["stand_ins"] == ["tokenizers", "psutil"]
    assert record["models"][0]["metrics"].keys() == set(case.artifact.metric_names)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_is_needed_is_named() -> None:
    """`make compat` makes what these tests look for."""
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    for name in ("python3.9", "arm64"):
        assert f"$(COMPAT)/{name}/.installed:" in makefile
    assert INSTALLED.is_absolute()
