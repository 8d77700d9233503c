"""Row store: named tensors of ragged rows on disk, written row by row in any order, read back as padded batches.

One folder holds one set of rows of known lengths. Row k's tensors lie together, without padding, so that a batch of B rows
is B contiguous reads; each number keeps its bits (bfloat16 as 16-bit patterns). Files, in this machine's byte order:
    header.json    what the rows belong to (`key`), the tensors' shapes and dtypes, and a hash of itself
    rows.bin       row k's tensors from byte `starts[k]` on; reserved whole at the start, so the disk cannot fill up later
    rows.crc       one uint64 a row: 2^32 + CRC-32 of the row's bytes, or 0 while it is not written
    complete.json  hash of rows.crc, written once all rows are on the disk
A row's checksum is written after its bytes, and compared at every read: a disk or memory may lose a bit at any time. A
mismatch is an error, unless the row was left by an earlier process in a store that is not complete, and has not been read
whole since: that is what a killed machine leaves, and the row counts as not written.

Several processes of one machine share a store: one creates it, each opens it and writes the rows it computed. Rows are
read and written with `pread` and `pwrite` rather than mapped: a broken disk is then an error, not a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertemd_deploy.errors import ArtifactError, BertemdError, TrainingError
from bertemd_deploy.files import claim_folder, new_folder, read_json, sha256_json, write_json

FORMAT = 1
HEADER, DATA, CHECKSUMS, COMPLETE = "header.json", "rows.bin", "rows.crc", "complete.json"
_ALIGNMENT = 8  # bytes; a row starts at a multiple, so that its tensors can be viewed in place
_WRITTEN = 1 << 32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS: dict[int, tuple[Any, torch.dtype]] = {4: (np.int32, torch.int32), 2: (np.int16, torch.int16)}


@dataclass(frozen=True)
class Part:
    """One tensor of a row; T is the row's number of tokens.

    Attributes:
        name: of the tensor.
        dtype: "float32", "bfloat16" or "float16".
        before: axes before T, or all axes of a tensor without T.
        after: axes after T.
        tokens: whether there is a T axis.
        layered: in a batch the B axis stands second, after the layers, instead of first.
    """

    name: str
    dtype: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: bool
    layered: bool

    @classmethod
    def of(cls, name: str, batch: Tensor, *, tokens: bool, layered: bool) -> Part:
        """Describe a batch's tensor: B first (or second, if `layered`), T last but one (if `tokens`).

        Raises:
            TrainingError: the dtype is none that is stored.
        """
        dtype = str(batch.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TrainingError(f"{name}: {dtype} cannot be kept on disk; known: {', '.join(_DTYPES)}.")
        shape = list(batch.shape)
        del shape[int(layered)]
        if not tokens:
            return cls(name, dtype, tuple(shape), (), tokens, layered)
        return cls(name, dtype, tuple(shape[:-2]), tuple(shape[-1:]), tokens, layered)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _DTYPES[self.dtype].itemsize

    def row_shape(self, length: int) -> tuple[int, ...]:
        """Return the shape of a row of `length` tokens."""
        return (*self.before, length, *self.after) if self.tokens else self.before

    def row_bytes(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes that rows of `lengths` tokens take."""
        factor = self.itemsize * math.prod(self.before) * math.prod(self.after)
        return factor * (lengths if self.tokens else np.ones_like(lengths))

    def empty(self, rows: int, width: int) -> Tensor:
        """Return an uninitialised batch of `rows` rows padded to `width` tokens."""
        shape = list(self.row_shape(width))
        shape.insert(int(self.layered), rows)
        return torch.empty(shape, dtype=_DTYPES[self.dtype])

    def rows_of(self, batch: Tensor) -> NDArray[Any]:
        """Return the bits of a batch on the CPU, sharing its memory, with B moved to the front."""
        bits: NDArray[Any] = batch.view(_BITS[self.itemsize][1]).numpy()
        return np.moveaxis(bits, int(self.layered), 0)


