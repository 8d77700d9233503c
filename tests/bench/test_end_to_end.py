from __future__ import annotations

import numpy as np
import pytest
from tiny_artifact import MAX_LENGTH, TEXTS, write_artifact

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.end_to_end import Answerer
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.runtime import open_session, run_session


@pytest.fixture
def answerer(artifact):
    session = open_session(artifact.folder / "onnx/model.onnx", threads=1)
    return Answerer(artifact, run=lambda inputs: run_session(session, inputs))


def test_texts_come_back_from_their_tokens(artifact, answerer):
    examples = artifact.evaluation().examples
    assert answerer.texts(examples) == (list(TEXTS), None)


def test_pairs_come_back_as_two_segments(artifact, answerer):
    encoder = TextEncoder.load(artifact.folder, max_length=MAX_LENGTH)
    examples = encoder.encode(["good film", "bad"], ["very fine", "the film"])
    assert answerer.texts(examples) == (["good film", "bad"], ["very fine", "the film"])


def test_answers_are_labels_with_softmax_scores(answerer):
    answers = answerer.answer(["the film was good", "bad film"], None)
    assert [answer.label for answer in answers] == ["positive", "negative"]
    # Logits [0.1, 2] and [2.1, 0].
    assert [answer.score for answer in answers] == pytest.approx([1 / (1 + np.exp(-1.9)), 1 / (1 + np.exp(-2.1))])


def test_regression_answers_are_values(tmp_path):
    artifact = Artifact.load(write_artifact(tmp_path, labels=[]))
    answerer = Answerer(artifact, run=lambda inputs: np.array([[2.5]] * len(inputs["input_ids"]), dtype=np.float32))
    assert [answer.score for answer in answerer.answer(["good", "bad"], None)] == [2.5, 2.5]
