"""The demo corpus: its size, its bytes, the gap between its splits, and how little a bag of words learns from it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import combinations

import pytest

from bertemd_deploy import demo

SHA256 = {
    "train": "70c53775b15e0088311b0562d93f3ad7828a59cf26b430ca365f78097ecf8f03",
    "dev": "eb28df85034b134b02f5f59aa17d6c9bd4767de581425d143f0d090a63e132ee",
}
BAG_OF_WORDS_BOUND = 0.70


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str, str]]]:
    return {"train": demo.demo_rows("train"), "dev": demo.demo_rows("dev")}


def plain(text: str) -> str:
    """Lower case, no final stop, one space at each end, so that whole words can be looked for."""
    return f" {text.lower().rstrip('.')} "


def test_counts_and_labels(rows):
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {"train": 4000, "dev": 800}
    assert len(demo.LABELS) == 16
    assert list(demo.LABELS) == sorted(set(demo.LABELS))
    for split_rows in rows.values():
        assert {label for _, label in split_rows} == set(demo.LABELS)


def test_labels_are_balanced(rows):
    for split_rows in rows.values():
        counts = Counter(label for _, label in split_rows)
        assert set(counts.values()) == {len(split_rows) // len(demo.LABELS)}
        assert min(counts.values()) >= 0.03 * len(split_rows)


def test_rows_are_shuffled(rows):
    for split_rows in rows.values():
        assert len({label for _, label in split_rows[:160]}) == len(demo.LABELS)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_same_bytes_everywhere(rows, split):
    assert demo.demo_rows(split) == rows[split]
    text = "".join(f"{text}\t{label}\n" for text, label in rows[split])
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[split]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'test'.*train, dev"):
        demo.demo_rows("test")


def test_texts_are_clean(rows):
    for text, _ in rows["train"] + rows["dev"]:
        assert re.fullmatch(r"[A-Za-z0-9' ]+\.?", text), text
        assert text == " ".join(text.split())


def test_no_text_appears_twice(rows):
    texts = [text for split_rows in rows.values() for text, _ in split_rows]
    assert len(set(texts)) == len(texts)
    assert not {plain(text) for text, _ in rows["train"]} & {plain(text) for text, _ in rows["dev"]}


@pytest.mark.parametrize("kind", ["commands", "remarks", "frames"])
def test_templates_are_disjoint(kind):
    train, dev = (getattr(demo.GRAMMARS[split], kind) for split in ("train", "dev"))
    assert sorted(train) == sorted(dev)
    seen = {template for templates in train.values() for template in templates}
    assert not [template for templates in dev.values() for template in templates if template in seen]


def test_slot_values_are_disjoint(rows):
    train, dev = (demo.GRAMMARS[split].slots for split in ("train", "dev"))
    assert sorted(train) == sorted(dev)
    seen = [plain(text) for text, _ in rows["train"]]
    for value in (value for values in dev.values() for value in values):
        assert not any(value in values for values in train.values()), value
        assert not any(f" {value} " in text for text in seen), value


def test_every_template_of_a_split_has_one_label():
    for grammar in demo.GRAMMARS.values():
        said = {label: {*grammar.commands[label], *grammar.remarks[label]} for label in demo.LABELS}
        for one, other in combinations(demo.LABELS, 2):
            assert not said[one] & said[other]


def test_groups_cover_every_intent_but_cancel():
    grouped = [label for group in demo.GROUPS for label in group]
    assert sorted([*grouped, "cancel"]) == list(demo.LABELS)


def test_a_bag_of_words_falls_well_short(rows):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    (texts, labels), (dev_texts, dev_labels) = (zip(*rows[split], strict=True) for split in ("train", "dev"))
    with threadpool_limits(1):  # a small fit: more threads only wait for one another
        for bag in (CountVectorizer(), TfidfVectorizer(ngram_range=(1, 2))):
            model = make_pipeline(bag, LogisticRegression(max_iter=1000)).fit(texts, labels)
            assert model.score(texts, labels) > 0.85
            assert model.score(dev_texts, dev_labels) < BAG_OF_WORDS_BOUND
