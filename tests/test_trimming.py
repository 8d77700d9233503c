"""Trimmed students: what goes into the vocabulary, equal logits on covered texts, and what the others cost."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import write_corpus
from safetensors.torch import load_file, save_file
from tiny_family import write_family_tokenizer
from tiny_words import BAD, GOOD, NEUTRAL, SPECIAL
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from bertemd_deploy.checkpoints import checked_encoder
from bertemd_deploy.data import Dataset, load_data
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import GateError, ModelError, RecipeError
from bertemd_deploy.export import export
from bertemd_deploy.facts import StudentFacts, facts_from_data
from bertemd_deploy.models import load_classifier, save_model, set_labels
from bertemd_deploy.settings import ExportSettings, QuantizeSettings
from bertemd_deploy.trimming import Trimmed, count_tokens, coverage, trim_student, trim_vocabulary

LETTERS = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), "."]
WORDS = ["[unused0]", "[unused1]", *GOOD, *BAD, *NEUTRAL, "##ly", "##s"]
WORDS = [word for word in WORDS if word not in LETTERS]  # "a"
VOCABULARY = ["[PAD]", *WORDS, *SPECIAL[1:], *LETTERS]
NEEDED = len(SPECIAL) + len(LETTERS)


def write_tokenizer(folder: Path) -> None:
    """Write BERT's tokenizer over VOCABULARY, special tokens at odd places, as real folders have it."""
    path = folder / "words.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab={token: at for at, token in enumerate(VOCABULARY)}).save_pretrained(folder)
    path.rename(folder / "vocab.txt")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(VOCABULARY.index(token)): {"content": token} for token in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def made(tiny_bert: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, StudentFacts, Dataset]]:
    """Return a factory of (student, its facts, its data): untrained, its embedding rows all different."""

    def build(kind: str = "classification", *, train: int = 60) -> tuple[Path, StudentFacts, Dataset]:
        if kind == "classification":
            data_folder = tmp_path / "data"
            data_folder.mkdir()
            rows = {
                "train": ["the good film .\t1", "a sad film\t0", "a bad song was sad .\t0", "we saw it . lovely\t1"],
                "dev": [
                    "a good film\t1",
                    "we saw a bad film .\t0",
                    "it was a very dull film\t0",
                    "the song was sad\t0",
                ],
            }
            for split, lines in rows.items():
                (data_folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
            data = load_data(str(data_folder))
        else:
            data = load_data(str(write_corpus(tmp_path / "data", kind, train=train, dev=24)), task=kind)
        encoder = tiny_bert("encoder", head=False)
        write_tokenizer(encoder)
        config = json.loads((encoder / "config.json").read_text())
        (encoder / "config.json").write_text(
            json.dumps(config | {"vocab_size": len(VOCABULARY) + 3, "sep_token_id": VOCABULARY.index("[SEP]")})
        )
        weights = load_file(encoder / "model.safetensors")
        name = "embeddings.word_embeddings.weight"
        weights[name] = torch.randn(len(VOCABULARY) + 3, weights[name].shape[1])
        save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
        model = load_classifier(encoder, labels=data.labels, kind=data.task.kind, new_head=True)
        set_labels(model, data.labels, kind=data.task.kind)
        save_model(model, tmp_path / "student", tokenizer_from=encoder)
        return tmp_path / "student", facts_from_data(tmp_path / "student", data, max_length=14), data

    return build


def trim(found: tuple[Path, StudentFacts, Dataset], out: Path, **settings: Any) -> Trimmed:
    student, facts, data = found
    return trim_student(student, facts=facts, data=data, out=out, **({"size": None, "max_drop": 100.0} | settings))


def tokens_of(folder: Path) -> list[str]:
    ids = TextEncoder.load(folder, max_length=8).vocabulary()
    assert sorted(ids.values()) == list(range(len(ids)))
    return sorted(ids, key=ids.__getitem__)


def test_a_corpus_keeps_its_tokens_in_their_order(made, tmp_path: Path) -> None:
    found = made()
    trimmed = trim(found, tmp_path / "small")
    used = {"the", "good", "film", "sad", "bad", "song", "was", "we", "saw", "it", "lovely", *LETTERS, *SPECIAL}
    assert tokens_of(trimmed.folder) == [token for token in VOCABULARY if token in used]
    assert (trimmed.folder / "vocab.txt").read_text().split() == tokens_of(trimmed.folder)
    config = json.loads((trimmed.folder / "config.json").read_text())
    assert config["vocab_size"] == len(used)
    assert config["pad_token_id"] == 0
    assert tokens_of(trimmed.folder)[config["sep_token_id"]] == "[SEP]"
    roles = json.loads((trimmed.folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(at): entry["content"] for at, entry in roles.items()} == {
        at: token for at, token in enumerate(tokens_of(trimmed.folder)) if token in SPECIAL
    }
    name = "bert.embeddings.word_embeddings.weight"
    old, new = (load_file(folder / "model.safetensors") for folder in (found[0], trimmed.folder))
    torch.testing.assert_close(new[name], old[name][[VOCABULARY.index(token) for token in tokens_of(trimmed.folder)]])
    assert {key: value.shape for key, value in new.items() if key != name} == {
        key: value.shape for key, value in old.items() if key != name
    }


def test_the_record_tells_coverage_and_equal_logits(made, tmp_path: Path) -> None:
    record = trim(made(), tmp_path / "small").record
    assert (record["kept"], record["total"], record["asked"]) == (NEEDED + 11, len(VOCABULARY), "corpus")
    train, dev = record["coverage"]["train"], record["coverage"]["evaluation"]
    assert (train["identical"], train["texts"], train["kept_share"]) == (4, 4, 1.0)
    # "it was a very dull film" loses two words of six and its two special tokens stay.
    assert (dev["tokens"], dev["kept"], dev["trimmed_tokens"]) == (27, 25, 25 + len("very") + len("dull"))
    assert (dev["identical"], dev["texts"], dev["unknown"], dev["trimmed_unknown"]) == (3, 4, 0, 0)
    assert record["equal_tokens"] == {"rows": 3, "max_abs_logit_difference": 0.0, "allowed": 1e-6}
    assert record["metrics"].keys() == {"full", "trimmed"}
    assert record["cut_off"] == 0


def test_a_size_takes_the_most_frequent_first_and_no_placeholders(made, tmp_path: Path) -> None:
    found = made()
    trimmed = trim(found, tmp_path / "small", size=NEEDED + 2)
    assert set(tokens_of(trimmed.folder)) - {*LETTERS, *SPECIAL} == {"film", "sad"}
    assert trimmed.record["coverage"]["train"]["kept_share"] < 1
    everything = trim(found, tmp_path / "all", size=1000)
    assert tokens_of(everything.folder) == [token for token in VOCABULARY if not token.startswith("[unused")]
    assert everything.record["coverage"]["evaluation"]["identical_share"] == 1.0
    some = trim(found, tmp_path / "some", size=NEEDED + 12)  # one more than train uses: of the others the first
    assert set(tokens_of(some.folder)) - set(tokens_of(trim(found, tmp_path / "used").folder)) == {"fine"}


@pytest.mark.parametrize("kind", ["multilabel", "token-classification", "question-answering"])
def test_every_kind_of_task_gets_slices_of_the_new_tokens(made, kind: str, tmp_path: Path) -> None:
    found = made(kind)
    trimmed = trim(found, tmp_path / "small", size=(size := NEEDED + 12))
    facts, before = trimmed.facts, found[1]
    assert facts.evaluation.fault() is None
    assert facts.evaluation.kind == facts.calibration.kind == kind
    assert int(facts.evaluation.examples.tokens.max()) < size
    assert len(facts.evaluation.examples.tokens) > len(before.evaluation.examples.tokens)
    assert replace(facts, evaluation=before.evaluation, calibration=before.calibration) == before
    covered = trimmed.record["coverage"]["evaluation"]
    assert covered["texts"] == 24
    assert 0 < covered["identical"] < 24
    assert trimmed.record["equal_tokens"]["max_abs_logit_difference"] == 0.0


def test_a_unigram_vocabulary(tmp_path: Path) -> None:
    student = tmp_path / "student"
    rows, pad = write_family_tokenizer(student, "deberta-v2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=rows, pad_token_id=pad, **sizes)).save_pretrained(student)
    texts = ["the film was bad", "we saw it"]
    before = checked_encoder(student, max_length=16).encode(texts)
    kept = trim_vocabulary(student, counts=count_tokens([before]), size=None, out=tmp_path / "small")
    after = checked_encoder(tmp_path / "small", max_length=16).encode(texts)
    np.testing.assert_array_equal(kept[after.tokens], before.tokens)
    assert len(kept) < rows - 10


def test_tokens_are_counted_over_parts(made) -> None:
    student, _, _ = made()
    encoder = checked_encoder(student, max_length=8)
    counts = count_tokens(encoder.encode([text]) for text in ("film", "film film sad"))
    found = {VOCABULARY[at]: int(count) for at, count in enumerate(counts) if count}
    assert found == {"film": 3, "sad": 1, "[CLS]": 2, "[SEP]": 2}
    assert len(count_tokens([])) == 0


def test_texts_that_become_known_are_no_longer_identical(made, tmp_path: Path) -> None:
    """Counted by tokens alone the text would be covered: its unknown token stays."""
    data = made()[2].splits["dev"].select([0, 1])
    whole = Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "a": 2, "ab": 3, "##bcd": 4}, unk_token="[UNK]"))
    part = Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "a": 2, "##bcd": 3}, unk_token="[UNK]"))
    texts = replace(data, texts=["abcd", "a"])
    old, new = (texts.encode(TextEncoder(tokenizer, max_length=8, pad_id=1)) for tokenizer in (whole, part))
    found = coverage(old, new, kept=np.array([0, 1, 2, 4]), unknown=0)
    assert (found.tokens, found.kept, found.unknown, found.trimmed_unknown) == (2, 2, 1, 0)
    assert (found.texts, found.identical) == (2, 1)


