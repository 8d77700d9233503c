"""The table of families: sizes, positions, inputs and heads by name, and a teacher of each distilled from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_family import CASES, answer_itself, tiny_config, tiny_model, write_family

from bertemd_deploy.data import load_data
from bertemd_deploy.distill import distill
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import (
    FAMILIES,
    Sizes,
    compared_part,
    family_of,
    feed_forward_activation,
    head_activation,
    head_parts,
    known_inputs,
    left_out,
    norm_epsilon,
    position_offset,
    positions,
    score_factor,
    sizes,
)
from bertemd_deploy.settings import DistillSettings, QuantizeSettings, StudentSettings
from bertemd_deploy.tasks import Kind


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_every_family_have_one_name(family: str) -> None:
    assert sizes(tiny_config(family).to_dict()) == Sizes(4, 16, 2, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_named_in_the_table_are_in_the_model(family: str) -> None:
    model = tiny_model(family)
    config = model.config.to_dict()
    row = FAMILIES[family]
    encoder = model.get_submodule(row.prefix)
    layers: Any = encoder.get_submodule(row.layers)
    assert len(layers) == 4
    for part in row.parts:
        assert {name for name, _ in layers[0].get_submodule(part).named_parameters()} == {"weight", "bias"}
    dense, output = (model.get_submodule(part) for part in head_parts(config, "classification"))
    assert (dense.out_features, output.out_features) == (16, 2)


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_over_tokens_have_one_linear_map(family: str, kind: Kind) -> None:
    model = tiny_model(family, kind=kind)
    (output,) = head_parts(model.config.to_dict(), kind)
    assert model.get_submodule(output).weight.shape == (2, 16)


@pytest.mark.parametrize(
    ("config", "offset", "tokens"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 0, 512),
        ({"model_type": "bert"}, 0, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 2, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 2, 512),
        ({"model_type": "roberta", "max_position_embeddings": 130, "pad_token_id": 0}, 1, 129),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 0}, 2, 512),
        ({"model_type": "distilbert", "max_position_embeddings": 512, "pad_token_id": 0}, 0, 512),
    ],
)
def test_positions_start_after_the_padding_token_in_some(config: dict[str, Any], offset: int, tokens: int) -> None:
    assert (position_offset(config), positions(config)) == (offset, tokens)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_a_row_as_long_as_the_positions_runs_and_one_longer_does_not(family: str) -> None:
    model = tiny_model(family, pad=1, positions=10)
    longest = positions(model.config.to_dict())
    assert model(torch.full((1, longest), 5)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("family", "changes", "typed"),
    [
        ("bert", {}, True),
        ("electra", {}, True),
        ("roberta", {}, False),
        ("roberta", {"type_vocab_size": 2}, True),
        ("mpnet", {}, False),
        ("distilbert", {}, False),
        ("deberta-v2", {}, False),
        ("deberta-v2", {"type_vocab_size": 2}, True),
    ],
)
def test_token_types_go_where_they_are_told_apart(family: str, changes: dict[str, Any], typed: bool) -> None:
    known = known_inputs(tiny_config(family, **changes).to_dict())
    assert known == {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
    stored = {"model_type": family}  # an old file without the field: the family's default
    assert ("token_type_ids" in known_inputs(stored)) is (family in ("bert", "electra", "roberta"))


def test_what_differs_from_a_bert_is_named() -> None:
    configs = {name: tiny_config(name, **CASES[name]).to_dict() for name in FAMILIES}
    heads = {name: head_activation(config) for name, config in configs.items()}
    assert heads == {
        "bert": "tanh", "roberta": "tanh", "electra": "gelu", "mpnet": "tanh", "distilbert": "relu", "deberta-v2": "gelu"
    }  # fmt: skip
    assert [name for name, config in configs.items() if compared_part(config)] == ["deberta-v2"]
    assert [name for name, family in FAMILIES.items() if family.position_scores] == ["mpnet"]
    assert [name for name, config in configs.items() if score_factor(config) != 1] == ["deberta-v2"]
    assert score_factor(configs["deberta-v2"]) == pytest.approx(3**-0.5)
    assert score_factor({"model_type": "deberta-v2", "pos_att_type": "c2p"}) == pytest.approx(2**-0.5)
    assert {name: len(left_out(config)) for name, config in configs.items()} == dict.fromkeys(FAMILIES, 0) | {
        "mpnet": 1,
        "deberta-v2": 3,
    }
    assert left_out(configs["mpnet"], folded=True) == []
    assert len(left_out(configs["deberta-v2"], folded=True)) == 3
    assert norm_epsilon(configs["deberta-v2"]) == 1e-7
    assert norm_epsilon(configs["distilbert"]) == 1e-12
    assert feed_forward_activation({"model_type": "distilbert", "activation": "relu"}) == "relu"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "albert"},
            "here: model_type is 'albert'; supported: bert, roberta, electra, mpnet, distilbert, deb",
        ),
        ({"model_type": ["bert"]}, r"model_type is \['bert'\]; supported"),
        ({}, "model_type is None; supported"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'; only",
        ),
        ({"model_type": "roberta", "is_decoder": True}, "is_decoder is true; a decoder sees no later tokens"),
    ],
)
def test_what_is_not_in_the_table_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        family_of(config, where="here")


def test_a_config_without_a_size_is_refused() -> None:
    with pytest.raises(ModelError, match="the model's config lacks n_heads, hidden_dim, which a distilbert needs"):
        sizes({"model_type": "distilbert", "n_layers": 2, "dim": 8, "hidden_size": 8})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_a_teacher_of_any_family_is_distilled(
    family: str, tmp_path: Path, tiny_data: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From end to end in one epoch; the student of MPNet, whose tokenizer is the oddest, is exported as well."""
    teacher = write_family(tmp_path / "teacher", family, **CASES[family])
    data = tiny_data(train=48, dev=24)
    answer_itself(teacher, data)
    out = tmp_path / "student"
    record = distill(
        teacher,
        data=load_data(str(data)),
        max_length=32,
        student=StudentSettings(layers=2, init="teacher", init_layers="even"),
        settings=DistillSettings(epochs=1, batch_size=8, learning_rate=2e-3, beta=0.05, logging_steps=1),
        out=out,
        checkpoints=tmp_path / "checkpoints",
        log=tmp_path / "distill.jsonl",
        teacher_name="the-teacher",
    )
    assert record["start"] == "teacher layers 2, 4" + (", fitted" if family == "mpnet" else "")
    assert record["metrics"]["teacher"] == {"accuracy": 1.0}
    said = capsys.readouterr().err
    assert said.count("the part compared with the student is content to content") == (family == "deberta-v2")
    assert "a BERT has no place for a learned bias by relative position" not in said
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForSequenceClassification"])
    assert (out / "tokenizer.json").read_text() == (teacher / "tokenizer.json").read_text()
    logged = [json.loads(line) for line in (tmp_path / "distill.jsonl").read_text().splitlines()]
    first = next(line for line in logged if "losses" in line)
    assert set(first["losses"]) == {"attention", "hidden", "embedding", "prediction"}
    assert all(value > 0 for value in first["losses"].values())
    if family == "mpnet":
        export_and_predict(out, tmp_path / "artifact")


