"""Small artifacts of every kind of task whose answers vary, and what this package says of texts, as plain values."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_lookup import write_lookup
from tiny_words import VOCABULARY, write_tokenizer

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.classifier import Classifier
from bertemd_deploy.files import sha256_file

KINDS = ("classification", "regression", "multilabel", "token-classification", "question-answering")
LABELS = {
    "classification": ("no", "yes", "perhaps"),
    "multilabel": ("home", "media", "time"),
    "token-classification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
}
AWKWARD = (
    '"quoted"\\',
    "two\nlines",
    "${name} $(id) {{x}}",
    "é 你好 \u2028",
)  # labels that no code or config may be made of
ODD = (
    "",
    " \t ",
    "The FILM\twas,\nvery good!",
    "Café naïve, señor's lovely (film).",
    "cafe\u0301 with its accent apart",
    "U.S. don't stop; it's 5:30 p.m. (3.5%)",
    "你好 the 开灯 \U00020000 film",
    "smile \U0001f600 no\u00a0break, zero\u200bwidth, \x07bell",
    "a" * 300,
    "the very good film was " * 40,
)
MAX_LENGTH = 20


def texts_of(count: int, *, seed: int = 0) -> list[str]:
    """Return the odd texts, and random ones of 1 to 40 words."""
    generator = random.Random(seed)
    words = [*VOCABULARY[5:23], "films", "unknown", ",", "Good", "U.S."]
    drawn = [" ".join(generator.choices(words, k=generator.randint(1, 40))) for _ in range(count)]
    return [*ODD, *drawn]


def questions_of(count: int) -> tuple[list[str], list[str]]:
    """Return questions with contexts: odd, blank and much too long ones among them."""
    contexts = texts_of(count, seed=1)
    return [("was it good ?", "who", "")[at % 3] for at in range(len(contexts))], contexts


def question(kind: str, count: int, *, pairs: bool = False) -> tuple[list[str], list[str] | None]:
    """Return texts and second texts for a model of a kind."""
    if kind == "question-answering":
        return questions_of(count)
    texts = texts_of(count)
    return texts, (list(reversed(texts)) if pairs else None)


def write_graph(path: Path, *, outputs: int, seed: int, mates: bool) -> None:
    """Write a graph that adds up random weights of tokens, of second segments twice.

    With `mates`, logits depend on the width of the batch and on all its rows too: only equal batches give equal answers.
    """
    random_table = np.random.default_rng(seed).normal(size=(len(VOCABULARY), outputs)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["types", "one"], ["weights"]),
        helper.make_node("Mul", ["mask", "weights"], ["real"]),
        helper.make_node("Unsqueeze", ["real", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "middle"], ["summed"], keepdims=0),
        helper.make_node("ReduceMean", ["weighted"], ["whole"], keepdims=0),
        helper.make_node("Mul", ["whole", "share"], ["shift"]),
        helper.make_node("Mul", ["shift", "slope"], ["shifts"]),
        helper.make_node("Add", ["summed", "shifts"], ["logits"]),
    ]
    constants = {
        "table": random_table,
        "one": np.float32(1),
        "share": np.float32(1 if mates else 0),
        "slope": np.arange(1, outputs + 1, dtype=np.float32),
        "last": np.array([2]),
        "middle": np.array([1]),
    }
    graph = helper.make_graph(
        nodes,
        "weights",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def write_artifact(
    folder: Path,
    kind: str = "classification",
    *,
    labels: Sequence[str] | None = None,
    graphs: Sequence[str] = ("fp32",),
    mates: bool = True,
    task: dict[str, Any] | None = None,
    **manifest: Any,
) -> Path:
    """Write an artifact of a kind of task, its graphs all the same function."""
    write_tokenizer(folder)
    names = list(LABELS.get(kind, ()) if labels is None else labels)
    draw = np.random.default_rng(7)
    for graph in graphs:
        path = folder / GRAPHS[graph]
        if kind == "token-classification":
            write_lookup(path, {"logits": draw.normal(size=(len(VOCABULARY), len(names)))})
        elif kind == "question-answering":
            write_lookup(path, {name: draw.normal(size=len(VOCABULARY)) for name in ("start_logits", "end_logits")})
        else:
            write_graph(path, outputs=len(names) or 1, seed=7, mates=mates)
    content = {
        "schema_version": 1,
        "task": {"name": "tiny", "kind": kind, "metrics": ["accuracy"], "doc_stride": 4} | (task or {}),
        "labels": names,
        "max_length": MAX_LENGTH,
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "bertemd.json"
        },
    }
    (folder / "bertemd.json").write_text(json.dumps(content | manifest))
    return folder


def said(artifact: Path, texts: Sequence[str], pairs: Sequence[str] | None, *, graph: str = "auto") -> list[Any]:
    """Return what `Classifier` says of texts, as JSON would hold it."""
    classifier = Classifier.load(artifact, graph=graph, threads=1)
    records = [classifier.record(found) for found in classifier.predict(texts, pairs)]
    plain: list[Any] = json.loads(json.dumps(records))
    return plain


def assert_same(found: Any, expected: Any, *, tolerance: float = 1e-9, where: str = "") -> None:
    """Compare plain values; numbers that are not whole may differ by `tolerance`."""
    if isinstance(expected, float):
        assert isinstance(found, float | int), where
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), (where, found, expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, tolerance=tolerance, where=f"{where}/{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), where
        assert len(found) == len(expected), where
        for at, value in enumerate(expected):
            assert_same(found[at], value, tolerance=tolerance, where=f"{where}/{at}")
    else:
        assert found == expected, where
