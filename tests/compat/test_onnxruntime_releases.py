"""ONNX Runtime from its oldest usable releases on (onnxruntime-node carries any of them, for any Python), and in Python.

`compatibility` states the oldest release that runs a graph; here a release below it fails or answers wrongly, one from it on
answers as the newest does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from compat_agreement import assert_equal_outputs, difference, found_outputs, tolerance
from compat_asking import ANSWERING, INSTALLED, ROOT, ask, executable, installed
from compat_cases import GRAPHS_ASKED, Case

from bertemd_deploy.artifact import GRAPH_PRECISION, GRAPHS
from bertemd_deploy.compatibility import highest_opset, oldest_onnxruntime, release

pytestmark = pytest.mark.compat
RELEASES = ("1.11.0", "1.12.0", "1.14.0", "1.15.1", "1.16.0", "1.17.0", "1.18.0", "1.20.1", "1.21.0")
Ask = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Ask:
    """Return the function that asks a release of onnxruntime-node, once."""

    @functools.cache
    def of(version: str) -> dict[str, Any]:
        software = installed(f"onnxruntime-node-{version}", program="node_modules/onnxruntime-node")
        node = executable("node")
        questions = request.getfixturevalue("request_for")()
        work = request.getfixturevalue("compat_work") / f"onnxruntime-node-{version}"
        found = ask([node, str(ANSWERING / "onnxruntime_node.cjs")], questions, work=work, folder=software)
        assert found["software"]["onnxruntime-node"] == version
        return found

    return of


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
@pytest.mark.parametrize("version", RELEASES)
def test_a_release_runs_what_is_stated(
    version: str, name: str, graph: str, answers: Ask, request: pytest.FixtureRequest
) -> None:
    found = answers(version)["cases"][name]["graphs"][graph]
    case: Case = request.getfixturevalue("cases")[name]
    model = onnx.load_model(case.artifact.folder / GRAPHS[graph])
    if release(version) >= release(oldest_onnxruntime(model)):
        assert_equal_outputs(case, graph, found)
    elif "error" not in found and GRAPH_PRECISION[graph] == "fp32":  # int8's tolerance is too wide to tell
        assert difference(case, graph, found_outputs(found)) > tolerance(case, graph)


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_loads_opsets_up_to_its_highest(version: str, answers: Ask, request: pytest.FixtureRequest) -> None:
    found = answers(version)["cases"]
    cases: dict[str, Case] = request.getfixturevalue("cases")
    loaded = {
        cases[name].artifact.manifest["files"][GRAPHS["fp32"]]["opset"]
        for name, case in found.items()
        if "error" not in case["graphs"]["fp32"]
    }
    assert max(loaded, default=None) == highest_opset(version)


def test_the_newest_onnxruntime_node_runs_all(request: pytest.FixtureRequest) -> None:
    software = installed("node", program="node_modules/onnxruntime-node")
    work = request.getfixturevalue("compat_work") / "onnxruntime-node"
    cases: dict[str, Case] = request.getfixturevalue("cases")
    questions = request.getfixturevalue("request_for")()
    found = ask([executable("node"), str(ANSWERING / "onnxruntime_node.cjs")], questions, work=work, folder=software)
    for name, case in cases.items():
        for graph in case.artifact.graphs():
            assert_equal_outputs(case, graph, found["cases"][name]["graphs"][graph])


@pytest.fixture(scope="module")
def wanted() -> None:
    """Skip where nothing is installed: this needs no other software, but the artifacts take a while to make."""
    if not INSTALLED.is_dir():
        pytest.skip(f"there is no {INSTALLED} (make compat)")


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
def test_plain_onnxruntime_in_python_runs_all(
    name: str, graph: str, wanted: None, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    session = onnxruntime.InferenceSession(str(case.artifact.folder / GRAPHS[graph]))
    names = [node.name for node in session.get_outputs()]
    outputs = []
    for batch in case.batches:
        values = session.run(None, dict(batch))
        outputs.append({name: np.asarray(value).tolist() for name, value in zip(names, values, strict=True)})
    assert_equal_outputs(case, graph, {"outputs": outputs})


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
def test_the_onnx_checker_passes_in_full(name: str, graph: str, wanted: None, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    path = case.artifact.folder / GRAPHS[graph]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load_model(path)
    entry = case.artifact.manifest["files"][GRAPHS[graph]]
    opset = {item.domain: item.version for item in model.opset_import}[""]
    assert (opset, model.ir_version) == (entry["opset"], entry["ir_version"])
    if not name.startswith("opset-"):
        assert (opset, model.ir_version) <= (17, 8)


@pytest.fixture(scope="module")
def minimum(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what the runtime half answers with the oldest release of each package that pyproject.toml lets it have."""
    software = installed("minimum", program="bin/python")
    questions = request.getfixturevalue("request_for")()
    work = request.getfixturevalue("compat_work") / "minimum"
    command = [str(software / "bin" / "python"), str(ANSWERING / "classifier_python.py")]
    return ask(command, questions, work=work, folder=software, path=str(ROOT))


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
def test_the_runtime_half_runs_with_the_oldest_packages(
    name: str, graph: str, minimum: dict[str, Any], cases: dict[str, Case]
) -> None:
    found = minimum["cases"][name]["graphs"][graph]
    assert_equal_outputs(cases[name], graph, found)
    if graph == "fp32":
        predictions = cases[name].classifier(graph).predict(cases[name].texts, cases[name].pairs)
        assert [entry["label"] for entry in found["decisions"]] == [one.label for one in predictions]


def test_the_oldest_packages_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [\n", 1)[1].split("\n]\n", 1)[0]
    allowed = [f"{name}=={lowest}" for name, lowest in re.findall(r'"([\w-]+)>=([\d.]+)"', block)]
    stated = (ROOT / "tests/compat/software/minimum.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in stated if not line.startswith("#")] == allowed
