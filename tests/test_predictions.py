from __future__ import annotations

import numpy as np
import pytest

from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.predictions import any_of, as_text, joined, softmax, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("EU rejects.", ["EU", "rejects", "."]),
        (
            "U.S. \u2014 (O'Neil) 3.5, e.g., Berlin...",
            ["U.S.", "—", "(", "O'Neil", ")", "3.5", ",", "e.g.", ",", "Berlin", ".", ".", "."],
        ),
        ('I came from Berlin. "Yes."', ["I", "came", "from", "Berlin", ".", '"', "Yes", ".", '"']),
        ("Ada's $5 bad-film 's A.", ["Ada", "'s", "$", "5", "bad-film", "'", "s", "A", "."]),
        ("na\u00efve nai\u0308ve \u00abja\u00bb", ["na\u00efve", "nai\u0308ve", "\u00ab", "ja", "\u00bb"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940\u0964", ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0964"]),
        ("\u6211\u5728\u5317\u4eacIBM3.5\u3002", ["\u6211", "\u5728", "\u5317", "\u4eac", "IBM3.5", "\u3002"]),
        ("\u845b\U000e0100\u57ce", ["\u845b\U000e0100", "\u57ce"]),
    ],
)
def test_words_are_split_as_data_of_tags_has_them(text, words):
    places = words_of(text)
    assert [text[start:end] for start, end in places] == words
    assert [place for place in places if place[0] < place[1]] == sorted(set(places))


@pytest.mark.parametrize("text", ["\u6211\u5728\u5317\u4eac\u3002", "U.S. O'Neil 3.5", "Berlin.", "good.fine, bad"])
def test_a_text_has_the_tokens_of_its_words(tiny_tokenizer, tmp_path, text):
    """So the model sees what it saw in training, where the data brought the words."""
    tiny_tokenizer(tmp_path)
    encoder = TextEncoder.load(tmp_path, max_length=32)
    split, first = encoder.encode_words([[text[start:end] for start, end in words_of(text)]])
    assert split.tokens.tolist() == encoder.encode([text]).tokens.tolist()
    assert first[first >= 0].tolist() == list(range(len(words_of(text))))


def test_words_are_joined_by_blanks():
    text, places = joined(["U.S.", "", "a b"])
    assert (text, places) == ("U.S.  a b", [(0, 4), (5, 5), (6, 9)])
    assert joined([]) == ("", [])


def test_probabilities_of_huge_logits_are_finite():
    assert softmax(np.array([[1e30, 0.0]], dtype=np.float32)).tolist() == [[1.0, 0.0]]
    (found,) = any_of(np.array([[1e30, -1e30]], dtype=np.float32), ["a", "b"])
    assert (found.labels, found.scores) == (("a",), {"a": 1.0, "b": 0.0})


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"label": "good", "score": 0.91, "scores": {}}, "good\t0.9100"),
        ({"label": None, "score": 2.5, "scores": {}}, "2.5000"),
        ({"label": "a", "labels": ["a", "b"], "score": 0.9, "scores": {"a": 0.9, "b": 0.6}}, "a\t0.9000\tb\t0.6000"),
        ({"label": None, "labels": [], "score": 0.4, "scores": {"a": 0.4}}, "-\t0.4000"),
        ({"entities": [{"label": "PER", "text": "Ada\nL.", "score": 0.8}], "score": 1.0}, "PER Ada L.\t0.8000"),
        ({"entities": [], "score": 0.99}, "-\t0.9900"),
        ({"answer": {"text": "in  1815"}, "score": 0.7}, "in 1815\t0.7000"),
        ({"answer": None, "score": 0.6}, "-\t0.6000"),
    ],
)
def test_one_line_for_every_kind(record, line):
    assert as_text(record) == line
