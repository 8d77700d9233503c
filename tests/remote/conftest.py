from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS / "bench"))  # tiny_artifact

from remote_parts import SMALL, Device  # noqa: E402
from tiny_artifact import write_artifact, write_graph_teacher  # noqa: E402 - found by the line above

from bertemd_deploy.artifact import Artifact  # noqa: E402
from bertemd_deploy.bench import candidates  # noqa: E402
from bertemd_deploy.remote import session  # noqa: E402
from bertemd_deploy.remote.folder import write_runner  # noqa: E402


@pytest.fixture
def artifact_folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact")


@pytest.fixture
def artifact(artifact_folder: Path) -> Artifact:
    return Artifact.load(artifact_folder)


@pytest.fixture
def graph_teacher(tmp_path: Path) -> Path:
    return write_graph_teacher(tmp_path / "teacher")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process believe that torch is not installed."""
    find_spec = candidates.importlib.util.find_spec
    monkeypatch.setattr(
        candidates.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Return a device whose connections are made again at once; nothing may be left on it."""
    monkeypatch.setattr(session, "WAITS", (0.0, 0.0))
    found = Device(tmp_path / "device")
    yield found
    until = time.monotonic() + 10  # what was cut off while removing goes on there
    while found.left and time.monotonic() < until:
        time.sleep(0.05)
    assert found.left == []


@pytest.fixture(scope="session")
def runner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runner folder of a tiny artifact; not to be changed."""
    folder = tmp_path_factory.mktemp("runner")
    return write_runner(write_artifact(folder / "artifact"), folder / "out", settings=SMALL)
