"""Which settings the mappings of a GLUE grid have, and what else was tried for them on a part of train: Markdown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glue_plan import FIRST_DEFAULTS, NO_MATTER, OF_STUDENT, Cell, cells
from glue_stats import Grid, Line, Lines, mean_sd, metric_names, same_origin
from glue_words import NOT_RUN, listed, spread, table

from bertemd_deploy.settings import DistillSettings, StudentSettings

Settings = Mapping[str, Any]
OF_STUDENT_PLAIN = {name: getattr(StudentSettings(), name) for name in OF_STUDENT}
PLAIN: dict[str, Any] = dataclasses.asdict(DistillSettings()) | FIRST_DEFAULTS | OF_STUDENT_PLAIN


def distill_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a student of a recipe depends on besides its seed; what came after the record is as by default."""
    student = recipe.get("student", {})
    found = PLAIN | recipe["distill"] | {name: student.get(name, plain) for name, plain in OF_STUDENT_PLAIN.items()}
    return {name: value for name, value in found.items() if name not in NO_MATTER}


def changed(grid: Grid) -> list[str]:
    """Return the finished variants that the plan would train otherwise now, each with its task."""
    planned = _planned(grid)
    known = [at for at in grid.found if at in planned]
    return [" ".join(at) for at in known if distill_settings(grid.found[at][0]["recipe"]) != planned[at]]


def settings_section(grid: Grid) -> Iterator[str]:
    """Yield the settings of each mapping, as planned, or as trained where there is no plan."""
    trained = {at: distill_settings(lines[0]["recipe"]) for at, lines in grid.found.items()}
    known = _planned(grid) | trained
    by_table: dict[tuple[str, ...], list[str]] = {}
    for task in grid.tasks:
        own = {variant: known[task, variant] for variant in grid.variants if (task, variant) in known}
        names, shared = _telling(list(own.values()))
        rows = [[variant, _text(settings, names, but=shared)] for variant, settings in own.items()]
        words = f"For all: {_text(next(iter(own.values())), shared)}." if shared and own else "Each as it says:"
        shown = table(["mapping", "settings other than the first defaults"], rows)
        by_table.setdefault((words, *shown), []).append(task)
    for (words, *rows), tasks in by_table.items():
        yield from ["", f"Settings on {listed(tasks)}. {words}", "", *rows]


def tuning_section(grid: Grid, plan: Mapping[str, Any], lines: Lines) -> Iterator[str]:
    """Yield what was tried on a part of train, how much of it for each mapping, and what of it the grid has."""
    entry = plan["grids"].get(grid.name, {})
    if not lines:
        yield "No setting was tried yet: the table is left out." if "tuning" in entry else "No setting was tried here."
        return
    planned = list(cells(plan, grid.name, tuning=True)) if grid.planned else []
    lines = [line for task in dict.fromkeys(one["task"] for one in lines) for line in _of_task(lines, task)]
    share = sorted({line["held_out"] for line in lines})
    yield f"Measured on {listed([f'{100 * part:g}%' for part in share])} of train, held out, without dev. Sorted by KL."
    counts = Counter(line["variant"] for line in {line["key"]: line for line in lines}.values())
    yield f"Settings tried by mapping: {listed([f'`{name}` {counts[name]}' for name in grid.variants])}."
    tasks = list(dict.fromkeys([cell.task for cell in planned] + [line["task"] for line in lines]))
    yield from _elsewhere(grid, entry, tasks)
    for task in tasks:
        tried = _of_task(lines, task)
        yield from ["", f"{task}:", ""]
        if not tried:
            yield f"All {NOT_RUN}: the table is left out."
            continue
        chosen = {variant: found for (of, variant), found in _planned(grid).items() if of == task}
        yield from [*_choice(tried, chosen), ""]
        yield from _tried(tried, {cell.key: cell for cell in planned if cell.task == task}, chosen)


def _of_task(lines: Lines, task: str) -> list[Line]:
    found = [line for line in lines if line["task"] == task]
    return same_origin(found) if found else []


