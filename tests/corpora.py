"""Small made-up corpora over the tiny vocabulary, one for each kind of task beside classes and numbers; all learnable.

multilabel: which of three moods a sentence's words have ("good", "bad", "art"), any of them or none.
token-classification: the word after "a" is a person; the two words after "the" are a place; words may have two pieces.
question-answering: a question names a key, the context says "KEY was VALUE ." for two keys; VALUE is one or two words.
Every fourth question of `unanswerable` data names a key that its context does not hold.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GOOD = ("good", "fine", "lovely", "bright")
BAD = ("bad", "poor", "dull", "sad")
ART = ("film", "song")
PLAIN = ("was", "we", "saw", "it", "today", "very")
KEYS = ("good", "bad", "film", "song")
VALUES = ("we", "saw", "it", "today", "very", "dull", "sad", "poor")


def multilabel_row(generator: random.Random, *, number: int) -> dict[str, Any]:
    """Return one row of `sentence` and `labels`; eight successive numbers have all combinations."""
    labels = [name for bit, name in enumerate(("good", "bad", "art")) if number >> bit & 1]
    words = generator.choices(PLAIN, k=generator.randint(2, 5))
    words += [generator.choice({"good": GOOD, "bad": BAD, "art": ART}[name]) for name in labels]
    generator.shuffle(words)
    return {"sentence": " ".join(words), "labels": labels}


def token_row(generator: random.Random) -> dict[str, Any]:
    """Return one row of `tokens` and `tags`."""
    tokens: list[str] = []
    tags: list[str] = []
    for _ in range(generator.randint(2, 4)):
        names = [word + generator.choice(("", "ly", "s")) for word in generator.sample(GOOD + BAD + ART, 2)]
        what = generator.choice(("person", "place", "plain"))
        if what == "person":
            tokens += ["a", names[0]]
            tags += ["O", "B-PER"]
        elif what == "place":
            tokens += ["the", *names]
            tags += ["O", "B-LOC", "I-LOC"]
        else:
            tokens += [generator.choice(PLAIN), names[0]]
            tags += ["O", "O"]
    return {"tokens": tokens, "tags": tags}


def question_row(generator: random.Random, *, name: str, answered: bool = True) -> dict[str, Any]:
    """Return one row of `id`, `question`, `context` and `answers`."""
    keys = generator.sample(KEYS, 3)
    values = [" ".join(generator.sample(VALUES, generator.randint(1, 2))) for _ in range(2)]
    context = " ".join(f"{key} was {value} ." for key, value in zip(keys, values, strict=False))
    asked = generator.randrange(2) if answered else 2
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if answered:
        start = context.index(f"{keys[asked]} was ") + len(f"{keys[asked]} was ")
        answers = {"text": [values[asked]], "answer_start": [start]}
    return {"id": name, "question": keys[asked], "context": context, "answers": answers}


def write_corpus(
    folder: Path, kind: str, *, train: int = 256, dev: int = 64, unanswerable: bool = False, seed: int = 0
) -> Path:
    """Write train.jsonl and dev.jsonl of one kind of task; return the folder."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("dev", dev)):
        if kind == "multilabel":
            rows = [multilabel_row(generator, number=at) for at in range(count)]
        elif kind == "token-classification":
            rows = [token_row(generator) for _ in range(count)]
        else:
            rows = [
                question_row(generator, name=f"{split}-{at}", answered=not (unanswerable and at % 4 == 0))
                for at in range(count)
            ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
