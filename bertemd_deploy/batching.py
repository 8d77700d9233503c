"""Batches of a training run: which rows this process takes of each, in parts that fit its memory.

A batch is the unit of one update, whatever number of processes and parts it is cut into; what its losses are divided by is
counted over the whole of it, so that every cut gives the same update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.data import training_batches
from bertemd_deploy.processes import Processes


@dataclass(frozen=True)
class Part:
    """Rows that run at once.

    Attributes:
        rows: (b,) their numbers in the training slice.
        inputs: `input_ids`, `attention_mask`, `token_type_ids`, each (b, T) int64 on the training device.
        labels: as `DataSlice.batch` gives them.
        tokens: real tokens.
        squares: sum of squared lengths, the real positions of one head's score maps.
    """

    rows: NDArray[np.int64]
    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int
    squares: int


@dataclass(frozen=True)
class Batch:
    """One update's rows: this process's parts, and what the whole batch counts over all processes.

    Attributes:
        number: of the step, from 0.
        seeds: of each part's dropout.
        parts: may be empty on a process when the last batch has fewer rows than there are processes.
        tokens, squares: of the whole batch, as in `Part`.
        units: what the prediction loss is a mean over: rows, or tokens with a label.
        split: whether the whole batch is in more than one part, on any process; the same everywhere.
    """

    number: int
    seeds: tuple[int, ...]
    parts: tuple[Part, ...]
    tokens: int
    squares: int
    units: int
    split: bool


@dataclass(frozen=True)
class Batching:
    """How batches are cut.

    Attributes:
        batch_size: rows of one update, over all processes.
        micro_batch_size: most rows of one part; None takes all.
        seed: of order and dropout.
        pad_id: token id of padding.
        processes: that share each batch.
        device: where the parts go.
    """

    batch_size: int
    micro_batch_size: int | None
    seed: int
    pad_id: int
    processes: Processes
    device: torch.device

    def epoch(self, data: DataSlice, epoch: int, *, skip: int) -> Iterator[Batch]:
        """Yield the batches of one epoch (from 0) after the first `skip`."""
        lengths = data.examples.lengths
        batches = training_batches(lengths, batch_size=self.batch_size, seed=self.seed, epoch=epoch)
        for at, rows in enumerate(batches[skip:], skip):
            yield self.batch(data, rows, number=epoch * len(batches) + at)

    def batch(self, data: DataSlice, rows: NDArray[np.int64], *, number: int) -> Batch:
        """Return the batch of `rows`: every `size`-th row of it is this process's, in parts of like length."""
        lengths = data.examples.lengths
        mine = rows[self.processes.rank :: self.processes.size]
        most = self.micro_batch_size or max(1, len(mine))
        parts = tuple(self._part(data, mine[at : at + most]) for at in range(0, len(mine), most))
        seeds = tuple(self._seed(number, at) for at in range(len(parts)))
        share = -(-len(rows) // self.processes.size)
        return Batch(
            number,
            seeds,
            parts,
            int(lengths[rows].sum()),
            int(np.square(lengths[rows]).sum()),
            max(1, _units(data, rows)),
            split=self.micro_batch_size is not None and share > self.micro_batch_size,
        )

    def _part(self, data: DataSlice, rows: NDArray[np.int64]) -> Part:
        lengths = data.examples.lengths[rows]
        arrays, labels = data.batch(rows, pad_id=self.pad_id)
        inputs = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
        answers = torch.from_numpy(labels).to(self.device)
        return Part(rows, inputs, answers, int(lengths.sum()), int(np.square(lengths).sum()))

    def _seed(self, number: int, part: int) -> int:
        """Return a part's seed; any two steps, parts and processes draw apart."""
        words = np.random.SeedSequence((self.seed, number, part, self.processes.rank)).generate_state(2, np.uint32)
        return int(words[0]) << 31 ^ int(words[1])


def _units(data: DataSlice, rows: NDArray[np.int64]) -> int:
    if data.kind != "token-classification":
        return len(rows)
    offsets = data.examples.offsets
    return sum(int((data.labels[offsets[row] : offsets[row + 1]] != NOT_SCORED).sum()) for row in rows)
