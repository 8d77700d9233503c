"""The artifact's files beside the graphs: the tokenizer as other tools look for it, and the model card.

In: the student folder and the manifest. Out: tokenizer.json, tokenizer_config.json and special_tokens_map.json, with vocab.txt
for WordPiece, vocab.json and merges.txt for byte-level BPE, nothing more for Unigram; and README.md with the measured
table. The tokenizer is the teacher's, the model beside it a BERT: the config names a class that reads tokenizer.json as it
stands wherever BERT's own class would build another tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertemd_deploy.artifact import GRAPHS, MANIFEST, Artifact
from bertemd_deploy.errors import ArtifactError, ExportError
from bertemd_deploy.files import read_json, sha256_file, write_json, write_text

SPECIAL_TOKENS = {
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
CARD = "README.md"
_MEASURED = ("<!-- measured: start -->", "<!-- measured: end -->")
_ENDS = ("bos_token", "eos_token")  # kept where they are named, never guessed
_MODELS = ("WordPiece", "BPE", "Unigram")
_ANY_TOKENIZER = "PreTrainedTokenizerFast"  # transformers and transformers.js read tokenizer.json as it stands
# Where the tokenizer once lay, or code to run with it: not this folder's.
_LEFT_OUT = ("auto_map", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file")


def write_tokenizer(student: Path, folder: Path, *, max_length: int) -> None:
    """Write the tokenizer's files into `folder`.

    Padding and truncation that another program left switched on in tokenizer.json are taken out; both are the caller's.

    Args:
        student: folder with tokenizer.json; of the others, transformers writes only some, depending on its version.
        folder: artifact folder being built.
        max_length: longest input in tokens, for tools that truncate by it.

    Raises:
        ArtifactError: a tokenizer file is not JSON.
        ExportError: the tokenizer is of a kind no BERT-like model has, or a WordPiece one's ids have holes.
    """
    source = student / "tokenizer.json"
    tokenizer = read_json(source, what="tokenizer")
    ids = _vocabulary(tokenizer, source)
    kind = tokenizer["model"]["type"]
    stored: dict[str, Any] = {}
    for name, what in (("special_tokens_map.json", "special tokens"), ("tokenizer_config.json", "tokenizer's config")):
        if (student / name).is_file():
            stored |= read_json(student / name, what=what)
    pointed = '"<s>"' in json.dumps(tokenizer.get("post_processor"))
    roles = {role: _special(stored, role, ids, pointed=pointed) for role in (*SPECIAL_TOKENS, *_ENDS)}
    roles["unk_token"] = roles["unk_token"] if "unk_token" in stored else _unknown(tokenizer["model"])
    special = {role: token for role, token in roles.items() if token is not None}
    config = {name: value for name, value in stored.items() if name not in _LEFT_OUT} | special
    named = str(stored.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")
    if named != "BertTokenizer" or kind != "WordPiece" or special.get("cls_token") != "[CLS]":
        config |= {
            "tokenizer_class": _ANY_TOKENIZER,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        }
    else:
        config |= {"tokenizer_class": stored.get("tokenizer_class") or "BertTokenizer"}
    if tokenizer.get("padding") or tokenizer.get("truncation"):
        plain = tokenizer | {"padding": None, "truncation": None}
        write_text(folder / "tokenizer.json", json.dumps(plain, ensure_ascii=False))
    else:
        shutil.copyfile(source, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", config | {"model_max_length": max_length})
    write_json(folder / "special_tokens_map.json", special)
    if kind == "WordPiece":
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in _in_order(ids, source)))
    elif kind == "BPE" and _is_byte_level(tokenizer):
        model = tokenizer["model"]
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        write_text(folder / "merges.txt", "\n".join(("#version: 0.2", *pairs)) + "\n")


def _vocabulary(tokenizer: dict[str, Any], path: Path) -> dict[str, int]:
    """Return every token with its id."""
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if kind not in _MODELS or not isinstance(vocabulary, list if kind == "Unigram" else dict):
        raise ExportError(
            f"{path}: a {kind or 'damaged'} tokenizer; known: {', '.join(_MODELS)}. Save it again, or use another teacher."
        )
    if isinstance(vocabulary, list):
        vocabulary = {piece: at for at, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}


def _in_order(ids: dict[str, int], path: Path) -> list[str]:
    tokens = {number: token for token, number in ids.items()}
    missing = sorted(set(range(len(tokens))) - set(tokens))
    if missing:
        raise ExportError(
            f"{path}: the vocabulary has no token of id {missing[0]} ({len(tokens)} tokens). Save it again."
        )
    return [tokens[number] for number in range(len(tokens))]


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])


def _unknown(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        at = model.get("unk_id")
        return None if at is None else str(model["vocab"][at][0])
    found = model.get("unk_token")
    return None if found is None else str(found)


def _special(config: dict[str, Any], role: str, ids: dict[str, int], *, pointed: bool) -> str | None:
    """Return the token of a role: as the config names it, else BERT's or (`pointed`) RoBERTa's where it exists."""
    found = config.get(role)
    if isinstance(found, dict):
        found = found.get("content")
    if isinstance(found, str):
        return found
    usual = SPECIAL_TOKENS.get(role, ())
    return next((token for token in (reversed(usual) if pointed else usual) if token in ids), None)


_EXAMPLES = {  # of kinds with a pipeline tag of their own
    "token-classification": '"a text with names"',
    "question-answering": "--pair $'a question\\tthe text that answers it'",
}
_PAIR_EXAMPLE = "--pair $'a first text\\ta second text'"
_SPLITTING = """
A text is split into words at blanks, with punctuation at either end of a word and each Chinese character as words of their
own; a word's first piece decides its tag. Where your data splits in another way, give `Classifier.predict` lists of words.
"""


def model_card(manifest: Mapping[str, Any], *, graphs: Mapping[str, Path]) -> str:
    """Return the model card as Markdown.

    Args:
        manifest: the artifact's manifest.
        graphs: graph names and their files.
    """
    task, student = manifest["task"], manifest["student"]
    metrics = list(task["metrics"])
    kind = str(task["kind"])
    example = _PAIR_EXAMPLE if task.get("pairs") else _EXAMPLES.get(kind, '"a text to classify"')
    unnamed = "where the answer starts and ends" if kind == "question-answering" else "one number (regression)"
    labels = ", ".join(f"`{label}`" for label in manifest["labels"]) or unnamed
    teacher = manifest["teacher"]
    origin = f", distilled from {teacher['name']} ({teacher['layers']} layers)" if teacher else ""
    rows = [
        ["model", "file", "MB", *metrics, "largest logit difference from torch", "same decision"],
        ["---", "---", *["---:"] * (len(metrics) + 3)],
    ]
    for name, values in manifest["metrics"].items():
        parity = manifest["parity"]["graphs"].get(name, {})
        rows.append(
            [
                name if name in graphs else f"{name} (torch)",
                f"`{GRAPHS[name]}`" if name in graphs else "",
                f"{graphs[name].stat().st_size / 1e6:.1f}" if name in graphs else "",
                *(f"{values[metric]:.4f}" if metric in values else "" for metric in metrics),
                _number(parity.get("max_abs_logit_difference"), ".1e"),
                _number(parity.get("decision_agreement"), ".1%"),
            ]
        )
    sizes = f"{student['layers']} layers, hidden size {student['hidden']}, {student['heads']} heads, "
    sizes += f"{student['parameters']:,} parameters"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""---
library_name: onnx
pipeline_tag: {kind if kind in _EXAMPLES else "text-classification"}
tags: [bert, distillation, int8, onnxruntime]
---
# {task["name"]}: a {student["layers"]}-layer BERT for CPUs

{sizes}{origin}.
Outputs: {labels}. Inputs of up to {manifest["max_length"]} tokens.

{table}

Metrics are those of the evaluation slice that the artifact carries (`eval.npz`); all numbers are in `bertemd.json`.
{_operators(graphs)}

```
bertemd predict . {example}
```
{_SPLITTING if kind == "token-classification" else ""}"""


