"""Model folders: where a checkpoint is, whether it is safe and whole, and what its tokenizer and labels are called.

A checkpoint is data from outside: safetensors only, no code of its own, no pickle. Nothing here builds a model.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertemd_deploy.console import note
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ModelError
from bertemd_deploy.files import sha256_file

WEIGHTS = "model.safetensors"
FAMILIES = ("bert",)


def find_model(spec: str, *, sha256: str | None = None) -> Path:
    """Return the local folder of a model: a folder, `package:IMPORT_NAME/sub/folder`, or a hub id.

    Args:
        spec: where the model is.
        sha256: expected hash of its weights file.

    Raises:
        ModelError: not found, no config, pickle weights only, or another hash than expected.
    """
    if spec.startswith("package:"):
        folder = _package_folder(spec.removeprefix("package:"))
    elif Path(spec).is_dir():
        folder = Path(spec)
    elif spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        folder = _hub_folder(spec)
    else:
        raise ModelError(
            f"{spec}: there is no such folder. Name a Hugging Face folder, a hub id (owner/name), or package:…."
        )
    check_folder(folder)
    if sha256 is not None and (found := sha256_file(folder / WEIGHTS)) != sha256:
        raise ModelError(f"{folder / WEIGHTS}: SHA-256 is {found}, the recipe expects {sha256}; not used.")
    return folder


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the config of a Hugging Face folder after checking that it can be loaded safely.

    Raises:
        ModelError: config.json or model.safetensors is missing or unreadable, or the architecture is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("model_type") not in FAMILIES:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ModelError(f"{path}: model_type is {found!r}; supported: {', '.join(FAMILIES)}.")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        why = f"only pickle weights ({', '.join(pickles)}), which can run code when loaded" if pickles else "no weights"
        raise ModelError(
            f"{folder}: no {WEIGHTS}, {why}. Convert a checkpoint you trust: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)."
        )
    return config


def has_head(folder: Path) -> bool:
    """Say whether a checkpoint carries a trained sequence-classification head.

    Raises:
        ModelError: the weights file is damaged.
    """
    return not _missing_head(folder)


def _missing_head(folder: Path) -> list[str]:
    """Return the names of the head's weights that a checkpoint lacks."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            present = set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: not a readable safetensors file ({error}); truncated or damaged. Copy it again."
        ) from error
    return [name for name in ("classifier.bias", "classifier.weight") if name not in present]


def checked_encoder(folder: Path, *, max_length: int) -> TextEncoder:
    """Return a model folder's tokenizer after checking that its ids and lengths fit the model.

    Raises:
        ModelError: no tokenizer, more tokens than embedding rows, or `max_length` beyond the model's positions.
    """
    config = check_folder(folder)
    positions = int(config.get("max_position_embeddings", 512))
    if max_length > positions:
        raise ModelError(f"{folder}: data.max_length is {max_length}, the model has {positions} positions. Lower it.")
    encoder = TextEncoder.load(folder, max_length=max_length)
    highest = max(encoder.vocabulary().values())
    if highest >= int(config["vocab_size"]):
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {highest}, the model's vocab_size is {config['vocab_size']}; "
            "tokenizer and weights belong to different models."
        )
    return encoder


def label_order(folder: Path, labels: Sequence[str]) -> list[int]:
    """Return, for each of the data's labels, the model's output that carries it, matched by name.

    A model whose labels are the placeholders LABEL_0, LABEL_1, … has no names; its order is taken as it stands.

    Raises:
        ModelError: there is no head, or the names differ, or their number.
    """
    config = check_folder(folder)
    if absent := _missing_head(folder):
        raise ModelError(
            f"{folder}: no classification head ({', '.join(absent)} missing). Fine-tune it first: `bertemd finetune`, "
            "or teacher.finetune: auto in a recipe."
        )
    if not labels:
        return [0]
    stored = config.get("id2label") or {str(at): f"LABEL_{at}" for at in range(config.get("num_labels", 2))}
    names = [str(stored[key]) for key in sorted(stored, key=int)]
    if len(names) != len(labels):
        raise ModelError(
            f"{folder}: the model has {len(names)} labels ({', '.join(names[:6])}), the data {len(labels)} "
            f"({', '.join(labels[:6])}). Use the data the model was trained for."
        )
    if names == [f"LABEL_{at}" for at in range(len(names))]:
        note(f"{folder}: labels have no names; outputs are taken in the data's order ({', '.join(labels[:6])})")
        return list(range(len(labels)))
    folded = {name.casefold(): at for at, name in enumerate(names)}
    missing = [label for label in labels if label.casefold() not in folded]
    if missing:
        raise ModelError(
            f"{folder}: the data's label(s) {', '.join(missing[:6])} are not among the model's: {', '.join(names[:6])}. "
            "Rename one side (config.json id2label, or the label column)."
        )
    return [folded[label.casefold()] for label in labels]


def _package_folder(spec: str) -> Path:
    name, _, below = spec.partition("/")
    if not name.isidentifier() or ".." in Path(below).parts or Path(below).is_absolute():
        raise ModelError(f"package:{spec}: write it as package:IMPORT_NAME/sub/folder.")
    try:
        found = importlib.util.find_spec(name)  # locates a top-level package without importing it
    except ValueError:  # a module that is running, not installed
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"package:{spec}: no installed package {name!r}. Install the package that carries the weights, "
            "or name a Hugging Face folder."
        )
    for root in found.submodule_search_locations:
        if (Path(root) / below).is_dir():
            return Path(root) / below
    raise ModelError(f"package:{spec}: the package {name!r} has no folder {below!r}.")


def _hub_folder(spec: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.txt", WEIGHTS]))
    except Exception as error:  # the hub client raises many kinds; all mean that the model did not arrive
        raise ModelError(
            f"{spec}: could not be fetched from the model hub ({(str(error).strip() or repr(error)).splitlines()[0][:160]}). "
            "Without a network, download the model elsewhere and name its folder instead."
        ) from error
