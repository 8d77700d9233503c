"""Students: sizes by name, weights from the teacher or from a checkpoint whose words are put in the teacher's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_capture import padded_batch
from tiny_family import (
    LABELS,
    WORDS,
    bert_teacher,
    encoder_of,
    family_teacher,
    write_family,
    write_family_tokenizer,
)
from tiny_words import VOCABULARY

from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.models import load_classifier
from bertemd_deploy.settings import StudentSettings
from bertemd_deploy.students import Shape, build_student, layer_rule, pick_layers, student_shape

TEACHER = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
}


def test_a_checkpoint_s_words_are_put_in_the_teacher_s_order(
    tmp_path: Path, tiny_bert: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, encoder = family_teacher(tmp_path, "mpnet")
    folder = tiny_bert("small", layers=2, hidden=8, intermediate=24, head=False, positions=64)
    stored = load_file(folder / "model.safetensors")
    student, told = build_student(teacher, shape=Shape(2, 8, 2, 24), init=str(folder), seed=1, encoder=encoder)
    assert told == f"checkpoint {folder}"
    words, row = student.bert.embeddings.word_embeddings.weight, encoder.vocabulary()
    partners = {word: word for word in WORDS} | {
        "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "[UNK]": "[UNK]", "<unk>": "[UNK]", "<mask>": "[MASK]"
    }  # fmt: skip
    assert set(partners) == set(row)
    for token, partner in partners.items():
        theirs = stored["embeddings.word_embeddings.weight"][VOCABULARY.index(partner)]
        torch.testing.assert_close(words[row[token]], theirs, rtol=0, atol=0)
    torch.testing.assert_close(
        student.bert.embeddings.position_embeddings.weight, stored["embeddings.position_embeddings.weight"][:38]
    )
    said = capsys.readouterr().err
    assert f"30 of the teacher's 30 tokens (100.00%) have a word embedding in {folder}, matched by text" in said
    assert "the head starts random" in said


def test_a_checkpoint_of_other_words_is_refused_with_examples(tmp_path: Path, tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = family_teacher(tmp_path, "roberta")
    folder = tiny_bert("small", layers=2)
    with pytest.raises(ModelError) as raised:
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1, encoder=encoder)
    assert "of the teacher's 320 tokens (" in str(raised.value)
    assert "at least 99% is needed); it lacks '\"', '#', '$'" in str(raised.value)


def test_a_checkpoint_of_another_family_and_more_layers(tmp_path: Path, tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("teacher", layers=4, labels=LABELS)
    teacher = load_classifier(folder, labels=LABELS)
    small = write_family(tmp_path / "small", "distilbert", activation="relu")
    student, told = build_student(
        teacher, shape=Shape(2, 16, 2, 32), init=str(small), seed=1, encoder=encoder_of(folder)
    )
    assert told == f"checkpoint {small} (layers 2, 4)"
    assert student.config.hidden_act == "relu"  # the function that its weights were trained for
    stored = load_file(small / "model.safetensors")
    torch.testing.assert_close(
        student.bert.encoder.layer[1].intermediate.dense.weight,
        stored["distilbert.transformer.layer.3.ffn.lin1.weight"],
    )


def test_layers_are_taken_from_where_the_setting_says(tmp_path: Path, tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    small = write_family(tmp_path / "small", "distilbert")
    stored = load_file(small / "model.safetensors")
    for rule, taken in (("auto", (2, 4)), ("even", (2, 4)), ("first", (1, 2)), ((2, 3), (2, 3))):
        made = {"shape": Shape(2, 16, 2, 32), "init_layers": rule, "seed": 1, "encoder": encoder}
        student, told = build_student(teacher, init="teacher", **made)
        assert told == f"teacher layers {taken[0]}, {taken[1]}"
        for layer, source in zip(student.bert.encoder.layer, taken, strict=True):
            theirs = teacher.bert.encoder.layer[source - 1]
            torch.testing.assert_close(layer.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        student, told = build_student(teacher, init=str(small), **made)
        assert told == f"checkpoint {small} (layers {taken[0]}, {taken[1]})"
        for layer, source in zip(student.bert.encoder.layer, taken, strict=True):
            theirs = stored[f"distilbert.transformer.layer.{source - 1}.ffn.lin1.weight"]
            assert torch.equal(layer.intermediate.dense.weight, theirs)


def test_a_checkpoint_as_deep_as_the_student_gives_all_its_layers(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    small = tiny_bert("small", layers=2)
    made = {"shape": Shape(2, 16, 2, 32), "init": str(small), "seed": 1, "encoder": encoder}
    plain, told = build_student(teacher, **made)
    assert told == f"checkpoint {small}"
    for rule in ("first", "even", (1, 2)):
        same, _ = build_student(teacher, init_layers=rule, **made)
        torch.testing.assert_close(same.bert.encoder.state_dict(), plain.bert.encoder.state_dict(), rtol=0, atol=0)
    with pytest.raises(RecipeError, match="allowed: 2 different layers of 1 to 2 of"):
        build_student(teacher, init_layers=(2, 3), **made)


def test_a_teacher_of_position_scores_lends_its_first_layers(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "mpnet")
    _, told = build_student(teacher, shape=Shape(2, 16, 2, 32), init="teacher", seed=1, encoder=encoder)
    assert told == "teacher layers 1, 2"
    mpnet = {"model_type": "mpnet"}
    assert [layer_rule("auto", start, mpnet) for start in ("teacher", "random", "folder")] == ["first", "even", "even"]
    assert layer_rule("auto", "teacher", TEACHER) == "even"
    assert layer_rule("even", "teacher", mpnet) == "even"
    assert layer_rule((1, 2), "teacher", mpnet) == (1, 2)


@pytest.mark.parametrize("rule", [(1,), (1, 2, 3), (2, 1), (2, 2), (3, 5), (0, 1)])
def test_layers_that_are_not_there_or_too_many_are_refused(rule: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError) as raised:
        pick_layers(rule, 4, 2, of="the teacher")
    assert str(raised.value) == (
        f"student.init_layers: found {list(rule)}, allowed: 2 different layers of 1 to 4 of the teacher, in rising order."
    )


def test_a_checkpoint_of_fewer_positions_is_refused_where_texts_are_longer(tiny_bert: Callable[..., Path]) -> None:
    folder, small = tiny_bert("teacher", layers=4), tiny_bert("small", positions=24)
    teacher = load_classifier(folder, labels=("0", "1"))
    shape = Shape(2, 16, 2, 32)
    student, _ = build_student(teacher, shape=shape, init=str(small), seed=1, encoder=encoder_of(folder, max_length=24))
    assert student.config.max_position_embeddings == 24
    with pytest.raises(ModelError, match=r"data\.max_length is 25, the checkpoint it starts from has 24 positions"):
        build_student(teacher, shape=shape, init=str(small), seed=1, encoder=encoder_of(folder, max_length=25))


def test_a_checkpoint_s_tokenizer_must_fit_its_weights(tiny_bert: Callable[..., Path], tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "mpnet")
    small = tiny_bert("small", layers=2)
    write_family_tokenizer(small, "mpnet")
    with pytest.raises(ModelError, match="has ids up to 29, its word embedding 29 rows"):
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(small), seed=1, encoder=encoder)


def test_a_random_student_of_any_teacher_has_its_own_sizes(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "distilbert", dropout=0.3, attention_dropout=0.2)
    settings = StudentSettings(layers=3, hidden=8, heads=4, init="random")
    shape = student_shape(settings, teacher.config.to_dict())
    assert shape == Shape(3, 8, 4, 32)
    student, _ = build_student(teacher, shape=shape, init="random", seed=1, encoder=encoder)
    assert student.config.hidden_act == "gelu"
    assert (student.config.hidden_dropout_prob, student.config.attention_probs_dropout_prob) == (0.3, 0.2)
    exact, _ = build_student(teacher, shape=shape, init="random", seed=1, encoder=encoder, dropout=0.0)
    assert {module.p for module in exact.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    batch = padded_batch()
    assert torch.equal(exact.train()(**batch).logits, exact.eval()(**batch).logits)
    assert student(**padded_batch()).logits.shape == (3, 2)


def test_teacher_layers_of_another_width_are_refused(tiny_bert: Callable[..., Path]) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    with pytest.raises(ModelError) as raised:
        build_student(teacher, shape=Shape(2, 8, 2, 32), init="teacher", seed=1, encoder=encoder)
    assert "sizes (8, 2, 32) (hidden, heads, intermediate) differ from the teacher's (16, 2, 32)" in str(raised.value)
    assert "Set student.init to a checkpoint, or to random" in str(raised.value)


def test_random_weights_are_loud_and_follow_the_seed(
    tiny_bert: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    before = torch.random.get_rng_state()
    built = [
        build_student(teacher, shape=Shape(2, 8, 2, 16), init="random", seed=seed, encoder=encoder)
        for seed in (1, 1, 2)
    ]
    torch.testing.assert_close(torch.random.get_rng_state(), before)  # the caller's random state is not ours
    assert built[0][1] == "random weights"
    assert "! the student starts from RANDOM weights: expect far lower accuracy" in capsys.readouterr().err
    one, same, other = (model.bert.encoder.layer[0].attention.self.query.weight for model, _ in built)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("head", [True, False])
def test_a_checkpoint_fills_every_weight_of_the_encoder(tiny_bert: Callable[..., Path], head: bool) -> None:
    teacher, encoder = bert_teacher(tiny_bert)
    folder = tiny_bert("small", layers=2, hidden=8, intermediate=24, head=head, labels=LABELS, seed=5)
    student, told = build_student(teacher, shape=Shape(2, 8, 2, 24), init=str(folder), seed=1, encoder=encoder)
    assert told == f"checkpoint {folder}"
    stored = load_file(folder / "model.safetensors")
    for name, value in student.state_dict().items():
        source = name if head else name.removeprefix("bert.")
        if source in stored:
            torch.testing.assert_close(value, stored[source], rtol=0, atol=0)
        else:
            assert name.startswith("classifier.")


def test_student_shape_takes_what_is_open_from_the_teacher() -> None:
    assert student_shape(StudentSettings(name="4L"), TEACHER) == Shape(4, 16, 2, 32, "teacher")
    small = StudentSettings(layers=2, hidden=8, heads=2)
    assert student_shape(small, TEACHER) == Shape(2, 8, 2, 32, "teacher")  # 4 times its own width
    named = student_shape(StudentSettings(name="4L-312"), TEACHER)
    assert named == Shape(4, 312, 12, 1200, "huawei-noah/TinyBERT_General_4L_312D")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (StudentSettings(name="9L"), "student.name: unknown '9L'; known: 4L-312, 6L-768, 4L, 6L, or give the sizes."),
        (StudentSettings(name="6L"), "student: 6 layers, the teacher has 4; a student is not deeper."),
        (StudentSettings(layers=2, hidden=10, heads=4), "student: hidden 10 is not a multiple of heads 4."),
    ],
)
def test_student_shape_refuses(settings: StudentSettings, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        student_shape(settings, TEACHER)
    assert str(raised.value) == message
