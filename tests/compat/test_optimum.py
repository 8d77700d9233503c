"""Optimum's ORTModel classes and transformers' pipelines, in an environment of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from compat_agreement import assert_equal_decisions, assert_equal_outputs, tokens_differ
from compat_asking import ANSWERING, ask, installed
from compat_cases import GRAPHS_ASKED, NAMES, Case

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def answer(request: pytest.FixtureRequest) -> dict[str, Any]:
    software = installed("optimum", program="bin/python")
    request_for: Callable[..., dict[str, Any]] = request.getfixturevalue("request_for")
    work = request.getfixturevalue("compat_work") / "optimum"
    command = [str(software / "bin" / "python"), str(ANSWERING / "optimum_python.py")]
    return ask(command, request_for(), work=work, folder=software)


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
def test_outputs_are_equal(name: str, graph: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    assert_equal_outputs(cases[name], graph, answer["cases"][name]["graphs"][graph])


@pytest.mark.parametrize("name", NAMES)
def test_its_tokenizer_reads_the_folder_alike(name: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    assert tokens_differ(cases[name], answer["cases"][name]["tokens"]) == []


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_decide_alike(name: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    assert_equal_decisions(cases[name], answer["cases"][name]["graphs"]["fp32"])
