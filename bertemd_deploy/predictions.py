"""From logits to what a person asked for: a label, several labels, a number, entities in a text, an answer in a context.

In: one model's logits with the texts they are of. Out: one `Prediction` per text. Probabilities are a softmax over the
classes, or a sigmoid for each of several labels. Tags are those of words, read as entities as the metric reads them
(`spans`); an answer is the best span over all windows of its context, as the metric finds it (`answers`). NumPy only.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import Answers, best_answers
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.spans import entities, is_entity_tag

Logits = NDArray[np.floating]
Word = tuple[int, int]

# The ideographs that BERT's normalizer sets between blanks; a variation selector belongs to the one before it.
_CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
    "\U0002f800-\U0002fa1f"
)
_PARTS = re.compile(rf"[{_CJK}][\ufe00-\ufe0f\U000e0100-\U000e01ef]?|[^\s{_CJK}]+")
_INITIALS = re.compile(r"(?:[^\W\d_]\.){2,}")
_POSSESSIVE = re.compile(r"['\u2019][sS]")


@dataclass(frozen=True)
class Entity:
    """A named thing in a text.

    Attributes:
        label: its type, such as PER.
        text: the text's own characters, from `start` to before `end`; of a list of words, the words with a blank between.
        start: first character in the text; of a list of words, in the words joined by blanks.
        end: the character behind the last.
        score: mean probability of its words' tags, in [0, 1].
    """

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """An answer found in a context.

    Attributes:
        text: the context's own characters, from `start` to before `end`.
        start: first character in the context.
        end: the character behind the last.
        score: probability of its first token times that of its last, over all windows of the context.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of one text.

    Attributes:
        label: name of the most probable class; of several labels None where none is above 0.5; None for other kinds.
        score: probability of the most probable class or label; for regression the predicted value; for entities the mean
            probability of the words' tags (1 for a text without words); for answers that of the answer, or of none.
        scores: probability by label name; empty for regression, entities and answers.
        labels: all labels above 0.5, the most probable first; only where a text may have several.
        entities: what was found in the text, in order; only for token classification. Where the tags name no entities
            (parts of speech), every word with its tag.
        answer: only for question answering; None where the model says that the context holds no answer.
    """

    label: str | None
    score: float
    scores: dict[str, float]
    labels: tuple[str, ...] = ()
    entities: tuple[Entity, ...] = ()
    answer: Answer | None = None


def values(logits: Logits) -> Iterator[Prediction]:
    """Yield the predictions of a regression model, logits (n, 1)."""
    yield from (Prediction(None, float(row[0]), {}) for row in logits)


def one_of(logits: Logits, labels: Sequence[str]) -> Iterator[Prediction]:
    """Yield the most probable class of every row of logits (n, labels)."""
    for row in softmax(logits):
        best = int(row.argmax())
        yield Prediction(labels[best], float(row[best]), dict(zip(labels, row.tolist(), strict=True)))


def any_of(logits: Logits, labels: Sequence[str]) -> Iterator[Prediction]:
    """Yield all labels above 0.5 of every row of logits (n, labels)."""
    for row in logits.astype(np.float64):
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-row))
        order = [int(at) for at in np.argsort(-row, kind="stable")]
        chosen = tuple(labels[at] for at in order if row[at] > 0)
        named = dict(zip(labels, scores.tolist(), strict=True))
        yield Prediction(chosen[0] if chosen else None, float(scores[order[0]]), named, labels=chosen)


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Return probabilities over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def words_of(text: str) -> list[Word]:
    """Return first and behind-last character of every word of a text that is not split yet.

    Words are what data sets of tags call so: parted by blanks, each ideograph alone, punctuation at either end of a word
    alone too. What stands inside stays (O'Neil, 3.5), as does the last stop of initials (U.S.); a possessive 's is a word.
    """
    found: list[Word] = []
    for part in _PARTS.finditer(text):
        first, last = part.span()
        while first < last and _is_punctuation(text[first]):
            first += 1
        while first < last and _is_punctuation(text[last - 1]):
            last -= 1
        if _INITIALS.fullmatch(text, first, last + 1):
            last += 1
        found += [(at, at + 1) for at in range(part.start(), first)]
        if last - first > 2 and _POSSESSIVE.fullmatch(text, last - 2, last):
            found += [(first, last - 2), (last - 2, last)]
        elif first < last:
            found.append((first, last))
        found += [(at, at + 1) for at in range(last, part.end())]
    return found


def joined(words: Sequence[str]) -> tuple[str, list[Word]]:
    """Return given words as one text, a blank between them, and the place of each in it."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return " ".join(words), [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]


def _is_punctuation(character: str) -> bool:
    symbol = character.isascii() and character.isprintable() and not (character.isalnum() or character == " ")
    return symbol or unicodedata.category(character).startswith("P")


def tagged(text: str, words: Sequence[Word], logits: Logits, labels: Sequence[str]) -> Prediction:
    """Return the entities of one text.

    Args:
        text: the text.
        words: places of those of its words that the model tagged.
        logits: (words, labels).
        labels: tags by number, such as O, B-PER, I-PER; or others, which name a word each.
    """
    if not len(words):
        return Prediction(None, 1.0, {})
    scores = softmax(logits)
    best = scores.argmax(axis=-1)
    sure = scores[np.arange(len(words)), best]
    tags = [labels[at] for at in best]
    named = all(is_entity_tag(label) for label in labels)
    found = []
    for label, first, last in entities(tags) if named else [(tag, at, at) for at, tag in enumerate(tags)]:
        start, end = words[first][0], words[last][1]
        found.append(Entity(label, text[start:end], start, end, float(sure[first : last + 1].mean())))
    return Prediction(None, float(sure.mean()), {}, entities=tuple(found))


def answered(
    logits: Logits,
    examples: Encoded,
    *,
    example: NDArray[np.int32],
    spans: NDArray[np.int32],
    contexts: Sequence[str],
    no_answer: bool,
) -> Iterator[Prediction]:
    """Yield the best answer in every context.

    Args:
        logits: (sum of lengths, 2), start and end of every token.
        examples: the windows.
        example: (windows,) the context each is of.
        spans: (sum of lengths, 2) characters of every token in its context, -1 outside of it.
        contexts: the contexts.
        no_answer: "no answer" may win too.
    """
    texts, none = tuple(contexts), ((),) * len(contexts)
    gold = Answers(example, spans, texts, none, ("",) * len(texts))
    owner = np.repeat(example, examples.lengths)
    tokens = np.argsort(owner, kind="stable")  # those of one context side by side
    ends = np.searchsorted(owner[tokens], np.arange(len(texts)), side="right")
    answers = best_answers(logits, offsets=examples.offsets, gold=gold, null=no_answer)
    for number, found in enumerate(answers):
        both = logits[tokens[ends[number - 1] if number else 0 : ends[number]]].astype(np.float64)
        total = float(np.logaddexp.reduce(both, axis=0).sum())
        if found.start < 0:
            yield Prediction(None, float(np.exp(found.null_score - total)), {})
            continue
        score = float(np.exp(found.score - total))
        yield Prediction(None, score, {}, answer=Answer(found.text, found.start, found.end, score))


def as_text(record: Mapping[str, Any]) -> str:
    """Return one line for a prediction's record (`Classifier.record`): what was found, each with its score, between tabs.

    Where nothing was found the line starts with "-"; a regression's line is its value alone.
    """
    if "entities" in record:
        found = [(f"{entity['label']} {entity['text']}", entity["score"]) for entity in record["entities"]]
    elif "answer" in record:
        found = [(record["answer"]["text"], record["score"])] if record["answer"] else []
    elif "labels" in record:
        found = [(label, record["scores"][label]) for label in record["labels"]]
    elif record["label"] is None:
        return f"{record['score']:.4f}"
    else:
        found = [(record["label"], record["score"])]
    return "\t".join(f"{' '.join(name.split())}\t{score:.4f}" for name, score in found or [("-", record["score"])])
