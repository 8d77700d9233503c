"""What measuring models alone asks of tokenizers: the vocabulary, and token ids as readable pieces. It tokenises nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Tokenizer:
    """The vocabulary of a tokenizer.json."""

    def __init__(self, ids: dict[str, int], special: set[int]) -> None:
        """Take every token with its id, and the ids of special tokens."""
        self._ids = ids
        self._tokens = {number: token for token, number in ids.items()}
        self._special = special

    @classmethod
    def from_file(cls, path: str) -> Tokenizer:
        """Read a tokenizer.json."""
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        vocabulary = stored["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = stored.get("added_tokens") or []
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        return cls(ids, {token["id"] for token in added if token.get("special")})

    def no_padding(self) -> None:
        """Do nothing: nothing is tokenised."""

    def enable_truncation(self, max_length: int) -> None:
        """Do nothing: nothing is tokenised."""

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._ids.get(token)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return every token with its id."""
        return dict(self._ids)

    def encode(self, text: str, pair: str = "") -> Any:
        """Return what surrounds two empty texts: the special tokens.

        Raises:
            NotImplementedError: there is a text.
        """
        if text or pair:
            raise NotImplementedError("the tokenizers package is not installed here")
        return SimpleNamespace(ids=sorted(self._special))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the tokens as they are, with blanks between."""
        kept = (number for number in ids if not (skip_special_tokens and number in self._special))
        return " ".join(self._tokens.get(number, "?") for number in kept)
