"""What the GLUE grids of `glue.yaml` consist of: cells, each one student of one task, mapping and seed, and its recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bertemd_deploy.config import Recipe, build_recipe, parse_yaml
from bertemd_deploy.data import Dataset, load_data
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.files import sha256_json

PLAN = Path(__file__).with_name("glue.yaml")
ROWS_SEED = 20201116  # any fixed number: the same rows are held out for every setting, and judge every int8 graph
OF_STUDENT = ("fit_layers", "init_layers")  # of a mapping's settings, what belongs to the student's section
# What a plan does not set is as the tool's first defaults were, whatever they are now: they may change, a record does not.
# beta, and how flows and costs are made, are as published in them.
FIRST_DEFAULTS = {
    "epochs": 10,
    "learning_rate": 2e-5,
    "beta": 0.005,
    "marginal_momentum": 0.0,
    "transported_mass": 1.0,
    "mapped_layers": "all",
    "cost_scale": "absolute",
}
NO_MATTER = ("seed", "teacher_cache_bytes")  # of `distill`: of what a student is, to rounding
GATE_ROWS = 400  # of train, on which the form of int8 is chosen


@dataclass(frozen=True)
class Cell:
    """One student to train.

    Attributes:
        grid: its name in the plan.
        task: its name in the plan.
        folder: of its data, in the folder of all data.
        variant: name of the mapping's settings, such as "emd".
        seed: of the student's training.
        recipe: how it is made, with names for what is a folder on the machine that runs it: the encoder's for `teacher.model`,
            the task's for `data.path`, that of the checkpoint it starts from, if any, for `student.init`.
        first: whether its seed is the task's first.
        held_out: share of train that stands for dev, where settings are chosen; 0 trains on all and measures on dev.
    """

    grid: str
    task: str
    folder: str
    variant: str
    seed: int
    recipe: Recipe
    held_out: float
    first: bool = False

    @property
    def key(self) -> str:
        """Return the hash of everything but the seed."""
        return key_of(self.grid, self.variant, self.recipe, held_out=self.held_out)

    @property
    def teacher_key(self) -> str:
        """Return the hash of what the teacher depends on."""
        return sha256_json(_given(self.recipe, ("teacher", "data")) | {"held_out": self.held_out})[:16]

    @property
    def name(self) -> str:
        """Return what the cell is called on the terminal and its folder."""
        return f"{self.grid}-{self.task}-{self.variant}-{self.key[:6]}-seed{self.seed}"

    def teacher_folder(self, work: Path) -> Path:
        """Return where its fine-tuned teacher is kept, one for all cells that share it."""
        return work / "teachers" / f"{self.recipe.teacher.model}-{self.task}-{self.teacher_key[:6]}"

    def artifact_folder(self, work: Path) -> Path:
        """Return where it is exported to; what belongs to a task's first seed stays there, to be timed."""
        return work / "artifacts" / f"{self.grid}-{self.task}-{self.variant}-seed{self.seed}"


def key_of(grid: str, variant: str, recipe: Recipe, *, held_out: float) -> str:
    """Return the hash of everything that a student depends on but its seed; what is held out for choices is not exported.

    A setting that changes a student by no more than rounding is no part of it (`NO_MATTER`).
    """
    exported = () if held_out else ("export", "quantize")
    given = _given(recipe, ("teacher", "data", "student", "distill", *exported))
    given["distill"] = {name: value for name, value in given["distill"].items() if name not in NO_MATTER}
    return sha256_json({"grid": grid, "variant": variant, "recipe": given, "held_out": held_out})[:16]


