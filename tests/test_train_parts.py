"""The benchmark of a step's parts: it runs, and its record holds both sides of every ratio. No timings."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import train_parts  # noqa: E402 - found through the line above

from bertemd_deploy.kernels import plain_attention  # noqa: E402


def test_every_part_has_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        record = train_parts.measure(argparse.Namespace(rounds=2, threads=1, smoke=True))
    finally:
        torch.set_num_threads(threads)
    assert len(record["seconds"]) == 4 + 2
    for sides in record["seconds"].values():
        assert {name: len(values) for name, values in sides.items()} == {"usual": 2, "ours": 2}
    train_parts.print_table(record)
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == list(record["seconds"])


def test_sides_take_turns_in_reversed_order() -> None:
    order: list[str] = []
    train_parts.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_each_side_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def plain(*given: torch.Tensor) -> torch.Tensor:
        used.append("plain")
        return plain_attention(*given)

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        used.append("kept")
        yield

    shape = dict.fromkeys(train_parts.SHAPES["4L-312"], 12)
    for where, ours in (("kernels.plain_attention", plain), ("allocator.freed_memory_kept", kept)):
        with monkeypatch.context() as patch:
            patch.setattr(f"bertemd_deploy.{where}", ours)
            sides = train_parts.attention(torch.float32, 4, 2, 3) if ours is plain else train_parts.steps(shape, 4)
            sides["usual"]()
            assert used == []
            sides["ours"]()
            assert used.pop() == ours.__name__


def test_the_ratio_is_usual_over_ours(capsys: pytest.CaptureFixture[str]) -> None:
    train_parts.print_table({"seconds": {"memory": {"usual": [0.004, 0.004], "ours": [0.002, 0.002]}}})
    assert capsys.readouterr().out == "memory: usual 4.0 ms, ours 2.0 ms; usual / ours 2.00 [2.00, 2.00]\n"


def test_both_ways_of_attention_compute_the_same() -> None:
    torch.manual_seed(0)
    arrays = [torch.randn(2, 3, 9, 4) for _ in range(3)]
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    expected = torch.nn.functional.scaled_dot_product_attention(*arrays, mask).transpose(1, 2)
    assert_close(plain_attention(*arrays, mask), expected)
    assert_close(
        plain_attention(*arrays, None, scaling=0.25),
        torch.nn.functional.scaled_dot_product_attention(*arrays, scale=0.25).transpose(1, 2),
    )
