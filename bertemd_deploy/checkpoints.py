"""Model folders: where a checkpoint is, whether it is safe and whole, and what its tokenizer and labels are called.

A checkpoint is data from outside: safetensors only, no code of its own, no pickle. Nothing here builds a model. Which
architectures there are, and what they call things, is the table in `families`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertemd_deploy.console import note
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import family_of, head_parts, positions
from bertemd_deploy.files import sha256_file
from bertemd_deploy.tasks import Kind

WEIGHTS = "model.safetensors"
_HEADS = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}
_SHOWN = 6


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
    config = check_folder(folder)
    if config.get("model_type") != _read_config(folder).get("model_type"):
        note(f"{folder}: config.json names no model_type; its weights have BERT's names, so it is read as a bert")
    if sha256 is not None and (found := sha256_file(folder / WEIGHTS)) != sha256:
        raise ModelError(f"{folder / WEIGHTS}: SHA-256 is {found}, the recipe expects {sha256}; not used.")
    return folder


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the config of a Hugging Face folder after checking that it can be loaded safely.

    A config without `model_type`, as old checkpoints have it, is completed where the weights' names are BERT's.

    Raises:
        ModelError: config.json or model.safetensors is missing or unreadable, or the architecture is not supported.
    """
    config = _read_config(folder)
    weights = (folder / WEIGHTS).is_file()
    if "model_type" not in config and weights and _is_bert(config, weight_names(folder)):
        config["model_type"] = "bert"
    family = family_of(config, where=str(folder / "config.json"))
    for name in (*family.fields, "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"):
        value = config.get(name)
        if value is not None and type(value) is not int:
            raise ModelError(f"{folder / 'config.json'}: {name} should be a whole number, found {value!r:.80}.")
    output_names(config, where=str(folder / "config.json"))
    if not weights:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        why = f"only pickle weights ({', '.join(pickles)}), which can run code when loaded" if pickles else "no weights"
        raise ModelError(
            f"{folder}: no {WEIGHTS}, {why}. Convert a checkpoint you trust: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)."
        )
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise ModelError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not readable as a JSON object (it holds a {type(config).__name__}).")
    return config


def output_names(config: Mapping[str, Any], *, where: str) -> list[str]:
    """Return the names of a model's outputs by number; LABEL_0, LABEL_1, … where its config has none.

    Raises:
        ModelError: they are not written as id2label is.
    """
    stored = config.get("id2label")
    if not stored and stored != []:
        count = config.get("num_labels", 2)
        return [f"LABEL_{at}" for at in range(count if type(count) is int else 2)]
    if not isinstance(stored, dict) or not all(str(key).isdecimal() and len(str(key)) < 10 for key in stored):
        raise ModelError(
            f'{where}: id2label should be an object of names by number, such as {{"0": "no", "1": "yes"}}, found '
            f"{stored!r:.80}. Correct it and label2id."
        )
    return [str(stored[key]) for key in sorted(stored, key=int)]


def model_labels(folder: Path) -> tuple[str, ...]:
    """Return the names of a folder's outputs; none where they are the placeholders LABEL_0, LABEL_1, ….

    Raises:
        ModelError: as `check_folder`.
    """
    names = output_names(check_folder(folder), where=str(folder))
    return () if _placeholders(names) else tuple(names)


def _placeholders(names: Sequence[str]) -> bool:
    return list(names) == [f"LABEL_{at}" for at in range(len(names))]


def damaged_weights(folder: Path, error: Exception) -> ModelError:
    """Return the error for a weights file that cannot be read."""
    return ModelError(
        f"{folder / WEIGHTS}: not a readable safetensors file ({error}); truncated or damaged. Copy it again."
    )


def _is_bert(config: dict[str, Any], names: set[str]) -> bool:
    """Say whether weights are named as BERT's; a bare RoBERTa's are as well, but it has one token type."""
    if "num_hidden_layers" not in config:
        return False
    prefixed = "bert.encoder.layer.0.attention.self.query.weight" in names
    bare = "encoder.layer.0.attention.self.query.weight" in names and "embeddings.token_type_embeddings.weight" in names
    return prefixed or (bare and config.get("type_vocab_size") != 1)


def weight_names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's weights.

    Raises:
        ModelError: the weights file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise damaged_weights(folder, error) from error


