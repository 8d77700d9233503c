"""The artifacts that other software is asked about: one for every kind of task, both exporters, every kind of tokenizer.

Each holds a random student that decides, over real vocabulary: WordPiece learned from the demo's texts, or the tokenizer of
another teacher's family. What this package itself says of it is computed here, on the same batches.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import LONGEST_ANSWER
from bertemd_deploy.artifact import GRAPHS, Artifact
from bertemd_deploy.classifier import Classifier
from bertemd_deploy.demo import demo_rows
from bertemd_deploy.encoding import Encoded, length_batches
from bertemd_deploy.runtime import open_session, run_session
from bertemd_deploy.tasks import Kind

MAX_LENGTH = 128
GIVEN = "given"
ARTIFACT = os.environ.get("BERTEMD_COMPAT_ARTIFACT", "")  # one more artifact to ask about
ODD_TEXTS = (
    "",
    " \t ",
    "TURN Off\tthe\nLIGHTS.",
    "Café NAÏVE résumé, señor Ångström",
    "cafe\u0301 with its accent apart",
    "don't stop; it's 5:30 p.m. (3.5%)",
    "你好 world, 开灯",
    "smile \U0001f600 and heart \u2764\ufe0f",
    "no\u00a0break, zero\u200bwidth, soft\u00adhyphen, \x07bell",
    "ﬁne ½ ＦＵＬＬ width",
    "İstanbul straße ΣΊΣΥΦΟΣ",
    "snake_case and-hyphen/slash\\back `tick` ~ $5",
    "\u201cquoted\u201d \u2018so\u2019 \u2013 \u2014 \u2026",
    "a" * 120,
    "turn off every light in the house and " * 40,
)


INT8, FLOAT16 = ("fp32", "int8", "fused", "fused-int8"), ("fp32", "fused", "fp16")


@dataclass(frozen=True)
class Design:
    """What one artifact is made of."""

    kind: Kind = "classification"
    exporter: str = "torchscript"
    family: str = "bert"
    pairs: bool = False
    opset: int = 17
    target: str = "portable"
    quantize: dict[str, Any] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that its artifact has to hold."""
        return FLOAT16 if self.quantize.get("mode") == "float16" else INT8


DESIGNS = {
    "classification": Design(),
    "pairs": Design(pairs=True),
    "regression": Design("regression"),
    "multilabel": Design("multilabel"),
    "token-classification": Design("token-classification"),
    "question-answering": Design("question-answering"),
    "classification-dynamo": Design(exporter="dynamo"),
    "token-classification-dynamo": Design("token-classification", exporter="dynamo"),
    "question-answering-dynamo": Design("question-answering", exporter="dynamo"),
    "mpnet-tokenizer": Design(family="mpnet"),
    "roberta-tokenizer": Design(family="roberta"),
    "deberta-tokenizer": Design(family="deberta-v2"),
    "deberta-pairs": Design(family="deberta-v2", pairs=True),
    "static": Design(quantize={"mode": "static"}),
    "static-tokens": Design("token-classification", exporter="dynamo", quantize={"mode": "static"}),
    "four-bit": Design(quantize={"embedding_bits": 4}),
    "float16": Design(quantize={"mode": "float16", "float16_on_cpu": True}),
    "opset-18": Design(opset=18, target="x86-avx2"),
    "opset-19": Design(opset=19, target="x86-avx2"),
    "opset-20": Design(opset=20, target="x86-avx2"),
    "opset-21": Design(opset=21, target="x86-avx2"),
    "opset-21-dynamo": Design(exporter="dynamo", opset=21, target="x86-avx2"),
}
NAMES = (*DESIGNS, *([GIVEN] if ARTIFACT else []))
# (name, graph) of all that there is to ask about.
GRAPHS_ASKED = [(name, graph) for name, design in DESIGNS.items() for graph in design.graphs]
if ARTIFACT:
    GRAPHS_ASKED += [(GIVEN, graph) for graph in Artifact.load(Path(ARTIFACT)).graphs()]
LABELS: dict[Kind, tuple[str, ...]] = {
    "classification": ("cancel", "dim", "light"),
    "multilabel": ("home", "media", "time"),
    "token-classification": ("O", "B-PLACE", "I-PLACE"),
}


@dataclass(frozen=True)
class Case:
    """An artifact with texts and batches to ask about."""

    name: str
    artifact: Artifact
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    batches: tuple[dict[str, NDArray[np.int64]], ...]

    @property
    def kind(self) -> Kind:
        return self.artifact.kind

    def request(self, graphs: tuple[str, ...]) -> dict[str, Any]:
        """Return the case as plain values, for the graphs of these names that the artifact holds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "folder": str(self.artifact.folder),
            "graphs": {graph: GRAPHS[graph] for graph in self.artifact.graphs() if graph in graphs},
            "texts": list(self.texts),
            "pairs": None if self.pairs is None else list(self.pairs),
            "batches": [{name: value.tolist() for name, value in batch.items()} for batch in self.batches],
            "longest_answer": LONGEST_ANSWER,
        }

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The texts as this package tokenises them, each one row."""
        return self.classifier("fp32").encoder.encode(self.texts, self.pairs)

    @functools.cache  # noqa: B019 - lives as long as the session's cases
    def classifier(self, graph: str) -> Classifier:
        """Return the classifier of a graph, one text at a time: dynamic int8 depends on what runs together."""
        session = open_session(self.artifact.folder / GRAPHS[graph], threads=1)
        return Classifier.of(self.artifact, partial(run_session, session), graph=graph, batch_size=1)

    @functools.cache  # noqa: B019
    def outputs(self, graph: str) -> tuple[NDArray[np.float32], ...]:
        """Return this package's logits of every batch."""
        session = open_session(self.artifact.folder / GRAPHS[graph], threads=1)
        return tuple(run_session(session, batch) for batch in self.batches)

    def __hash__(self) -> int:
        return hash(self.name)


