from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compat_cases import ARTIFACT, GIVEN, NAMES, Case, build, case_of

from bertemd_deploy.artifact import GRAPHS, Artifact


class Cases(dict[str, Case]):
    """All cases by name, each made when it is first asked for; the artifacts lie in one folder under their names."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Case:
        if name == GIVEN:
            (self.folder / GIVEN).symlink_to(Path(ARTIFACT).resolve(), target_is_directory=True)
        artifact = Artifact.load(self.folder / GIVEN) if name == GIVEN else build(name, self.folder)
        self[name] = case_of(name, artifact)
        return self[name]


@pytest.fixture(scope="session")
def compat_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compat")


@pytest.fixture(scope="session")
def cases(compat_work: Path) -> Cases:
    folder = compat_work / "artifacts"
    folder.mkdir()
    return Cases(folder)


@pytest.fixture(scope="session")
def request_for(cases: Cases) -> Callable[..., dict[str, Any]]:
    """Return the function that writes all cases as a request for the graphs named."""

    def write(graphs: tuple[str, ...] = tuple(GRAPHS)) -> dict[str, Any]:
        return {name: cases[name].request(graphs) for name in NAMES}

    return write
