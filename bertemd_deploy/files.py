"""Files that appear whole or not at all, and the hashes that name them.

Every file or folder a user keeps is written under a temporary name beside its destination, flushed to disk and renamed.
A killed process or a full disk leaves the destination as it was; `discard_partial` removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertemd_deploy.errors import ArtifactError

PARTIAL = ".partial-"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_folder(folder: Path) -> str:
    """Return one SHA-256 over the names and contents of every file below `folder`, in sorted order."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sha256_json([[name, sha256_file(folder / name)] for name in names])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without error, flush it and rename it to `path`.

    Raises:
        ArtifactError: the operating system refused a write (full disk, no permission); `path` is unchanged.
    """
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; when the block ends without error, rename it to `folder`.

    An existing `folder` is replaced whole at the end, so a reader sees the old content or the new, never a mixture.

    Raises:
        ArtifactError: the operating system refused a write; `folder` is unchanged.
    """
    partial = folder.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{folder.name}")
    old = partial.with_name(partial.name + "-old")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_error(path: Path, error: OSError) -> ArtifactError:
    """Return the message for a write to `path` that the operating system refused with `error`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ArtifactError(
        f"{path}: could not be written ({reason}). Nothing that was there has changed. "
        "Free space or choose another --out, then run the same command again."
    )


def discard_partial(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left directly in `folder`."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused.

    Raises:
        ValueError: a number is not finite.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Args:
        path: file to read.
        what: what the file is, for the message, such as "manifest".

    Raises:
        ArtifactError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: the {what} is missing.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: the {what} cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: the {what} should be a JSON object, found {type(value).__name__}.")
    return value


def inside(root: Path, name: str) -> Path:
    """Return `root / name`, refusing a name that leaves `root`.

    Raises:
        ArtifactError: `name` is absolute or climbs out of `root`, directly or through a link.
    """
    path = root / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{root}: the file name {name!r} points outside the folder; refused.")
    return path


def claim_folder(folder: Path, *, marker: str, force: bool) -> None:
    """Make `folder` ours to write: new, empty, carrying `marker` from an earlier run, or forced.

    Args:
        folder: output folder.
        marker: file name whose presence says that this kind of output was written there before.
        force: replace whatever is there.

    Raises:
        ArtifactError: `folder` is a file, or holds something else and `force` is not set.
    """
    if folder.is_file():
        raise ArtifactError(f"{folder}: is a file; --out needs a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).exists() and not force:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
        raise ArtifactError(
            f"{folder}: holds something else ({found}) and no {marker}. "
            "Choose an empty or new folder, or add --force to write there all the same."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    discard_partial(folder)
