"""The artifact's files beside the graphs: the tokenizer as other tools look for it, and the model card.

In: the student folder and the manifest. Out: tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt,
whichever of them the student folder has, and README.md with the measured table.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.errors import ExportError
from bertemd_deploy.files import read_json, write_json, write_text

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def write_tokenizer(student: Path, folder: Path, *, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt into `folder`.

    Args:
        student: folder with tokenizer.json; of the others, transformers writes only some, depending on its version.
        folder: artifact folder being built.
        max_length: longest input in tokens, for tools that truncate by it.

    Raises:
        ArtifactError: a tokenizer file is not JSON.
        ExportError: the tokenizer is not a WordPiece one, or its ids have holes.
    """
    source = student / "tokenizer.json"
    tokenizer = read_json(source, what="tokenizer")
    tokens = _vocabulary(tokenizer, source)
    stored = student / "tokenizer_config.json"
    config = read_json(stored, what="tokenizer's config") if stored.is_file() else {"tokenizer_class": "BertTokenizer"}
    special = {role: token for role in SPECIAL_TOKENS if (token := _special(config, role, tokens)) is not None}
    shutil.copyfile(source, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", config | special | {"model_max_length": max_length})
    write_json(folder / "special_tokens_map.json", special)
    write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens))


def _vocabulary(tokenizer: dict[str, Any], path: Path) -> list[str]:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        found = model.get("type") if isinstance(model, dict) else None
        raise ExportError(f"{path}: a {found or 'damaged'} tokenizer; vocab.txt needs a WordPiece one, as BERT has.")
    ids: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    ids |= {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", [])}
    missing = sorted(set(range(len(ids))) - set(ids))
    if missing:
        raise ExportError(f"{path}: the vocabulary has no token of id {missing[0]} ({len(ids)} tokens). Save it again.")
    return [ids[number] for number in range(len(ids))]


def _special(config: dict[str, Any], role: str, tokens: list[str]) -> str | None:
    found = config.get(role)
    if isinstance(found, dict):
        found = found.get("content")
    if isinstance(found, str):
        return found
    return SPECIAL_TOKENS[role] if SPECIAL_TOKENS[role] in tokens else None


def model_card(manifest: Mapping[str, Any], *, graphs: Mapping[str, Path]) -> str:
    """Return the model card as Markdown.

    Args:
        manifest: the artifact's manifest.
        graphs: graph names and their files.
    """
    task, student = manifest["task"], manifest["student"]
    metrics = list(task["metrics"])
    labels = ", ".join(f"`{label}`" for label in manifest["labels"]) or "one number (regression)"
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
pipeline_tag: text-classification
tags: [bert, distillation, int8, onnxruntime]
---
# {task["name"]}: a {student["layers"]}-layer BERT for CPUs

{sizes}{origin}.
Outputs: {labels}. Inputs of up to {manifest["max_length"]} tokens.

{table}

Metrics are those of the evaluation slice that the artifact carries (`eval.npz`); all numbers are in `bertemd.json`.
`model.onnx` and `model_quantized.onnx` use standard ONNX operators only; the `fused` graphs need ONNX Runtime.

```
bertemd predict . "a text to classify"
```
"""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
