"""Task models as folders: every weight accounted for, outputs named and put in the data's order, saved whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_capture import padded_batch
from tiny_family import CASES, write_family

from bertemd_deploy.errors import ArtifactError, ModelError
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.models import (
    auto_class,
    first_lines,
    load_classifier,
    output_logits,
    reorder_outputs,
    save_model,
    set_labels,
)
from bertemd_deploy.tasks import Kind

LABELS = ("no", "yes")


def weights_but(folder: Path, *absent: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith(absent)}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_every_family_loads_as_it_was(family: str, kind: Kind, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family, kind=kind, **CASES[family])
    model = load_classifier(folder, labels=LABELS, kind=kind)
    assert model.config.model_type == family
    assert model.config._attn_implementation == ("sdpa" if FAMILIES[family].sdpa else "eager")
    stored = load_file(folder / "model.safetensors")
    assert {name for name, _ in model.named_parameters()} == set(stored)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["roberta", "mpnet", "distilbert"])
def test_a_model_without_token_types_is_not_given_any(family: str, tmp_path: Path) -> None:
    model = load_classifier(write_family(tmp_path / "model", family), labels=LABELS)
    inputs = padded_batch(int(model.config.pad_token_id))
    with torch.no_grad():
        bare = model(inputs["input_ids"], inputs["attention_mask"]).logits
        torch.testing.assert_close(model(**inputs).logits, bare, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_another_kind_is_no_head(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family)
    for kind, labels in (("token-classification", LABELS), ("question-answering", ())):
        with pytest.raises(ModelError, match=rf"no {kind} head \((classifier|qa_outputs)\.bias, .* missing\)"):
            load_classifier(folder, labels=labels, kind=kind)
        model = load_classifier(folder, labels=labels, kind=kind, new_head=True)
        assert isinstance(model, type(auto_class(kind).from_config(model.config)))
        with torch.no_grad():
            assert output_logits(model(**padded_batch(1))).shape == (3, 9, 2)


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reorder_outputs_permutes_the_logits(family: str, kind: Kind, tmp_path: Path) -> None:
    names = ("a", "b", "c")
    model = load_classifier(write_family(tmp_path / "model", family, labels=names, kind=kind), labels=names, kind=kind)
    inputs = padded_batch(int(model.config.pad_token_id))
    with torch.no_grad():
        before = model(**inputs).logits
        reorder_outputs(model, [2, 0, 1])
        after = model(**inputs).logits
        torch.testing.assert_close(after, before[..., [2, 0, 1]])
        reorder_outputs(model, [0, 1, 2])
        torch.testing.assert_close(model(**inputs).logits, after, rtol=0, atol=0)


def test_old_names_are_read_and_a_config_without_type_is_a_bert_s(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=LABELS)
    stored = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in stored.items()
    }
    save_file(old | {"fit_dense.weight": torch.ones(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    model = load_classifier(folder, labels=LABELS)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


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
    with pytest.raises(ModelError, match=r"not a readable safetensors file .* Copy it again\."):
        load_classifier(folder, labels=LABELS)


def test_a_config_that_builds_no_model_is_one_message(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=LABELS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 15}))
    with pytest.raises(ModelError, match=r"could not be loaded \(.+\)\.$"):
        load_classifier(folder, labels=LABELS)


def test_three_lines_of_a_library_s_message_are_kept() -> None:
    assert first_lines(ValueError("a fault:\n\n  found 3\n  allowed 2\nmore")) == "a fault: found 3 allowed 2"
    assert first_lines(KeyError()) == "KeyError()"


def test_set_labels_marks_regression(tiny_bert: Callable[..., Path]) -> None:
    model = load_classifier(tiny_bert(labels=()), labels=())
    set_labels(model, ())
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1


def test_set_labels_says_what_kind_of_outputs_they_are(tiny_bert: Callable[..., Path]) -> None:
    model = load_classifier(tiny_bert(labels=LABELS), labels=LABELS)
    told = {}
    for kind in ("classification", "multilabel", "token-classification"):
        set_labels(model, ("a", "b"), kind=kind)
        told[kind] = model.config.problem_type
    assert told == {
        "classification": "single_label_classification",
        "multilabel": "multi_label_classification",
        "token-classification": None,
    }
    set_labels(model, (), kind="question-answering")
    assert model.config.num_labels == 2


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
