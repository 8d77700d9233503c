"""Teacher and student: every weight accounted for, and layers read as an eager model computes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertemd_deploy.capture import LayerReader
from bertemd_deploy.config import StudentSettings
from bertemd_deploy.errors import ArtifactError, ModelError, RecipeError
from bertemd_deploy.mapping import even_layers
from bertemd_deploy.models import load_classifier, reorder_outputs, save_model, set_labels
from bertemd_deploy.students import Shape, build_student, student_shape

LABELS = ("no", "yes")
TEACHER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}


def padded_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 28, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    types = (torch.arange(9) >= 3).long().expand(3, 9) * mask
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types}


def weights_but(folder: Path, *absent: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith(absent)}
    save_file(kept, path, metadata={"format": "pt"})


def test_layer_outputs_are_what_an_eager_copy_computes(tiny_bert: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_bert(layers=3, hidden=24, heads=3, labels=LABELS)
    model = load_classifier(folder, labels=LABELS)
    eager = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = padded_batch()
    with torch.no_grad():
        read = LayerReader(model)(inputs)
        told = eager(**inputs, output_attentions=True, output_hidden_states=True)
        embedding = eager.bert.embeddings(inputs["input_ids"], inputs["token_type_ids"])
    assert model.config._attn_implementation == "sdpa"
    assert read.queries.shape == read.keys.shape == (3, 3, 3, 9, 8)
    scores = read.queries @ read.keys.transpose(-1, -2) / math.sqrt(8)
    hidden_away = inputs["attention_mask"][None, :, None, None, :] == 0
    probs = scores.masked_fill(hidden_away, -math.inf).softmax(-1)
    torch.testing.assert_close(probs, torch.stack(told.attentions))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(read.logits, told.logits)
    torch.testing.assert_close(read.embedding, embedding)
    torch.testing.assert_close(read.embedding, told.hidden_states[0])
    torch.testing.assert_close(read.hidden_states[:, real], torch.stack(told.hidden_states[1:])[:, real])


def test_a_second_batch_does_not_see_the_first(tiny_bert: Callable[..., Path]) -> None:
    read = LayerReader(load_classifier(tiny_bert(labels=LABELS), labels=LABELS))
    inputs = padded_batch()
    with torch.no_grad():
        first = read(inputs)
        read({name: value[:, :5] for name, value in inputs.items()})
        again = read(inputs)
    torch.testing.assert_close(again.queries, first.queries, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [(12, 4, [2, 5, 8, 11]), (12, 6, [1, 3, 5, 7, 9, 11]), (4, 2, [1, 3]), (5, 2, [1, 4]), (3, 3, [0, 1, 2])],
)
def test_even_layers_end_with_the_teacher_s_last(teacher: int, student: int, layers: list[int]) -> None:
    assert even_layers(teacher, student) == layers


def test_a_student_from_teacher_layers_has_exactly_their_weights(tiny_bert: Callable[..., Path]) -> None:
    teacher = load_classifier(tiny_bert(layers=4, labels=LABELS), labels=LABELS)
    student, told = build_student(teacher, shape=Shape(2, 16, 2, 32), init="auto", seed=1)
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


def test_teacher_layers_of_another_width_are_refused(tiny_bert: Callable[..., Path]) -> None:
    teacher = load_classifier(tiny_bert(layers=4, labels=LABELS), labels=LABELS)
    with pytest.raises(ModelError) as raised:
        build_student(teacher, shape=Shape(2, 8, 2, 32), init="teacher", seed=1)
    assert "sizes (8, 2, 32) (hidden, heads, intermediate) differ from the teacher's (16, 2, 32)" in str(raised.value)
    assert "Set student.init to a checkpoint, or to random" in str(raised.value)


def test_random_weights_are_loud_and_follow_the_seed(
    tiny_bert: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_classifier(tiny_bert(layers=4, labels=LABELS), labels=LABELS)
    before = torch.random.get_rng_state()
    built = [build_student(teacher, shape=Shape(2, 8, 2, 16), init="random", seed=seed) for seed in (1, 1, 2)]
    torch.testing.assert_close(torch.random.get_rng_state(), before)  # the caller's random state is not ours
    assert built[0][1] == "random weights"
    assert "! the student starts from RANDOM weights: expect far lower accuracy" in capsys.readouterr().err
    one, same, other = (model.bert.encoder.layer[0].attention.self.query.weight for model, _ in built)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("head", [True, False])
def test_a_checkpoint_fills_every_weight_of_the_encoder(tiny_bert: Callable[..., Path], head: bool) -> None:
    teacher = load_classifier(tiny_bert("teacher", layers=4, labels=LABELS), labels=LABELS)
    folder = tiny_bert("small", layers=2, hidden=8, intermediate=24, head=head, labels=LABELS, seed=5)
    student, told = build_student(teacher, shape=Shape(2, 8, 2, 24), init=str(folder), seed=1)
    assert told == f"checkpoint {folder}"
    stored = load_file(folder / "model.safetensors")
    for name, value in student.state_dict().items():
        source = name if head else name.removeprefix("bert.")
        if source in stored:
            torch.testing.assert_close(value, stored[source], rtol=0, atol=0)
        else:
            assert name.startswith("classifier.")


def test_a_checkpoint_without_a_weight_is_refused_by_the_weight_s_name(tiny_bert: Callable[..., Path]) -> None:
    teacher = load_classifier(tiny_bert("teacher", layers=4, labels=LABELS), labels=LABELS)
    folder = tiny_bert("small", layers=2, head=False)
    weights_but(folder, "encoder.layer.1.output.dense.weight")
    with pytest.raises(ModelError) as raised:
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1)
    assert "1 weight(s) cannot be loaded from" in str(raised.value)
    assert "bert.encoder.layer.1.output.dense.weight (missing)" in str(raised.value)


def test_a_checkpoint_of_other_sizes_is_refused_with_both_shapes(tiny_bert: Callable[..., Path]) -> None:
    teacher = load_classifier(tiny_bert("teacher", layers=4, labels=LABELS), labels=LABELS)
    folder = tiny_bert("small", layers=2, intermediate=24, head=False)
    with pytest.raises(ModelError, match=r"intermediate\.dense\.weight \(\(24, 16\) for \(32, 16\)\)"):
        build_student(teacher, shape=Shape(2, 16, 2, 32), init=str(folder), seed=1)


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


def test_reorder_outputs_permutes_the_logits(tiny_bert: Callable[..., Path]) -> None:
    names = ("a", "b", "c")
    model = load_classifier(tiny_bert(labels=names), labels=names)
    with torch.no_grad():
        before = model(**padded_batch()).logits
        reorder_outputs(model, [2, 0, 1])
        after = model(**padded_batch()).logits
        torch.testing.assert_close(after, before[:, [2, 0, 1]])
        reorder_outputs(model, [0, 1, 2])
        torch.testing.assert_close(model(**padded_batch()).logits, after, rtol=0, atol=0)


def test_load_classifier_names_missing_encoder_weights(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=LABELS)
    weights_but(folder, "bert.encoder.layer.1.attention.self.query.", "bert.embeddings.LayerNorm.")
    with pytest.raises(ModelError) as raised:
        load_classifier(folder, labels=LABELS, new_head=True)
    assert "4 weight(s) are missing from model.safetensors and would be random" in str(raised.value)
    assert "bert.embeddings.LayerNorm.bias, bert.embeddings.LayerNorm.weight" in str(raised.value)


def test_a_missing_head_is_an_error_unless_a_new_one_is_wanted(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(head=False)
    with pytest.raises(ModelError) as raised:
        load_classifier(folder, labels=LABELS)
    assert "no classification head (classifier.bias, classifier.weight missing)" in str(raised.value)
    assert "`bertemd finetune`" in str(raised.value)
    model = load_classifier(folder, labels=("a", "b", "c"), new_head=True)
    assert model.classifier.weight.shape == (3, 16)


def test_a_head_of_another_size_is_replaced_only_on_request(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=LABELS)
    with pytest.raises(ModelError) as raised:
        load_classifier(folder, labels=("a", "b", "c"))
    assert "the model has 2 outputs (no, yes), the data needs 3 (a, b, c)" in str(raised.value)
    assert load_classifier(folder, labels=("a", "b", "c"), new_head=True).classifier.weight.shape == (3, 16)


def test_damaged_weights_are_one_message(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=LABELS)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"could not be loaded \(.+\)\.$"):
        load_classifier(folder, labels=LABELS)


def test_set_labels_marks_regression(tiny_bert: Callable[..., Path]) -> None:
    model = load_classifier(tiny_bert(labels=()), labels=())
    set_labels(model, ())
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1


def test_save_model_writes_a_folder_that_loads_alike(tiny_bert: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_bert(labels=LABELS)
    model = load_classifier(folder, labels=LABELS)
    out = tmp_path / "saved"
    save_model(model, out, tokenizer_from=folder, beside=lambda new: (new / "more.txt").write_text("more") and None)
    written = {path.name for path in out.iterdir()}
    assert written >= {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "more.txt"}
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    again = load_classifier(out, labels=LABELS)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_save_model_leaves_the_folder_when_the_disk_refuses(
    tiny_bert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    folder = tiny_bert(labels=LABELS)
    model = load_classifier(folder, labels=LABELS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before.txt").write_text("kept")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ArtifactError, match=r"could not be written \(I/O error: No space left on device"):
        save_model(model, tmp_path / "out", tokenizer_from=folder)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["before.txt"]
    assert not list(tmp_path.glob(".partial-*"))
