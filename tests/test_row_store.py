"""Rows of tensors on disk: the same bits come back, damage is never read, and a killed process's rows are written again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bertemd_deploy import row_store
from bertemd_deploy.errors import ArtifactError, TrainingError
from bertemd_deploy.row_store import CHECKSUMS, COMPLETE, DATA, HEADER, Part, RowStore, remove_store, store_bytes

LENGTHS = np.array([3, 7, 1, 5, 7], dtype=np.int64)
LAYERED = ("hidden_states", "queries")
ALL = np.arange(len(LENGTHS))


def batch(rows: np.ndarray, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors as a forward pass gives them, 2 layers; padding holds rubbish; `queries` is strided."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = len(rows)
    return {
        "logits": random(size, 3).to(dtype),
        "embedding": random(size, width, 4),
        "hidden_states": random(2, size, width, 4),
        "queries": random(2, size, width, 3, 2).transpose(2, 3).to(dtype),
    }


def parts(tensors: dict[str, Tensor]) -> list[Part]:
    return [Part.of(name, value, tokens=name != "logits", layered=name in LAYERED) for name, value in tensors.items()]


def create(folder: Path, tensors: dict[str, Tensor] | None = None, *, key: str = "k") -> RowStore:
    return RowStore.create(folder, key=key, parts=parts(tensors or batch(ALL, 7)), lengths=LENGTHS)


def filled(folder: Path) -> dict[str, Tensor]:
    """Make a complete store and return what is in it, at width 7."""
    store = create(folder)
    tensors = batch(ALL, 7)
    store.store(ALL, tensors)
    store.close()
    return tensors


def opened(folder: Path, *, key: str = "k") -> RowStore:
    store = RowStore.open(folder, key=key, lengths=LENGTHS, at_most=10**6)
    assert store is not None
    return store


def assert_rows(found: dict[str, Tensor], wanted: dict[str, Tensor], at: int, of: int, length: int) -> None:
    """Compare row `at` of `found` with row `of` of `wanted` bit for bit, and its padding with zero."""
    assert set(found) == set(wanted)
    for name in wanted:
        axis = int(name in LAYERED)
        row, expected = found[name].select(axis, at), wanted[name].select(axis, of)
        assert row.dtype == expected.dtype
        if name != "logits":
            assert not row[..., length:, :].any(), name
            row, expected = row[..., :length, :], expected[..., :length, :]
        assert torch.equal(row, expected), name


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_come_back_in_any_batch(tmp_path: Path, dtype: torch.dtype):
    first, second = np.array([4, 0, 2]), np.array([1, 3])
    one, two = batch(first, 7, dtype=dtype), batch(second, 9, dtype=dtype, seed=1)
    store = create(tmp_path / "s", one)
    store.store(first, one)
    assert list(store.has(ALL)) == [True, False, True, False, True]
    store.store(second, two)
    store.close()
    store = opened(tmp_path / "s")
    assert store.held == 5
    found, held = store.load(np.array([0, 1, 2, 3]), width=8)
    assert held.all()
    assert found["queries"].shape == (2, 4, 3, 8, 2)
    for at, (source, of) in enumerate([(one, 1), (two, 0), (one, 2), (two, 1)]):
        assert_rows(found, source, at, of, int(LENGTHS[at]))


def test_odd_numbers_of_bfloat16_and_special_values(tmp_path: Path):
    logits = torch.tensor([[float("nan"), float("inf"), -0.0], [1e-40, 3e38, 1.0]]).to(torch.bfloat16)
    lengths = np.array([1, 2], dtype=np.int64)
    part = Part.of("logits", logits, tokens=False, layered=False)
    store = RowStore.create(tmp_path / "s", key="k", parts=[part], lengths=lengths)
    store.store(np.array([0, 1]), {"logits": logits})
    found, _ = store.load(np.array([0, 1]), width=2)
    assert torch.equal(found["logits"].view(torch.int16), logits.view(torch.int16))


def test_logits_of_tokens(tmp_path: Path):
    logits = torch.randn(5, 7, 3)
    part = Part.of("logits", logits, tokens=True, layered=False)
    store = RowStore.create(tmp_path / "s", key="k", parts=[part], lengths=LENGTHS)
    store.store(ALL, {"logits": logits})
    found, _ = store.load(np.array([2]), width=4)
    assert torch.equal(found["logits"][0, :1], logits[2, :1])
    assert not found["logits"][0, 1:].any()


def test_bytes_are_known_beforehand(tmp_path: Path):
    layout = parts(batch(ALL, 7, dtype=torch.bfloat16))
    # A row: logits 3 of 2 bytes; a token: 4 + 2 * 4 of 4 bytes, 2 * 3 * 2 of 2; rounded up to 8; 8 more for the checksum.
    expected = sum(-(-(6 + 72 * int(length)) // 8) * 8 + 8 for length in LENGTHS)
    assert store_bytes(layout, LENGTHS) == expected
    RowStore.create(tmp_path / "s", key="k", parts=layout, lengths=LENGTHS).close()
    sizes = {path.name: path.stat() for path in (tmp_path / "s").iterdir()}
    assert sizes[DATA].st_size + sizes[CHECKSUMS].st_size == expected
    assert sizes[DATA].st_blocks * 512 >= sizes[DATA].st_size  # reserved, not sparse


def test_a_missing_row_reads_as_zeros_and_not_held(tmp_path: Path):
    store = create(tmp_path / "s")
    tensors = batch(np.array([1]), 7)
    store.store(np.array([1]), tensors)
    found, held = store.load(np.array([3, 1]), width=7)
    assert list(held) == [False, True]
    assert not found["hidden_states"][:, 0].any()
    assert_rows(found, tensors, 1, 0, 7)


def test_another_key_is_no_store(tmp_path: Path):
    filled(tmp_path / "s")
    assert RowStore.open(tmp_path / "s", key="other", lengths=LENGTHS, at_most=10**6) is None
    assert RowStore.open(tmp_path / "nowhere", key="k", lengths=LENGTHS, at_most=10**6) is None


def test_a_store_above_the_budget_is_not_opened(tmp_path: Path):
    filled(tmp_path / "s")
    needed = store_bytes(parts(batch(ALL, 7)), LENGTHS)
    assert RowStore.open(tmp_path / "s", key="k", lengths=LENGTHS, at_most=needed - 1) is None
    assert RowStore.open(tmp_path / "s", key="k", lengths=LENGTHS, at_most=needed) is not None


def test_create_replaces_an_earlier_store(tmp_path: Path):
    filled(tmp_path / "s")
    store = create(tmp_path / "s", key="new")
    assert store.held == 0
    assert not (tmp_path / "s" / COMPLETE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_create_does_not_replace_something_else(tmp_path: Path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.txt\)"):
        create(tmp_path / "s")
    assert not remove_store(tmp_path / "s")
    assert (tmp_path / "s" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_flipped_byte_of_a_complete_store_is_an_error(tmp_path: Path, row: int):
    filled(tmp_path / "s")
    assert (tmp_path / "s" / COMPLETE).exists()
    sizes = [-(-(12 + 96 * int(length)) // 8) * 8 for length in LENGTHS]
    flip(tmp_path / "s" / DATA, sum(sizes[:row]) + 11 + 7 * row)
    store = opened(tmp_path / "s")
    sound = np.delete(ALL, row)
    assert store.load(sound, width=7)[1].all()
    with pytest.raises(TrainingError) as raised:
        store.load(ALL, width=7)
    message = str(raised.value)
    assert f"{tmp_path / 's' / DATA}: " in message
    assert f"row {row} is not what was written" in message
    assert f"Delete the folder {tmp_path / 's'} and run the same command again" in message
    assert "--force" in message


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("rows", [ALL, ALL[:2]])
def test_a_byte_flipped_under_an_open_store_is_an_error(tmp_path: Path, rows: np.ndarray, read_before: bool):
    """Whether the store is complete or not: this process wrote the row, so nothing was torn."""
    store = create(tmp_path / "s")
    store.store(rows, batch(rows, 7))
    if read_before:
        assert store.load(rows, width=7)[1].all()
    flip(tmp_path / "s" / DATA, 20)
    with pytest.raises(TrainingError, match="row 0 is not what was written"):
        store.load(rows, width=7)


def test_a_row_once_read_whole_is_not_torn_later(tmp_path: Path):
    store = create(tmp_path / "s")
    store.store(ALL[:2], batch(ALL[:2], 7))
    store.close()
    store = opened(tmp_path / "s")
    assert store.load(ALL[:2], width=7)[1].all()
    flip(tmp_path / "s" / DATA, 20)
    with pytest.raises(TrainingError, match="row 0 is not what was written"):
        store.load(ALL[:2], width=7)


@pytest.mark.parametrize("moment", ["header", "rows"])
def test_a_store_removed_while_it_is_opened_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    """Another process discards it after this one has seen the header."""
    filled(tmp_path / "s")
    read = row_store.read_json

    def read_late(path: Path, *, what: str) -> dict[str, Any]:
        if moment == "header":
            remove_store(tmp_path / "s")
        found = read(path, what=what)
        remove_store(tmp_path / "s")
        return found

    monkeypatch.setattr(row_store, "read_json", read_late)
    assert RowStore.open(tmp_path / "s", key="k", lengths=LENGTHS, at_most=10**6) is None


@pytest.mark.parametrize("name", [DATA, CHECKSUMS])
def test_a_truncated_file_is_an_error(tmp_path: Path, name: str):
    filled(tmp_path / "s")
    path = tmp_path / "s" / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(
        TrainingError, match=rf"{name}: .*has {size - 1:,} bytes instead of {size:,}.*Delete the folder"
    ):
        opened(tmp_path / "s")
    path.unlink()
    with pytest.raises(TrainingError, match=f"{name}: .*No such file"):
        opened(tmp_path / "s")


def test_a_file_truncated_under_an_open_store_is_an_error(tmp_path: Path):
    filled(tmp_path / "s")
    store = opened(tmp_path / "s")
    store.load(ALL, width=7)  # verified once, and yet
    os.truncate(tmp_path / "s" / DATA, 100)
    with pytest.raises(TrainingError, match="row 3 is not what was written"):
        store.load(np.array([3]), width=7)


@pytest.mark.parametrize("name", [HEADER, CHECKSUMS, COMPLETE])
def test_damage_to_the_small_files_is_an_error(tmp_path: Path, name: str):
    filled(tmp_path / "s")
    path = tmp_path / "s" / name
    flip(path, path.stat().st_size // 2)
    with pytest.raises(TrainingError, match="the teacher cache is damaged"):
        opened(tmp_path / "s")


def test_rows_go_on_where_a_killed_process_stopped(tmp_path: Path):
    """It was killed after writing three rows; of one of them the machine lost the bytes."""
    store = create(tmp_path / "s")
    tensors = batch(ALL, 7)
    some = np.array([0, 1, 3])
    store.store(
        some, {name: value.index_select(int(name in LAYERED), torch.tensor(some)) for name, value in tensors.items()}
    )
    store.close()
    flip(tmp_path / "s" / DATA, 20)  # in row 0
    store = opened(tmp_path / "s")
    assert not store.complete
    found, held = store.load(ALL, width=7)
    assert list(held) == [False, True, False, True, False]
    assert not found["logits"][0].any()
    for row in (1, 3):
        assert_rows(found, tensors, row, row, int(LENGTHS[row]))
    rest = np.array([0, 2, 4])
    store.store(
        rest, {name: value.index_select(int(name in LAYERED), torch.tensor(rest)) for name, value in tensors.items()}
    )
    assert store.complete
    store.close()
    found, held = opened(tmp_path / "s").load(ALL, width=7)
    assert held.all()
    for row in range(5):
        assert_rows(found, tensors, row, row, int(LENGTHS[row]))


def test_a_store_taken_up_with_all_rows_is_complete_only_once_they_are_verified(tmp_path: Path):
    filled(tmp_path / "s")
    (tmp_path / "s" / COMPLETE).unlink()  # killed between the last row and the mark
    flip(tmp_path / "s" / DATA, 20)
    store = opened(tmp_path / "s")
    assert store.has(ALL).all()
    assert not store.complete
    assert list(store.load(ALL, width=7)[1]) == [False, True, True, True, True]
    assert not store.complete


def test_processes_share_a_store(tmp_path: Path):
    """Each opens it and writes its rows; both read all of them, and the one that sees the last row says complete."""
    tensors = batch(ALL, 7)
    one = create(tmp_path / "s")
    two = opened(tmp_path / "s")
    left, right = np.array([0, 2]), np.array([1, 3, 4])

    def rows(chosen: np.ndarray) -> dict[str, Tensor]:
        return {name: value.index_select(int(name in LAYERED), torch.tensor(chosen)) for name, value in tensors.items()}

    one.store(left, rows(left))
    two.store(right, rows(right))
    for store in (one, two):
        found, held = store.load(ALL, width=7)
        assert held.all()
        for row in range(5):
            assert_rows(found, tensors, row, row, int(LENGTHS[row]))
    assert one.complete
    assert (tmp_path / "s" / COMPLETE).exists()


def test_other_tensors_than_the_store_holds_are_refused(tmp_path: Path):
    store = create(tmp_path / "s")
    tensors = batch(ALL, 7) | {"hidden_states": torch.zeros(3, 5, 7, 4)}
    with pytest.raises(TrainingError, match=r"hidden_states is \(3, 5, 7, 4\) torch\.float32, the cache holds"):
        store.store(ALL, tensors)
    with pytest.raises(TrainingError, match="float64 cannot be kept on disk; known: float32, bfloat16, float16"):
        Part.of("logits", torch.zeros(2, 3, dtype=torch.float64), tokens=False, layered=False)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "full")


def test_a_disk_without_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_store.os, "posix_fallocate", no_space)
    with pytest.raises(ArtifactError) as raised:
        create(tmp_path / "s")
    assert "could not be written (No space left on device) and is removed" in str(raised.value)
    assert "Free space, or set distill.teacher_cache_bytes: 0, then run the same command again." in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = create(tmp_path / "s")
    store.store(np.array([1]), batch(np.array([1]), 7))
    monkeypatch.setattr(row_store.os, "pwrite", no_space)
    with pytest.raises(ArtifactError, match=r"No space left on device\) and is removed"):
        store.store(ALL, batch(ALL, 7))
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_reservations_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "unsupported")

    monkeypatch.setattr(row_store.os, "posix_fallocate", unsupported)
    tensors = filled(tmp_path / "s")
    found, held = opened(tmp_path / "s").load(ALL, width=7)
    assert held.all()
    assert torch.equal(found["logits"], tensors["logits"])


def test_remove(tmp_path: Path):
    filled(tmp_path / "s")
    assert remove_store(tmp_path / "s")
    assert not remove_store(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_writing_to_disk_is_possible(tmp_path: Path):
    store = create(tmp_path / "s")
    store.store(ALL, batch(ALL, 7))
    assert store.to_disk() == hasattr(os, "posix_fadvise")
    assert store.load(ALL, width=7)[1].all()