def texts_of(kind: Kind, *, pairs: bool) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return first and second texts: the demo's, and odd ones for kinds that read any text."""
    demo = [text for text, _ in demo_rows("dev")[:40]]
    if kind == "question-answering":
        return tuple(demo[:12]), tuple(demo[12:24])  # short: transformers.js knows no longest answer
    texts = (*demo[:12], *ODD_TEXTS)
    # transformers 4 takes an empty second text for none where a pair is given alone.
    return texts, (tuple(text or "nothing" for text in reversed(texts)) if pairs else None)


def case_of(name: str, artifact: Artifact) -> Case:
    """Return the case of an artifact: two evaluation rows alone, the others in batches of eight, of like length."""
    pairs = artifact.kind == "question-answering" or bool(artifact.pairs)
    texts, seconds = texts_of(artifact.kind, pairs=pairs)
    part = artifact.evaluation().examples
    part = part.select(range(min(len(part), 34)))
    pad_id = Classifier.load(artifact.folder, "fp32").encoder.pad_id
    groups = [np.array([0]), np.array([1])]
    groups += [2 + rows for rows in length_batches(part.lengths[2:], batch_size=8)]
    batches = tuple(part.batch(rows, pad_id=pad_id) for rows in groups)
    return Case(name, artifact, texts, seconds, batches)


def build(name: str, folder: Path) -> Artifact:
    """Write the artifact of a design into `folder / name` and return it."""
    from bertemd_deploy.config import build_recipe
    from bertemd_deploy.pipeline import export_stage

    design = DESIGNS[name]
    work = folder / f"{name}.made-of"
    student = _write_student(work / "student", design)
    data = _write_data(work / "data", design)
    task = design.kind if design.kind != "classification" else None
    content: dict[str, Any] = {
        "teacher": {"model": str(student)},
        "data": {"path": str(data), "max_length": MAX_LENGTH} | ({"task": task} if task else {}),
        "student": {"name": "4L"},
        "export": {"exporter": design.exporter, "opset": design.opset, "target": design.target},
        "quantize": {"max_drop": 100, "max_changed": 100} | design.quantize,
    }
    export_stage(build_recipe(content, where=name), student, folder / name, data=str(data))
    artifact = Artifact.load(folder / name)
    assert artifact.graphs() == [graph for graph in GRAPHS if graph in design.graphs]
    return artifact


def _write_data(folder: Path, design: Design) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        texts = [text for text, _ in demo_rows(split)[:48]]
        labels = LABELS.get(design.kind, ())
        rows: list[dict[str, Any]] = []
        for at, text in enumerate(texts):
            other = texts[(at * 7 + 3) % len(texts)]
            if design.kind == "question-answering":
                answer = {"text": [other.split()[0]], "answer_start": [0]}
                rows.append({"id": str(at), "question": text, "context": other, "answers": answer})
            elif design.kind == "token-classification":
                words = text.split()
                rows.append({"tokens": words, "tags": [labels[number % len(labels)] for number in range(len(words))]})
            elif design.kind == "multilabel":
                rows.append({"sentence": text, "labels": [name for bit, name in enumerate(labels) if at >> bit & 1]})
            elif design.pairs:
                rows.append({"sentence1": text, "sentence2": other, "label": labels[at % len(labels)]})
            else:
                rows.append({"sentence": text, "label": labels[at % len(labels)] if labels else at / 10})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _write_student(folder: Path, design: Design) -> Path:
    from tiny_family import write_family_tokenizer
    from tiny_student import tiny_model

    if design.family == "bert":
        vocabulary, pad = _write_demo_tokenizer(folder)
    else:
        vocabulary, pad = write_family_tokenizer(folder, design.family)
    labels = LABELS.get(design.kind, ())
    outputs = 2 if design.kind == "question-answering" else len(labels) or 1
    sizes: dict[str, int] = {"vocab_size": max(vocabulary, 100), "pad_token_id": pad}
    model: Any = tiny_model(outputs=outputs, kind=design.kind, max_position_embeddings=MAX_LENGTH, **sizes)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.save_pretrained(folder)
    return folder


def _write_demo_tokenizer(folder: Path) -> tuple[int, int]:
    """Write BERT's tokenizer with a vocabulary learned from the demo's texts and the odd ones; return size and pad id."""
    from tiny_words import SPECIAL
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator([*(text for text, _ in demo_rows("train")[:1000]), *ODD_TEXTS], trainer)
    ids: Callable[[str], int] = tokenizer.token_to_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids(token)) for token in ("[CLS]", "[SEP]")],
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "pad", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, **roles}), encoding="utf-8"
    )
    return tokenizer.get_vocab_size(), ids("[PAD]")