def check_measured(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse records that are not of the artifact whose model card they are to be put into.

    Args:
        folder: the artifact.
        records: bench records.

    Raises:
        ArtifactError: the artifact is damaged, or a record is of another one.
    """
    manifest = Artifact.load(folder).manifest
    for record in records:
        theirs = record.get("artifact")
        for key in ("task", "labels", "student", "created"):
            found = theirs.get(key) if isinstance(theirs, dict) else None
            if found != manifest.get(key):
                raise ArtifactError(
                    f"{folder}: its {key} is {str(manifest.get(key))[:120]}, a record's is {str(found)[:120]}. The table of a "
                    "model card is of its own artifact; name that one."
                )


def add_measured(folder: Path, table: str) -> None:
    """Put what devices measured into an artifact's model card, in the place of what stood there before.

    Args:
        folder: the artifact.
        table: Markdown, from `report.model_card_table`.

    Raises:
        ArtifactError: the artifact is damaged, or cannot be written.
    """
    artifact = Artifact.load(folder)
    path = folder / CARD
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ArtifactError(f"{path}: the model card is missing or cannot be read. Export again.") from None
    before, _, rest = card.partition(_MEASURED[0])
    _, end, after = rest.partition(_MEASURED[1])
    after = after if end else rest  # a card that was edited: nothing of it is dropped
    card = f"{before.rstrip()}\n\n{_MEASURED[0]}\n## Measured\n\n{table}\n{_MEASURED[1]}\n{after.lstrip()}"
    write_text(path, card)
    entry = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    files = artifact.manifest["files"]
    write_json(folder / MANIFEST, artifact.manifest | {"files": files | {CARD: files.get(CARD, {}) | entry}})


def _operators(graphs: Mapping[str, Path]) -> str:
    """Return a sentence on which of these graphs run where."""
    standard = [f"`{Path(GRAPHS[name]).name}`" for name in graphs if not name.startswith("fused")]
    verb = "use" if len(standard) > 1 else "uses"
    return f"{' and '.join(standard)} {verb} standard ONNX operators only; the `fused` graphs need ONNX Runtime."


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
