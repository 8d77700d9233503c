"""What the lines of `glue.py` state, as RESULTS.md and its figures: records and the plan in, Markdown out; no models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from glue_bars import BARS, NEEDS, verdict_lines
from glue_figures import Picture, draw_flows, picture_rows
from glue_plan import FIRST_DEFAULTS, read_lines, read_plan, starts_elsewhere
from glue_settings import changed, settings_section, tuning_section
from glue_stats import (
    RESAMPLES,
    Grid,
    Line,
    Lines,
    difference,
    mean_sd,
    metric_names,
    pooled_difference,
    pooled_kl_ratio,
    pooled_mcnemar,
    read_grid,
    retention,
    smooths,
)
from glue_words import NOT_DEFINED, NOT_MEASURED, NOT_RUN, listed, ratio_text, signed, spread, student_words, table

from bertemd_deploy.files import write_text

HERE = Path(__file__).resolve().parent
BASE = "uniform"  # what every other mapping is set against
MARKS = ("<!-- glue: written by benchmarks/glue.py --table -->", "<!-- glue: end -->")  # of the README's table
LENGTHS = "replay"  # of the dev rows, in what glue_latency.py measures
SOLVED = ("emd-fixed", "emd")  # mappings whose flows are shown
AGAINST = (("emd", "skip"), ("emd", "emd-fixed"))  # what else is set against each other, pooled over tasks


def write_results(
    lines_path: Path = HERE / "results" / "glue.jsonl",
    tuning_path: Path = HERE / "results" / "glue-tuning.jsonl",
    latency_path: Path = HERE / "results" / "glue-latency.json",
    out: Path = HERE / "RESULTS.md",
    figures: Path = HERE / "figures",
    readme: Path | None = HERE.parent / "README.md",
    findings: Path = HERE / "glue-findings.md",
) -> None:
    """Write the page, its figures and the README's table from the records alone.

    Args:
        lines_path: lines of finished students.
        tuning_path: lines of the settings that were tried.
        latency_path: times of the deployed models by grid and task, as glue_latency.py writes them; may be absent.
        out: the page.
        figures: folder of the flows' maps.
        readme: text whose table between `MARKS` is replaced; None leaves it out.
        findings: what a person made of the records, for the page; may be absent.
    """
    plan = read_plan()
    lines, tuning = read_lines(lines_path), read_lines(tuning_path)
    latency = json.loads(latency_path.read_text(encoding="utf-8"))["grids"] if latency_path.exists() else {}
    names = dict.fromkeys([*plan["grids"], *(line["grid"] for line in (*lines, *tuning))])
    grids = [read_grid(name, plan, [line for line in lines if line["grid"] == name]) for name in names]
    words = findings.read_text(encoding="utf-8").splitlines() if findings.exists() else []
    text = [*_intro(grids, plan), *verdict_lines(grids), *(["", "## What was found", "", *words] if words else [])]
    for grid in grids:
        text += ["", f"## Grid {grid.name}", "", *_grid(grid, latency.get(grid.name, {}), figures=figures, out=out)]
        text += [
            "",
            f"### {grid.name}: how settings were chosen",
            "",
            *tuning_section(grid, plan, [line for line in tuning if line["grid"] == grid.name]),
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(text) + "\n")
    if readme is not None:
        write_text(readme, with_table(readme.read_text(encoding="utf-8"), summary(grids, latency)))


def with_table(text: str, rows: Sequence[str]) -> str:
    """Return a text with the lines between `MARKS` replaced.

    Raises:
        ValueError: the text has not each of the marks once, in their order.
    """
    before, found, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not found or not closed or MARKS[0] in rest or MARKS[1] in after:
        raise ValueError(f"one {MARKS[0]} and one {MARKS[1]} after it are needed")
    return "\n".join([before + MARKS[0], *rows, MARKS[1] + after])


def summary(grids: Sequence[Grid], latency: Mapping[str, Any]) -> list[str]:
    """Return the table of deployed students, mapping `emd`, of the grids that have bars: a row for each task and metric."""
    rows = []
    for grid in (grid for grid in grids if any(bar.grid == grid.name for bar in BARS)):
        for task in grid.tasks:
            lines = grid.lines(task, "emd")
            timed = _timed(latency.get(grid.name, {}).get(task)).get("int8")
            for metric in metric_names(lines) if lines else []:
                means = [mean_sd(lines, metric, model=model) for model in ("teacher", "int8")]
                if means[0] is None or means[1] is None:
                    continue
                kept, sizes = retention(lines, metric), lines[0]["bytes"]
                agrees = np.mean([line["models"]["int8"]["agreement"] for line in lines])
                rows.append(
                    [
                        f"`{grid.name}` {task}, {metric}",
                        f"{means[0][0]:.4f}",
                        spread(lines, metric, model="int8"),
                        NOT_DEFINED if kept is None else f"{kept:.1f}%",
                        f"{100 * agrees:.1f}%",
                        f"{sizes['teacher'] / 1e6:.1f} / {sizes['int8'] / 1e6:.1f} MB",
                        _times(timed)[-1] if timed else NOT_MEASURED,
                        f"{len(lines)} of {grid.seeds(task, 'emd')}",
                    ]
                )
    head = [
        "grid, task, metric",
        "teacher",
        "int8 student",
        "kept",
        "agrees with teacher",
        "size",
        "faster [95%]",
        "seeds",
    ]
    if not rows:
        return ["No student of mapping `emd` is finished yet."]
    device = next((one["device"] for of in latency.values() for one in of.values()), None)
    words = (
        f"Times: median of single rows of dev, {device['cpu']}, all cores, against the teacher in PyTorch fp32."
        if device
        else ""
    )
    return ["", *table(head, rows), "", *([words, ""] if words else [])]


def _intro(grids: Sequence[Grid], plan: Mapping[str, Any]) -> Iterator[str]:
    yield "# GLUE: does the student hold up, and does EMD earn its keep?"
    yield ""
    yield "Written by `python benchmarks/glue.py --table` from `results/glue.jsonl`, `results/glue-tuning.jsonl` and, where it"
    yield "exists, `results/glue-latency.json`; what was found is said in `glue-findings.md`. Change the records, the plan"
    yield "(`glue.yaml`) or the findings, not this page."
    yield ""
    yield "## What was run"
    yield ""
    yield "A teacher is fine-tuned from a pretrained encoder, and students are distilled from it, one for each task, mapping"
    yield "and seed. Students of one machine, encoder and task share their teacher. Each is exported and made int8."
    yield ""
    for grid in grids:
        lines = [line for task in grid.tasks for line in grid.of_task(task)]
        total = sum(grid.seeds(task, variant) for task in grid.tasks for variant in grid.variants)
        entry = plan["grids"].get(grid.name)
        made = f"encoder {entry['encoder']}, student {student_words(entry['student'])}, " if entry else ""
        yield f"- `{grid.name}`: {made}tasks {listed(grid.tasks)}; {len(lines)} of {total} planned students are finished."
        if lines:
            machines = sorted({f"{line['machine']['cpu']}, {line['machine']['cores']} cores" for line in lines})
            hours = sum(float(line["seconds"]) for line in lines) / 3600
            yield f"  Trained on {listed(machines)}, {hours:.1f} hours in all; commit {listed(_of(lines, 'commit'))}."
            for made in sorted({int8_words(line) for line in lines}):
                yield f"  {made}"
        if grid.left_out:
            yield f"  Left out: {grid.left_out} older line(s) of other settings, another teacher, other data or int8."
        if other := changed(grid):
            yield f"  Settings that are no longer those of `glue.yaml`: {listed(other)}."
    yield from [
        "",
        "To repeat it, with GLUE a folder of the tasks' folders and FOLDER the pretrained encoder (START the students'",
        "own start, where they have one):",
        "",
        "```",
    ]
    for grid in grids:
        entry = plan["grids"].get(grid.name, {})
        start = " --start START" if starts_elsewhere(entry.get("student", {})) else ""
        for tuning in (" --tuning", "") if "tuning" in entry else ("",):
            yield f"python benchmarks/glue.py --grid {grid.name} --data GLUE --encoder FOLDER{start}{tuning}"
    yield from ["python benchmarks/glue.py --table", "```", "", *_method(grids)]


def int8_words(line: Line) -> str:
    """Return how a line's int8 was made."""
    if not smooths(line):
        return "Int8 from before features that stand out were scaled down (smoothed): it loses more than today's."
    return f"Int8 with smoothing, exported by commit {line['int8']['commit']}."


