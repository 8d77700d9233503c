"""transformers.js in Node (onnxruntime-node) and in headless Chromium (onnxruntime-web, wasm), all from this machine.

It is known to read two sorts of text otherwise, whatever the model: it cuts a text that is too long behind its last special
token, which is lost (a second text is cut where the first one has left room), and writes a capital sigma at the end of a
word as JavaScript does. Nothing in an artifact changes that; those texts are compared apart. Segments of pairs it returns
unasked for BERT's own tokenizer only, so they are asked for.
"""

from __future__ import annotations

from typing import Any

import pytest
from compat_agreement import assert_equal_decisions, assert_equal_outputs, tokens_differ
from compat_asking import ANSWERING, INSTALLED, ask, executable, installed
from compat_cases import DESIGNS, GRAPHS_ASKED, NAMES, Case

pytestmark = pytest.mark.compat
PLACES = ("node", "chromium")
SCREENSHOT = INSTALLED / "browser.png"


@pytest.fixture(scope="module", params=PLACES)
def answer(request: pytest.FixtureRequest) -> dict[str, Any]:
    software = installed("node", program="node_modules/@huggingface/transformers")
    node = executable("node")
    more: tuple[str, ...] = ()
    if request.param == "chromium":
        more = (executable("chromium", "chromium-browser", "google-chrome"), str(SCREENSHOT))
    questions = request.getfixturevalue("request_for")()
    script = "transformers_browser.mjs" if more else "transformers_node.mjs"
    work = request.getfixturevalue("compat_work") / f"transformers-{request.param}"
    return ask([node, str(ANSWERING / script)], questions, work=work, folder=software, more=more)


def read_otherwise(case: Case) -> set[str]:
    """Return the texts that transformers.js is known to tokenise otherwise."""
    cut = {
        text
        for text, length in zip(case.texts, case.encoded.lengths, strict=True)
        if length == case.artifact.max_length
    }
    seconds = case.pairs or ("",) * len(case.texts)
    sigma = {text for text, second in zip(case.texts, seconds, strict=True) if "Σ" in text + second}
    return cut | sigma


@pytest.mark.parametrize(("name", "graph"), GRAPHS_ASKED)
def test_outputs_are_equal(name: str, graph: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    assert_equal_outputs(cases[name], graph, answer["cases"][name]["graphs"][graph])


@pytest.mark.parametrize("name", NAMES)
def test_its_tokenizer_reads_alike_but_for_what_is_known(
    name: str, answer: dict[str, Any], cases: dict[str, Case]
) -> None:
    found = set(tokens_differ(cases[name], answer["cases"][name]["tokens"]))
    assert found <= read_otherwise(cases[name])
    if name in DESIGNS and DESIGNS[name].family == "bert" and cases[name].kind != "question-answering":
        assert found == read_otherwise(cases[name])  # once it reads them alike, the exceptions above go


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_decide_alike(name: str, answer: dict[str, Any], cases: dict[str, Case]) -> None:
    found = answer["cases"][name]["graphs"]["fp32"]
    assert_equal_decisions(cases[name], found, skipped=read_otherwise(cases[name]), drops_unknown=True)


def test_the_browser_asks_nobody_else(answer: dict[str, Any]) -> None:
    if "requests" not in answer:
        pytest.skip("only a browser makes requests")
    requests = answer["requests"]
    assert (requests["foreign"], requests["refused"]) == ([], [])
    assert any(url.endswith(".wasm") for url in requests["all"])
    assert any(url.endswith("/onnx/model_quantized.onnx") for url in requests["all"])
    assert not [line for line in answer["said"] if line.startswith("error")]
    assert SCREENSHOT.stat().st_size > 10_000