def _elsewhere(grid: Grid, entry: Mapping[str, Any], tried_on: Sequence[str]) -> Iterator[str]:
    """Yield of which tasks nothing was tried, and whose settings of the mappings they have."""
    for task in [task for task in grid.tasks if task not in tried_on and task in entry.get("tasks", {})]:
        own = entry["tasks"][task]["variants"]
        alike = [one for one in tried_on if entry["tasks"].get(one, {}).get("variants") == own]
        words = (
            f"; its mappings have the settings of {listed(alike)}, epochs and learning rate are its own"
            if alike
            else ""
        )
        yield f"Nothing was tried on {task}{words}."


def _planned(grid: Grid) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell.task, cell.variant): distill_settings(cell.recipe.to_dict()) for cell in grid.planned}


def _choice(lines: Lines, chosen: Mapping[str, Settings]) -> Iterator[str]:
    """Yield whether the grid has what did best, and where more of it was not tried."""
    best: dict[str, str] = {}
    by_key = _by_key(lines)
    for key in sorted(by_key, key=lambda one: _kl(by_key[one])):
        best.setdefault(by_key[key][0]["variant"], key)
    found = {name: distill_settings(by_key[key][0]["recipe"]) for name, key in best.items()}
    others = [f"`{name}`" for name, settings in chosen.items() if name in found and not _same(found[name], settings)]
    yield f"The grid has each mapping's setting of least KL{f', but for {listed(others)}' if others else ''}."
    settings = [distill_settings(line["recipe"]) for line in lines]
    untried = [f"`{name}`" for name, own in chosen.items() if not any(_same(own, one) for one in settings)]
    if untried:
        yield f"Not tried itself: what the grid has for {listed(untried)}."
    betas: dict[str, set[float]] = {}
    for line in lines:
        betas.setdefault(line["variant"], set()).add(line["recipe"]["distill"]["beta"])
    edge = [f"`{name}`" for name, one in found.items() if len(betas[name]) > 1 and one["beta"] == max(betas[name])]
    if edge:
        yield f"Best at the largest beta that was tried of it: {listed(edge)}."


def _same(one: Settings, other: Settings) -> bool:
    """Say whether two settings differ in nothing but for how long they train."""
    return {**one, "epochs": 0} == {**other, "epochs": 0}


def _tried(lines: Lines, planned: Mapping[str, Cell], chosen: Mapping[str, Settings]) -> list[str]:
    by_key = _by_key(lines)
    entries = [(of[0]["variant"], distill_settings(of[0]["recipe"]), of) for of in by_key.values()]
    entries += [
        (cell.variant, distill_settings(cell.recipe.to_dict()), [])
        for key, cell in planned.items()
        if key not in by_key
    ]
    names, shared = _telling([settings for _, settings, _ in entries])
    metrics = metric_names(lines)
    rows = []
    for variant, settings, of in sorted(entries, key=lambda entry: _kl(entry[2])):
        values = [spread(of, name) for name in (*metrics, "agreement", "kl")] if of else [NOT_RUN]
        values += [""] * (len(metrics) + 2 - len(values))
        mark = "chosen" if variant in chosen and _same(chosen[variant], settings) else ""
        rows.append([variant, _text(settings, names, but=shared), str(len(of)), *values, mark])
    words = [f"For all: {_text(entries[0][1], shared)}.", ""] if shared else []
    return [*words, *table(["mapping", "settings", "seeds", *metrics, "agreement", "KL", "in glue.yaml"], rows)]


def _by_key(lines: Lines) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["key"], []).append(line)
    return found


def _telling(settings: Sequence[Settings]) -> tuple[list[str], list[str]]:
    """Return which settings are not everywhere as by default, and which of these are the same everywhere."""
    names = [name for name in PLAIN if name not in ("mapping", *NO_MATTER)]
    names = [name for name in names if any(one[name] != PLAIN[name] for one in settings)]
    shared = [name for name in names if len(settings) > 1 and all(one[name] == settings[0][name] for one in settings)]
    return names, shared


def _text(settings: Settings, names: Sequence[str], *, but: Sequence[str] = ()) -> str:
    own = [f"{name} {settings[name]}" for name in names if name not in but and settings[name] != PLAIN[name]]
    return ", ".join(own) or "first defaults"


def _kl(lines: Lines) -> float:
    found = mean_sd(lines, "kl")
    return float("inf") if found is None else found[0]