def _of(lines: Lines, name: str) -> list[str]:
    return sorted({str(line[name]) for line in lines})


def _method(grids: Sequence[Grid]) -> list[str]:
    chosen = [line for grid in grids for lines in grid.found.values() for line in lines if _chosen_on_dev(line)]
    words = "Nothing is chosen on dev: students and teachers keep their last epoch, and the form of int8 is chosen on train."
    if chosen:
        words = f"In {len(chosen)} line(s) an epoch or the form of int8 was chosen on dev; their numbers are too good for it."
    return [
        f"- Choices. {words}",
        "  Settings are chosen on a part of train that is held out: the last table of a grid shows what was tried for each",
        "  mapping. A mapping for which more was tried has an advantage.",
        f"- First defaults of `distill`: {listed([f'{name} {value}' for name, value in FIRST_DEFAULTS.items()])}.",
        "- Metrics are of dev, mean ± standard deviation (n - 1) over seeds. The first of a task is its main metric.",
        "- Agreement is the share of dev rows that student and teacher give the same label, right or wrong.",
        "- KL is the mean over dev rows of KL(teacher || student) = sum_c p_c (log p_c - log q_c), in nats; p are the",
        "  teacher's probabilities of the labels, q the student's.",
        "- Differences are of pairs: students of one task, teacher and seed. Brackets are 95% intervals of a bootstrap that",
        f"  draws dev rows and seeds anew, the same ones for both sides ({RESAMPLES:,} draws). What another teacher would have",
        "  changed is not in them. With one seed they say nothing of how seeds differ. With 2 or 3 they are about right where",
        "  seeds differ little beside rows, and too narrow where they differ much (in simulations 7 or 8 of 10 then held the",
        "  truth, not 9.5).",
    ]


