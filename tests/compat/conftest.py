from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compat_cases import ARTIFACT, DESIGNS, GIVEN, NAMES, Case, build, case_of

from bertemd_deploy.artifact import GRAPHS, Artifact


@pytest.fixture(scope="session")
def compat_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compat")


@pytest.fixture(scope="session")
def cases(compat_work: Path) -> dict[str, Case]:
    """Return all artifacts, exported once; they lie in one folder under their names."""
    folder = compat_work / "artifacts"
    folder.mkdir()
    made = {name: build(name, folder) for name in DESIGNS}
    if ARTIFACT:
        (folder / GIVEN).symlink_to(Path(ARTIFACT).resolve(), target_is_directory=True)
        made[GIVEN] = Artifact.load(folder / GIVEN)
    return {name: case_of(name, artifact) for name, artifact in made.items()}


@pytest.fixture(scope="session")
def request_for(cases: dict[str, Case]) -> Callable[..., dict[str, Any]]:
    """Return the function that writes all cases, or some, as a request for the graphs named."""

    def write(graphs: tuple[str, ...] = tuple(GRAPHS), *, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
        return {name: cases[name].request(graphs) for name in names}

    return write
