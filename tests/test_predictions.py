from __future__ import annotations

import numpy as np
import pytest

from bertemd_deploy.predictions import any_of, as_text, softmax, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("EU rejects.", ["EU", "rejects", "."]),
        ("it's $5 (a_b)", ["it", "'", "s", "$", "5", "(", "a", "_", "b", ")"]),
        ("naïve naïve — «ja»", ["naïve", "naïve", "—", "«", "ja", "»"]),
        ("हिन्दी।", ["हिन्दी", "।"]),
    ],
)
def test_words_are_split_as_bert_splits_them(text, words):
    places = words_of(text)
    assert [text[start:end] for start, end in places] == words
    from tokenizers.pre_tokenizers import BertPreTokenizer

    assert places == [place for _, place in BertPreTokenizer().pre_tokenize_str(text)]


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