def _chosen_on_dev(line: Line) -> bool:
    recipe = line["recipe"]
    epochs = {recipe["distill"].get("keep_epoch")}
    if recipe["teacher"].get("finetune") != "never":
        epochs.add(recipe["teacher"].get("keep_epoch"))
    return epochs != {"last"} or line.get("int8_judged_on") != "train"


def _grid(grid: Grid, latency: Mapping[str, Any], *, figures: Path, out: Path) -> Iterator[str]:
    if not grid.found:
        yield "No student of this grid is finished: its tables are left out."
        return
    yield from ["Teachers:", "", *_teachers(grid), *settings_section(grid)]
    for task in grid.tasks:
        yield from ["", f"### {grid.name}, {task}", ""]
        if not grid.of_task(task):
            yield "No student of this task is finished: its tables are left out."
            continue
        yield from [*_task(grid, task), "", "As deployed, means over seeds:", ""]
        yield from _deployed(grid, task, latency.get(task))
        pictures = {
            variant: draw_flows(lines, name=f"{grid.name}-{task}-{variant}", folder=figures)
            for variant in grid.variants
            if (lines := grid.lines(task, variant)) and lines[0]["recipe"]["distill"]["mapping"] in SOLVED
        }
        yield from ["", *_maps(pictures, page=out)]
    yield from ["", f"### {grid.name}, all tasks", "", *_pooled(grid)]


def _teachers(grid: Grid) -> list[str]:
    rows = []
    for task in grid.tasks:
        lines = grid.of_task(task)
        if not lines:
            rows.append([task, NOT_RUN, "", "", ""])
            continue
        line = max(lines, key=lambda one: str(one["finished"]))
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["teacher"]["metrics"].items())
        size = f"{line['bytes']['teacher'] / 1e6:.1f}"
        rows.append([task, metrics, size, f"{line['train_rows']:,}", f"{line['dev_rows']:,}"])
    found = table(["task", "teacher, PyTorch fp32", "MB", "train rows", "dev rows"], rows)
    several = [task for task in grid.tasks if len({line["sha256"]["teacher"] for line in grid.of_task(task)}) > 1]
    if several:
        found += [
            "",
            f"There are several teachers of {listed(several)}, of one setting; the last is shown, and pairs share theirs.",
        ]
    return found


def _task(grid: Grid, task: str) -> list[str]:
    metrics = metric_names(grid.of_task(task))
    against = [f"{name} - {BASE} [95%]" for name in NEEDS.values()]
    rows = []
    for variant in grid.variants:
        lines, base = grid.lines(task, variant), grid.lines(task, BASE)
        count = f"{len(lines)} of {grid.seeds(task, variant)}"
        if not lines:
            rows.append([variant, count, NOT_RUN, *[""] * (len(metrics) + 5)])
            continue
        values = [spread(lines, name) for name in (*metrics, "agreement", "kl")]
        if variant == BASE:
            rows.append([variant, count, *values, *[""] * 4])
            continue
        found = [difference(lines, base, name) for name in NEEDS]
        pairs = str(found[0].pairs) if found[0] else "0"
        rows.append([variant, count, *values, pairs, *map(signed, found, NEEDS)])
    head = ["mapping", "seeds", *metrics, "agreement", "KL", "pairs", *against]
    return ["Students in PyTorch fp32:", "", *table(head, rows)]


