"""Entities in tags, and their F1, against hand-made cases and the package whose counting they follow."""

from __future__ import annotations

import random
import warnings

import pytest

from bertemd_deploy.spans import entities, entity_f1, is_entity_tag


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-PER O", [("PER", 0, 1)]),  # IOB1: no B- at the start
        ("O I-LOC B-LOC I-LOC", [("LOC", 1, 1), ("LOC", 2, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),  # another type begins an entity
        ("B-X I-X E-X S-X", [("X", 0, 2), ("X", 3, 3)]),  # IOBES
        ("S-X E-X I-X", [("X", 0, 0), ("X", 1, 1), ("X", 2, 2)]),
        ("B-A-B I-A-B", [("A-B", 0, 1)]),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_f1_by_hand() -> None:
    """Found 3, there are 2, shared 1: 2 * 1 / 5; the second sentence's entity has a wrong end."""
    predicted = [["B-PER", "O", "B-LOC"], ["B-LOC", "I-LOC"]]
    actual = [["B-PER", "O", "O"], ["B-LOC", "O"]]
    assert entity_f1(predicted, actual) == pytest.approx(2 / 5)
    assert entity_f1(actual, actual) == 1.0
    assert entity_f1([["O"]], [["O"]]) == 0.0


def test_an_entity_ends_with_its_sentence() -> None:
    assert entity_f1([["B-X"], ["I-X"]], [["B-X"], ["I-X"]]) == 1.0
    assert entity_f1([["B-X", "I-X"]], [["B-X", "B-X"]]) == 0.0


@pytest.mark.parametrize("scheme", ["BIO", "BIESO"])
@pytest.mark.parametrize("seed", range(5))
def test_any_tags_count_as_seqeval_counts_them(scheme: str, seed: int) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.metrics.sequence_labeling import get_entities

    generator = random.Random(seed)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in scheme if prefix != "O" for kind in ("PER", "LOC", "X-Y"))]

    def sentence(length: int) -> list[str]:
        return generator.choices(tags, weights=[4] + [1] * (len(tags) - 1), k=length)

    lengths = [generator.randint(1, 12) for _ in range(40)]
    actual = [sentence(length) for length in lengths]
    predicted = [
        [tag if generator.random() < 0.7 else generator.choice(tags) for tag in sentence_tags]
        for sentence_tags in actual
    ]
    for tags_of_one in actual + predicted:
        assert entities(tags_of_one) == get_entities(tags_of_one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = seqeval.f1_score(actual, predicted)
    assert 0.1 < expected < 0.9
    assert entity_f1(predicted, actual) == pytest.approx(expected)


def test_which_tags_are_entities() -> None:
    assert all(map(is_entity_tag, ("O", "B-PER", "I-a b", "E-X", "S-1")))
    assert not any(map(is_entity_tag, ("", "PER", "NN", "B-", "B", "X-PER", "o")))
