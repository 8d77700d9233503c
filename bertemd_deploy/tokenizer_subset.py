"""A tokenizer cut down to part of its vocabulary: which tokens have to stay, and its JSON with new ids.

What a text becomes changes only where a piece that it used is gone:

    WordPiece  takes, from left to right, the longest piece of V that fits. Let V' be a part of V that holds every piece taken.
               A longer one that fits is not in V, so not in V' either: V' takes the same pieces.
    Unigram    takes the path of the highest score through the pieces that fit, and an unknown character where no piece of that
               one character does, at a score below the lowest of V. V' keeps all pieces of one character and the lowest
               score, so its paths are among those of V at the same scores, and the best of V is the best of V'.

A word of which a piece is gone is put together from shorter ones; as all characters stay, a word whose characters V has as
pieces of their own stays known. An unknown word may become known, where the piece that led WordPiece astray is gone.
Byte-pair encoding reaches its pieces through others, in order, so that none can go: it is refused.

In and out: the content of tokenizer.json and of the configs beside it. How many tokens stay, and which, is the caller's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bertemd_deploy.errors import ModelError

_PLACEHOLDER = re.compile(r"[\[<]unused_?\d+[\]>]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROCESSORS = ("BertProcessing", "RobertaProcessing", "TemplateProcessing", "Sequence", "ByteLevel")


def token_ids(tokenizer: Mapping[str, Any], where: Path) -> dict[str, int]:
    """Return every token with its id.

    Raises:
        ModelError: the tokenizer is of a kind that cannot be cut down, or damaged.
    """
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in ("WordPiece", "Unigram") or not isinstance(model, dict):
        raise ModelError(
            f"{where}: a {kind or 'damaged'} tokenizer; a vocabulary can be trimmed where it is WordPiece or Unigram"
            + (" (BPE joins pieces step by step, so that each needs others)" if kind == "BPE" else "")
            + ". Set export.vocabulary to null."
        )
    try:
        own = model["vocab"] if kind == "WordPiece" else {piece: at for at, (piece, _) in enumerate(model["vocab"])}
        ids = {str(token): int(at) for token, at in own.items()}
        added = {str(entry["content"]): int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{where}: its vocabulary is damaged ({error!r}). Save the tokenizer again.") from error
    return ids | added


def unknown_token(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the token that stands for what the vocabulary has no pieces for."""
    model = tokenizer["model"]
    if model["type"] == "WordPiece":
        return str(model["unk_token"])
    at = model.get("unk_id")
    return None if at is None else str(model["vocab"][at][0])


def needed_tokens(
    tokenizer: Mapping[str, Any], ids: Mapping[str, int], configs: Sequence[Mapping[str, Any]]
) -> set[str]:
    """Return the tokens that stay whatever the texts: special ones and characters, and Unigram's least likely piece.

    Args:
        tokenizer: content of tokenizer.json.
        ids: its tokens with their ids.
        configs: of the tokenizer and the model, which name tokens by role (`cls_token`, `pad_token_id`).
    """
    model = tokenizer["model"]
    needed: set[Any] = {entry["content"] for entry in tokenizer.get("added_tokens") or []} | {unknown_token(tokenizer)}
    needed |= set(_template_tokens(tokenizer.get("post_processor")))
    named = [(role, value) for config in configs for role, value in config.items()]
    for role, value in named:
        if role.endswith("_token"):
            needed.add(value.get("content") if isinstance(value, dict) else value)
    numbers = [value for role, value in named if role.endswith("_token_id")]
    needed |= {token for token, at in ids.items() if at in numbers}
    if model["type"] == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or ""
        needed |= {token for token in ids if len(token) == 1 or len(token.removeprefix(prefix)) == 1}
    else:
        needed |= {token for token in ids if len(token) == 1 or _BYTE.fullmatch(token)}
        needed.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return {token for token in needed if token in ids}


def is_placeholder(token: str) -> bool:
    """Return whether a token is a reserved name such as [unused7], which no text becomes."""
    return _PLACEHOLDER.fullmatch(token) is not None


def subset(tokenizer: Mapping[str, Any], new_ids: Mapping[str, int], *, where: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json with the tokens of `new_ids` alone.

    Args:
        tokenizer: content of the whole one.
        new_ids: the tokens that stay, all that are needed among them, numbered from 0 in the order of their old ids.
        where: the file, for messages.

    Raises:
        ModelError: it has a post-processor of an unknown kind, or the library numbers the tokens otherwise.
    """
    model = dict(tokenizer["model"])
    if model["type"] == "WordPiece":
        model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in new_ids}
    else:
        unknown = unknown_token(tokenizer)
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new_ids]
        model["unk_id"] = None if unknown is None else new_ids[unknown]
    result = dict(tokenizer) | {"model": model}
    result["added_tokens"] = [
        entry | {"id": new_ids[entry["content"]]} for entry in tokenizer.get("added_tokens") or []
    ]
    result["post_processor"] = _renumber_processor(tokenizer.get("post_processor"), new_ids, where)
    if isinstance(padding := tokenizer.get("padding"), dict):
        result["padding"] = padding | {"pad_id": new_ids[padding["pad_token"]]}
    try:
        found = Tokenizer.from_str(json.dumps(result)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust side raises a bare Exception
        raise ModelError(f"{where}: not a tokenizer any more with part of its vocabulary ({error}).") from error
    if found != dict(new_ids):
        differing = sorted(token for token in {*found, *new_ids} if found.get(token) != new_ids.get(token))
        raise ModelError(
            f"{where}: with part of its vocabulary the tokenizers library numbers {len(differing)} tokens otherwise "
            f"({', '.join(differing[:5])}); added tokens should have the highest ids. Set export.vocabulary to null."
        )
    return result


def renumber_config(config: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return tokenizer_config.json or special_tokens_map.json with new ids; most name tokens by their text."""
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return dict(config)
    return dict(config) | {
        "added_tokens_decoder": {
            str(new_ids[entry["content"]]): entry for entry in entries.values() if entry["content"] in new_ids
        }
    }


def _template_tokens(processor: Any) -> Iterator[str]:
    """Yield the tokens that a post-processor adds."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or ():
        yield from _template_tokens(part)
    for role in ("sep", "cls"):
        if role in processor:
            yield processor[role][0]
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["tokens"]


def _renumber_processor(processor: Any, new_ids: Mapping[str, int], where: Path) -> Any:
    if processor is None:
        return None
    if processor.get("type") not in _PROCESSORS:
        raise ModelError(
            f"{where}: a post-processor of the kind {processor.get('type')!r}, whose token ids are not known; known: "
            f"{', '.join(_PROCESSORS)}. Set export.vocabulary to null."
        )
    result = dict(processor)
    for role in {"sep", "cls"} & set(result):
        token = result[role][0]
        result[role] = [token, new_ids[token]]
    if "special_tokens" in result:
        result["special_tokens"] = {
            name: entry | {"ids": [new_ids[token] for token in entry["tokens"]]}
            for name, entry in result["special_tokens"].items()
        }
    if "processors" in result:
        result["processors"] = [_renumber_processor(part, new_ids, where) for part in result["processors"]]
    return result