def _pooled(grid: Grid) -> list[str]:
    head = ["mapping", "against", "tasks", "pairs", "accuracy [95%]", "agreement [95%]", "KL, ratio [95%]"]
    head += ["rows lost, gained", "McNemar's p"]
    rows = []
    pairs = [(variant, BASE) for variant in grid.variants if variant != BASE]
    for variant, base in [*pairs, *(pair for pair in AGAINST if set(pair) <= set(grid.variants))]:
        sides = grid.sides(variant, base)
        accuracy, counts = pooled_difference(sides, "accuracy"), pooled_mcnemar(sides)
        if accuracy is None or counts is None:
            rows.append([variant, base, f"0 of {len(sides)}", "0", "no pair yet", *[""] * 4])
            continue
        row = [variant, base, f"{accuracy.tasks} of {len(sides)}", str(accuracy.pairs), signed(accuracy, "accuracy")]
        row += [signed(pooled_difference(sides, "agreement"), "agreement"), ratio_text(pooled_kl_ratio(sides))]
        rows.append([*row, f"{counts.lost}, {counts.gained}", f"{counts.p:.3g}"])
    return [
        "Differences are means over tasks. KL is the geometric mean over tasks of the ratios; below 1 is nearer to the",
        "teacher. Lost and gained are dev rows, once per seed, that only the second or only the first mapping has right.",
        "Rows of several seeds are not independent, so the p describes and the intervals decide.",
        "",
        *table(head, rows),
    ]


def _deployed(grid: Grid, task: str, latency: Mapping[str, Any] | None) -> list[str]:
    first = metric_names(grid.of_task(task))[0]
    models = {"torch": "PyTorch fp32", "fp32": "ONNX fp32", "int8": "int8", "fused-int8": "fused int8"}
    times = _timed(latency)
    head = ["mapping", *(f"{first}, {name}" for name in models.values()), "int8 of teacher", "int8 MB", "teacher MB"]
    head += ["int8 p50 ms", "int8 p95 ms", "faster [95%]"]
    rows = []
    for variant in grid.variants:
        lines = grid.lines(task, variant)
        if not lines:
            rows.append([variant, NOT_RUN, *[""] * (len(head) - 2)])
            continue
        means = [mean_sd(lines, first, model=model) for model in models]
        kept, sizes = retention(lines, first), lines[0]["bytes"]
        row = [variant, *(f"{found[0]:.4f}" if found else "not made" for found in means)]
        row += [NOT_DEFINED if kept is None else f"{kept:.2f}%"]
        row += [f"{sizes[name] / 1e6:.1f}" if name in sizes else "not made" for name in ("int8", "teacher")]
        rows.append([*row, *(_times(times["int8"]) if "int8" in times else [NOT_MEASURED] * 3)])
    found = table(head, rows)
    if latency:
        device, timed = latency["device"], list(times.values())
        words = (
            f"Times: {device['cpu']}, {timed[0]['threads']} threads, one dev row at a time at its own length, raw samples in "
            "`results/glue-latency.json`. They depend on a model's sizes, not on its weights: one student stands for all."
        )
        listing = [[one["name"], f"{one['bytes'] / 1e6:.1f}", f"{_peak(one)}", *_times(one)] for one in timed]
        found += [
            "",
            words,
            "",
            *table(["model", "MB", "peak MB of memory", "p50 ms", "p95 ms", "faster [95%]"], listing),
        ]
    return found


def _timed(latency: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Return what was measured over the dev rows' own lengths, by model."""
    models = latency["models"] if latency else []
    return {one["model"]: one for one in models if one["lengths"] == LENGTHS}


def _peak(one: Mapping[str, Any]) -> str:
    return NOT_MEASURED if one["peak_rss_bytes"] is None else f"{one['peak_rss_bytes'] / 1e6:.0f}"


def _times(one: Mapping[str, Any]) -> list[str]:
    spans = one["latency_ms"]
    faster = "1" if one["speedup"] is None else "{:.2f}x [{:.2f}, {:.2f}]".format(*one["speedup"])
    return [f"{spans['p50']:.2f}", f"{spans['p95']:.2f}", faster]


def _maps(pictures: Mapping[str, Mapping[str, Picture]], *, page: Path) -> list[str]:
    if not any(pictures.values()):
        return [f"No flows of {listed(SOLVED)} yet: their maps are left out."]
    words = "Flows at the end of training, mean over seeds, in percent of the mass; cells below 0.1 are left blank:"
    rows = [[name, *(cell or NOT_RUN for cell in cells)] for name, cells in picture_rows(pictures, page=page)]
    return [words, "", *table(["mapping", "attention scores", "hidden states"], rows)]
