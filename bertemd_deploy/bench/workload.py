"""What the models are given: cells of fixed shape, and requests replayed from the evaluation slice.

Everything is drawn from a seed, so each worker makes the same inputs for itself and every model does the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import Artifact, DataSlice
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.files import read_json

if TYPE_CHECKING:
    from bertemd_deploy.settings import BenchSettings

Inputs = dict[str, NDArray[np.int64]]
REPLAY: Literal["replay"] = "replay"
MEMORY_ROWS = 64  # rows of the memory pass, besides the longest one
PACED_TOKENS = 32  # the fixed length nearest to it is also run one request at a time


@dataclass(frozen=True)
class Cell:
    """One point of the grid: examples per call, tokens per example (or "replay"), threads."""

    batch: int
    sequence: int | Literal["replay"]
    threads: int


def plan_cells(
    settings: BenchSettings, *, max_length: int, cpus: int, most_threads: int
) -> tuple[list[Cell], list[str]]:
    """Return the cells to measure, by thread count, and a note on everything asked for that cannot be measured.

    Args:
        settings: what was asked for.
        max_length: longest input of the artifact, in tokens.
        cpus: threads that "all" stands for.
        most_threads: how many threads this process can run at once.

    Raises:
        MeasurementError: nothing would be left.
    """
    notes: list[str] = []
    lengths = sorted({max_length if length == "max" else length for length in settings.sequence_lengths})
    if too_long := [length for length in lengths if length > max_length]:
        notes.append(f"sequence lengths {too_long} left out: the artifact's longest input is {max_length} tokens")
    threads = sorted({cpus if count == "all" else count for count in settings.threads})
    if too_many := [count for count in threads if count > most_threads]:
        notes.append(f"threads {too_many} left out: this process may use {most_threads} CPUs")
    sequences: list[int | Literal["replay"]] = [length for length in lengths if length <= max_length]
    sequences += [REPLAY] if settings.replay else []
    threads = [count for count in threads if count <= most_threads]
    cells = [
        Cell(batch, sequence, count)
        for count in threads
        for batch in sorted(set(settings.batch_sizes))
        for sequence in sequences
    ]
    if not cells:
        raise MeasurementError(
            f"bench: nothing is left to measure ({'; '.join(notes) or 'no lengths, batch sizes or threads given'}). "
            'Ask for bench.sequence_lengths=["max"] and bench.threads=["all"].'
        )
    return cells, notes


def paced_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that are also run one request at a time: single examples with the most threads.

    These are the replay, and the fixed length nearest to 32 tokens, the shorter of two.
    """
    most = max((cell.threads for cell in cells), default=0)
    single = [cell for cell in cells if cell.batch == 1 and cell.threads == most]
    fixed = {cell.sequence for cell in single if isinstance(cell.sequence, int)}
    nearest = sorted(fixed, key=lambda tokens: (abs(tokens - PACED_TOKENS), tokens))[:1]
    return [cell for cell in single if cell.sequence in (*nearest, REPLAY)]


class Workload:
    """The inputs of one artifact's benchmark."""

    def __init__(self, evaluation: DataSlice, *, pad_id: int, special_ids: Sequence[int], seed: int) -> None:
        """Take the evaluation slice; synthetic inputs are drawn from its tokens other than `special_ids`."""
        self.evaluation = evaluation
        self.pad_id = pad_id
        self._seed = seed
        self._order = np.random.default_rng(seed).permutation(len(evaluation.examples))
        self._token_ids = np.setdiff1d(evaluation.examples.tokens, np.asarray(special_ids, dtype=np.int32))

    @classmethod
    def load(cls, artifact: Artifact, *, seed: int) -> Workload:
        """Read the evaluation slice and the special tokens of `artifact`.

        Raises:
            ArtifactError: a file is missing or damaged, or the slice holds no ordinary token.
        """
        evaluation = artifact.evaluation()
        added = read_json(artifact.folder / "tokenizer.json", what="tokenizer").get("added_tokens", [])
        special_ids = [token["id"] for token in added if token.get("special")]
        pad_id = TextEncoder.load(artifact.folder, max_length=artifact.max_length).pad_id
        workload = cls(evaluation, pad_id=pad_id, special_ids=special_ids, seed=seed)
        if not len(workload._token_ids):
            raise ArtifactError(f"{artifact.folder}: the evaluation slice holds no ordinary token. Export again.")
        return workload

    def synthetic(self, *, batch: int, sequence: int) -> Inputs:
        """Return random ordinary token ids without padding; three (batch, sequence) int64 arrays."""
        generator = np.random.default_rng([self._seed, batch, sequence])
        ids = generator.choice(self._token_ids, size=(batch, sequence)).astype(np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def request_rows(self, *, batch: int, start: int, count: int) -> list[NDArray[np.int64]]:
        """Return the rows of requests `start` to `start + count`, each (batch,): batched as they arrive, unsorted."""
        places = np.arange(start * batch, (start + count) * batch) % len(self._order)
        return list(self._order[places].reshape(count, batch))

    def requests(self, *, batch: int, start: int, count: int) -> list[Inputs]:
        """Return the inputs of the same requests, each padded to its own longest row."""
        examples = self.evaluation.examples
        return [
            examples.batch(rows, pad_id=self.pad_id)
            for rows in self.request_rows(batch=batch, start=start, count=count)
        ]

    def memory_requests(self, *, batch: int) -> list[Inputs]:
        """Return requests of mixed lengths, in arrival order, the longest row of the slice among the last."""
        rows = np.append(self._order[:MEMORY_ROWS], np.argmax(self.evaluation.examples.lengths))
        groups = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        return [self.evaluation.examples.batch(group, pad_id=self.pad_id) for group in groups]
