"""Whether other software says of an artifact what this package says: outputs, tokens, decisions.

Logits of fp32 graphs may differ by `FP32_TOLERANCE`, and decide the same wherever this package does not see a tie. So do those
of fp16, by `FP16_TOLERANCE`: some software computes them in float16, some in float32. An int8 graph rounds what it multiplies,
so the last bit of a kernel's float32 can move a code: its logits may be off by no more than quantization itself put them off
(int8 against fp32, here), and the decisions that this changes are few.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from compat_cases import Case
from numpy.typing import NDArray

from bertemd_deploy.artifact import GRAPH_PRECISION
from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.runtime import OUTPUT_NAME, SPAN_OUTPUTS

FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 0.05
SCORE_TOLERANCE = 1e-4  # of probabilities, from fp32 graphs
INT8_AGREEMENT = 0.95  # share of equal decisions
FP32_OF = {"int8": "fp32", "fused-int8": "fused"}


def found_outputs(found: dict[str, Any]) -> list[NDArray[np.float32]]:
    """Return an answer's logits of every batch, in the shapes of `runtime.run_session`."""
    assert "error" not in found, found["error"]
    batches = []
    for batch in found["outputs"]:
        if OUTPUT_NAME in batch:
            batches.append(np.array(batch[OUTPUT_NAME], dtype=np.float32))
        else:
            batches.append(np.stack([np.array(batch[name], dtype=np.float32) for name in SPAN_OUTPUTS], axis=-1))
    return batches


def _real(case: Case, outputs: Any) -> NDArray[np.float32]:
    """Return the outputs of all batches as one array, (rows, outputs) or (real tokens, outputs)."""
    kept = []
    for batch, values in zip(case.batches, outputs, strict=True):
        mask = batch["attention_mask"].astype(bool)
        assert values.shape[: values.ndim - 1] == mask.shape[: values.ndim - 1]
        kept.append(values if values.ndim == 2 else values[mask])
    return np.concatenate(kept)


def difference(case: Case, graph: str, outputs: Any) -> float:
    """Return the largest distance of logits from this package's."""
    return float(np.abs(_real(case, outputs) - _real(case, case.outputs(graph))).max())


def tolerance(case: Case, graph: str) -> float:
    """Return how far a graph's logits may be off this package's."""
    if graph not in FP32_OF:
        return FP16_TOLERANCE if GRAPH_PRECISION[graph] == "fp16" else FP32_TOLERANCE
    return max(FP32_TOLERANCE, difference(case, FP32_OF[graph], case.outputs(graph)))


def agreement(case: Case, graph: str, outputs: Any) -> float:
    """Return the share of equal decisions; a regression decides nothing.

    Of an fp16 classifier, rows are left out whose best two logits are nearer to each other than the tolerance may move them.
    """
    if case.kind == "regression":
        return 1.0
    lengths = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in case.batches])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    expected, found = _real(case, case.outputs(graph)), _real(case, outputs)
    same = same_decisions(case.kind, expected=expected, found=found, offsets=offsets)
    if GRAPH_PRECISION[graph] == "fp16" and case.kind == "classification":
        best = np.sort(expected, axis=-1)
        sure = best[:, -1] - best[:, -2] > 2 * FP16_TOLERANCE
        assert sure.mean() > 0.9
        same = same[sure]
    return float(same.mean())


def assert_equal_outputs(case: Case, graph: str, found: dict[str, Any]) -> None:
    """Compare an answer's logits of every batch, and what they decide."""
    outputs = found_outputs(found)
    assert difference(case, graph, outputs) <= tolerance(case, graph)
    assert agreement(case, graph, outputs) >= (INT8_AGREEMENT if graph in FP32_OF else 1)


def tokens_differ(case: Case, tokens: dict[str, list[list[int]]]) -> list[str]:
    """Return the texts of which an answer has other token ids or segments than this package."""
    offsets = case.encoded.offsets
    found = []
    for at, text in enumerate(case.texts):
        row = slice(offsets[at], offsets[at + 1])
        ids, types = case.encoded.tokens[row].tolist(), case.encoded.types[row].tolist()
        if (tokens["input_ids"][at], tokens["token_type_ids"][at]) != (ids, types):
            found.append(text)
    return found


def assert_equal_decisions(
    case: Case, found: dict[str, Any], *, skipped: Collection[str] = (), drops_unknown: bool = False
) -> None:
    """Compare what a pipeline of the fp32 graph says of every text with this package's predictions.

    Args:
        case: the artifact and its texts.
        found: the answer for its fp32 graph.
        skipped: texts that the software is known to tokenise otherwise.
        drops_unknown: the pipeline leaves out unknown tokens where it lists all.
    """
    assert "error" not in found, found["error"]
    decisions = found["decisions"]
    assert len(decisions) == len(case.texts)
    kept = [at for at, text in enumerate(case.texts) if text not in skipped]
    assert len(kept) >= len(case.texts) - 5
    predictions = case.classifier("fp32").predict(case.texts, case.pairs)
    for at in kept:
        text, prediction, decision = case.texts[at], predictions[at], decisions[at]
        if case.kind == "token-classification":
            assert {entry["index"]: entry["entity"] for entry in decision} == _tags(case, text, drops_unknown), text
        elif case.kind == "question-answering":
            assert prediction.answer is not None
            assert _bare(decision["answer"]) == _bare(prediction.answer.text), text
        elif case.kind == "regression":
            assert [entry["score"] for entry in decision] == [pytest.approx(prediction.score, abs=SCORE_TOLERANCE)], (
                text
            )
        else:
            scores = {entry["label"]: entry["score"] for entry in decision}
            assert max(scores, key=scores.__getitem__) == max(prediction.scores, key=prediction.scores.__getitem__), (
                text
            )
            assert scores == pytest.approx(prediction.scores, abs=SCORE_TOLERANCE), text


def _bare(answer: str) -> str:
    """Return an answer without what a tokenizer's decoding changes: blanks, case, the mark of a word's later piece."""
    return "".join(answer.lower().removeprefix("##").split())


def _tags(case: Case, text: str, drops_unknown: bool) -> dict[int, str]:
    """Return the tag of every token of a text, by its place; special tokens are left out, unknown ones on request."""
    classifier = case.classifier("fp32")
    vocabulary = classifier.encoder.vocabulary()
    left_out = {vocabulary[token] for token in ("[CLS]", "[SEP]", *(["[UNK]"] if drops_unknown else []))}
    encoded = classifier.encoder.encode([text])
    chosen = classifier.run(encoded).argmax(axis=-1).tolist()
    pairs = enumerate(zip(encoded.tokens.tolist(), chosen, strict=True))
    return {at: case.artifact.labels[tag] for at, (token, tag) in pairs if token not in left_out}
