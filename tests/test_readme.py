"""The README's commands, options, keys and recipe exist, its tree is the tree, and its numbers stand in a committed record."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bertemd_deploy.cli import app
from bertemd_deploy.config import Recipe, load_recipe
from bertemd_deploy.devices import load_devices
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.settings import MAPPINGS
from bertemd_deploy.students import STUDENTS
from bertemd_deploy.tasks import GLUE, TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bertemd_deploy"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = README.split("```")[1::2]
CODE = "".join(BLOCKS)
TREE = README.split("```\nbertemd_deploy/\n", 1)[1].split("```", 1)[0]
# (command, the rest of its line), as a console script or behind a launcher
LINES = re.findall(r"^(?:bertemd|.* -m bertemd_deploy) ([a-z]+)\b(.*)$", CODE, flags=re.MULTILINE)
COMMANDS = sorted({command for command, _ in LINES})
OPTIONS = sorted({(command, option) for command, rest in LINES for option in re.findall(r" (--[a-z-]+)", rest)})
SECTIONS = typing.get_type_hints(Recipe)
KEYS = sorted(set(re.findall(rf"\b({'|'.join(SECTIONS)})\.(?!py\b)([a-z][a-z0-9_]*)\b", README)))


def help_of(command: str) -> str:
    answer = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert answer.exit_code == 0, answer.output
    return re.sub(r"\x1b\[[0-9;]*m", "", answer.output)


def table(heading: str) -> dict[str, str]:
    """Return the rows of the table whose first heading is `heading`, by the name in their first cell."""
    below = README.split(f"\n| {heading}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {re.findall(r"`([^`]+)`", row)[0]: row for row in below}


def test_commands_are_shown() -> None:
    assert {"run", "check", "predict", "distill"} <= set(COMMANDS)
    assert ("distill", "--compare") in OPTIONS
    assert ("distill", "micro_batch_size") in KEYS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_exists(command: str) -> None:
    assert "Usage:" in help_of(command)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_shown_exists(command: str, option: str) -> None:
    assert re.search(rf"{option}\b", help_of(command))


@pytest.mark.parametrize("option", ["--max-minutes", "--json", "--pair", "--compare"])
def test_every_option_told_exists(option: str) -> None:
    commands = {"--max-minutes": ("run", "finetune", "distill"), "--compare": ("distill",)}
    assert option in README
    assert all(option in help_of(command) for command in commands.get(option, ("predict",)))


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_recipe_key_named_exists(section: str, key: str) -> None:
    assert key in {field.name for field in dataclasses.fields(SECTIONS[section])}


def test_the_recipe_shown_loads(tmp_path: Path) -> None:
    whole, devices, budget = (block.removeprefix("yaml\n") for block in BLOCKS if block.startswith("yaml\n"))
    (tmp_path / "recipe.yaml").write_text(whole + budget, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.student.name in STUDENTS
    assert recipe.budget["raspberry-pi-5"] == {"max_p95_ms": "30 ms"}
    (tmp_path / "devices.yaml").write_text(devices, encoding="utf-8")
    assert load_devices(tmp_path / "devices.yaml")["kiosk"].memory_limit_bytes == 10**9


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = set(re.findall(r"make ([a-z]+)", README))
    assert {"quickstart", "test"} <= shown <= targets


def test_the_tree_holds_every_module_once() -> None:
    told = re.findall(r"\b(\w+\.py)\b", TREE)
    present = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(told) == sorted(present)


def test_the_tree_holds_every_folder() -> None:
    told = set(re.findall(r"(?:^|\s)(\w+)/", TREE))
    present = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {"bench", "report"} <= present
    assert told == present | {"recipes", "benchmarks", "tests", "bertemd_deploy"}
    assert all((ROOT / name).is_dir() for name in told - present)


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert "bertemd_deploy/emd.py" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tables_hold_every_task_and_mapping() -> None:
    tasks = table("`data.task`")
    assert set(tasks) == set(TASKS) - {*GLUE, "demo"}
    for name, row in tasks.items():
        assert ", ".join(f"`{metric}`" for metric in TASKS[name].metrics) in row
    assert set(table("mapping")) == set(MAPPINGS)


def test_every_family_student_and_data_set_is_named() -> None:
    for name in (*FAMILIES, *STUDENTS):
        assert f"`{name}`" in README
    for name in GLUE:
        assert re.search(rf"\b{name}\b", README)


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
    accuracy = {(one["model"], one["backend"], one["graph"]): one["metrics"]["accuracy"] for one in record["models"]}
    for entry in rows:
        latency, of_it = entry["latency_ms"], accuracy[entry["model"], entry["backend"], entry["graph"]]
        cells = f"{of_it:.3f} | {entry['model_bytes'] / 1e6:.1f} MB | {latency['p50']:.2f} ms | {latency['p95']:.2f} ms"
        assert cells in README.replace("**", "")
        assert f"| {entry['peak_rss_bytes'] / 1e6:.0f} MB |" in README.replace("**", "")
