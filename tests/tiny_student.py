"""A tiny random student with a tokenizer and data, for the tests of export and its gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from bertemd_deploy.answers import Answers, best_answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.models import output_logits
from bertemd_deploy.tasks import Kind

torch.set_num_threads(1)  # matrices this small only wait for a second thread

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + [f"word{number}" for number in range(95)]


HEADS = {
    "token-classification": (BertForTokenClassification, "classifier"),
    "question-answering": (BertForQuestionAnswering, "qa_outputs"),
}
LABELS: dict[str, tuple[str, ...]] = {
    "classification": ("no", "yes"),
    "regression": (),
    "multilabel": ("joy", "love", "fear"),
    "token-classification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "question-answering": (),
}


def tiny_model(*, outputs: int = 2, seed: int = 0, kind: Kind = "classification", **config: object) -> torch.nn.Module:
    """Return a random model whose logits differ well from example to example."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    build, head_name = HEADS.get(kind, (BertForSequenceClassification, "classifier"))
    model = build(BertConfig(**(sizes | {"num_labels": outputs} | config)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.1 * torch.randn_like(weight))
            else:
                weight.mul_(4)
    model = model.eval()
    if outputs > 1:  # centre the logits, so that every class is chosen
        logits = torch_outputs(model, examples(64, longest=min(32, model.config.max_position_embeddings), seed=9))
        head = getattr(model, head_name)
        with torch.no_grad():
            head.weight.mul_(4 / logits.std())
            head.bias.copy_(torch.zeros(outputs))
            logits = torch_outputs(model, examples(64, longest=min(32, model.config.max_position_embeddings), seed=9))
            head.bias.copy_(-torch.from_numpy(np.median(logits, axis=0)))
    return model


OUTLIER = 3  # a feature


def outliers(**given: Any) -> torch.nn.Module:
    """Return a model of `tiny_model` in which one feature behind every LayerNorm is some twelve times as large as the rest."""
    model = tiny_model(**given)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" in name:
                weight[OUTLIER] *= 12
    return model


def write_student(
    folder: Path, *, labels: tuple[str, ...] | None = None, kind: Kind = "classification", **config: object
) -> Path:
    """Write a student folder as transformers 5 does: no vocab.txt, no special_tokens_map.json."""
    labels = LABELS[kind] if labels is None else labels
    model = tiny_model(outputs=2 if kind == "question-answering" else len(labels) or 1, kind=kind, **config)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": {"content": "[CLS]"}, "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **roles}))
    return folder


def examples(count: int, *, longest: int = 32, seed: int = 0) -> Encoded:
    """Return random examples of 3 to `longest` tokens, two segments each."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, longest + 1, size=count)
    tokens, types = [], []
    for length in lengths:
        row = random.integers(5, len(VOCABULARY), size=length)
        row[0], row[-1] = 2, 3
        tokens.append(row)
        types.append((np.arange(length) >= length // 2).astype(np.int8))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(np.concatenate(tokens).astype(np.int32), np.concatenate(types), offsets)


def questions(part: Encoded) -> Answers:
    """Return the rows' second segments, without their last token, as contexts: their words between blanks."""
    spans = np.full((len(part.tokens), 2), -1, dtype=np.int32)
    contexts = []
    for row in range(len(part)):
        at = np.arange(part.offsets[row], part.offsets[row + 1])
        context = ""
        for token in at[part.types[at] == 1][:-1]:
            word = VOCABULARY[part.tokens[token]]
            context += " " * bool(context)
            spans[token] = len(context), len(context) + len(word)
            context += word
        contexts.append(context)
    rows = len(part)
    return Answers(np.arange(rows, dtype=np.int32), spans, tuple(contexts), (("",),) * rows, ("",) * rows)


def torch_outputs(model: torch.nn.Module, part: Encoded) -> np.ndarray:
    """Return the model's logits of every example, each run alone; ragged as the tokens where each has its own."""
    rows = []
    with torch.inference_mode():
        for row in range(len(part)):
            inputs = {name: torch.from_numpy(value) for name, value in part.batch([row], pad_id=0).items()}
            rows.append(output_logits(model(**inputs)).numpy()[0])
    return np.concatenate(rows) if rows[0].ndim == 2 else np.stack(rows)


def labelled(model: torch.nn.Module, count: int, *, seed: int = 0, kind: Kind = "classification") -> DataSlice:
    """Return examples labelled with the model's own output, so that the fp32 model scores 1."""
    part = examples(count, seed=seed)
    logits = torch_outputs(model, part)
    if kind == "regression":
        return DataSlice(part, logits[:, 0].astype(np.float32), kind)
    if kind == "multilabel":
        return DataSlice(part, (logits > 0).astype(np.float32), kind)
    if kind == "token-classification":
        special = np.isin(part.tokens, (2, 3))
        return DataSlice(part, np.where(special, NOT_SCORED, logits.argmax(axis=-1)).astype(np.int64), kind)
    if kind == "question-answering":
        gold = questions(part)
        found = best_answers(logits, offsets=part.offsets, gold=gold, null=False)
        accepted = tuple((answer.text,) for answer in found)
        return DataSlice(part, np.zeros((count, 2), dtype=np.int64), kind, replace(gold, accepted=accepted))
    return DataSlice(part, logits.argmax(axis=-1).astype(np.int64))


def shifted(graph: onnx.ModelProto, *, by: float) -> onnx.ModelProto:
    """Return the graph with its classifier's bias moved by (`by`, 0)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    name = copy.graph.node[-1].input[2]
    for at, tensor in enumerate(copy.graph.initializer):
        if tensor.name == name:
            moved = numpy_helper.to_array(tensor) + np.array([by, 0], dtype=np.float32)
            copy.graph.initializer[at].CopyFrom(numpy_helper.from_array(moved, name))
    return copy
