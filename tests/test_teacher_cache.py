"""The teacher cache: when it is used, that it never gives another row's outputs, and what it says."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bertemd_deploy import teacher_cache
from bertemd_deploy.capture import LayerOutputs, LayerReader
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError, TrainingError
from bertemd_deploy.row_store import COMPLETE, DATA, HEADER, store_bytes
from bertemd_deploy.teacher_cache import CachedTeacher, Measured, cache_key, check_room, decide, parts_of

GB = 10**9
ROWS = 24
BATCH = 4


def examples(*, seed: int = 0) -> Encoded:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 9, ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = generator.integers(5, 25, offsets[-1]).astype(np.int32)
    return Encoded(tokens, generator.integers(0, 2, offsets[-1]).astype(np.int8), offsets)


class Teacher:
    """A tiny teacher that counts the rows it computes."""

    def __init__(self, model: Any, *, layers: bool = True, bfloat16: bool = False) -> None:
        self.model, self.read, self.bfloat16, self.rows = model, LayerReader(model) if layers else None, bfloat16, 0

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.rows += len(inputs["input_ids"])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            if self.read is None:
                return {"logits": self.model(**inputs).logits}
            found = self.read(inputs)
        layers = {name: torch.stack(list(getattr(found, name))) for name in ("hidden_states", "queries", "keys")}
        return {"logits": found.logits, "embedding": found.embeddings[0], **layers}


@pytest.fixture
def model(tiny_bert: Callable[..., Path]) -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained(tiny_bert("teacher")).eval()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(teacher_cache, "note", said.append)
    return said


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stand in for the disk, and for a slow teacher on a fast disk; the result may be changed."""
    usage = {"free": 100 * GB, "total": 200 * GB, "read": 10**12}
    kind = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: kind(usage["total"], 0, usage["free"]))
    monkeypatch.setattr(teacher_cache, "probe", lambda *_: (10.0**12, float(usage["read"]), True))
    return usage


def cached(teacher: Teacher, folder: Path, **changes: Any) -> CachedTeacher:
    given: dict[str, Any] = {
        "folder": folder,
        "key": "k",
        "examples": examples(),
        "budget": GB,
        "passes": lambda: 5,
    }
    return CachedTeacher(teacher, **given | changes)