def export_and_predict(student: Path, out: Path) -> None:
    from bertemd_deploy.classifier import Classifier
    from bertemd_deploy.export import export
    from bertemd_deploy.facts import read_student
    from bertemd_deploy.models import load_classifier
    from bertemd_deploy.settings import ExportSettings

    facts = read_student(student)
    export(
        student=student,
        out=out,
        task=facts.task,
        labels=facts.labels,
        max_length=facts.max_length,
        evaluation=facts.evaluation,
        calibration=facts.calibration,
        teacher=facts.teacher,
        reference_metrics=facts.metrics,
        distillation=facts.distillation,
        settings=ExportSettings(),
        quantization=QuantizeSettings(mode="none"),
    )
    texts = ["the good film", "a bad song today"]
    predictions = Classifier.load(out).predict(texts)
    model = load_classifier(student, labels=facts.labels)
    encoder = TextEncoder.load(student, max_length=32)
    batch = encoder.encode(texts).batch([0, 1], pad_id=encoder.pad_id)
    with torch.no_grad():
        probabilities = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.softmax(-1)
    for prediction, row in zip(predictions, probabilities, strict=True):
        assert prediction.label == facts.labels[int(row.argmax())]
        assert prediction.score == pytest.approx(float(row.max()), abs=1e-4)
