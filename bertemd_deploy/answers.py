"""Question answering: from start and end logits to answers in the context, and how far they are from accepted ones.

A long context is cut into overlapping windows, each a row; an example's answer is the best span over all its windows. The
scores are those of SQuAD's evaluation (Rajpurkar et al. 2016, 2018): exact match and token F1 after lower-casing and
without punctuation, articles and extra blanks, the best over the accepted answers; no accepted answer means that the
right answer is the empty one. Everything is numpy and text, so a device computes it too.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST_ANSWER = 30  # tokens, as in the published SQuAD settings of BERT
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answers:
    """What turns a slice's outputs into answers, and what they are compared with.

    Attributes:
        example: (rows,) int32, the example that each row is a window of.
        spans: (sum of lengths, 2) int32, every token's first and behind-last character in the context, -1 outside of it.
        contexts: text of each example.
        accepted: accepted answers of each example; none where the context holds no answer.
        ids: name of each example.
        no_answer: whether "no answer" is a possible one; None: where an example of these has no answer.
    """

    example: NDArray[np.int32]
    spans: NDArray[np.int32]
    contexts: tuple[str, ...]
    accepted: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    no_answer: bool | None = None

    @property
    def unanswerable(self) -> bool:
        """Whether "no answer" is a possible one, as an example of these or of the rest of their data has none."""
        return not all(self.accepted) if self.no_answer is None else self.no_answer

    def select(self, rows: Sequence[int] | NDArray[np.integer], *, offsets: NDArray[np.int64]) -> Answers:
        """Return what belongs to the given rows, in the given order, with the examples that they are windows of.

        Args:
            rows: row numbers.
            offsets: (all rows + 1,) row starts in `spans`.
        """
        chosen = self.example[np.asarray(rows, dtype=np.int64)]
        kept, example = np.unique(chosen, return_inverse=True)
        pieces = [self.spans[offsets[row] : offsets[row + 1]] for row in rows]
        return Answers(
            example.astype(np.int32),
            np.concatenate([self.spans[:0], *pieces]),
            tuple(self.contexts[at] for at in kept),
            tuple(self.accepted[at] for at in kept),
            tuple(self.ids[at] for at in kept),
            self.no_answer,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return it as named arrays; texts are one UTF-8 JSON array, each context once."""
        numbers = {context: at for at, context in enumerate(dict.fromkeys(self.contexts))}
        texts = {
            "contexts": list(numbers),
            "context": [numbers[context] for context in self.contexts],
            "accepted": self.accepted,
            "ids": self.ids,
            "no_answer": self.no_answer,
        }
        text = np.frombuffer(json.dumps(texts, ensure_ascii=False).encode(), dtype=np.uint8)
        return {"example": self.example, "spans": self.spans, "text": text}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Answers:
        """Return what `arrays` gave.

        Raises:
            ValueError: the arrays are not such.
            KeyError: one is missing.
        """
        texts = json.loads(arrays["text"].tobytes().decode())
        if not isinstance(texts, dict):
            raise ValueError("the texts are not an object")
        contexts, numbers = texts["contexts"], texts["context"]
        if not _all(contexts, str) or not _all(numbers, int) or not _all(texts["ids"], str):
            raise ValueError("the texts are not lists of text")
        if not isinstance(texts["accepted"], list) or not all(_all(answers, str) for answers in texts["accepted"]):
            raise ValueError("the accepted answers are not lists of text")
        if not len(numbers) == len(texts["accepted"]) == len(texts["ids"]):
            raise ValueError("contexts, answers and ids differ in number")
        if not isinstance(texts.get("no_answer"), bool | None):
            raise ValueError("no_answer is neither true nor false")
        example, spans = arrays["example"], arrays["spans"]
        if any(not 0 <= at < len(contexts) for at in numbers) or example.ndim != 1 or example.dtype.kind != "i":
            raise ValueError("a number is not that of a context")
        if len(example) and (int(example.min()) < 0 or int(example.max()) >= len(numbers)):
            raise ValueError("a row is a window of no example")
        if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype.kind != "i":
            raise ValueError("the character spans are not pairs of numbers")
        return cls(
            example,
            spans,
            tuple(contexts[at] for at in numbers),
            tuple(map(tuple, texts["accepted"])),
            tuple(texts["ids"]),
            texts.get("no_answer"),  # slices of an older version do not say
        )