def batches(seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(ROWS)
    return [order[at : at + BATCH] for at in range(0, ROWS, BATCH)]


def inputs_of(rows: np.ndarray, source: Encoded | None = None) -> dict[str, Tensor]:
    arrays = (source or examples()).batch(rows, pad_id=0)
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def epoch(source: CachedTeacher, plain: Teacher, seed: int) -> None:
    """Run one epoch, comparing every output at real tokens with what the teacher computes."""
    for rows in batches(seed):
        inputs = inputs_of(rows)
        found, expected = source(rows, inputs), plain(inputs)
        mask = inputs["attention_mask"].bool()
        assert set(found) == set(expected)
        for name, value in found.items():
            wanted = expected[name]
            assert value.shape == wanted.shape
            assert value.dtype == wanted.dtype
            if name == "embedding":
                value, wanted = value[mask], wanted[mask]
            elif name != "logits":  # (L, B, [A,] T, n)
                shown = mask[None, :, :, None] if value.dim() == 4 else mask[None, :, None, :, None]
                value, wanted = value * shown, wanted * shown
            rounding = 0.05 if plain.bfloat16 else 1e-5
            torch.testing.assert_close(value, wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_later_epochs_are_read(tmp_path: Path, model: Any, notes: list[str], layers: bool, bfloat16: bool):
    teacher = Teacher(model, layers=layers, bfloat16=bfloat16)
    plain = Teacher(model, layers=layers, bfloat16=bfloat16)
    source = cached(teacher, tmp_path / "c")
    epoch(source, plain, seed=0)
    assert source.decision is not None
    assert source.decision.use
    assert notes == [f"teacher cache: {source.decision.why}"]
    assert teacher.rows == ROWS
    epoch(source, plain, seed=1)  # the measured batches were not kept: their rows are computed once more, and no others
    assert teacher.rows == ROWS + 4 * BATCH
    assert (tmp_path / "c" / COMPLETE).exists()
    epoch(source, plain, seed=2)
    assert teacher.rows == ROWS + 4 * BATCH
    source.close(remove=True)
    assert not (tmp_path / "c").exists()


def test_everything_the_objective_reads_is_kept(model: Any):
    read = [field.name.replace("embeddings", "embedding") for field in dataclasses.fields(LayerOutputs)]
    assert sorted(teacher_cache._LAYERED) == sorted(read)
    outputs = Teacher(model)(inputs_of(np.arange(3)))
    tokens = {part.name for part in parts_of(outputs) if part.tokens}
    assert tokens == {"embedding", "hidden_states", "queries", "keys"}
    assert {part.name for part in parts_of({"logits": torch.zeros(3, 5, 2)}) if part.tokens} == {"logits"}


def test_a_batch_of_kept_rows_has_the_bits_it_was_computed_with(tmp_path: Path, model: Any):
    source = cached(Teacher(model), tmp_path / "c")
    for rows in batches(0)[:5]:
        computed = source(rows, inputs_of(rows))
    again = source(rows, inputs_of(rows))
    assert torch.equal(again["logits"], computed["logits"])
    mask = inputs_of(rows)["attention_mask"].bool()
    assert torch.equal(again["hidden_states"][:, mask], computed["hidden_states"][:, mask])
    assert not again["hidden_states"][:, ~mask].any()


def test_a_killed_run_goes_on_with_its_rows(tmp_path: Path, model: Any, notes: list[str]):
    first = cached(Teacher(model), tmp_path / "c")
    for rows in batches(0)[:5]:  # four measured, one kept
        first(rows, inputs_of(rows))
    teacher, plain = Teacher(model), Teacher(model)
    second = cached(teacher, tmp_path / "c")
    assert notes[-1] == f"teacher cache: used: continuing with 4 of 24 rows in {tmp_path / 'c'}"
    epoch(second, plain, seed=1)
    assert teacher.rows == ROWS - BATCH
    epoch(second, plain, seed=2)
    assert teacher.rows == ROWS - BATCH


def test_damage_stops_the_run(tmp_path: Path, model: Any):
    first = cached(Teacher(model), tmp_path / "c")
    for seed in range(2):
        epoch(first, Teacher(model), seed)
    first.close()
    path = tmp_path / "c" / DATA
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"rows\.bin: the teacher cache is damaged .*Delete the folder"):
        epoch(cached(Teacher(model), tmp_path / "c"), Teacher(model), seed=2)
    path.write_bytes(content[:-8])
    with pytest.raises(TrainingError, match=r"rows\.bin: .* bytes instead of"):
        cached(Teacher(model), tmp_path / "c")


def test_another_key_discards(tmp_path: Path, model: Any, notes: list[str]):
    epoch(cached(Teacher(model), tmp_path / "c"), Teacher(model), seed=0)
    teacher = Teacher(model)
    source = cached(teacher, tmp_path / "c", key="other")
    assert notes[-1].endswith("was of another teacher, data or precision, or above the budget; discarded")
    assert not (tmp_path / "c").exists()
    epoch(source, Teacher(model), seed=0)
    assert teacher.rows == ROWS


def test_the_key_follows_from_all_that_matters(model: Any):
    def key(**changes: Any) -> str:
        given: dict[str, Any] = {"max_length": 32, "precision": "float32", "layers": True}
        return cache_key(changes.pop("teacher", model), changes.pop("examples", examples()), **given | changes)

    keys = {key(), key(max_length=31), key(precision="bfloat16"), key(layers=False), key(examples=examples(seed=1))}
    rows = examples()
    keys.add(key(examples=dataclasses.replace(rows, types=1 - rows.types)))
    assert key() == key()
    keys.add(key())
    before = key()
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    keys.add(key())
    model.classifier.bias.data[0] -= 1e-6
    model.config.layer_norm_eps *= 2
    keys.add(key())
    assert before in keys
    assert len(keys) == 8


def test_the_budget_refuses_with_the_bytes_needed(tmp_path: Path, model: Any, notes: list[str]):
    teacher = Teacher(model)
    needed = store_bytes(parts_of(teacher(inputs_of(np.arange(2)))), examples().lengths)
    source = cached(teacher, tmp_path / "c", budget=needed - 1)
    epoch(source, Teacher(model), seed=0)
    assert len(notes) == 1
    assert "not used: all rows need" in notes[0]
    assert f"Set it to {needed} or more to use it." in notes[0]
    assert list(tmp_path.glob("c*")) == []
    source = cached(teacher, tmp_path / "c", budget=needed)
    epoch(source, Teacher(model), seed=0)
    assert source.decision is not None
    assert source.decision.use


def test_a_cache_above_a_lowered_budget_is_discarded(tmp_path: Path, model: Any, notes: list[str]):
    epoch(cached(Teacher(model), tmp_path / "c"), Teacher(model), seed=0)
    cached(Teacher(model), tmp_path / "c", budget=100)
    assert notes[-1].endswith("or above the budget; discarded")
    assert not (tmp_path / "c").exists()


def test_a_disk_nearly_full_refuses(tmp_path: Path, model: Any, notes: list[str], roomy: dict[str, int]):
    roomy["free"] = 10 * GB
    epoch(cached(Teacher(model), tmp_path / "c"), Teacher(model), seed=0)
    assert "the disk has 10.0 GB free and 10.0 GB of it are left alone. Free space to use it." in notes[0]
    assert list(tmp_path.glob("c*")) == []


def test_a_slow_disk_refuses(tmp_path: Path, model: Any, notes: list[str], roomy: dict[str, int]):
    roomy["read"] = 1
    teacher = Teacher(model)
    source = cached(teacher, tmp_path / "c")
    for seed in range(2):
        epoch(source, Teacher(model), seed)
    assert teacher.rows == 2 * ROWS
    assert len(notes) == 1
    assert "not used: it would cost" in notes[0]
    assert list(tmp_path.glob("c*")) == []


def test_other_processes_follow_the_leader(tmp_path: Path, model: Any, notes: list[str]):
    teachers = [Teacher(model), Teacher(model)]
    leader = cached(teachers[0], tmp_path / "c", processes=2)
    other = cached(teachers[1], tmp_path / "c", processes=2, leader=False)
    for seed in range(8):
        for number, rows in enumerate(batches(seed)):
            source = (leader, other)[number % 2]
            found = source(rows, inputs_of(rows))
            torch.testing.assert_close(found["logits"], Teacher(model)(inputs_of(rows))["logits"])
        if seed == 0:
            assert other.decision is None
    assert (tmp_path / "c" / COMPLETE).exists()
    done = [teacher.rows for teacher in teachers]
    for rows in batches(9):
        leader(rows, inputs_of(rows))
        other(rows, inputs_of(rows))
    assert [teacher.rows for teacher in teachers] == done
    assert len(notes) == 1  # the leader's
    other.close(remove=True)
    assert (tmp_path / "c" / HEADER).exists()
    leader.close(remove=True)
    assert not (tmp_path / "c").exists()


def test_other_processes_learn_that_there_is_no_cache(tmp_path: Path, model: Any, roomy: dict[str, int]):
    roomy["read"] = 1
    refusal = tmp_path / "c-refused.txt"
    refusal.write_text("of an earlier run\n")
    leader = cached(Teacher(model), tmp_path / "c", processes=2)
    teacher = Teacher(model)
    other = cached(teacher, tmp_path / "c", processes=2, leader=False)
    rows = np.arange(BATCH)
    other(rows, inputs_of(rows))
    assert not other.refused  # nothing is decided yet
    assert not leader.refused
    for chosen in batches(0):
        leader(chosen, inputs_of(chosen))
    assert leader.refused
    assert refusal.read_text().startswith("not used: it would cost")
    other(rows, inputs_of(rows))
    assert other.refused
    assert teacher.rows == 2 * BATCH
    other.close(remove=True)
    assert refusal.exists()
    leader.close(remove=True)
    assert list(tmp_path.glob("c*")) == []


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids"])
def test_other_tokens_than_the_rows_are_refused(tmp_path: Path, model: Any, name: str):
    """As augmentation drawn anew each epoch would give."""
    rows = np.array([1, 2])
    inputs = inputs_of(rows)
    inputs[name][1, 1] = 1 - inputs[name][1, 1]
    with pytest.raises(TrainingError, match=r"other tokens than its rows .*Set distill\.teacher_cache_bytes: 0"):
        cached(Teacher(model), tmp_path / "c")(rows, inputs)


def test_the_probe_measures_and_leaves_nothing(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the real probe
    rows = np.arange(5)
    outputs = Teacher(model)(inputs_of(rows))
    with torch.no_grad():
        write, read, _ = teacher_cache.probe(tmp_path / "c", parts_of(outputs), examples().lengths[rows], outputs)
    assert write > 0
    assert read > 0
    assert list(tmp_path.glob("c*")) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path, model: Any):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds something else"):
        epoch(cached(Teacher(model), tmp_path / "c"), Teacher(model), seed=0)
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


# ---- the decision


FAST_DISK = Measured(teacher_tokens_per_s=1000, write_bytes_per_s=GB, read_bytes_per_s=2 * GB, from_disk=True)


def test_decide_by_hand():
    """A pass is 100 s of teacher, or 10 s of reading; writing takes 20 s: 5 passes save 500 - (100 + 20 + 4 * 10)."""
    decision = decide(needed=20 * GB, tokens=100_000, passes=5, processes=1, measured=FAST_DISK)
    assert decision.use
    assert decision.why == (
        "used: saves about 340.0 s of 500.0 s (5 passes left, each 100.0 s of teacher or 10.0 s of reading 20.0 GB; "
        "writing takes 20.0 s)."
    )


def test_decide_with_more_processes_has_less_teacher_to_save():
    """Four processes take 25 s a pass, the shared disk still 10 s: 125 - (25 + 20 + 40) saved."""
    decision = decide(needed=20 * GB, tokens=100_000, passes=5, processes=4, measured=FAST_DISK)
    assert decision.use
    assert "saves about 40.0 s of 125.0 s" in decision.why


@pytest.mark.parametrize(
    ("changes", "passes", "words"),
    [
        ({}, 1, "not used: the rows are not needed again after this pass."),
        ({"write_bytes_per_s": GB / 20}, 5, "not used: it would cost 40.0 s of 500.0 s"),
        ({"read_bytes_per_s": GB / 6}, 5, "not used: it would cost 100.0 s of 500.0 s"),
        ({"write_bytes_per_s": GB / 16}, 5, "not used: it would save only 40.0 s of 500.0 s"),
        ({"teacher_tokens_per_s": 10_000.0}, 5, "not used: it would cost 20.0 s of 50.0 s"),
    ],
)
def test_decide_refuses(changes: dict[str, float], passes: int, words: str):
    measured = dataclasses.replace(FAST_DISK, **changes)
    decision = decide(needed=20 * GB, tokens=100_000, passes=passes, processes=1, measured=measured)
    assert not decision.use
    assert decision.why.startswith(words)


def test_decide_says_when_the_read_came_from_memory():
    measured = dataclasses.replace(FAST_DISK, from_disk=False)
    decision = decide(needed=20 * GB, tokens=1_000_000, passes=50, processes=1, measured=measured)
    assert "(measured from memory; a disk may be slower)" in decision.why
    assert "min of" in decision.why


@pytest.mark.parametrize(
    ("needed", "budget", "free", "disk", "words"),
    [
        (20 * GB, 20 * GB, 40 * GB, 100 * GB, "20.0 GB fit"),
        (20 * GB, 20 * GB - 1, 40 * GB, 100 * GB, "Set it to 20000000000 or more"),
        (20 * GB, 30 * GB, 24 * GB, 100 * GB, "the disk has 24.0 GB free and 5.0 GB of it are left alone"),
        (1500, 30 * GB, 10**6, 10**7, "all rows need 1.5 kB, the disk has 1.0 MB free and 2.1 GB"),
    ],
)
def test_check_room(needed: int, budget: int, free: int, disk: int, words: str):
    decision = check_room(needed, budget=budget, free=free, disk=disk)
    assert decision.use == words.endswith("fit")
    assert words in decision.why