def test_the_trimmed_student_exports_as_any_other(made, tmp_path: Path) -> None:
    trimmed = trim(made("multilabel"), tmp_path / "small", size=NEEDED + 12)
    facts = trimmed.facts
    artifact = export(
        trimmed.folder,
        out=tmp_path / "artifact",
        task=facts.task,
        labels=facts.labels,
        max_length=facts.max_length,
        evaluation=facts.evaluation,
        calibration=facts.calibration,
        teacher=None,
        reference_metrics={},
        distillation=None,
        settings=ExportSettings(),
        quantization=QuantizeSettings(mode="none"),
    )
    assert artifact.manifest["metrics"]["fp32"] == trimmed.record["metrics"]["trimmed"]
    assert tokens_of(artifact.folder) == tokens_of(trimmed.folder)


def test_what_cannot_be_trimmed_is_refused(made, tiny_bert: Callable[..., Path], tmp_path: Path) -> None:
    found = made()
    student, facts, data = found
    with pytest.raises(RecipeError, match=rf"export.vocabulary is 20; .* are {NEEDED}, which stay whatever the corpus"):
        trim(found, tmp_path / "small", size=20)
    with pytest.raises(ModelError, match=r"its labels are 0, 1, the data's yes, no. Trim with the data"):
        trim((student, facts, replace(data, labels=("yes", "no"))), tmp_path / "small")
    weights = load_file(student / "model.safetensors")
    rows = weights.pop("bert.embeddings.word_embeddings.weight")
    save_file(weights, student / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors: needs one word embedding .*; found none"):
        trim_vocabulary(student, counts=np.zeros(4, dtype=np.int64), size=None, out=tmp_path / "small")
    save_file(weights | {"bert.embeddings.word_embeddings.weight": rows[:40]}, student / "model.safetensors")
    with pytest.raises(ModelError, match=r"of more than 77 rows, one for each token; found bert\S+ of 40 rows"):
        trim_vocabulary(student, counts=np.zeros(4, dtype=np.int64), size=None, out=tmp_path / "small")
    (student / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        trim_vocabulary(student, counts=np.zeros(4, dtype=np.int64), size=None, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_words_cut_off_count_as_lost(made, tmp_path: Path) -> None:
    found = made("token-classification")
    student, facts, data = found
    record = trim(found, tmp_path / "small", size=NEEDED + 8).record
    scored = [int((facts.evaluation.labels >= 0).sum()), 0]
    scored[1] = int((trim(found, tmp_path / "again", size=NEEDED + 8).facts.evaluation.labels >= 0).sum())
    assert 0.1 < record["cut_off"] == 1 - scored[1] / scored[0]
    with pytest.raises(
        GateError, match=r"loses \S+ points of entity_f1 \(\S+ to [\d.]+, and 2\d.\d% of the words are cut off"
    ):
        trim_student(student, facts=facts, data=data, size=NEEDED + 8, max_drop=5, out=tmp_path / "small")


def test_a_drop_beyond_the_gate_and_wrong_rows_are_refused(made, tmp_path: Path, monkeypatch) -> None:
    found = made()
    scores = iter([{"accuracy": 0.75}, {"accuracy": 0.5}])
    with monkeypatch.context() as patch:
        patch.setattr("bertemd_deploy.trimming.dev_metrics", lambda *_, **__: next(scores))
        message = (
            rf"with {NEEDED} of {len(VOCABULARY)} tokens it loses 25 points of accuracy \(0.7500 to 0.5000; allowed 1\); "
            r"0.0% of the dev texts become the same tokens"
        )
        with pytest.raises(GateError, match=message):
            trim(found, tmp_path / "small", size=NEEDED, max_drop=1.0)
    right = load_file

    def rotated(path: Path) -> dict[str, torch.Tensor]:
        weights = right(path)
        return {key: value.roll(1, 0) if "word_embeddings" in key else value for key, value in weights.items()}

    monkeypatch.setattr("bertemd_deploy.trimming.load_file", rotated)
    with pytest.raises(GateError, match=r"on 3 rows of the same tokens .* a logit differs by .* \(allowed 1e-06\)"):
        trim(found, tmp_path / "small")
