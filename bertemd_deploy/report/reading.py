"""Record files in, `Record`s out: checked, and named so that no two on one page have the same name.

Refused is only what would make the page wrong: another schema version, another task or another teacher than the first
record's. Several devices, several ways of getting the numbers and several students of one teacher share a page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import read_json
from bertemd_deploy.report.records import KINDS, Cell, Record, Variant, cell_of, count, variant_of
from bertemd_deploy.report.text import dig, number

SCHEMA_VERSION = 1
DEEPEST = 64  # levels of a record; those that `bertemd bench` writes have less than 10


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Return the records in `paths`, in that order, each with a name of its own.

    Raises:
        ArtifactError: no path; a file that is no bench record of this schema version; or records of different tasks or
            teachers, whose numbers must not share a page.
    """
    if not paths:
        raise ArtifactError("no bench record was given. Name at least one record.json, as `bertemd bench` writes it.")
    raws = [read_record(path) for path in paths]
    for path, raw in zip(paths, raws, strict=True):
        _same_task(raws[0], raw, first=paths[0], other=path)
    return named(raws)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file.

    Raises:
        ArtifactError: it is unreadable, no bench record, of another schema version, or holds a number that is none.
    """
    raw = read_json(path, what="bench record")
    _check_values(raw, where=str(path))
    check_schema(raw, where=str(path))
    for key, kind in (("device", dict), ("artifact", dict), ("measurements", list)):
        if not isinstance(raw.get(key), kind):
            raise ArtifactError(
                f"{path}: {key!r} should be a {kind.__name__}, found {type(raw.get(key)).__name__}; "
                "this is no bench record. Name the record.json that `bertemd bench` wrote."
            )
    stated = raw["device"].get("kind")
    if stated is not None and stated not in KINDS:
        raise ArtifactError(
            f"{path}: device.kind is {_short(stated)}, allowed are {', '.join(KINDS)}. How its numbers were got has to be "
            "known; run `bertemd bench` again."
        )
    seen: set[tuple[Variant, Cell]] = set()
    for place, entry in enumerate(raw["measurements"]):
        try:
            found_at = (variant_of(entry), cell_of(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f'{path}: measurements[{place}] needs whole numbers above 0 for batch, sequence (or "replay") and '
                f"threads ({error!r}). Run `bertemd bench` again."
            ) from None
        if found_at in seen:
            raise ArtifactError(
                f"{path}: measurements[{place}] measures {found_at[0].label}, {found_at[1].label} once more; "
                "one record holds each cell once. Run `bertemd bench` again."
            )
        seen.add(found_at)
    return raw


def _check_values(raw: Mapping[str, Any], *, where: str) -> None:
    """Refuse numbers that are not finite or that no float holds, and levels below the deepest.

    Raises:
        ArtifactError: there is one.
    """
    level: list[tuple[str, Any]] = [("", raw)]
    for _ in range(DEEPEST):
        for name, value in level:
            if isinstance(value, int | float) and not isinstance(value, bool) and number(value) is None:
                found = repr(value) if isinstance(value, float) else "a whole number too large for any measurement"
                raise ArtifactError(
                    f"{where}: {name[:160]} is {found}, allowed are finite numbers, and null for what was not measured. "
                    "Run `bertemd bench` again."
                )
        level = [
            (f"{name}.{key}" if name else str(key), item)
            for name, value in level
            if isinstance(value, Mapping)
            for key, item in value.items()
        ] + [
            (f"{name}[{at}]", item) for name, value in level if isinstance(value, list) for at, item in enumerate(value)
        ]
        if not level:
            return
    raise ArtifactError(
        f"{where}: is nested deeper than {DEEPEST} levels; this is no bench record. "
        "Name the record.json that `bertemd bench` wrote."
    )


def check_schema(raw: Mapping[str, Any], *, where: str) -> None:
    """Refuse a record of another schema version.

    Raises:
        ArtifactError: it is of another one.
    """
    found = raw.get("schema_version")
    if found != SCHEMA_VERSION or isinstance(found, bool):
        raise ArtifactError(
            f"{where}: schema_version is {_short(found)}, this bertemd reads {SCHEMA_VERSION}. "
            "Run `bertemd bench` again with this version, or report with the version that wrote it."
        )


def _same_task(left: Mapping[str, Any], right: Mapping[str, Any], *, first: Path, other: Path) -> None:
    for what in ("task", "labels", "teacher"):
        mine, theirs = _identity(left, what), _identity(right, what)
        if mine != theirs:
            raise ArtifactError(
                f"{other}: its {what} is {_short(dig(right, 'artifact', what))}, that of {first} is "
                f"{_short(dig(left, 'artifact', what))}. One report holds one task and one teacher, on one or more devices and "
                "with one or more students; report the others into folders of their own."
            )


def _identity(raw: Mapping[str, Any], what: str) -> Any:
    """Return what has to agree: of the task its name, kind and metrics, of the teacher its weights' hash where it is known."""
    found = dig(raw, "artifact", what)
    if what == "task" and isinstance(found, Mapping):
        return [found.get(key) for key in ("name", "kind", "metrics")]
    if what == "teacher":
        return dig(found, "sha256") or found
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 160 else text[:159] + "…"


def named(raws: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return records under names of their own: the device's, after the student's where there are several students."""
    keys = [_student_key(raw) for raw in raws]
    students = _student_names(dict(zip(keys, raws, strict=True)))
    taken: dict[str, int] = {}
    records = []
    for key, raw in zip(keys, raws, strict=True):
        student = students[key] if len(students) > 1 else ""
        device = str(raw["device"].get("name") or "unnamed device")
        name = f"{student} on {device}" if student else device
        kind = str(raw["device"].get("kind") or "measured")
        taken[f"{name} {kind}"] = times = taken.get(f"{name} {kind}", 0) + 1
        records.append(Record(raw, name if times == 1 else f"{name} ({times})", student))
    return records


def _student_key(raw: Mapping[str, Any]) -> str:
    """Return what tells one student from another: its sizes, when it was exported, and what it scored there."""
    artifact = raw["artifact"]
    scores = artifact.get("metrics") if isinstance(artifact.get("metrics"), Mapping) else {}
    own = {name: value for name, value in scores.items() if name != "teacher"}
    return json.dumps([artifact.get("student"), artifact.get("created"), own], sort_keys=True, default=str)


def _student_names(students: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a name per student: its sizes; with mapping and seed where two are alike; numbered where they still are."""
    names = {key: _sizes(raw) for key, raw in students.items()}
    for describe in (_training, lambda raw: ""):
        groups: dict[str, list[str]] = {}
        for key, name in names.items():
            groups.setdefault(name, []).append(key)
        for name, keys in groups.items():
            if len(keys) == 1:
                continue
            for place, key in enumerate(keys, start=1):
                more = describe(students[key])
                names[key] = f"{name}, {more}" if more else f"{name} ({place})"
    return names


def _sizes(raw: Mapping[str, Any]) -> str:
    layers, hidden = (number(dig(raw, "artifact", "student", key)) for key in ("layers", "hidden"))
    said = [count(int(layers), "layer") if layers else "", f"width {int(hidden)}" if hidden else ""]
    return ", ".join(filter(None, said)) or "student"


def _training(raw: Mapping[str, Any]) -> str:
    mapping, seed = (dig(raw, "distillation", key) for key in ("mapping", "seed"))
    said = [f"mapping {mapping}" if isinstance(mapping, str) else "", f"seed {seed}" if isinstance(seed, int) else ""]
    return ", ".join(filter(None, said))
