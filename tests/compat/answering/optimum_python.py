"""Answer a request with Optimum's ONNX Runtime models and transformers' pipelines; runs in its own environment."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import (
    ORTModelForQuestionAnswering,
    ORTModelForSequenceClassification,
    ORTModelForTokenClassification,
)
from transformers import AutoTokenizer, pipeline

torch.set_num_threads(1)
MODELS = {
    "token-classification": ("token-classification", ORTModelForTokenClassification),
    "question-answering": ("question-answering", ORTModelForQuestionAnswering),
}
OUTPUTS = {"question-answering": ("start_logits", "end_logits")}


def decisions(case, model, tokenizer):
    """Return what the pipeline says of every text, with as few options as its user would give."""
    kind, texts, pairs = case["kind"], case["texts"], case["pairs"]
    task = MODELS.get(kind, ("text-classification",))[0]
    pipe = pipeline(task, model=model, tokenizer=tokenizer)
    if kind == "question-answering":
        options = {"max_answer_len": case["longest_answer"], "align_to_words": False}
        return [pipe(question=text, context=pair, **options) for text, pair in zip(texts, pairs, strict=True)]
    if kind == "token-classification":
        return [pipe(text, ignore_labels=[]) if text.strip() else [] for text in texts]
    rows = texts if pairs is None else [{"text": one, "text_pair": two} for one, two in zip(texts, pairs, strict=True)]
    return [pipe(row, top_k=None, truncation=True) for row in rows]


def outputs(case, model):
    found = []
    for batch in case["batches"]:
        result = model(**{name: torch.tensor(value) for name, value in batch.items()})
        names = OUTPUTS.get(case["kind"], ("logits",))
        found.append({name: np.asarray(getattr(result, name)).tolist() for name in names})
    return found


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def answer(case):
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    encoded = tokenizer(case["texts"], case["pairs"], truncation=True)
    tokens = {name: encoded[name] for name in ("input_ids", "token_type_ids")}
    graphs = {}
    for graph, path in case["graphs"].items():
        folder, _, name = path.rpartition("/")
        load = MODELS.get(case["kind"], ("", ORTModelForSequenceClassification))[1].from_pretrained
        model = load(case["folder"], subfolder=folder, file_name=name)
        graphs[graph] = {"outputs": outputs(case, model), "decisions": plain(decisions(case, model, tokenizer))}
    return {"tokens": tokens, "graphs": graphs}


REQUEST = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
ANSWER = {
    "software": {name: version(name) for name in ("optimum", "optimum-onnx", "transformers", "onnxruntime", "torch")},
    "cases": {name: answer(case) for name, case in REQUEST.items()},
}
Path(sys.argv[2]).write_text(json.dumps(ANSWER), encoding="utf-8")
