"""What came back from a device: data from outside, taken only if it is a bench record of this artifact and of bounded size.

A record is text until `checked_record` has read it. Numbers are finite, texts short and printable, nesting shallow, and what
every report reads has the type it should have. What the record says of the artifact is replaced by what is known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from bertemd_deploy.artifact import GRAPHS, SCHEMA_VERSION, Artifact
from bertemd_deploy.bench.record import artifact_excerpt
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.remote.ssh import plain

MOST_RECORD_BYTES = 32 * 2**20
MOST_LIST_BYTES = 32 * 2**20
MOST_TEXT = 20_000  # characters of one string
MOST_DEPTH = 16
MOST_MEASUREMENTS = 20_000
_POSITIVE = "a whole number above 0"
_NUMBER = "a number of at least 0"


def checked_record(text: str, *, artifact: Artifact, where: str) -> dict[str, Any]:
    """Return a record that a device wrote.

    Args:
        text: what came back.
        artifact: what was measured.
        where: the device, for the message.

    Raises:
        ArtifactError: it is no record of a remote measurement by this version, or holds what none would.
    """
    record = _read(text, where=where, what="record")
    found = record.get("schema_version")
    if found != SCHEMA_VERSION:
        raise _refused(where, f"schema_version is {plain(found)}, not {SCHEMA_VERSION}")
    for path, value, wanted, fits in _wanted(record):
        if not fits(value):
            raise _refused(where, f"{path} should be {wanted}, found {plain(repr(value))[:80]}")
    excerpt = json.loads(json.dumps(artifact_excerpt(artifact)))
    return record | {"artifact": excerpt, "distillation": artifact.manifest.get("distillation")}


def checked_lines(text: str, *, where: str) -> str:
    """Return a list of JSON objects, one a line, as a device wrote it.

    Raises:
        ArtifactError: a line is no object, or holds what no list would.
    """
    lines = [_read(line, where=where, what=f"list, line {at}") for at, line in enumerate(text.splitlines(), 1)]
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


def _refused(where: str, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{where}: what came back is no bench record ({reason}). Nothing was written. Measure again; if it stays so, "
        "carry the folder of `bertemd bundle` there and run it by hand."
    )


def _read(text: str, *, where: str, what: str) -> dict[str, Any]:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _refused(where, f"the {what} cannot be read: {plain(error)}") from error
    if not isinstance(value, dict):
        raise _refused(where, f"the {what} is {type(value).__name__}, not an object")
    if fault := _fault(value, depth=0):
        raise _refused(where, f"the {what} holds {fault}")
    return value


def _fault(value: Any, *, depth: int) -> str | None:
    """Return what no record holds, at any depth of `value`, or None."""
    if depth > MOST_DEPTH:
        return f"more than {MOST_DEPTH} levels"
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return next((fault for item in items if (fault := _fault(item, depth=depth + 1))), None)
    if isinstance(value, float):  # 1e999 reads as infinity
        return None if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            return f"a text of {len(value):,} characters"
        if any(not letter.isprintable() and letter not in "\n\t" for letter in value):
            return f"a text with control characters: {plain(value)[:80]!r}"
    return None


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**53


def _optional(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and value >= 0)


def _present(value: Any) -> bool:
    return value is not None and _optional(value)


Wanted = tuple[str, Any, str, Callable[[Any], bool]]


def _wanted(record: dict[str, Any]) -> Iterator[Wanted]:
    """Yield the place and value of what a report reads, what it should be, and the check of that."""
    device, measurements, models = (record.get(key) for key in ("device", "measurements", "models"))
    yield "device", device, "an object", lambda value: isinstance(value, dict)
    assert isinstance(device, dict)
    yield "device.kind", device.get("kind"), '"remote"', lambda value: value == "remote"
    yield "device.name", device.get("name"), "a text", lambda value: isinstance(value, str) and 0 < len(value) <= 300
    for name in ("cores", "threads", "memory_bytes"):
        yield f"device.{name}", device.get(name), f"{_NUMBER} or null", _optional
    for name in ("versions", "settings", "conditions"):
        yield name, record.get(name), "an object", lambda value: isinstance(value, dict)
    yield "started", record.get("started"), "a time", lambda value: isinstance(value, str) and len(value) < 60
    yield "notes", record.get("notes"), "a list of texts", _texts
    yield "models", models, "a list", lambda value: isinstance(value, list) and len(value) < 100
    assert isinstance(models, list)
    for at, model in enumerate(models):
        yield from _wanted_model(model, f"models[{at}]")
    few = f"a list of 1 to {MOST_MEASUREMENTS:,}"
    yield (
        "measurements",
        measurements,
        few,
        lambda value: isinstance(value, list) and 0 < len(value) <= MOST_MEASUREMENTS,
    )
    assert isinstance(measurements, list)
    for at, entry in enumerate(measurements):
        place = f"measurements[{at}]"
        yield from _wanted_model(entry, place)
        for name in ("batch", "threads", "n"):
            yield f"{place}.{name}", entry.get(name), _POSITIVE, _count
        yield f"{place}.sequence", entry.get("sequence"), f'{_POSITIVE} or "replay"', _length
        latency = entry.get("latency_ms")
        yield f"{place}.latency_ms", latency, "an object", lambda value: isinstance(value, dict)
        assert isinstance(latency, dict)
        for name in ("p50", "p95", "mean"):
            yield f"{place}.latency_ms.{name}", latency.get(name), _NUMBER, _present
        yield f"{place}.latency_ms.samples", latency.get("samples"), "a list of numbers", _numbers


def _wanted_model(entry: Any, place: str) -> Iterator[Wanted]:
    """Yield what holds for an entry of `models` as well as of `measurements`."""
    yield place, entry, "an object", lambda value: isinstance(value, dict)
    yield f"{place}.model", entry.get("model"), "teacher or student", lambda value: value in ("teacher", "student")
    yield f"{place}.backend", entry.get("backend"), "onnxruntime", lambda value: value == "onnxruntime"
    yield f"{place}.graph", entry.get("graph"), f"one of {', '.join(GRAPHS)}", lambda value: value in tuple(GRAPHS)
    for name in ("model_bytes", "peak_rss_bytes"):
        yield f"{place}.{name}", entry.get(name), f"{_NUMBER} or null", _optional


def _length(value: Any) -> bool:
    return bool(value == "replay") or _count(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_present, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
