"""Files that appear whole or not at all, and the hashes that name them.

Every file or folder a user keeps is written under a temporary name beside its destination, flushed to disk and renamed.
A killed process or a full disk leaves the destination as it was. A folder is replaced by two renames; one killed between
them leaves the old folder under its `.previous-` name, and the next `claim_folder` or `new_folder` puts it back. What else
a killed process left is removed then too: one destination has one writer at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bertemd_deploy.errors import ArtifactError

PARTIAL = ".partial-"
PREVIOUS = ".previous-"
_OURS = re.compile(rf"({re.escape(PARTIAL)}|{re.escape(PREVIOUS)})[0-9a-f]{{8}}-(.+)", re.DOTALL)


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


def move_into(source: Path, out: Path, *, last: str, stale: Collection[str] = ()) -> None:
    """Move every file of a finished folder into one that holds other things, and remove `source`.

    Args:
        source: on the same file system as `out`.
        out: where its files go; a file of the same name is replaced.
        last: the file that is moved last, and tells a reader that all are there.
        stale: files of `out` that an earlier run wrote there; those without a successor are removed.

    Raises:
        ArtifactError: a file cannot be placed, such as where a folder has its name; then none is moved.
    """
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    try:
        for name in files:
            if (out / name).is_dir() or any(place.is_file() for place in (out / name).parents):
                raise ArtifactError(f"{out / name}: something of this name is in the way. Choose another --out.")
        for name in map(Path, sorted(set(stale) - {path.as_posix() for path in files})):
            (out / name).unlink()
            with contextlib.suppress(OSError):  # a folder that still holds something stays
                for place in name.parents:
                    (out / place).rmdir()
        for name in sorted(files, key=lambda path: path == Path(last)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).replace(out / name)
    finally:
        shutil.rmtree(source)


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
    partial = _beside(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the parent may be no folder; the error above says so
            partial.unlink()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; when the block ends without error, rename it to `folder`.

    An existing `folder` is replaced whole at the end, so a reader sees the old content or the new, never a mixture. What
    a killed process left of an earlier attempt is put back or removed first.

    Raises:
        ArtifactError: the operating system refused a write, or `folder` cannot be renamed ("." or a mount point);
            `folder` is unchanged.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    check_replaceable(folder)
    partial, previous = _beside(folder, PARTIAL), _beside(folder, PREVIOUS)
    try:
        _recover(folder.parent, only=folder.name)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        if folder.exists():
            folder.replace(previous)
        partial.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if previous.exists():
            _put_back(previous, folder)


@contextlib.contextmanager
def new_bundle(
    out: Path, *, listing: str, listed: Callable[[Path], set[str]], sources: Mapping[str, Path], force: bool
) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without error, what it holds becomes the bundle in `out`.

    Only files that an earlier bundle's list names are ever replaced or removed; other things in `out` stay beside the new.

    Args:
        out: a new or empty folder; with `force` any.
        listing: the file of a bundle that lists its files, and says that a folder is one.
        listed: reads the names out of such a file.
        sources: what the bundle is made from, by what it is called; nothing is written there.
        force: replace a bundle that is there; into a folder of other things the files are put beside them.

    Raises:
        ArtifactError: `out` is, holds or lies in one of `sources`, holds something and `force` is not set, or cannot be
            written.
    """
    for what, source in sources.items():
        if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
            raise ArtifactError(f"{out}: is, holds or lies in the {what} itself. Choose another --out.")
    found = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name)) if out.is_dir() else []
    if found and not force:
        raise ArtifactError(
            f"{out}: is not empty ({', '.join(found[:4])}). Choose an empty or new folder, or add --force to write there all "
            "the same."
        )
    existed = out.exists()
    claim_folder(out, marker=listing, force=True)
    names = {listing, *(listed(out / listing) if (out / listing).is_file() else ())}
    folders = {place.as_posix() for name in names for place in Path(name).parents}
    there = {path.relative_to(out).as_posix(): path.is_dir() for path in out.rglob("*")}
    foreign = any(name not in (folders if is_folder else names) for name, is_folder in there.items())
    fresh = out / ".bertemd-new" if foreign else out
    try:
        with new_folder(fresh) as folder:
            yield folder
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # it is empty, or not ours
                out.rmdir()
        raise
    if foreign:
        move_into(fresh, out, last=listing, stale={name for name in names if there.get(name) is False})


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that `new_folder` could not replace whole, before hours of work go into it.

    Raises:
        ArtifactError: `folder` is the current folder, a parent, or a mount point.
    """
    if folder.name in ("", "..") or folder.is_mount():
        raise ArtifactError(
            f"{folder}: is the current folder, a parent or a mount point and cannot be replaced whole. "
            "Name a folder below it, as in --out OUT/NAME."
        )


def write_error(path: Path, error: OSError) -> ArtifactError:
    """Return the message for a write to `path` that the operating system refused with `error`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ArtifactError(
        f"{path}: could not be written ({reason}). Nothing that was there has changed. "
        "Free space or choose another --out, then run the same command again."
    )


def discard_partial(folder: Path) -> None:
    """Mend what a killed process left directly in `folder`: temporary names go, a folder lost between renames returns."""
    _recover(folder)


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{uuid.uuid4().hex[:8]}-{path.name}")


def _recover(parent: Path, *, only: str | None = None) -> None:
    """Put back or remove our temporary names in `parent`, of every destination or of the one named `only`."""
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        ours = _OURS.fullmatch(path.name)
        if ours is None or only not in (None, ours[2]):
            continue
        if ours[1] == PREVIOUS:
            _put_back(path, parent / ours[2])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _put_back(previous: Path, folder: Path) -> None:
    """Rename a replaced folder back where nothing took its place; remove it otherwise."""
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.replace(folder)


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
        ArtifactError: the file is missing, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: the {what} is missing.") from None
    except RecursionError:
        raise ArtifactError(f"{path}: the {what} cannot be read (it is nested too deeply).") from None
    except (OSError, ValueError) as error:  # not UTF-8, not JSON, or an integer of more digits than Python takes
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
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file; --out needs a folder.")
    try:
        _recover(folder.parent, only=folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
        if found and marker not in found and not force:
            raise ArtifactError(
                f"{folder}: holds something else ({', '.join(found[:4])}) and no {marker}. "
                "Choose an empty or new folder, or add --force to write there all the same."
            )
        discard_partial(folder)
    except OSError as error:
        raise write_error(folder, error) from error