def _given(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what is set otherwise than by the first defaults, so that a setting added later changes nothing."""
    content = recipe.to_dict()
    plain = {name: dataclasses.asdict(type(getattr(recipe, name))()) for name in sections}
    plain["distill"] = plain.get("distill", {}) | FIRST_DEFAULTS
    return {
        name: {key: value for key, value in content[name].items() if value != plain[name][key]} for name in sections
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file, with the recipes and keys they have today; none where there is no file.

    Settings that are newer than a line are as at first; a line of settings that are gone keeps its key,
    which is no cell's.
    What a killed process left of a line is not read.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lines = [json.loads(text) for text in file if is_whole(text)]
    for line in lines:
        with contextlib.suppress(RecipeError):
            content = line["recipe"] | {"distill": FIRST_DEFAULTS | line["recipe"].get("distill", {})}
            recipe = build_recipe(content, where=str(path))
            line["recipe"] = recipe.to_dict()
            line["key"] = key_of(line["grid"], line["variant"], recipe, held_out=line["held_out"])
    return lines


def is_whole(text: str) -> bool:
    """Say whether a line was written to its end: it has its newline, or is complete JSON without one."""
    if text.endswith("\n"):
        return True
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def read_plan() -> dict[str, Any]:
    """Return the plan as written."""
    plan: dict[str, Any] = parse_yaml(PLAN.read_text(encoding="utf-8"), where=str(PLAN))
    return plan


def cells(plan: Mapping[str, Any], grid: str, *, tuning: bool) -> Iterator[Cell]:
    """Yield a grid's cells, all of the first seed first, so that a run cut short is as broad as can be.

    Args:
        plan: from `read_plan`.
        grid: name of one of its grids.
        tuning: the settings to choose from, on a part of train, instead of those that were chosen.
    """
    entry = plan["grids"][grid]
    if tuning:
        tried = entry.get("tuning", {"seeds": [], "tasks": {}})
        for seed in tried["seeds"]:
            for task, settings in tried["tasks"].items():
                for setting in settings:
                    yield _cell(entry, grid, task, setting, seed=seed, held_out=tried["held_out"])
        return
    for seed in sorted({seed for task in entry["tasks"].values() for seed in task["seeds"]}):
        for task, chosen in entry["tasks"].items():
            if seed in chosen["seeds"]:
                for name, settings in chosen["variants"].items():
                    yield _cell(entry, grid, task, {"variant": name} | settings, seed=seed, held_out=0.0)


def _cell(
    entry: Mapping[str, Any], grid: str, task: str, setting: Mapping[str, Any], *, seed: int, held_out: float
) -> Cell:
    own = entry["tasks"][task]
    variant = str(setting["variant"])
    tried = {name: value for name, value in setting.items() if name not in ("variant", *OF_STUDENT)}
    student = {name: setting[name] for name in OF_STUDENT if name in setting}
    base = FIRST_DEFAULTS | own["distill"] | entry["variants"][variant]
    content = {
        "teacher": {"model": entry["encoder"]} | own["teacher"],
        "data": {"path": task, "task": task} | own.get("data", {}),
        "student": entry["student"] | student,
        "distill": base | tried | {"seed": seed},
        "export": entry.get("export", {}),
        "quantize": entry.get("quantize", {}),
    }
    recipe = build_recipe(content, where=f"{PLAN.name}: {grid}, {task}, {variant}")
    return Cell(grid, task, own["folder"], variant, seed, recipe, held_out, first=seed == min(own["seeds"]))


def starts_elsewhere(student: Mapping[str, Any]) -> bool:
    """Say whether students of these settings start from a checkpoint that is not the teacher."""
    return student.get("init", "auto") not in ("auto", "teacher", "random")


def cell_data(cell: Cell, folder: Path) -> Dataset:
    """Return a cell's data set: the task's, or train alone with a part of it, the same for all, in the place of dev."""
    settings = cell.recipe.data
    data = load_data(str(folder), task=settings.task, train_limit=settings.train_limit)
    if not cell.held_out:
        return data
    train = data.splits["train"]
    order = np.random.default_rng(ROWS_SEED).permutation(len(train))
    count = round(len(train) * cell.held_out)
    splits = {
        "train": train.select(sorted(order[count:].tolist())),
        "dev": train.select(sorted(order[:count].tolist())),
    }
    return replace(data, splits=splits, sha256=sha256_json({"of": data.sha256, "held_out": cell.held_out}))
