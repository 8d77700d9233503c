"""Text to token ids and back to padded batches, with numpy and the `tokenizers` library only.

Training, export, benchmarks and prediction all go through here, so a text is tokenised in one way everywhere. Examples
are kept ragged (no padding); a batch is padded to its own longest row, and rows of like length are batched together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.errors import DataError, ModelError

_Row = TypeVar("_Row")
_CHUNK = 1024  # texts whose tokens and offsets are held as objects at once


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
            DataError: a text is not valid Unicode.
        """
        check_unicode(texts)
        check_unicode(pairs or ())
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._tokenizer.encode_batch_fast(rows)
        return _join((encoding.ids, encoding.type_ids) for encoding in encodings)

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> tuple[Encoded, NDArray[np.int32]]:
        """Tokenise sentences that are split into words already; what is beyond the maximum length is cut off.

        Returns:
            The rows, and for every token (sum of lengths,) int32 the number of the word that it is the first piece of, or
            -1 for further pieces and special tokens. A word that the tokenizer drops (such as a control character) or
            that was cut off has no token.

        Raises:
            DataError: a word is not valid Unicode.
        """
        check_unicode("".join(sentence) for sentence in sentences)
        rows, words = [], []
        for chunk in _chunks(sentences):
            for encoding in self._of_words.encode_batch([list(sentence) for sentence in chunk], is_pretokenized=True):
                numbers = np.array([-1 if at is None else at for at in encoding.word_ids], dtype=np.int32)
                numbers[1:][numbers[1:] == numbers[:-1]] = -1
                rows.append((encoding.ids, encoding.type_ids))
                words.append(numbers)
        return _join(rows), np.concatenate([np.zeros(0, dtype=np.int32), *words])

    def encode_windows(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        overlap: int,
        names: Sequence[str] = (),
        remedy: str = "Shorten it, or raise data.max_length.",
    ) -> tuple[Encoded, NDArray[np.int32], NDArray[np.int32]]:
        """Tokenise question and context pairs, a context that is too long in overlapping windows behind its question.

        Args:
            questions: first texts, never cut.
            contexts: second texts.
            overlap: tokens that neighbouring windows share; at most half of the room that the question leaves.
            names: what the examples are called in an error; none takes their numbers, from 1.
            remedy: what to do about a question that is too long.

        Returns:
            The rows; (rows,) int32 the example each is of; (sum of lengths, 2) int32 the first and behind-last character
            of every token in its context, -1 outside of it.

        Raises:
            DataError: a question leaves no room for its context, or a text is not valid Unicode.
            ValueError: `questions` has another length than `contexts`.
        """
        check_unicode(questions)
        check_unicode(contexts)
        rows: list[tuple[Sequence[int], Sequence[int]]] = []
        example: list[int] = []
        spans: list[NDArray[np.int32]] = []
        number = -1
        for chunk in _chunks(list(zip(questions, contexts, strict=True))):
            for encoding in self._whole.encode_batch(chunk):
                number += 1
                inside = np.flatnonzero(np.array([part == 1 for part in encoding.sequence_ids], dtype=bool))
                places = np.full((len(encoding.ids), 2), -1, dtype=np.int32)
                places[inside] = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)[inside]
                first, behind = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(places), len(places))
                room = self.max_length - (len(places) - (behind - first))
                if room < 1:
                    raise DataError(
                        f"question {names[number] if names else number + 1}: it fills {self.max_length - room} of "
                        f"{self.max_length} tokens and leaves no room for its context. {remedy}"
                    )
                for start in _window_starts(behind - first, room=room, overlap=overlap):
                    kept = np.r_[:first, first + start : min(first + start + room, behind), behind : len(places)]
                    rows.append((np.take(encoding.ids, kept), np.take(encoding.type_ids, kept)))
                    example.append(number)
                    spans.append(places[kept])
        return _join(rows), np.array(example, dtype=np.int32), np.concatenate([np.zeros((0, 2), np.int32), *spans])

    @functools.cached_property
    def _whole(self) -> Tokenizer:
        """The tokenizer without truncation."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    @functools.cached_property
    def _of_words(self) -> Tokenizer:
        """The tokenizer for lists of words: with a blank before every word where blanks are parts of tokens."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        if getattr(tokenizer.pre_tokenizer, "add_prefix_space", True) is False:
            tokenizer.pre_tokenizer.add_prefix_space = True
        return tokenizer

    def vocabulary(self) -> dict[str, int]:
        """Return every token with its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))


def decoded(tokenizer: Tokenizer, examples: Encoded) -> tuple[list[str], list[str] | None]:
    """Return the rows as texts again, special tokens left out; second segments too where a row has one, else None.

    Segments are told apart by their types, or, where a tokenizer gives both the same, by the special tokens between them.
    What the tokenizer dropped (case, accents, runs of blanks) is not brought back.
    """
    typed = bool(examples.types.any())
    frame = np.unique(tokenizer.encode("", "").ids).astype(np.int64)  # what it puts around and between segments
    segments: tuple[list[str], list[str]] = ([], [])
    for row in range(len(examples)):
        piece = slice(examples.offsets[row], examples.offsets[row + 1])
        tokens = examples.tokens[piece]
        second = examples.types[piece] == 1 if typed else _behind_first(~np.isin(tokens, frame))
        for chosen, texts in zip((~second, second), segments, strict=True):
            texts.append(tokenizer.decode(tokens[chosen].tolist(), skip_special_tokens=True))
    return segments[0], segments[1] if typed or any(segments[1]) else None


def _behind_first(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which places lie behind the first unbroken run of `inside`."""
    return np.asarray(np.cumsum(np.diff(inside.astype(np.int8), prepend=0) == -1) > 0)


def check_unicode(texts: Iterable[str], *, first: int = 1) -> None:
    """Refuse texts that no tokenizer can read: with half of a surrogate pair, as bytes that are not UTF-8 become.

    Args:
        texts: what to check.
        first: number of the first, for the message.

    Raises:
        DataError: such a text, by its number.
    """
    for number, text in enumerate(texts, first):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {number} is not valid Unicode (lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start + 1}). Read or convert it as UTF-8."
            ) from error


def _window_starts(tokens: int, *, room: int, overlap: int) -> range:
    """Return where windows of `room` tokens start so that the last one reaches the end of `tokens`."""
    step = room - min(overlap, room // 2)
    return range(0, max(1, tokens - room + step), step)


def _chunks(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _join(rows: Iterable[tuple[Sequence[int] | NDArray[np.integer], Sequence[int] | NDArray[np.integer]]]) -> Encoded:
    """Return (ids, types) rows as one."""
    kept = [(np.asarray(ids, dtype=np.int32), np.asarray(types, dtype=np.int8)) for ids, types in rows]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in kept], dtype=np.int64)]).astype(np.int64)
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(ids for ids, _ in kept)])
    return Encoded(tokens, np.concatenate([np.zeros(0, dtype=np.int8), *(types for _, types in kept)]), offsets)
