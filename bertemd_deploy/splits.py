"""One split of a data set, by kind of task: texts, words or questions with their labels, and how they are tokenised.

Each kind of split has a length (rows of the file), can be cut to some rows, says what it holds (for the hash of a data
set), and encodes itself as the `DataSlice` that models are trained and judged on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import Answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.console import note
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.tasks import Kind

Rows = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class Split:
    """Texts, or pairs of texts, with one answer each.

    Attributes:
        texts: first (or only) texts.
        pairs: second texts.
        labels: (n,) int64 class numbers, (n,) float32 for regression, or (n, labels) float32 of 0 and 1 for multilabel.
        kind: of the task.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: NDArray[Any]
    kind: Kind = "classification"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def encode(self, encoder: TextEncoder) -> DataSlice:
        """Return the split tokenised."""
        return DataSlice(encoder.encode(self.texts, self.pairs), self.labels, self.kind)

    def select(self, rows: Rows) -> Split:
        """Return the given rows, in the given order."""
        pairs = None if self.pairs is None else [self.pairs[at] for at in rows]
        return replace(self, texts=[self.texts[at] for at in rows], pairs=pairs, labels=self.labels[np.asarray(rows)])

    def content(self) -> list[Any]:
        """Return what the split holds, as JSON can write it."""
        return [self.texts, self.pairs, self.labels.tolist()]


@dataclass(frozen=True)
class TokenSplit:
    """Sentences of words, each word with a tag number."""

    words: list[list[str]]
    tags: list[list[int]]

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.words)

    def encode(self, encoder: TextEncoder) -> DataSlice:
        """Return the split tokenised: a word's tag is the label of its first piece, and its only one.

        Words beyond the maximum length are cut off; how many is said once.
        """
        examples, words = encoder.encode_words(self.words)
        labels = np.full(len(words), NOT_SCORED, dtype=np.int64)
        for row, tags in enumerate(self.tags):
            piece = slice(examples.offsets[row], examples.offsets[row + 1])
            first = words[piece] >= 0
            labels[piece][first] = np.asarray(tags, dtype=np.int64)[words[piece][first]]
        given, scored = sum(map(len, self.tags)), int((labels != NOT_SCORED).sum())
        if scored < given:
            note(
                f"data: {given - scored:,} of {given:,} words are not scored: beyond data.max_length "
                f"({encoder.max_length}), or without a token"
            )
        return DataSlice(examples, labels, "token-classification")

    def select(self, rows: Rows) -> TokenSplit:
        """Return the given sentences, in the given order."""
        return TokenSplit([self.words[at] for at in rows], [self.tags[at] for at in rows])

    def content(self) -> list[Any]:
        """Return what the split holds, as JSON can write it."""
        return [self.words, self.tags]


@dataclass(frozen=True)
class QuestionSplit:
    """Questions on contexts.

    Attributes:
        ids: name of each question.
        questions: the questions.
        contexts: the text that each is asked of.
        answers: accepted answers of each: text, and its first character in the context; none where there is no answer.
            Training learns the first.
        doc_stride: tokens that neighbouring windows of a long context share.
        no_answer: whether "no answer" is a possible one; None: where a question of these has no answer.
    """

    ids: list[str]
    questions: list[str]
    contexts: list[str]
    answers: list[list[tuple[str, int]]]
    doc_stride: int
    no_answer: bool | None = None

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def encode(self, encoder: TextEncoder) -> DataSlice:
        """Return the split tokenised: a row for each window of each context.

        Raises:
            DataError: a question leaves no room for its context.
        """
        examples, example, spans = encoder.encode_windows(
            self.questions, self.contexts, overlap=self.doc_stride, names=self.ids
        )
        labels = np.zeros((len(examples), 2), dtype=np.int64)
        for row, number in enumerate(example):
            if not self.answers[number]:
                continue
            piece = spans[examples.offsets[row] : examples.offsets[row + 1]]
            text, start = self.answers[number][0]
            start, stop = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
            inside = np.flatnonzero(piece[:, 0] >= 0)
            held = inside[(piece[inside, 0] < stop) & (piece[inside, 1] > start)]
            opens = row == 0 or example[row - 1] != number
            closes = row + 1 == len(example) or example[row + 1] != number
            if len(held) and (opens or piece[inside[0], 0] <= start) and (closes or piece[inside[-1], 1] >= stop):
                labels[row] = held[0], held[-1]
        accepted = tuple(tuple(text for text, _ in answers) for answers in self.answers)
        gold = Answers(example, spans, tuple(self.contexts), accepted, tuple(self.ids), self.no_answer)
        return DataSlice(examples, labels, "question-answering", gold)

    def select(self, rows: Rows) -> QuestionSplit:
        """Return the given questions, in the given order."""
        return replace(
            self,
            ids=[self.ids[at] for at in rows],
            questions=[self.questions[at] for at in rows],
            contexts=[self.contexts[at] for at in rows],
            answers=[self.answers[at] for at in rows],
        )

    def content(self) -> list[Any]:
        """Return what the split holds, as JSON can write it."""
        return [self.ids, self.questions, self.contexts, self.answers, self.doc_stride]


AnySplit = Split | TokenSplit | QuestionSplit


def with_no_answer(splits: Mapping[str, AnySplit]) -> dict[str, AnySplit]:
    """Return the splits of one data set, where "no answer" is possible in all splits of questions if it is so in one."""
    questions = [split for split in splits.values() if isinstance(split, QuestionSplit)]
    found = any(split.no_answer or not all(split.answers) for split in questions)
    return {
        name: replace(split, no_answer=found) if isinstance(split, QuestionSplit) else split
        for name, split in splits.items()
    }
