"""Model folders: found, checked before anything is built, labels matched by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import CASES, write_family

from bertemd_deploy.checkpoints import check_folder, checked_encoder, find_model, has_head, label_order
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.files import sha256_file
from bertemd_deploy.tasks import Kind


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_found_and_its_hash_checked(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    found = sha256_file(folder / "model.safetensors")
    assert find_model(str(folder), sha256=found) == folder
    with pytest.raises(ModelError) as raised:
        find_model(str(folder), sha256="0" * 64)
    assert str(raised.value) == (
        f"{folder / 'model.safetensors'}: SHA-256 is {found}, the recipe expects {'0' * 64}; not used."
    )


def test_an_absent_folder_says_what_a_model_may_be(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent: there is no such folder\. Name a Hugging Face folder, a hub id"):
        find_model(str(tmp_path / "absent"))


def test_a_folder_without_config_is_refused(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json, so this is not a Hugging Face model folder"):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: not readable as JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", r"config\.json: not readable as JSON \(Exceeds the limit"),
        ("[" * 100_000, r"config\.json: not readable as JSON"),
        ("[]", r"config\.json: not readable as a JSON object \(it holds a list\)"),
        ("{}", r"config\.json: model_type is None; supported: bert"),
        (
            '{"model_type": "gpt2"}',
            r"config\.json: model_type is 'gpt2'; supported: bert, roberta, electra, mpnet, dis",
        ),
    ],
)
def test_a_config_that_is_not_a_bert_s_is_refused(tiny_bert: Callable[..., Path], content: str, message: str) -> None:
    folder = tiny_bert()
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_pickle_weights_are_refused_by_name(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as raised:
        find_model(str(folder))
    assert "only pickle weights (pytorch_model.bin), which can run code when loaded" in str(raised.value)
    assert "safe_serialization=True" in str(raised.value)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors, no weights"):
        find_model(str(folder))


def test_a_package_is_located_without_importing_it(
    tiny_bert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "weights_that_explode"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    tiny_bert().rename(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_model("package:weights_that_explode/model") == package / "model"
    with pytest.raises(ModelError, match="the package 'weights_that_explode' has no folder 'absent'"):
        find_model("package:weights_that_explode/absent")


@pytest.mark.parametrize("spec", ["package:a-b/model", "package:json/../os", "package:json//etc", "package:/etc"])
def test_a_package_spec_may_not_leave_the_package(spec: str) -> None:
    with pytest.raises(ModelError, match="write it as package:IMPORT_NAME/sub/folder"):
        find_model(spec)


@pytest.mark.parametrize("name", ["no_such_package_here", "sys", "__main__"])
def test_what_is_no_installed_package_is_said_to_be_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as under the console script
    with pytest.raises(ModelError, match=f"no installed package '{name}'"):
        find_model(f"package:{name}/model")


def test_a_hub_id_without_network_points_to_a_folder() -> None:
    with pytest.raises(ModelError) as raised:
        find_model("nobody/no-such-model")
    assert str(raised.value).startswith("nobody/no-such-model: could not be fetched from the model hub (")
    assert "Without a network, download the model elsewhere and name its folder instead" in str(raised.value)


def test_a_misspelt_folder_is_said_to_be_absent_before_the_hub_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sst2-teacher").mkdir(parents=True)
    with pytest.raises(ModelError) as raised:
        find_model("models/sst2-teechr")
    assert str(raised.value).startswith(
        "models/sst2-teechr: no such folder here: models/ has no sst2-teechr (it holds sst2-teacher). "
        "Taken for a hub id, it could not be fetched from the model hub ("
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty/ has no model \(it holds no folders\)"):
        find_model("empty/model")


def test_a_hub_id_becomes_the_downloaded_folder(
    tiny_bert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert()
    asked = {}

    def download(spec: str, *, allow_patterns: list[str]) -> str:
        asked[spec] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("owner/name") == folder
    assert asked == {"owner/name": ["*.json", "*.txt", "model.safetensors"]}  # never a pickle, never code


def test_a_hub_error_without_words_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match=r"could not be fetched from the model hub \(TimeoutError\(\)\)"):
        find_model("owner/name")


def test_has_head_tells_a_classifier_from_an_encoder(tiny_bert: Callable[..., Path]) -> None:
    assert has_head(tiny_bert("classifier"))
    assert not has_head(tiny_bert("encoder", head=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_has_head_knows_the_heads_of_every_family_and_kind(family: str, tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("classification", "token-classification", "question-answering")
    for kind in kinds:
        folder = write_family(tmp_path / kind, family, kind=kind, **CASES[family])
        assert [has_head(folder, kind=other) for other in kinds] == [kind == other for other in kinds]
        assert has_head(folder, kind="multilabel") is has_head(folder)
        edit_config(folder, architectures=None)  # an old file: by the weights' names alone
        assert has_head(folder, kind=kind)
        weights = folder / "model.safetensors"
        prefix = f"{FAMILIES[family].prefix}."
        save_file({name: value for name, value in load_file(weights).items() if name.startswith(prefix)}, weights)
        assert not has_head(folder, kind=kind)


def test_half_a_head_is_none(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "roberta")
    weights = folder / "model.safetensors"
    save_file({name: v for name, v in load_file(weights).items() if name != "classifier.dense.weight"}, weights)
    with pytest.raises(ModelError, match=r"no classification head \(classifier\.dense\.weight missing\)"):
        label_order(folder, ("no", "yes"))


@pytest.mark.parametrize("bare", [True, False])
def test_a_config_without_model_type_is_a_bert_s_by_its_weights(
    tiny_bert: Callable[..., Path], capsys: pytest.CaptureFixture[str], bare: bool
) -> None:
    folder = tiny_bert(head=not bare)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert find_model(str(folder)) == folder
    told = f"{folder}: config.json names no model_type; its weights have BERT's names, so it is read as a bert"
    assert capsys.readouterr().err.strip() == told
    assert check_folder(folder)["model_type"] == "bert"
    assert has_head(folder) is not bare
    assert capsys.readouterr().err == ""
    edit_config(folder, type_vocab_size=1)  # as RoBERTa has it, whose bare weights have the same names
    if bare:
        with pytest.raises(ModelError, match="model_type is None; supported"):
            check_folder(folder)
    save_file({"layers.0.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="model_type is None; supported"):
        find_model(str(folder))


def test_a_model_type_that_is_named_is_not_guessed(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    edit_config(folder, model_type=None)
    with pytest.raises(ModelError, match="model_type is None; supported"):
        check_folder(folder)


@pytest.mark.parametrize(("family", "tokens"), [("mpnet", 38), ("roberta", 38), ("electra", 40), ("deberta-v2", 40)])
def test_checked_encoder_counts_the_positions_that_tokens_read(family: str, tokens: int, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family, **CASES[family])
    encoder = checked_encoder(folder, max_length=tokens)
    assert encoder.max_length == tokens
    assert encoder.pad_id == json.loads((folder / "config.json").read_text())["pad_token_id"]
    with pytest.raises(ModelError, match=rf"data\.max_length is {tokens + 1}, the model has {tokens} positions"):
        checked_encoder(folder, max_length=tokens + 1)


def test_padding_is_the_token_that_the_model_s_config_names(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "mpnet")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["[PAD]"] = vocabulary.pop("dull")  # the vocabulary of the published model has both
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert checked_encoder(folder, max_length=8).pad_id == 1
    edit_config(folder, pad_token_id=1000)  # no token
    assert checked_encoder(folder, max_length=8).pad_id in (1, vocabulary["[PAD]"])


def test_checked_encoder_refuses_lengths_and_ids_beyond_the_model(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    assert checked_encoder(folder, max_length=64).max_length == 64
    with pytest.raises(ModelError, match=r"data\.max_length is 65, the model has 64 positions"):
        checked_encoder(folder, max_length=65)
    highest = max(checked_encoder(folder, max_length=64).vocabulary().values())
    edit_config(folder, vocab_size=highest)
    with pytest.raises(ModelError, match=f"ids up to {highest}, the model's vocab_size is {highest}"):
        checked_encoder(folder, max_length=64)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json\. Save the tokenizer there"):
        checked_encoder(folder, max_length=64)


def test_label_order_matches_by_name_whatever_the_case(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=("Neutral", "CONTRADICTION", "entailment"))
    assert label_order(folder, ("entailment", "neutral", "contradiction")) == [2, 0, 1]


def test_label_order_of_tags_and_of_answers(tmp_path: Path) -> None:
    tags = write_family(tmp_path / "tags", "electra", kind="token-classification", labels=("B-PER", "O"))
    assert label_order(tags, ("O", "b-per"), kind="token-classification") == [1, 0]
    answers = write_family(tmp_path / "answers", "mpnet", kind="question-answering", labels=())
    assert label_order(answers, (), kind="question-answering") == [0, 1]
    with pytest.raises(
        ModelError, match=r"no question-answering head \(qa_outputs\.bias, qa_outputs\.weight missing\)"
    ):
        label_order(tags, (), kind="question-answering")


def test_label_order_of_placeholders_is_the_data_s_and_is_said(
    tiny_bert: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bert(labels=("LABEL_0", "LABEL_1"))
    assert label_order(folder, ("no", "yes")) == [0, 1]
    assert "labels have no names; outputs are taken in the data's order (no, yes)" in capsys.readouterr().err
    edit_config(folder, id2label=None)
    assert label_order(folder, ("no", "yes")) == [0, 1]
    assert label_order(folder, ()) == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id2label": ["no", "yes"]},
            r"config\.json: id2label should be an object of names by number, .* \['no', 'yes'\]",
        ),
        ({"id2label": {"no": 0}}, r"id2label should be an object of names by number, .* Correct it and label2id"),
        ({"vocab_size": "many"}, r"config\.json: vocab_size should be a whole number, found 'many'"),
        ({"num_attention_heads": 2.5}, r"num_attention_heads should be a whole number, found 2\.5"),
        ({"vocab_size": None}, r"config\.json: has no vocab_size, the number of rows of the word embedding\. Copy"),
    ],
)
def test_a_config_with_values_that_cannot_be_used(
    tiny_bert: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    folder = tiny_bert()
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        checked_encoder(folder, max_length=8)


def test_label_order_sorts_ten_and_more_outputs_by_number(tiny_bert: Callable[..., Path]) -> None:
    names = tuple(f"class {number}" for number in range(12))
    assert label_order(tiny_bert(labels=names), names) == list(range(12))


def test_label_order_refuses_other_names_and_other_counts(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert(labels=("negative", "positive"))
    with pytest.raises(ModelError, match=re.escape("label(s) good are not among the model's: negative, positive.")):
        label_order(folder, ("negative", "good"))
    with pytest.raises(ModelError, match=re.escape("has 2 labels (negative, positive), the data 3 (a, b, c)")):
        label_order(folder, ("a", "b", "c"))


def test_truncated_weights_are_one_message(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file .* Copy it again"):
        has_head(folder)


def test_an_encoder_without_a_head_is_told_so_before_its_labels_are_counted(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    weights = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "classifier" not in name}, weights)
    with pytest.raises(ModelError, match=r"no classification head \(classifier.bias, classifier.weight missing\)"):
        label_order(folder, ["a", "b", "c", "d"])
