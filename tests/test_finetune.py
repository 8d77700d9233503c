"""Fine-tuning: a pretrained encoder becomes a classifier folder that scores what the record says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_corpus
from safetensors.torch import load_file
from tiny_family import carve_codes

from bertemd_deploy.data import load_data
from bertemd_deploy.errors import ModelError
from bertemd_deploy.evaluate import evaluate_folder
from bertemd_deploy.files import sha256_file
from bertemd_deploy.finetune import finetune
from bertemd_deploy.models import load_classifier
from bertemd_deploy.position_codes import code_coordinates
from bertemd_deploy.settings import TeacherSettings

Make = Callable[..., Path]


def train(model: Path, data: Path, out: Path, *, task: str | None = None, **settings: Any) -> dict[str, Any]:
    return finetune(
        model,
        data=load_data(str(data), task=task),
        max_length=32,
        settings=TeacherSettings(**({"epochs": 3, "batch_size": 8, "learning_rate": 5e-3} | settings)),
        out=out,
        checkpoints=out.with_name(f"{out.name}-checkpoints"),
        log=out.with_name(f"{out.name}.jsonl"),
    )


def test_an_encoder_becomes_a_teacher_that_scores_its_record(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    data = tiny_data(labels=("bad", "good"))
    record = train(tiny_bert(head=False), data, tmp_path / "teacher", epochs=8)
    assert record["metrics"]["accuracy"] > 0.9
    assert record | {"metrics": {}, "best_epoch": 0} == {
        "metrics": {},
        "best_epoch": 0,
        "epochs": 8,
        "steps": 64,
        "rows": 64,
        "model": "model",
    }
    again = evaluate_folder(tmp_path / "teacher", data=load_data(str(data)), max_length=32)
    assert again["metrics"] == record["metrics"]
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["problem_type"] == "single_label_classification"
    lines = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2


def test_codes_of_positions_outlive_it(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    folder = tiny_bert(labels=("bad", "good"))
    before = carve_codes(folder, [3, 7])
    train(folder, tiny_data(labels=("bad", "good")), tmp_path / "teacher")
    tuned = load_classifier(tmp_path / "teacher", labels=("bad", "good"))
    assert code_coordinates(tuned).tolist() == [3, 7]
    name = "bert.embeddings.position_embeddings.weight"
    now = load_file(tmp_path / "teacher" / "model.safetensors")[name]
    torch.testing.assert_close(now[:, [3, 7]], before[name][:, [3, 7]], rtol=0.01, atol=0)  # weight decay
    assert not torch.allclose(now[:, [2, 5]], before[name][:, [2, 5]], rtol=0.01, atol=0)


def test_regression_is_one_output_without_names(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    data = tiny_data("regression")
    record = train(tiny_bert(head=False), data, tmp_path / "teacher", task="regression", epochs=6)
    assert record["metrics"]["pearson"] > 0.5
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert load_file(tmp_path / "teacher" / "model.safetensors")["classifier.weight"].shape == (1, 16)


def test_a_head_of_another_task_gives_way(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    train(tiny_bert(labels=("a", "b", "c")), tiny_data("pair"), tmp_path / "teacher", epochs=1)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}


def test_the_seed_decides_the_result(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    model, data = tiny_bert(head=False), tiny_data(train=16, dev=8)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        train(model, data, tmp_path / name, epochs=1, seed=seed)
    hashes = {name: sha256_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other")}
    assert hashes["one"] == hashes["same"] != hashes["other"]


def test_a_batch_in_parts_gives_the_same_teacher_to_rounding(tiny_bert: Make, tiny_data: Make, tmp_path: Path) -> None:
    model, data = tiny_bert(head=False, dropout=0.0), tiny_data(train=16, dev=8)
    for name, rows in (("whole", None), ("parts", 3)):
        train(model, data, tmp_path / name, epochs=1, batch_size=8, precision="float32", micro_batch_size=rows)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which AdamW scales up
            torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert any(not torch.equal(parts[name], value) for name, value in whole.items())


def test_a_longer_input_than_the_model_has_positions_is_refused(
    tiny_bert: Make, tiny_data: Make, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"data\.max_length is 32, the model has 16 positions"):
        train(tiny_bert(positions=16), tiny_data(), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("kind", "epochs", "level"),
    [("multilabel", 10, 0.9), ("token-classification", 12, 0.9), ("question-answering", 14, 0.8)],
)
def test_every_kind_is_learnt_and_scored_again_from_its_folder(
    tiny_bert: Make, tmp_path: Path, kind: str, epochs: int, level: float
) -> None:
    folder = write_corpus(tmp_path / "data", kind, train=512 if kind == "question-answering" else 384)
    data = load_data(str(folder), task=kind)
    model = tiny_bert(head=False, hidden=32, intermediate=64, dropout=0.0)
    record = train(model, folder, tmp_path / "teacher", task=kind, epochs=epochs, batch_size=16, learning_rate=3e-3)
    metric = data.task.metrics[0]
    assert record["metrics"][metric] > level
    assert list(record["metrics"]) == list(data.task.metrics)
    again = evaluate_folder(tmp_path / "teacher", data=data, max_length=32)
    assert again["metrics"] == pytest.approx(record["metrics"])
    assert again["rows"] == 64
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    if kind == "multilabel":
        assert config["problem_type"] == "multi_label_classification"
    if data.labels:
        assert [config["id2label"][str(at)] for at in range(data.outputs)] == list(data.labels)
    best = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    scores = [line["dev"][metric] for line in best if "dev" in line]
    assert scores.index(max(scores)) + 1 == record["best_epoch"]


def test_questions_without_an_answer_are_learnt(tiny_bert: Make, tmp_path: Path) -> None:
    """A quarter has none: always saying so would score 0.25."""
    folder = write_corpus(tmp_path / "data", "question-answering", train=512, unanswerable=True)
    model = tiny_bert(head=False, hidden=32, intermediate=64, dropout=0.0)
    record = train(
        model, folder, tmp_path / "teacher", task="question-answering", epochs=18, batch_size=16, learning_rate=3e-3
    )
    assert record["metrics"]["f1_squad"] > 0.6
