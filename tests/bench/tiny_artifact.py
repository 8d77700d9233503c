"""A tiny artifact, built whole: a tokenizer of eight words, graphs of one embedding table, twelve evaluation rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_lookup import write_lookup
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bertemd_deploy.artifact import DataSlice, write_slices
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.files import sha256_file
from bertemd_deploy.splits import QuestionSplit, TokenSplit

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "bad", "poor", "the", "film", "was", "very")
TEXTS = (
    "good film",
    "bad film",
    "the film was very very good",
    "the film was poor",
    "fine",
    "very bad",
    "the very fine film was very very good",
    "poor film",
    "the film was the film",
    "good",
    "was the film poor",
    "very very very very very fine",
)
GOLD = np.array([1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1])
MAX_LENGTH = 12


def write_tokenizer(folder: Path, *, words: tuple[str, ...] = WORDS) -> None:
    """Write a word-level tokenizer.json with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(words[:4]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_graph(path: Path, *, table: np.ndarray, bias: np.ndarray) -> None:
    """Write a graph whose logits are the sum of `table` (vocabulary, outputs) over the real tokens, plus `bias`."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide_mask"]),
        helper.make_node("Mul", ["rows", "wide_mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
        helper.make_node("Add", ["summed", "bias"], ["logits"]),
    ]
    constants = {"table": table.astype(np.float32), "bias": bias.astype(np.float32)}
    axes = {"last": np.array([2]), "middle": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", table.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in (constants | axes).items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def lookup_tables(kind: str) -> dict[str, np.ndarray]:
    """Return weights that tag good words PER and bad ones LOC, or that answer from "was" to a good word."""
    if kind == "token-classification":
        table = np.zeros((len(WORDS), 3))
        table[:, 0] = 1.0
        table[[4, 5], 1] = table[[6, 7], 2] = 2.0
        return {"logits": table}
    start, end = np.zeros(len(WORDS)), np.zeros(len(WORDS))
    start[10], end[[4, 5]] = 2.0, 2.0
    return {"start_logits": start, "end_logits": end}


def token_slice(encoder: TextEncoder) -> DataSlice:
    """Return the texts' words with their right tags."""
    words = [text.split() for text in TEXTS]
    tags = {"good": 1, "fine": 1, "bad": 2, "poor": 2}
    return TokenSplit(words, [[tags.get(word, 0) for word in row] for row in words]).encode(encoder)


def question_slice(encoder: TextEncoder) -> DataSlice:
    """Return four questions whose answers the graph finds, two of them on contexts of several windows."""
    contexts = [
        "the film was good",
        "the very film was very fine",
        "the film " * 5 + "was fine",
        "was good" + " film" * 9,
    ]
    answers = [
        [(text, context.index(text))]
        for text, context in zip(("was good", "was very fine", "was fine", "was good"), contexts, strict=True)
    ]
    split = QuestionSplit(["a", "b", "c", "d"], ["the film"] * 4, contexts, answers, doc_stride=2)
    return split.encode(encoder)


def write_other_artifact(folder: Path, kind: str) -> Path:
    """Write an artifact of a kind that decides on tokens, with the graphs "fp32" and "int8" (the same function)."""
    write_tokenizer(folder)
    for name in ("model", "model_quantized"):
        write_lookup(folder / "onnx" / f"{name}.onnx", lookup_tables(kind))
    encoder = TextEncoder.load(folder, max_length=MAX_LENGTH)
    part = token_slice(encoder) if kind == "token-classification" else question_slice(encoder)
    write_slices(folder / "eval.npz", {"evaluation": part, "calibration": part})
    metrics = ["entity_f1"] if kind == "token-classification" else ["f1_squad", "exact_match"]
    labels = ["O", "B-PER", "B-LOC"] if kind == "token-classification" else []
    write_manifest(folder, task={"name": kind, "kind": kind, "metrics": metrics, "doc_stride": 2}, labels=labels)
    return folder


def sentiment_table() -> np.ndarray:
    """Return weights that answer 1 for the good words and 0 for the bad."""
    table = np.zeros((len(WORDS), 2))
    table[[4, 5], 1] = 2.0
    table[[6, 7], 0] = 2.0
    return table


def write_manifest(folder: Path, **changes: Any) -> None:
    """Write bertemd.json over all files in `folder`; `changes` replace its entries."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size, "opset": 17}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "bertemd.json"
    }
    manifest = {
        "schema_version": 1,
        "task": {"name": "tiny", "metrics": ["accuracy", "f1"]},
        "labels": ["negative", "positive"],
        "max_length": MAX_LENGTH,
        "student": {"layers": 1, "hidden": 2, "parameters": 26},
        "quantization": {"mode": "dynamic", "excluded": [f"node{at}" for at in range(20)], "trials": [{"drop": 0.0}]},
        "distillation": {"flow": [[1.0]]},
        "files": files,
    }
    (folder / "bertemd.json").write_text(json.dumps(manifest | changes))


def write_artifact(folder: Path, *, bias: tuple[float, float] = (0.1, 0.0), **changes: Any) -> Path:
    """Write a whole artifact with the graphs "fp32" and "int8" (the same function)."""
    write_tokenizer(folder)
    for name in ("model", "model_quantized"):
        write_graph(folder / "onnx" / f"{name}.onnx", table=sentiment_table(), bias=np.array(bias))
    examples = TextEncoder.load(folder, max_length=MAX_LENGTH).encode(TEXTS)
    part = DataSlice(examples, GOLD)
    write_slices(folder / "eval.npz", {"evaluation": part, "calibration": part})
    write_manifest(folder, **changes)
    return folder


def write_graph_teacher(folder: Path, **config: Any) -> Path:
    """Write a teacher folder with a ready graph and no weights, its outputs in reverse label order."""
    write_tokenizer(folder)
    named = {"id2label": {"0": "Positive", "1": "Negative"}, "max_position_embeddings": 64, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(named | config))
    write_graph(folder / "onnx" / "model.onnx", table=sentiment_table()[:, ::-1], bias=np.array([0.0, 0.1]))
    return folder