@dataclass(frozen=True)
class Answer:
    """One example's answer.

    Attributes:
        text: the answer; empty where there is none.
        start: its first character in the context, or -1.
        end: the character behind it, or -1.
        score: start plus end logit of the best span; minus infinity where a context has no tokens.
        null_score: the same of "no answer" at the first token, the smallest over the example's windows.
    """

    text: str
    start: int
    end: int
    score: float
    null_score: float


def best_answers(
    logits: NDArray[np.floating], *, offsets: NDArray[np.int64], gold: Answers, null: bool | None = None
) -> list[Answer]:
    """Return the best answer of every example.

    Args:
        logits: (sum of lengths, 2) start and end logits of every token.
        offsets: (rows + 1,) row starts.
        gold: windows, spans and contexts.
        null: whether "no answer" may be given, where it scores higher than the best span; None: where `gold` has it
            possible (as in SQuAD 2.0).
    """
    allowed = gold.unanswerable if null is None else null
    found: list[tuple[float, int, int]] = [(-np.inf, -1, -1)] * len(gold.contexts)
    nulls = [np.inf] * len(gold.contexts)
    blanks: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
    for row, example in enumerate(gold.example):
        if not row or example != gold.example[row - 1]:
            blanks = np.cumsum([0, *map(str.isspace, gold.contexts[example])])
        piece = slice(offsets[row], offsets[row + 1])
        scores, spans = logits[piece].astype(np.float64), gold.spans[piece]
        nulls[example] = min(nulls[example], float(scores[0].sum()))
        places = np.clip(spans, 0, len(blanks) - 1)
        said = np.diff(blanks[places])[:, 0] < np.diff(places)[:, 0]  # more than blanks
        score, first, last = best_span(scores, inside=(spans[:, 0] >= 0) & said)
        if score > found[example][0]:
            found[example] = score, int(spans[first, 0]), int(spans[last, 1])
    answers = []
    for context, (score, start, end), null_score in zip(gold.contexts, found, nulls, strict=True):
        none = start < 0 or (allowed and null_score > score)
        start, end = (-1, -1) if none else _trimmed(context, start, end)
        answers.append(Answer("" if none else context[start:end], start, end, score, null_score))
    return answers


def _trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Return a span without blanks at its ends, which tokens of some tokenizers have, and with all marks of its letters."""
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    while start > 0 and _is_mark(context[start]) and not context[start - 1].isspace():
        start -= 1
    while end < len(context) and _is_mark(context[end]):
        end += 1
    return start, end


def _is_mark(character: str) -> bool:
    """Say whether a character belongs to the letter before it, such as the accents of decomposed text."""
    return unicodedata.category(character).startswith("M")


def best_span(scores: NDArray[np.floating], *, inside: NDArray[np.bool_]) -> tuple[float, int, int]:
    """Return (score, first token, last token) of the best span of up to `LONGEST_ANSWER` tokens of one window.

    Args:
        scores: (T, 2) start and end logits.
        inside: (T,) which tokens are the context's.
    """
    starts = np.where(inside, scores[:, 0], -np.inf)
    ends = np.where(inside, scores[:, 1], -np.inf)
    best = (-np.inf, 0, 0)
    for width in range(min(LONGEST_ANSWER, len(scores))):
        sums = starts[: len(starts) - width] + ends[width:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = float(sums[first]), first, first + width
    return best


def answer_scores(answers: Sequence[str], *, accepted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return "exact_match" and "f1_squad" of answers, means over the examples, in [0, 1]."""
    exact = [_best_over(answer, known, exact_match) for answer, known in zip(answers, accepted, strict=True)]
    overlap = [_best_over(answer, known, token_f1) for answer, known in zip(answers, accepted, strict=True)]
    return {"exact_match": float(np.mean(exact)), "f1_squad": float(np.mean(overlap))}


def normalized(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 where the normalised texts are equal, else 0."""
    return float(normalized(answer) == normalized(gold))


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of the normalised texts' words, in [0, 1]; of an empty text, 1 where both are empty."""
    found, wanted = normalized(answer).split(), normalized(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _best_over(answer: str, accepted: Sequence[str], score: Callable[[str, str], float]) -> float:
    known = [gold for gold in accepted if normalized(gold)]
    return max(score(answer, gold) for gold in known or [""])


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
