"""What a model brings to export, for every kind of task: labels, task and slices, read back as they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus

from bertemd_deploy.artifact import write_slices
from bertemd_deploy.config import options_recipe
from bertemd_deploy.data import load_data
from bertemd_deploy.errors import ModelError
from bertemd_deploy.facts import FACTS, SLICES, StudentFacts, facts_from_data, read_student, task_facts
from bertemd_deploy.files import write_json
from bertemd_deploy.models import load_classifier, save_model, set_labels
from bertemd_deploy.pipeline import needs_finetuning

KINDS = ("multilabel", "token-classification", "question-answering")


@pytest.fixture
def made(tiny_bert: Callable[..., Path], tmp_path: Path) -> Callable[[str], tuple[Path, StudentFacts]]:
    """Return a factory of (folder of an untrained task model, its facts) for a kind of task."""

    def build(kind: str) -> tuple[Path, StudentFacts]:
        data = load_data(str(write_corpus(tmp_path / "data", kind, train=300, dev=24)), task=kind)
        encoder = tiny_bert("encoder", head=False)
        model = load_classifier(encoder, labels=data.labels, kind=data.task.kind, new_head=True)
        set_labels(model, data.labels, kind=data.task.kind)
        save_model(model, tmp_path / "model", tokenizer_from=encoder)
        return tmp_path / "model", facts_from_data(tmp_path / "model", data, max_length=12)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_a_model_made_elsewhere(made: Callable[[str], tuple[Path, StudentFacts]], kind: str) -> None:
    _, facts = made(kind)
    assert facts.task["kind"] == facts.evaluation.kind == facts.calibration.kind == kind
    assert (
        facts.labels
        == {
            "multilabel": ["art", "bad", "good"],
            "token-classification": ["O", "B-LOC", "B-PER", "I-LOC"],
            "question-answering": [],
        }[kind]
    )
    gold = facts.evaluation.gold
    assert (gold is not None) == (kind == "question-answering")
    if gold is None:
        assert (len(facts.evaluation), len(facts.calibration)) == (24, 256)
    else:
        assert len(gold.ids) == 24 < len(facts.evaluation)  # 12 tokens do not hold every context
        assert facts.task["doc_stride"] == 128


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_read_back(made: Callable[[str], tuple[Path, StudentFacts]], kind: str) -> None:
    folder, facts = made(kind)
    slices = {"evaluation": facts.evaluation, "calibration": facts.calibration}
    write_slices(folder / SLICES, slices)
    names = ("task", "labels", "max_length", "teacher", "metrics", "distillation")
    content = {name: getattr(facts, name) for name in names}
    write_json(folder / FACTS, content)
    stored = read_student(folder)
    assert {name: getattr(stored, name) for name in names} == content
    for found, part in ((stored.evaluation, facts.evaluation), (stored.calibration, facts.calibration)):
        np.testing.assert_array_equal(found.labels, part.labels, strict=True)
        assert (found.kind, found.gold is None) == (part.kind, part.gold is None)
    write_json(folder / FACTS, content | {"task": facts.task | {"kind": "regression"}})
    with pytest.raises(
        ModelError, match=rf"eval\.npz: its slices are for {kind}, bertemd_student\.json says regression\."
    ):
        read_student(folder)


def test_a_model_with_the_tasks_head_is_not_fine_tuned_first(made: Callable[[str], tuple[Path, StudentFacts]]) -> None:
    folder, _ = made("question-answering")
    for task, needed in (("question-answering", False), ("token-classification", True), ("multilabel", True)):
        options = [f"teacher.model={folder}", "data.path=data", f"data.task={task}", "student.name=4L"]
        assert needs_finetuning(options_recipe(options), folder) is needed


@pytest.mark.parametrize("kind", ["single", "pair", "regression"])
def test_a_task_says_whether_its_texts_are_pairs(tiny_data: Callable[..., Path], kind: str) -> None:
    task = "regression" if kind == "regression" else None
    assert task_facts(load_data(str(tiny_data(kind)), task=task))["pairs"] is (kind == "pair")


def test_a_task_of_tags_says_nothing_of_pairs(tmp_path: Path) -> None:
    folder = str(write_corpus(tmp_path / "data", "token-classification", train=64, dev=4))
    assert task_facts(load_data(folder, task="token-classification")).keys() == {"name", "kind", "metrics"}


def test_a_task_says_how_its_contexts_are_cut(tmp_path: Path) -> None:
    folder = str(write_corpus(tmp_path / "data", "question-answering", train=4, dev=4))
    data = load_data(folder, task="question-answering", doc_stride=5)
    assert task_facts(data) == {
        "name": "question-answering",
        "kind": "question-answering",
        "metrics": ["f1_squad", "exact_match"],
        "doc_stride": 5,
    }
