"""Text to token ids and back to padded batches, with numpy and the `tokenizers` library only.

Training, export, benchmarks and prediction all go through here, so a text is tokenised in one way everywhere. Examples
are kept ragged (no padding); a batch is padded to its own longest row, and rows of like length are batched together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.errors import ModelError


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, ragged: row k is `tokens[offsets[k]:offsets[k + 1]]`.

    Attributes:
        tokens: (sum of lengths,) int32 token ids with special tokens.
        types: (sum of lengths,) int8 segment ids.
        offsets: (n + 1,) int64 row starts; the last is the number of tokens.
    """

    tokens: NDArray[np.int32]
    types: NDArray[np.int8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens in each row."""
        return np.diff(self.offsets)

    def select(self, rows: Sequence[int] | NDArray[np.integer]) -> Encoded:
        """Return the given rows, in the given order."""
        pieces = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([piece.stop - piece.start for piece in pieces], dtype=np.int64)])
        empty_tokens, empty_types = self.tokens[:0], self.types[:0]
        return Encoded(
            np.concatenate([empty_tokens, *(self.tokens[piece] for piece in pieces)]),
            np.concatenate([empty_types, *(self.types[piece] for piece in pieces)]),
            offsets.astype(np.int64),
        )

    def batch(
        self, rows: Sequence[int] | NDArray[np.integer], *, pad_id: int, length: int | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Return `rows` padded on the right as the graph's inputs, each (batch, T) int64.

        Args:
            rows: row numbers.
            pad_id: token id of padding.
            length: T; None takes the longest of `rows`.
        """
        lengths = self.lengths[np.asarray(rows, dtype=np.int64)]
        width = int(lengths.max()) if length is None else length
        ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        types = np.zeros_like(ids)
        for at, row in enumerate(rows):
            piece = slice(self.offsets[row], self.offsets[row + 1])
            ids[at, : lengths[at]] = self.tokens[piece]
            types[at, : lengths[at]] = self.types[piece]
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def length_batches(lengths: NDArray[np.integer], *, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield row numbers in batches of like length, shortest first; every row once, ties in their given order."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class TextEncoder:
    """A model folder's tokenizer, cut to a maximum length; pairs become one row with two segments."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, pad_id: int) -> None:
        """Take a tokenizer whose post-processor adds the special tokens; truncate at `max_length` tokens."""
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        self.max_length = max_length

    @classmethod
    def load(cls, folder: Path, *, max_length: int) -> TextEncoder:
        """Read `tokenizer.json` in `folder`.

        Raises:
            ModelError: the file is missing or damaged, or has no padding token.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder}: no tokenizer.json. Save the tokenizer there with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ModelError(f"{path}: not a readable tokenizer ({error}).") from error
        for token in ("[PAD]", "<pad>"):
            pad_id = tokenizer.token_to_id(token)
            if pad_id is not None:
                return cls(tokenizer, max_length=max_length, pad_id=pad_id)
        raise ModelError(f"{path}: the vocabulary has neither [PAD] nor <pad>; batches cannot be padded.")

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        """Tokenise `texts`, or `texts` with `pairs` as second segments, in order.

        Raises:
            ValueError: `pairs` has another length than `texts`.
        """
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._tokenizer.encode_batch_fast(rows)
        lengths = np.fromiter((len(encoding) for encoding in encodings), dtype=np.int64, count=len(encodings))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.empty(int(offsets[-1]), dtype=np.int32)
        types = np.empty(int(offsets[-1]), dtype=np.int8)
        for at, encoding in enumerate(encodings):
            tokens[offsets[at] : offsets[at + 1]] = encoding.ids
            types[offsets[at] : offsets[at + 1]] = encoding.type_ids
        return Encoded(tokens, types, offsets)

    def vocabulary(self) -> dict[str, int]:
        """Return every token with its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))