def has_head(folder: Path, *, kind: Kind = "classification") -> bool:
    """Say whether a checkpoint carries a trained head for a kind of task.

    Raises:
        ModelError: the folder is no model of a supported family, or its weights file is damaged.
    """
    return not missing_head(folder, kind)


def missing_head(folder: Path, kind: Kind) -> list[str]:
    """Return the names of the head's weights that a checkpoint lacks.

    A checkpoint saved with another kind of head (its `architectures` say so) lacks all of them: the heads for sequences and
    for tokens share their names.

    Raises:
        ModelError: as `has_head`.
    """
    config = check_folder(folder)
    parts = [part for part in head_parts(config, kind) if not part.startswith(f"{family_of(config).prefix}.")]
    wanted = [f"{part}.{name}" for part in parts for name in ("bias", "weight")]
    present = weight_names(folder)
    saved = str(next(iter(config.get("architectures") or ()), "")).rpartition("For")[2]
    if saved in {"SequenceClassification", *_HEADS.values()} and saved != _HEADS.get(kind, "SequenceClassification"):
        return wanted
    return [name for name in wanted if name not in present]


def no_head(folder: Path, absent: Sequence[str], kind: Kind) -> ModelError:
    """Return the error for a checkpoint without a head for a kind of task."""
    head = f"{kind} head" if kind in _HEADS else "classification head"
    return ModelError(
        f"{folder}: no {head} ({', '.join(absent)} missing). Fine-tune it first: `bertemd finetune`, "
        "or teacher.finetune: auto in a recipe."
    )


def checked_encoder(folder: Path, *, max_length: int) -> TextEncoder:
    """Return a model folder's tokenizer after checking that its ids and lengths fit the model.

    Padding is the token that the model's config names, where it names one of the tokenizer's.

    Raises:
        ModelError: no tokenizer, more tokens than embedding rows, or `max_length` beyond the model's positions.
    """
    config = check_folder(folder)
    if max_length > (most := positions(config)):
        raise ModelError(f"{folder}: data.max_length is {max_length}, the model has {most} positions. Lower it.")
    if config.get("vocab_size") is None:
        raise ModelError(
            f"{folder / 'config.json'}: has no vocab_size, the number of rows of the word embedding. Copy the config.json that "
            "belongs to the weights."
        )
    encoder = TextEncoder.load(folder, max_length=max_length)
    ids = set(encoder.vocabulary().values())
    highest = max(ids)
    if highest >= int(config["vocab_size"]):
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {highest}, the model's vocab_size is {config['vocab_size']}; "
            "tokenizer and weights belong to different models."
        )
    if config.get("pad_token_id") in ids:
        encoder.pad_id = int(config["pad_token_id"])
    return encoder


def label_order(folder: Path, labels: Sequence[str], *, kind: Kind = "classification") -> list[int]:
    """Return, for each of the data's labels, the model's output that carries it, matched by name.

    A model whose labels are the placeholders LABEL_0, LABEL_1, … has no names; its order is taken as it stands. So is the
    order of outputs that are no labels (a number; the start and end of an answer).

    Raises:
        ModelError: there is no head, or the names differ, or their number.
    """
    config = check_folder(folder)
    if absent := missing_head(folder, kind):
        raise no_head(folder, absent, kind)
    if kind == "question-answering":
        return [0, 1]
    if not labels:
        return [0]
    names = output_names(config, where=str(folder))
    if len(names) != len(labels):
        raise ModelError(
            f"{folder}: the model has {len(names)} labels ({', '.join(names[:6])}), the data {len(labels)} "
            f"({', '.join(labels[:6])}). Use the data the model was trained for."
        )
    if _placeholders(names):
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
        parent, _, name = spec.partition("/")
        local = ""
        if Path(parent).is_dir():
            inside = sorted(item.name for item in Path(parent).iterdir() if item.is_dir())
            local = (
                f"no such folder here: {parent}/ has no {name} (it holds {_listed(inside)}). Taken for a hub id, it "
            )
        raise ModelError(
            f"{spec}: {local}could not be fetched from the model hub "
            f"({(str(error).strip() or repr(error)).splitlines()[0][:160]}). "
            "Without a network, download the model elsewhere and name its folder instead."
        ) from error


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")) or "no folders"
