"""Altered copies of train rows: what may change, what never does, the same by seed, and which folders are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.augmentation import _bounded_batches, augment
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.families import FAMILIES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXTS = ["the film was good today", "a song", "we saw it, sadly", "good", "fine zebra films", "very very very bad !"]
PAIRS = ["it was bad", "good", "we saw a very good film today", "sad", "lovely", "the song"]


@pytest.fixture
def masked_lm(tmp_path: Path, tiny_tokenizer: Callable[[Path], None]) -> Callable[..., Path]:
    """Return a factory of folders with a random masked language model of a family over the tiny vocabulary."""

    def build(model_type: str = "bert", **changes: Any) -> Path:
        folder = tmp_path / f"{model_type}-{len(changes)}"
        tiny_tokenizer(folder)
        family = FAMILIES[model_type]
        sizes = dict(zip(family.fields, (2, 16, 2, 32), strict=True))
        config = transformers.CONFIG_MAPPING[model_type](
            vocab_size=31, max_position_embeddings=64, pad_token_id=0, embedding_size=16, **(sizes | changes)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForMaskedLM.from_config(config)
            for weight in model.parameters():  # far enough apart that the likeliest words are clear
                weight.data.add_(torch.randn_like(weight) * 0.3)
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def plain(tmp_path: Path, tiny_tokenizer: Callable[[Path], None]) -> Path:
    tiny_tokenizer(tmp_path / "plain")
    return tmp_path / "plain"


def encoded(folder: Path, *, pairs: bool = True, times: int = 1) -> tuple[TextEncoder, DataSlice]:
    encoder = TextEncoder.load(folder, max_length=32)
    examples = encoder.encode(TEXTS * times, PAIRS * times if pairs else None)
    return encoder, DataSlice(examples, np.arange(len(examples), dtype=np.int64))


def words(encoder: TextEncoder, part: DataSlice) -> list[list[str]]:
    names = {number: name for name, number in encoder.vocabulary().items()}
    offsets = part.examples.offsets
    tokens = [names[int(token)] for token in part.examples.tokens]
    return [tokens[start:stop] for start, stop in itertools.pairwise(offsets)]


def segments(row: list[str]) -> list[list[str]]:
    first, rest = row[1:-1], row.index("[SEP]")
    return [first[: rest - 1], first[rest:]]


def call(part: DataSlice, encoder: TextEncoder, folder: Path, **changes: Any) -> DataSlice:
    settings: dict[str, Any] = {"kind": "classification", "method": "dropout", "copies": 2, "rate": 0.3, "seed": 1}
    return augment(part, encoder=encoder, teacher_folder=folder, **(settings | changes))


def test_dropout_keeps_the_rows_the_labels_and_every_special_token(plain: Path) -> None:
    encoder, part = encoded(plain, times=20)
    more = call(part, encoder, plain)
    count = len(part)
    assert len(more) == 3 * count
    np.testing.assert_array_equal(more.labels, np.tile(part.labels, 3))
    assert (more.kind, more.labels.dtype, more.examples.tokens.dtype) == (part.kind, np.int64, np.int32)
    assert (more.examples.types.dtype, more.examples.offsets.dtype) == (np.int8, np.int64)
    assert more.fault() is None
    before, after = words(encoder, part), words(encoder, more)
    assert after[:count] == before
    for old, new in zip(before * 2, after[count:], strict=True):
        assert [token for token in new if token in SPECIAL] == [token for token in old if token in SPECIAL]
        for was, now in zip(segments(old), segments(new), strict=True):
            assert now, "a segment may not come out empty"
            left = iter(was)
            assert all(token in left for token in now), f"{now} is no part of {was} in its order"
    for row, tokens in enumerate(after):
        types = more.examples.types[more.examples.offsets[row] : more.examples.offsets[row + 1]]
        split = tokens.index("[SEP]") + 1
        assert types.tolist() == [0] * split + [1] * (len(tokens) - split)
    assert after[count : 2 * count] != after[2 * count :]


def test_dropout_leaves_out_the_share_asked_for_and_at_rate_one_all_but_a_token(plain: Path) -> None:
    encoder, part = encoded(plain, pairs=False, times=1)
    long = encoder.encode(["the film was a song we saw it today very good " * 2] * 400)
    part = DataSlice(long, np.zeros(400, dtype=np.int64))
    kept = call(part, encoder, plain, copies=1, rate=0.3).examples.lengths[400:] - 2
    assert kept.sum() / (400 * 22) == pytest.approx(0.7, abs=0.02)
    assert set(call(part, encoder, plain, copies=1, rate=1.0).examples.lengths[400:]) == {3}


def test_the_seed_alone_decides(plain: Path, masked_lm: Callable[..., Path]) -> None:
    folder = masked_lm()
    encoder, part = encoded(folder, times=3)
    for method in ("dropout", "mlm"):
        first, again, other = (call(part, encoder, folder, method=method, seed=seed) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first.examples.tokens, again.examples.tokens)
        assert first.examples.tokens.tolist() != other.examples.tokens.tolist()
        one = call(part, encoder, folder, method=method, seed=5, copies=1)
        np.testing.assert_array_equal(one.examples.tokens, first.examples.tokens[: len(one.examples.tokens)])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlm_replaces_whole_words_by_whole_words(model_type: str, masked_lm: Callable[..., Path]) -> None:
    folder = masked_lm(model_type)
    encoder, part = encoded(folder, times=4)
    more = call(part, encoder, folder, method="mlm", rate=1.0, copies=1)
    count = len(part)
    np.testing.assert_array_equal(more.examples.offsets[count:] - more.examples.offsets[count], part.examples.offsets)
    np.testing.assert_array_equal(more.examples.types[len(part.examples.types) :], part.examples.types)
    np.testing.assert_array_equal(more.labels, np.tile(part.labels, 2))
    before, after = words(encoder, part), words(encoder, more)[count:]
    changed = 0
    for old, new in zip(before, after, strict=True):
        for at, (was, now) in enumerate(zip(old, new, strict=True)):
            in_pieces = was.startswith("##") or "".join(old[at + 1 : at + 2]).startswith("##")
            if was in SPECIAL or in_pieces:
                assert now == was
            else:
                assert now != was
                assert now not in SPECIAL
                assert not now.startswith("##")
                changed += 1
    assert changed > 100


def test_mlm_draws_from_the_fifteen_likeliest_words_in_their_proportion(masked_lm: Callable[..., Path]) -> None:
    folder = masked_lm()
    encoder = TextEncoder.load(folder, max_length=32)
    part = DataSlice(encoder.encode(["good"] * 3000), np.zeros(3000, dtype=np.int64))
    drawn = call(part, encoder, folder, method="mlm", rate=1.0, copies=1).examples.tokens[9000:].reshape(3000, 3)[:, 1]
    ids = encoder.vocabulary()
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[ids["[CLS]"], ids["[MASK]"], ids["[SEP]"]]])).logits[0, 1]
    allowed = [at for name, at in ids.items() if name not in (*SPECIAL, "good") and not name.startswith("##")]
    assert len(allowed) > 15
    best = sorted(allowed, key=lambda at: -float(logits[at]))[:15]
    assert set(drawn.tolist()) <= set(best)
    wanted = logits[best].softmax(-1).numpy()
    found = np.array([(drawn == at).mean() for at in best])
    np.testing.assert_allclose(found, wanted, atol=0.04)


def test_mlm_reads_the_other_words_and_not_the_hidden_one(masked_lm: Callable[..., Path]) -> None:
    """Rows of one length, run in one batch or each alone, give the same words: padding and neighbours have no part."""
    folder = masked_lm()
    encoder, part = encoded(folder, times=2)
    together = call(part, encoder, folder, method="mlm", copies=1)
    small = pytest.MonkeyPatch()
    with small.context() as patch:
        patch.setattr("bertemd_deploy.augmentation._HIDDEN_WORDS", 1)
        apart = call(part, encoder, folder, method="mlm", copies=1)
    np.testing.assert_array_equal(together.examples.tokens, apart.examples.tokens)


def test_batches_are_bounded_and_hold_every_row_with_words_once() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 513, size=500)
    counts = np.minimum(lengths - 2, generator.integers(0, 400, size=500))
    batches = _bounded_batches(lengths, counts)
    assert sorted(np.concatenate(batches).tolist()) == np.flatnonzero(counts).tolist()
    for batch in batches:
        assert counts[batch[1:]].sum() <= 512
        assert lengths[batch[1:]].sum() <= 512 * 16
    assert _bounded_batches(lengths, np.zeros(500, dtype=np.int64)) == []


def test_a_byte_level_vocabulary_changes_words_that_a_space_begins(
    masked_lm: Callable[..., Path], tmp_path: Path
) -> None:
    folder = masked_lm("roberta")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "<mask>": 4}
    starts = ("Ġ", "t", "h", "e", "Ġt", "he", "Ġthe", "Ġs", "Ġh", "Ġe")
    vocabulary |= {name: 5 + at for at, name in enumerate(starts)}
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]
    content["model"] = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": at, "content": name} | flags for name, at in vocabulary.items() if at < 5]
    content["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]} | {
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = TextEncoder.load(folder, max_length=32)
    part = DataSlice(encoder.encode(["he the the", "the the he"] * 20), np.zeros(40, dtype=np.int64))
    rows = words(encoder, part)
    assert rows[:2] == [["<s>", "he", "Ġthe", "Ġthe", "</s>"], ["<s>", "t", "he", "Ġthe", "Ġ", "he", "</s>"]]
    for row in words(encoder, call(part, encoder, folder, method="mlm", rate=1.0, copies=1))[40::2]:
        assert (row[0], row[1], row[-1]) == ("<s>", "he", "</s>")
        assert all(token.startswith("Ġ") and token != "Ġthe" for token in row[2:4])


def test_several_labels_and_numbers_go_along(plain: Path) -> None:
    encoder, part = encoded(plain)
    for kind, labels in (
        ("multilabel", np.eye(6, 3, dtype=np.float32)),
        ("regression", np.linspace(0, 5, 6).astype(np.float32)),
    ):
        more = call(DataSlice(part.examples, labels, kind), encoder, plain, kind=kind)
        np.testing.assert_array_equal(more.labels, np.concatenate([labels] * 3))
        assert more.fault() is None


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
@pytest.mark.parametrize("method", ["dropout", "mlm"])
def test_labels_of_positions_are_refused(kind: str, method: str, plain: Path) -> None:
    encoder, part = encoded(plain)
    with pytest.raises(RecipeError) as caught:
        call(part, encoder, plain, kind=kind, method=method)
    assert str(caught.value) == (
        f"distill.augmentation: {method} does not fit {kind}, whose labels belong to token positions: a copy with "
        "other tokens would carry wrong ones. Use augmentation: none."
    )


def test_a_folder_without_a_masked_lm_head_is_refused(
    tiny_bert: Callable[..., Path], masked_lm: Callable[..., Path]
) -> None:
    teacher = tiny_bert()
    encoder, part = encoded(teacher)
    with pytest.raises(
        ModelError, match=r"model: has no masked-LM head \(cls\.predictions\..+, … missing\), so it can"
    ):
        call(part, encoder, teacher, method="mlm")
    damaged = masked_lm()
    weights = load_file(damaged / "model.safetensors")
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        call(part, encoder, damaged, method="mlm")
    assert str(caught.value) == (
        f"{damaged}: has no masked-LM head (cls.predictions.transform.dense.weight missing), so it cannot say which words "
        "are likely. Use augmentation: dropout."
    )


def test_broken_weights_and_strange_tokenizers_are_refused(masked_lm: Callable[..., Path], tmp_path: Path) -> None:
    folder = masked_lm()
    encoder, part = encoded(folder)
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.transform.dense.weight"][:] = torch.nan
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"broken: its masked-LM outputs are not finite\. The weights are broken\.$"):
        call(part, encoder, broken, method="mlm")

    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"extra": 29}
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=r"other: its tokenizer\.json has another vocabulary than the one the data was"
    ):
        call(part, encoder, other)

    content = json.loads((folder / "tokenizer.json").read_text().replace("[MASK]", "[HIDE]"))
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=r"cannot be used for masked words \(mask token None, 29 tokens for a model of 31"
    ):
        call(part, TextEncoder.load(other, max_length=32), other, method="mlm")

    (other / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"other: could not be loaded \(.+\)\.$"):
        call(part, TextEncoder.load(other, max_length=32), other, method="mlm")
