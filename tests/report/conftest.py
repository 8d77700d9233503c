"""What the report's tests share: records, and the place to write them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_record import build_record


@pytest.fixture(scope="session")
def build() -> Callable[..., dict[str, Any]]:
    """The builder itself, for records of other devices."""
    return build_record


@pytest.fixture(scope="session")
def stored_record() -> dict[str, Any]:
    """A full record, to be left as it is."""
    return build_record()


@pytest.fixture
def record(stored_record) -> dict[str, Any]:
    """A full record, free to change."""
    return copy.deepcopy(stored_record)


@pytest.fixture
def bare() -> dict[str, Any]:
    """A record of the student alone, without teacher and distillation."""
    return build_record(teacher=False) | {"distillation": None}


@pytest.fixture
def empty() -> dict[str, Any]:
    """The least that is a record: nothing was measured."""
    return {"schema_version": 1, "device": {}, "artifact": {}, "measurements": []}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a record and return its path."""

    def write(value: Any, name: str = "record.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write
