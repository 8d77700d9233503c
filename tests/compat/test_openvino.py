"""OpenVINO on the CPU: the portable graphs, which use standard operators only."""

from __future__ import annotations

from typing import Any

import pytest
from compat_agreement import assert_equal_outputs
from compat_asking import ANSWERING, ask, installed
from compat_cases import GRAPHS_ASKED, Case

pytestmark = pytest.mark.compat
PORTABLE = ("fp32", "int8", "fp16")


@pytest.fixture(scope="module")
def answer(request: pytest.FixtureRequest) -> dict[str, Any]:
    software = installed("openvino", program="bin/python")
    questions = request.getfixturevalue("request_for")(PORTABLE)
    work = request.getfixturevalue("compat_work") / "openvino"
    command = [str(software / "bin" / "python"), str(ANSWERING / "openvino_python.py")]
    return ask(command, questions, work=work, folder=software)


@pytest.mark.parametrize(("name", "graph"), [asked for asked in GRAPHS_ASKED if asked[1] in PORTABLE])
def test_outputs_are_equal(name: str, graph: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    assert_equal_outputs(cases[name], graph, answer["cases"][name]["graphs"][graph])
