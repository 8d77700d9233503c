"""A tiny random student with a tokenizer and data, for the tests of export and its gates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.encoding import Encoded

torch.set_num_threads(1)  # matrices this small only wait for a second thread

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + [f"word{number}" for number in range(95)]


def tiny_model(*, outputs: int = 2, seed: int = 0, **config: object) -> BertForSequenceClassification:
    """Return a random classifier whose logits differ well from example to example."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    model = BertForSequenceClassification(BertConfig(**(sizes | {"num_labels": outputs} | config)))
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
        with torch.no_grad():
            model.classifier.weight.mul_(4 / logits.std())
            model.classifier.bias.copy_(torch.zeros(outputs))
            logits = torch_outputs(model, examples(64, longest=min(32, model.config.max_position_embeddings), seed=9))
            model.classifier.bias.copy_(-torch.from_numpy(np.median(logits, axis=0)))
    return model


def write_student(folder: Path, *, labels: tuple[str, ...] = ("no", "yes"), **config: object) -> Path:
    """Write a student folder as transformers 5 does: no vocab.txt, no special_tokens_map.json."""
    model = tiny_model(outputs=len(labels) or 1, **config)
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


def torch_outputs(model: torch.nn.Module, part: Encoded) -> np.ndarray:
    """Return the model's logits of every example, each run alone."""
    rows = []
    with torch.inference_mode():
        for row in range(len(part)):
            inputs = {name: torch.from_numpy(value) for name, value in part.batch([row], pad_id=0).items()}
            rows.append(model(**inputs).logits.numpy()[0])
    return np.stack(rows)


def labelled(model: torch.nn.Module, count: int, *, seed: int = 0, regression: bool = False) -> DataSlice:
    """Return examples labelled with the model's own output, so that the fp32 model scores 1."""
    part = examples(count, seed=seed)
    logits = torch_outputs(model, part)
    if regression:
        return DataSlice(part, logits[:, 0].astype(np.float32))
    return DataSlice(part, logits.argmax(axis=-1).astype(np.int64))