def row_sizes(parts: Sequence[Part], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes of each row's tensors, (n,) int64."""
    sizes: NDArray[np.int64] = np.sum([part.row_bytes(lengths) for part in parts], axis=0)
    return sizes


def store_bytes(parts: Sequence[Part], lengths: NDArray[np.int64]) -> int:
    """Return the bytes of disk that a store of rows of these lengths takes, beside its small JSON files."""
    return int(_starts(row_sizes(parts, lengths))[-1]) + _ALIGNMENT * len(lengths)


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    rounded = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(rounded)])


class RowStore:
    """An open store; made by `create` or `open`."""

    def __init__(self, folder: Path, parts: Sequence[Part], lengths: NDArray[np.int64]) -> None:
        """Open the files of `folder`; the header is already checked.

        Raises:
            TrainingError: a file is missing or of another size, or the checksums are not those of a complete store.
        """
        self.folder, self.lengths = folder, lengths
        self.parts = tuple(sorted(parts, key=lambda part: -part.itemsize))  # wide numbers first: all are aligned
        self._sizes = row_sizes(self.parts, lengths)
        self._starts = _starts(self._sizes)
        self._buffer = np.empty(int(self._sizes.max(initial=0)), dtype=np.uint8)
        self._files: dict[str, int] = {}
        try:
            self._open_file(DATA, int(self._starts[-1]))
            self._open_file(CHECKSUMS, _ALIGNMENT * len(lengths))
            self._marks = self._read_marks()
            self._doubtful = self._written().copy()  # by a process before: its bytes may have been lost
            self.complete = (folder / COMPLETE).exists()
            if self.complete:
                self._check_complete()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: Path, *, key: str, parts: Sequence[Part], lengths: NDArray[np.int64]) -> RowStore:
        """Make a store without rows in place of what `folder` holds, reserving all of its space.

        Args:
            folder: new, empty, or an earlier store.
            key: what the rows belong to.
            parts: the tensors of a row.
            lengths: (n,) int64 tokens of each row.

        Raises:
            ArtifactError: the space cannot be reserved, or `folder` holds something else; nothing is left behind.
        """
        claim_folder(folder, marker=HEADER, force=False)
        remove_store(folder)
        parts = sorted(parts, key=lambda part: -part.itemsize)
        total = store_bytes(parts, lengths)
        header = {"format": FORMAT, "key": key, "byteorder": sys.byteorder, "rows": len(lengths), "bytes": total}
        header |= {"parts": [asdict(part) for part in parts]}
        checksums = _ALIGNMENT * len(lengths)
        with new_folder(folder) as partial:
            try:
                for name, size in ((DATA, total - checksums), (CHECKSUMS, checksums)):
                    with (partial / name).open("wb") as handle:
                        _reserve(handle.fileno(), size)
            except OSError as error:
                raise _write_error(folder, error) from error
            write_json(partial / HEADER, header | {"sha256": sha256_json(header)})
        return cls(folder, parts, lengths)

    @classmethod
    def open(cls, folder: Path, *, key: str, lengths: NDArray[np.int64], at_most: int) -> RowStore | None:
        """Open the store of `key` in `folder`, complete or not; None where there is none that will do.

        Args:
            folder: where it may be.
            key: what the rows have to belong to.
            lengths: (n,) int64 tokens of each row.
            at_most: bytes it may take, as `store_bytes` counts them.

        Raises:
            TrainingError: the store is damaged: the message names the file and what to do.
        """
        path = folder / HEADER
        if not path.exists():
            return None
        try:
            return cls._open(folder, key=key, lengths=lengths, at_most=at_most)
        except TrainingError:
            if not path.exists():  # another process has just removed it, the header first
                return None
            raise

    @classmethod
    def _open(cls, folder: Path, *, key: str, lengths: NDArray[np.int64], at_most: int) -> RowStore | None:
        path = folder / HEADER
        try:
            header = read_json(path, what="header of the teacher cache")
            own = header.pop("sha256", None)
            if own != sha256_json(header):
                raise ValueError("its contents have changed")
            if (header["format"], header["byteorder"], header["key"]) != (FORMAT, sys.byteorder, key):
                return None
            if header["bytes"] > at_most:
                return None
            parts = [
                Part(**entry | {"before": tuple(entry["before"]), "after": tuple(entry["after"])})
                for entry in header["parts"]
            ]
        except (BertemdError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        return cls(folder, parts, lengths)

    def has(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `rows` are written, by this process or another, (B,) bool."""
        held = self._written()[rows]
        if not held.all():
            self._marks = self._read_marks()
            self._complete_if_all()
            held = self._written()[rows]
        return held

    @property
    def held(self) -> int:
        """Rows written so far."""
        return int(self._written().sum())

    def load(self, rows: NDArray[np.int64], *, width: int) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
        """Return the tensors of a batch, padded with zeros, and which rows they hold.

        Args:
            rows: (B,) row numbers.
            width: T, at least the longest row.

        Returns:
            The tensors by name, on the CPU, in the dtypes that were stored; and (B,) bool, False where a row is not
            written or was torn when a machine was killed: its place is all zeros.

        Raises:
            TrainingError: a row is not what was written, or cannot be read.
        """
        held = self.has(rows)
        batch = {part.name: part.empty(len(rows), width) for part in self.parts}
        places = [(part, part.rows_of(batch[part.name])) for part in self.parts]
        for at, row in enumerate(rows):
            held[at] = held[at] and self._read_row(int(row))
            length = int(self.lengths[row])
            views = self._views(length)
            for (part, place), view in zip(places, views, strict=True):
                if not held[at]:
                    place[at] = 0
                elif part.tokens:
                    place[at][..., :length, :] = view
                    place[at][..., length:, :] = 0
                else:
                    place[at] = view
        return batch, held

    def store(self, rows: NDArray[np.int64], batch: Mapping[str, Tensor]) -> None:
        """Write the rows of a batch; its padding is left out.

        Args:
            rows: (B,) row numbers.
            batch: the tensors by name, of the store's shapes and dtypes, on any device.

        Raises:
            TrainingError: a tensor is not of the store's shape or dtype.
            ArtifactError: the disk is full or refuses the write; the store is removed.
        """
        for part in self.parts:
            if Part.of(part.name, batch[part.name], tokens=part.tokens, layered=part.layered) != part:
                found = batch[part.name]
                raise TrainingError(
                    f"{self.folder}: {part.name} is {tuple(found.shape)} {found.dtype}, the cache holds {part}. "
                    "Delete that folder and run the same command again."
                )
        places = [part.rows_of(batch[part.name].detach().cpu()) for part in self.parts]
        for at, row in enumerate(rows):
            length = int(self.lengths[row])
            for part, view, place in zip(self.parts, self._views(length), places, strict=True):
                view[...] = place[at][..., :length, :] if part.tokens else place[at]
            self._write_row(int(row))
        self._complete_if_all()

    def to_disk(self) -> bool:
        """Wait until every written byte is on the disk, and ask the system to forget its copies in memory.

        Returns:
            Whether the system could be asked, so that the next read comes from the disk.
        """
        try:
            for file in self._files.values():
                os.fsync(file)
        except OSError as error:
            raise self._give_up(error) from error
        if not hasattr(os, "posix_fadvise"):
            return False
        os.posix_fadvise(self._files[DATA], 0, 0, os.POSIX_FADV_DONTNEED)
        return True

    def close(self) -> None:
        """Close the files; the rows stay on disk."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _views(self, length: int) -> list[NDArray[Any]]:
        """Return the buffer as the tensors of a row of `length` tokens, one array of bits a part."""
        views, start = [], 0
        for part in self.parts:
            shape = part.row_shape(length)
            stop = start + part.itemsize * math.prod(shape)
            views.append(self._buffer[start:stop].view(_BITS[part.itemsize][0]).reshape(shape))
            start = stop
        return views

    def _read_row(self, row: int) -> bool:
        """Fill the buffer with a row; False if an earlier process left it torn and the store is not complete."""
        piece = self._buffer.data[: int(self._sizes[row])]
        whole = self._read(DATA, piece, int(self._starts[row]))
        if whole and zlib.crc32(piece) == int(self._marks[row]) - _WRITTEN:
            self._doubtful[row] = False
            return True
        if not self._doubtful[row] or self.complete or (self.folder / COMPLETE).exists():
            raise _damaged(self.folder / DATA, f"row {row} is not what was written")
        self._marks[row] = 0
        return False

    def _write_row(self, row: int) -> None:
        piece = self._buffer.data[: int(self._sizes[row])]
        self._marks[row] = _WRITTEN + zlib.crc32(piece)
        try:
            _write(self._files[DATA], piece, int(self._starts[row]))
            _write(self._files[CHECKSUMS], memoryview(self._marks[row : row + 1].tobytes()), _ALIGNMENT * row)
        except OSError as error:
            raise self._give_up(error) from error
        self._doubtful[row] = False

    def _read(self, name: str, target: memoryview, offset: int) -> bool:
        """Fill `target`; False where the file ends too early."""
        try:
            while target:
                count = os.preadv(self._files[name], [target], offset)
                if count == 0:
                    return False
                target, offset = target[count:], offset + count
        except OSError as error:
            raise _damaged(self.folder / name, os.strerror(error.errno or errno.EIO)) from error
        return True

    def _read_marks(self) -> NDArray[np.uint64]:
        marks = np.zeros(len(self.lengths), dtype=np.uint64)
        if len(marks) and not self._read(CHECKSUMS, marks.data.cast("B"), 0):
            raise _damaged(self.folder / CHECKSUMS, "it is shorter than it was")
        return marks

    def _written(self) -> NDArray[np.bool_]:
        return np.asarray(self._marks >> np.uint64(32) == 1)

    def _complete_if_all(self) -> None:
        """Say on disk that all rows are written, once they are and none is left that a killed machine may have torn."""
        if self.complete or self._doubtful.any() or not self._written().all():
            return
        try:
            for file in self._files.values():
                os.fsync(file)
        except OSError as error:
            raise self._give_up(error) from error
        write_json(self.folder / COMPLETE, {"sha256": self._marks_hash()})
        self.complete = True

    def _check_complete(self) -> None:
        path = self.folder / CHECKSUMS
        try:
            expected = read_json(self.folder / COMPLETE, what="mark of a complete teacher cache").get("sha256")
        except ArtifactError as error:
            raise _damaged(self.folder / COMPLETE, str(error)) from error
        if not self._written().all() or expected != self._marks_hash():
            raise _damaged(path, "the checksums are not what was written")

    def _marks_hash(self) -> str:
        return hashlib.sha256(self._marks.tobytes()).hexdigest()

    def _open_file(self, name: str, size: int) -> None:
        path = self.folder / name
        try:
            self._files[name] = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise _damaged(path, os.strerror(error.errno or errno.EIO)) from error
        found = os.fstat(self._files[name]).st_size
        if found != size:
            raise _damaged(path, f"it has {found:,} bytes instead of {size:,}")

    def _give_up(self, error: OSError) -> ArtifactError:
        self.close()
        remove_store(self.folder)
        return _write_error(self.folder, error)


def remove_store(folder: Path) -> bool:
    """Remove a store's files and its folder, and nothing else; return whether there was one."""
    found = (folder / HEADER).exists()
    for name in (HEADER, COMPLETE, CHECKSUMS, DATA):  # the header first: what is left of a killed removal is no store
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # holds something else, or was never there
        folder.rmdir()
    return found


def _reserve(file: int, size: int) -> None:
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what a file system without reservations says
                raise


def _write(file: int, piece: memoryview, offset: int) -> None:
    while piece:
        count = os.pwrite(file, piece, offset)
        piece, offset = piece[count:], offset + count


def _write_error(folder: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{folder}: the teacher cache could not be written ({os.strerror(error.errno or errno.EIO)}) and is removed. "
        "Free space, or set distill.teacher_cache_bytes: 0, then run the same command again."
    )


def _damaged(path: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{path}: the teacher cache is damaged ({reason}). Delete the folder {path.parent} and run the same command "
        "again: training goes on from its checkpoint and the cache is filled anew. --force starts over."
    )
