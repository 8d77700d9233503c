"""The README's commands exist, its tree is the tree, and its numbers stand in a committed record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bertemd_deploy.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "".join(README.split("```")[1::2])
COMMANDS = sorted(set(re.findall(r"^bertemd ([a-z]+)", CODE, flags=re.MULTILINE)))


def test_commands_are_shown() -> None:
    assert {"run", "check", "predict"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = set(re.findall(r"make ([a-z]+)", README))
    assert {"quickstart", "test"} <= shown <= targets


def test_every_module_of_the_tree_exists() -> None:
    tree = README.split("bertemd_deploy/\n", 1)[1].split("```", 1)[0]
    names = set(re.findall(r"\b(\w+\.py)\b", tree))
    present = {path.name for path in (ROOT / "bertemd_deploy").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert names <= present
    assert "emd.py" in names


def test_the_table_holds_the_numbers_of_the_committed_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
    most = max(entry["threads"] for entry in record["measurements"])
    rows = [
        entry
        for entry in record["measurements"]
        if (entry["sequence"], entry["batch"], entry["threads"]) == ("replay", 1, most)
        and (entry["model"] == "teacher" or entry["precision"] == "int8")
    ]
    assert len(rows) == 4
    for entry in rows:
        latency = entry["latency_ms"]
        cells = f"{entry['model_bytes'] / 1e6:.1f} MB | {latency['p50']:.2f} ms | {latency['p95']:.2f} ms"
        assert cells in README.replace("**", "")
        assert f"| {entry['peak_rss_bytes'] / 1e6:.0f} MB |" in README.replace("**", "")
