"""A BERT of all of a teacher's layers computes what the teacher does, wherever a BERT can; the rest is told or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_capture import padded_batch
from test_models import weights_but
from tiny_family import LABELS, bert_teacher, encoder_of, family_teacher

from bertemd_deploy.capture import LayerReader
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.models import load_classifier, output_logits
from bertemd_deploy.students import Shape, build_student
from bertemd_deploy.tasks import Kind

SAME = Shape(4, 16, 2, 32)
# What of a family a BERT can hold in full; MPNet's learned bias is set to zero.
EXACT: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "electra": {},
    "mpnet": {},
    "distilbert": {"activation": "relu"},
    "deberta-v2": {"pos_att_type": "c2p|p2c", "embedding_size": 12, "pooler_hidden_act": "tanh", "type_vocab_size": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_computes_what_its_teacher_does(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, encoder = family_teacher(tmp_path, family, **EXACT[family])
    if family == "mpnet":
        teacher.mpnet.encoder.relative_attention_bias.weight.data.zero_()
    student, told = build_student(teacher, shape=SAME, init="teacher", seed=1, encoder=encoder)
    assert told == "teacher layers 1, 2, 3, 4"
    assert student.config.model_type == "bert"
    assert student.config._attn_implementation == "sdpa"
    assert student.config.pad_token_id == encoder.pad_id == (1 if FAMILIES[family].offset else 0)
    assert student.config.vocab_size == teacher.config.vocab_size
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert student.config.max_position_embeddings == 40 - 2 * FAMILIES[family].offset
    inputs = padded_batch(encoder.pad_id)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs, ours = LayerReader(teacher)(inputs), LayerReader(student)(inputs)
    torch.testing.assert_close(ours.embeddings[0][real], theirs.embeddings[0][real], rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], other[real], rtol=1e-4, atol=1e-5)
    fresh = (
        f"the head starts random; the teacher cannot give it: its own uses {FAMILIES[family].activation}, a BERT's tanh"
    )
    said = capsys.readouterr().err
    if family in ("electra", "distilbert"):
        assert fresh in said
    else:
        assert "the head starts random" not in said
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert ("a BERT has no place for a learned bias by relative position" in said) is (family == "mpnet")


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_over_tokens_are_taken_over(family: str, kind: Kind, tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, family, kind=kind, **EXACT[family])
    if family == "mpnet":
        teacher.mpnet.encoder.relative_attention_bias.weight.data.zero_()
    student, _ = build_student(teacher, shape=SAME, init="teacher", seed=1, encoder=encoder, kind=kind)
    assert type(student).__name__ == "BertFor" + "".join(word.capitalize() for word in kind.split("-"))
    inputs = padded_batch(encoder.pad_id)
    with torch.no_grad():
        ours, theirs = output_logits(student(**inputs)), output_logits(teacher(**inputs))
    real = inputs["attention_mask"].bool()
    assert ours.shape == (3, 9, 2)
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)


def test_what_a_bert_has_no_place_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, encoder = family_teacher(
        tmp_path,
        "deberta-v2",
        relative_attention=True,
        pos_att_type=["c2p"],
        position_biased_input=False,
        conv_kernel_size=3,
    )
    student, _ = build_student(teacher, shape=Shape(2, 16, 2, 32), init="teacher", seed=1, encoder=encoder)
    assert "the teacher is of the family deberta-v2; a BERT has no place for content-to-position and" in (
        said := capsys.readouterr().err
    )
    assert "nor the absence of absolute positions (the student's start at zero) nor the convolution after" in said
    assert student.bert.embeddings.position_embeddings.weight.abs().sum() == 0
    query = teacher.deberta.encoder.layer[1].attention.self.query_proj.weight
    torch.testing.assert_close(student.bert.encoder.layer[0].attention.self.query.weight, query / 2**0.5)


def test_a_small_electra_s_embeddings_are_refused(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "electra", embedding_size=8)
    with pytest.raises(
        ModelError, match=r"normalised before they are projected .*electra with embedding_size 8.*Set student"
    ):
        build_student(teacher, shape=SAME, init="teacher", seed=1, encoder=encoder)


def test_old_names_of_norms_and_fitting_heads_are_read(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("teacher", layers=2, labels=LABELS)
    small = tiny_bert("small", layers=2, labels=LABELS, seed=4)
    stored = load_file(small / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in stored.items()
    } | {"fit_dense.weight": torch.ones(3, 3), "fit_denses.0.weight": torch.ones(3, 3)}
    save_file(old, small / "model.safetensors")
    teacher = load_classifier(folder, labels=LABELS)
    student, _ = build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(small), seed=1, encoder=encoder_of(folder))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


def test_a_student_from_teacher_layers_has_exactly_their_weights(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    student, told = build_student(teacher, shape=Shape(2, 16, 2, 32), init="auto", seed=1, encoder=encoder)
    assert told == "teacher layers 2, 4"
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert not student.training
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        source = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        torch.testing.assert_close(value, theirs[source], rtol=0, atol=0)
    student.classifier.weight.data.zero_()
    assert teacher.classifier.weight.abs().sum() > 0  # a copy, no view


def test_a_checkpoint_without_a_weight_is_refused_by_the_weight_s_name(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    folder = tiny_bert("small", layers=2, head=False)
    weights_but(folder, "encoder.layer.1.output.dense.weight")
    with pytest.raises(ModelError) as raised:
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1, encoder=encoder)
    assert "1 weight(s) cannot be loaded from" in str(raised.value)
    assert "bert.encoder.layer.1.output.dense.weight (missing)" in str(raised.value)


def test_a_checkpoint_of_other_sizes_is_refused_with_both_shapes(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    folder = tiny_bert("small", layers=2, intermediate=24, head=False)
    with pytest.raises(ModelError, match=r"intermediate\.dense\.weight \(\(24, 16\) for \(32, 16\)\)"):
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1, encoder=encoder)


def test_a_checkpoint_of_other_heads_is_refused(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    folder = tiny_bert("small", layers=2, heads=4, head=False)
    with pytest.raises(
        ModelError, match=r"small: its layers have 4 attention heads, the student's 2; .* student\.heads: 4"
    ):
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1, encoder=encoder)


def test_a_truncated_checkpoint_is_one_message(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    weights = tiny_bert("small", layers=2, head=False) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(
        ModelError, match=r"model\.safetensors: not a readable safetensors file .* truncated or damaged"
    ):
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(weights.parent), seed=1, encoder=encoder)
