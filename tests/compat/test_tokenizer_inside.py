"""The graph with its tokenizer inside, in ONNX Runtime with onnxruntime-extensions: texts in, the same logits out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from compat_asking import INSTALLED
from compat_cases import ARTIFACT, GIVEN, ODD_TEXTS, Case

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.demo import demo_rows
from bertemd_deploy.tokenizer_graph import tokenizer_graph, with_tokenizer
from bertemd_deploy.tokenizer_inside import check_tokenizer, open_text_session

pytestmark = pytest.mark.compat
NAMES = ("classification", "pairs", "regression", "multilabel", "mpnet-tokenizer", "opset-21-dynamo")


@pytest.fixture(scope="module")
def wanted() -> None:
    pytest.importorskip("onnxruntime_extensions", reason="onnxruntime-extensions is not installed (make compat)")
    if not INSTALLED.is_dir():
        pytest.skip(f"there is no {INSTALLED} (make compat)")


@pytest.mark.parametrize("graph", ["fp32", "int8", "fused", "fused-int8"])
@pytest.mark.parametrize("name", [*NAMES, *([GIVEN] if ARTIFACT else [])])
def test_texts_give_the_same_logits(name: str, graph: str, wanted: None, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    if case.kind not in ("classification", "regression", "multilabel"):
        pytest.skip("what reads every token needs the tokens beside the logits")
    artifact = case.artifact
    model = onnx.load_model(artifact.folder / GRAPHS[graph])
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    paired = case.pairs is not None
    front = tokenizer_graph(artifact.folder, max_length=artifact.max_length, pairs=paired, opset=opset)
    session = open_text_session(with_tokenizer(model, front).SerializeToString())
    expected = case.classifier(graph).logits(case.texts, case.pairs)
    for row, text in enumerate(case.texts):
        feeds = {"text": np.array([text], dtype=object)}
        if case.pairs is not None:
            feeds["text_pair"] = np.array([case.pairs[row]], dtype=object)
        np.testing.assert_allclose(session.run(["logits"], feeds)[0][0], expected[row], atol=1e-5, err_msg=text)


@pytest.mark.parametrize("name", [*NAMES, *([GIVEN] if ARTIFACT else [])])
def test_the_whole_demo_is_read_alike(name: str, wanted: None, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    folder, max_length = case.artifact.folder, case.artifact.max_length
    texts = [*(text for split in ("train", "dev") for text, _ in demo_rows(split)), *ODD_TEXTS]
    for pairs in (None, texts[::-1]):
        front = tokenizer_graph(folder, max_length=max_length, pairs=pairs is not None)
        check_tokenizer(front, texts, pairs, tokenizer=folder, max_length=max_length)
