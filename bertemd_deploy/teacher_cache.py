"""Teacher cache: from the second epoch on, what the teacher computes is read from disk instead, where that is faster.

The teacher is frozen and its dropout is off, so a row's outputs are the same in every epoch, up to the rounding of kernels
that choose their order of summation by the batch's shape. A cached row holds the very bits of the batch it was computed in:
equality with a run without the cache is to rounding, not to the bit, and whether the cache is used depends on the clock.
Padding reads as zeros; every cost masks it.

The first steps measure the teacher; then the size is known to the byte, one batch is written and read back on the disk in
question, and `decide` says whether the rest of the run gets shorter. All rows are kept or none. What a cache belongs to (the
teacher's weights and configuration, the rows' tokens, the precision) is hashed into its key; another key, another cache.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertemd_deploy.console import note
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import TrainingError
from bertemd_deploy.files import sha256_json, write_text
from bertemd_deploy.row_store import FORMAT, Part, RowStore, remove_store, row_sizes, store_bytes

# Names of what is kept: whether layers come before B, as in `capture.LayerOutputs`. Logits have T for tagging only.
_LAYERED = {"logits": False, "embedding": False, "hidden_states": True, "queries": True, "keys": True}
_WARM_UP, _MEASURED = 1, 4  # batches
_WORTH = 0.1  # of the teacher's remaining time; what is saved below it is within the error of the measurement
_SPARE_BYTES, _SPARE_SHARE = 2 << 30, 0.05  # of the disk, never filled

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Measured:
    """Speeds of one process on this machine.

    Attributes:
        teacher_tokens_per_s: of the teacher's forward pass.
        write_bytes_per_s: of keeping rows, until they are on the disk.
        read_bytes_per_s: of reading rows, checking and padding them.
        from_disk: the read came from the disk; otherwise copies in memory may have made it look faster than it will be.
    """

    teacher_tokens_per_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float
    from_disk: bool


@dataclass(frozen=True)
class Decision:
    """Whether the cache is used, and the sentence that says why."""

    use: bool
    why: str


def check_room(needed: int, *, budget: int, free: int, disk: int) -> Decision:
    """Return whether `needed` bytes are within the budget and leave enough of the disk free.

    Args:
        needed: bytes that all rows take.
        budget: distill.teacher_cache_bytes.
        free: bytes free on the disk.
        disk: bytes of the whole disk; 2 GiB or a twentieth of it stay free, whichever is more.
    """
    if needed > budget:
        return Decision(
            False,
            f"not used: all rows need {_size(needed)}, more than distill.teacher_cache_bytes allows ({_size(budget)}). "
            f"Set it to {needed} or more to use it.",
        )
    spare = max(_SPARE_BYTES, int(disk * _SPARE_SHARE))
    if needed + spare > free:
        return Decision(
            False,
            f"not used: all rows need {_size(needed)}, the disk has {_size(free)} free and {_size(spare)} of it are "
            "left alone. Free space to use it.",
        )
    return Decision(True, f"{_size(needed)} fit")


def decide(*, needed: int, tokens: int, passes: int, processes: int, measured: Measured) -> Decision:
    """Return whether keeping the teacher's outputs shortens the rest of the run.

    The first of the remaining passes computes and writes, every later one reads. Processes share the teacher's work but
    also the disk, whose speed is taken as one process found it. It must save a tenth of the teacher's remaining time.

    Args:
        needed: bytes that all rows take.
        tokens: of all rows.
        passes: how often each row will still be asked for, the present pass included.
        processes: that share the rows.
        measured: speeds of one process.
    """
    computed = tokens / measured.teacher_tokens_per_s / processes
    written, read = needed / measured.write_bytes_per_s, needed / measured.read_bytes_per_s
    plain = passes * computed
    saved = plain - computed - written - (passes - 1) * read if passes > 1 else 0.0
    facts = (
        f"{passes} passes left, each {_time(computed)} of teacher or {_time(read)} of reading {_size(needed)}"
        f"{'' if measured.from_disk else ' (measured from memory; a disk may be slower)'}; writing takes {_time(written)}"
    )
    if passes <= 1:
        return Decision(False, "not used: the rows are not needed again after this pass.")
    if saved < _WORTH * plain:
        would = f"save only {_time(saved)}" if saved > 0 else f"cost {_time(-saved)}"
        return Decision(False, f"not used: it would {would} of {_time(plain)} ({facts}).")
    return Decision(True, f"used: saves about {_time(saved)} of {_time(plain)} ({facts}).")


def cache_key(teacher: nn.Module, examples: Encoded, *, max_length: int, precision: str, layers: bool) -> str:
    """Return the hash of all that the teacher's outputs follow from.

    Args:
        teacher: the model as it is run, its outputs already in the student's order.
        examples: the train rows.
        max_length: longest input in tokens.
        precision: "float32" or "bfloat16", of matrix products.
        layers: whether more than the logits are kept.
    """
    source: Any = teacher.config
    config = {key: value for key, value in source.to_dict().items() if key != "_name_or_path"}
    known = {"format": FORMAT, "teacher": weights_hash(teacher), "rows": rows_hash(examples), "max_length": max_length}
    known |= {"precision": precision, "layers": layers, "config": hashlib.sha256(repr(config).encode()).hexdigest()}
    return sha256_json(known)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers, with their names."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return weights.hexdigest()


def rows_hash(examples: Encoded) -> str:
    """Return the SHA-256 of encoded rows."""
    rows = hashlib.sha256()
    for array in (examples.tokens, examples.types, examples.offsets):
        rows.update(np.ascontiguousarray(array).data)
    return rows.hexdigest()


class CachedTeacher:
    """A frozen teacher whose outputs are computed, then kept, then read, by row number.

    With several processes on one machine, the leader decides and makes the folder, or a file beside it that says no; the
    others look for either at each call. Nobody waits for anybody, so that they need not call in step; every process is
    given the same folder, key and rows, and writes the rows it computed. All are made before the first is called.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        folder: Path,
        key: str,
        examples: Encoded,
        budget: int,
        passes: Callable[[], int],
        leader: bool = True,
        processes: int = 1,
    ) -> None:
        """Take up a cache of this key that an earlier run left in `folder`; discard one of another key.

        Args:
            compute: the teacher: a batch's inputs to tensors by name: "logits" (B, outputs) or (B, T, outputs), and
                where layers are compared the other fields of `capture.LayerOutputs`.
            folder: of the cache alone; made when it is decided to use one.
            key: from `cache_key`.
            examples: the train rows, the same in every epoch.
            budget: most bytes to take.
            passes: tells how often each row will still be asked for, the present pass included; called once.
            leader: whether this process decides.
            processes: that share the rows.

        Raises:
            TrainingError: the cache in `folder` is damaged.
        """
        self._compute, self._folder, self._key, self._examples = compute, folder, key, examples
        self._lengths = examples.lengths
        self._budget, self._passes, self._leader, self._processes = budget, passes, leader, processes
        self._store = self._find()
        self._calls = self._tokens = 0
        self._seconds = 0.0
        self.decision: Decision | None = None
        if not leader:
            return
        remove_store(_probe_folder(folder))  # of a killed process
        _refusal(folder).unlink(missing_ok=True)  # another day, another disk
        if self._store is not None:
            held = f"{self._store.held:,} of {len(examples):,} rows"
            self.decision = Decision(True, f"used: continuing with {held} in {folder}")
            note(f"teacher cache: {self.decision.why}")
        elif remove_store(folder):
            note(f"teacher cache: {folder} was of another teacher, data or precision, or above the budget; discarded")

    def __call__(self, rows: NDArray[np.int64], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the teacher's outputs of a batch, read where every row is kept; what is missing is computed and kept.

        Args:
            rows: (B,) row numbers of `examples`.
            inputs: `input_ids`, `attention_mask`, `token_type_ids` of these rows, each (B, T) int64, on any device.

        Raises:
            TrainingError: the inputs are not those rows, or the cache is damaged.
            ArtifactError: the disk refused a write; the cache is removed.
        """
        if self._store is None and not self._leader and not self.refused:
            self._follow()
        if self.refused:
            with torch.no_grad():
                return self._compute(inputs)
        rows = np.asarray(rows, dtype=np.int64)
        self._check(rows, inputs)
        if self._store is None:
            return self._measure(rows, inputs)
        return self._through(self._store, rows, inputs)

    @property
    def refused(self) -> bool:
        """Whether it was decided not to keep anything: the teacher may as well be asked directly."""
        return self.decision is not None and not self.decision.use

    def close(self, *, remove: bool = False) -> None:
        """Let go of the files; with `remove`, when the run is over, the leader takes the cache off the disk."""
        if self._store is not None:
            self._store.close()
            self._store = None
        if remove and self._leader:
            remove_store(self._folder)
            _refusal(self._folder).unlink(missing_ok=True)

    def _follow(self) -> None:
        """Take up what the leader has decided, if it has."""
        self._store = self._find()
        if self._store is None and _refusal(self._folder).exists():
            self.decision = Decision(False, "not used: so the main process decided")

    def _find(self) -> RowStore | None:
        return RowStore.open(self._folder, key=self._key, lengths=self._lengths, at_most=self._budget)

    def _through(self, store: RowStore, rows: NDArray[np.int64], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device = inputs["input_ids"].device
        held = store.has(rows)
        kept: dict[str, Tensor] = {}
        if held.any():
            kept, held = store.load(rows, width=inputs["input_ids"].shape[1])
            kept = {name: value.to(device) for name, value in kept.items()}
        if held.all():
            return kept
        missing = np.flatnonzero(~held)
        chosen = torch.from_numpy(missing).to(device)
        with torch.no_grad():
            fresh = self._compute({name: value[chosen] for name, value in inputs.items()} if held.any() else inputs)
        store.store(rows[missing], fresh)
        if not held.any():
            return fresh
        for name, value in fresh.items():
            kept[name].index_copy_(int(_LAYERED[name]), chosen, value)
        return kept

    def _measure(self, rows: NDArray[np.int64], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute a batch, take its time, and decide once there are enough."""
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self._compute(inputs)
        if not self._leader:
            return outputs
        outputs["logits"].cpu()  # an accelerator answers before it is done; this waits for it
        self._calls += 1
        if self._calls > _WARM_UP:
            self._seconds += time.perf_counter() - started
            self._tokens += int(self._lengths[rows].sum())
        if self._calls == _WARM_UP + _MEASURED:
            self._decide(rows, outputs)
        return outputs

    def _decide(self, rows: NDArray[np.int64], outputs: dict[str, Tensor]) -> None:
        parts = parts_of(outputs)
        needed = store_bytes(parts, self._lengths)
        usage = shutil.disk_usage(_existing(self._folder))
        self.decision = check_room(needed, budget=self._budget, free=usage.free, disk=usage.total)
        if self.decision.use:
            write, read, from_disk = probe(self._folder, parts, self._lengths[rows], outputs)
            self.decision = decide(
                needed=needed,
                tokens=int(self._lengths.sum()),
                passes=self._passes(),
                processes=self._processes,
                measured=Measured(self._tokens / max(self._seconds, 1e-9), write, read, from_disk),
            )
        note(f"teacher cache: {self.decision.why}")
        if self.decision.use:
            self._store = RowStore.create(self._folder, key=self._key, parts=parts, lengths=self._lengths)
            self._store.store(rows, outputs)
        elif self._processes > 1:
            write_text(_refusal(self._folder), f"{self.decision.why}\n")

    def _check(self, rows: NDArray[np.int64], inputs: Mapping[str, Tensor]) -> None:
        """Refuse a batch whose tokens are not those of its rows: its outputs would be another text's."""
        expected = self._examples.select(rows)
        mask = inputs["attention_mask"].cpu().numpy() != 0
        same = np.array_equal(mask, np.arange(mask.shape[1]) < expected.lengths[:, None])
        for name, values in (("input_ids", expected.tokens), ("token_type_ids", expected.types)):
            same = same and np.array_equal(inputs[name].cpu().numpy()[mask], values)
        if not same:
            raise TrainingError(
                f"{self._folder}: a batch holds other tokens than its rows of the train slice, so the teacher's outputs "
                "cannot be kept by row. Set distill.teacher_cache_bytes: 0."
            )


def parts_of(outputs: Mapping[str, Tensor]) -> list[Part]:
    """Return the layout of a batch of teacher outputs.

    Raises:
        TrainingError: a dtype that is not kept.
    """
    return [
        Part.of(name, value, tokens=name != "logits" or value.dim() == 3, layered=_LAYERED[name])
        for name, value in outputs.items()
    ]


def probe(
    folder: Path, parts: list[Part], lengths: NDArray[np.int64], outputs: Mapping[str, Tensor]
) -> tuple[float, float, bool]:
    """Write one batch beside `folder` as a cache would, read it back, remove it.

    Returns:
        Bytes written per second, bytes read per second, and whether the read came from the disk.
    """
    place = _probe_folder(folder)
    store = RowStore.create(place, key="probe", parts=parts, lengths=lengths)
    rows = np.arange(len(lengths), dtype=np.int64)
    size = int(row_sizes(parts, lengths).sum())
    try:
        started = time.perf_counter()
        store.store(rows, outputs)
        from_disk = store.to_disk()
        written = time.perf_counter()
        store.load(rows, width=int(lengths.max()))
        read = time.perf_counter()
    finally:
        store.close()
        remove_store(place)
    return size / max(written - started, 1e-9), size / max(read - written, 1e-9), from_disk


def _probe_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-probe")


def _refusal(folder: Path) -> Path:
    """Return the file by which the leader tells the others that there will be no cache."""
    return folder.with_name(f"{folder.name}-refused.txt")


def _existing(folder: Path) -> Path:
    """Return the nearest folder above that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def _size(count: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:,.1f} {unit}"
    return f"{count} bytes"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
