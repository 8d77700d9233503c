"""The results of the GLUE grids: differences, intervals and bars from known lines, and the page that is made of them."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import glue_bars  # noqa: E402 - found through the line above
import glue_figures  # noqa: E402
import glue_plan  # noqa: E402
import glue_stats  # noqa: E402
import glue_tables  # noqa: E402

from bertemd_deploy.tasks import TASKS  # noqa: E402

PLAN = """
grids:
  minilm-4l:
    encoder: minilm
    student: {name: 4L}
    quantize: {mode: dynamic}
    variants:
      none: {mapping: none}
      uniform: {mapping: uniform}
      skip: {mapping: skip}
      last: {mapping: last}
      emd-fixed: {mapping: emd-fixed}
      emd: {mapping: emd}
    tasks:
      mrpc: &task
        folder: MRPC
        seeds: [1, 2, 3]
        teacher: {keep_epoch: last}
        distill: {epochs: 2, keep_epoch: last}
        variants:
          none: {}
          uniform: {beta: 0.1}
          skip: {}
          last: {}
          emd-fixed: {beta: 0.1}
          emd: {beta: 0.1, marginal_momentum: 0.9}
      sst2: *task
    tuning:
      held_out: 0.2
      seeds: [11]
      tasks:
        mrpc:
          - {variant: uniform, beta: 0.1}
          - {variant: uniform, beta: 0.4}
          - {variant: emd, beta: 0.1, marginal_momentum: 0.9}
          - {variant: emd, beta: 0.4}
"""
ROWS = 200
FLOW = [[0.25, 0.0, 0.0, 0.0], [0.0, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.25]]
SCORES = {
    "none": 120,
    "uniform": 130,
    "skip": 128,
    "last": 126,
    "emd-fixed": 131,
    "emd": 150,
}  # dev rows that are right


def bits(count: int, rows: int = ROWS) -> str:
    return "1" * count + "0" * (rows - count)


def model(right: int, *, agrees: int = 150, kl: float = 0.1, task: str = "mrpc") -> dict[str, Any]:
    return {
        "metrics": dict.fromkeys(TASKS[task].metrics, right / ROWS),
        "agreement": agrees / ROWS,
        "kl": kl,
        "right": bits(right),
        "agrees": bits(agrees),
        "kls": [kl] * ROWS,
    }


def line(variant: str, *, task: str = "mrpc", seed: int = 1, right: int = 130, **changes: Any) -> dict[str, Any]:
    """A line as `glue.run_cell` writes it, of a student with `right` dev rows right."""
    options = {name: changes.pop(name) for name in ("agrees", "kl") if name in changes}
    moment = None if variant == "none" else {"step": 9, "attention_flow": FLOW, "hidden_flow": FLOW}
    teacher = {"metrics": dict.fromkeys(TASKS[task].metrics, 0.8), "right": bits(160)}
    return {
        "grid": "minilm-4l",
        "task": task,
        "variant": variant,
        "seed": seed,
        "key": variant,
        "held_out": 0.0,
        "recipe": {
            "teacher": {"keep_epoch": "last"},
            "data": {"path": task},
            "distill": {"mapping": variant, "keep_epoch": "last"},
        },
        "commit": "0123456789ab",
        "int8_judged_on": "train",
        "sha256": {"data": "of the task", "encoder": "of the grid", "teacher": "of the task"},
        "finished": f"2026-01-01T00:00:0{seed}+00:00",
        "machine": {"cpu": "a CPU", "cores": 2},
        "seconds": 60.0,
        "train_rows": 3668,
        "dev_rows": ROWS,
        "flows": {"first": moment, "last": moment},
        "teacher": teacher,
        "bytes": {"torch": 60_000_000, "teacher": 90_000_000, "fp32": 60_000_000, "int8": 19_000_000},
        "models": {name: model(right, task=task, **options) for name in ("torch", "fp32", "int8", "fused-int8")},
    } | changes


def seeds(variant: str, **options: Any) -> list[dict[str, Any]]:
    return [line(variant, seed=seed, **options) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "glue.yaml"
    path.write_text(PLAN, encoding="utf-8")
    monkeypatch.setattr(glue_plan, "PLAN", path)


@pytest.fixture
def lines(plan: None) -> list[dict[str, Any]]:
    """A full grid: every cell of the plan is finished."""
    found = []
    for cell in glue_plan.cells(glue_plan.read_plan(), "minilm-4l", tuning=False):
        right, kl = SCORES[cell.variant], 0.05 if cell.variant == "emd" else 0.1
        one = line(cell.variant, task=cell.task, seed=cell.seed, right=right, kl=kl, agrees=right + 10)
        found.append(one | {"recipe": cell.recipe.to_dict(), "key": cell.key})
    return found


def tuning_lines() -> list[dict[str, Any]]:
    found = []
    for at, cell in enumerate(glue_plan.cells(glue_plan.read_plan(), "minilm-4l", tuning=True)):
        one = line(cell.variant, task=cell.task, seed=cell.seed, kl=0.4 - 0.1 * at)
        found.append(one | {"recipe": cell.recipe.to_dict(), "key": cell.key, "held_out": cell.held_out})
    return found


def write(folder: Path, lines: list[Any], *, tuning: list[Any] | None = None, latency: Any = None) -> str:
    """Write the records and the page from them; return the page."""
    folder.mkdir(exist_ok=True)
    for name, of in (("lines", lines), ("tuning", tuning or [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in of), encoding="utf-8")
    if latency:
        (folder / "latency.json").write_text(json.dumps(latency), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text("\n".join(["# A page", *glue_tables.MARKS, "the end\n"]), encoding="utf-8")
    glue_tables.write_results(
        folder / "lines.jsonl",
        folder / "tuning.jsonl",
        folder / "latency.json",
        folder / "RESULTS.md",
        folder / "figures",
        readme,
    )
    return (folder / "RESULTS.md").read_text(encoding="utf-8")


def verdicts(lines: list[Any]) -> dict[tuple[str, ...], tuple[str, str]]:
    """What is said of each bar, by grid, task, what, of and against."""
    plan = glue_plan.read_plan()
    grids = {"minilm-4l": glue_stats.read_grid("minilm-4l", plan, lines)}
    named = {
        (bar.grid, *bar.tasks, bar.what, bar.of, bar.against[0] if bar.what == "ahead" else ""): bar
        for bar in glue_bars.BARS
    }
    return {name: glue_bars.verdict(bar, grids) for name, bar in named.items()}


def test_a_known_difference_is_recovered_and_its_interval_excludes_0() -> None:
    found = glue_stats.difference(seeds("emd", right=150), seeds("uniform", right=130), "accuracy")
    assert found.pairs == 3
    np.testing.assert_allclose(found.value, 0.1)
    assert 0 < found.low < 0.1 < found.high
    sd = np.sqrt(0.1 * 0.9 / ROWS)  # of a share of 20 in 200 rows, the same in every seed
    np.testing.assert_allclose((found.high - found.low) / 2, 1.96 * sd, rtol=0.1)


def test_the_interval_of_chance_covers_0() -> None:
    generator = np.random.default_rng(3)
    sides = []
    for variant in ("emd", "uniform"):
        side = seeds(variant)
        for one in side:
            one["models"]["torch"]["right"] = "".join(generator.choice(["0", "1"], ROWS, p=(0.3, 0.7)))
        sides.append(side)
    found = glue_stats.difference(*sides, "accuracy")
    assert found.low < 0 < found.high


def test_both_sides_have_the_same_draws() -> None:
    same = glue_stats.difference(seeds("emd"), seeds("uniform"), "accuracy")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    every_row = glue_stats.difference(seeds("emd", kl=0.3), seeds("uniform", kl=0.1), "kl")
    np.testing.assert_allclose((every_row.value, every_row.low, every_row.high), 0.2)


def test_seeds_are_resampled_too() -> None:
    ours = [line("emd", seed=seed, kl=kl) for seed, kl in ((1, 0.1), (2, 0.2), (3, 0.6))]
    found = glue_stats.difference(ours, seeds("uniform", kl=0.1), "kl")
    np.testing.assert_allclose((found.value, found.low, found.high), (0.2, 0.0, 0.5), atol=1e-12)


def test_pairs_are_of_one_seed_one_teacher_and_one_start() -> None:
    ours = [line("emd", seed=seed, right=right) for seed, right in ((2, 140), (3, 150), (4, 199))]
    theirs = [line("uniform", seed=seed, right=right) for seed, right in ((1, 0), (2, 130), (3, 130))]
    found = glue_stats.difference(ours, theirs, "accuracy")
    assert found.pairs == 2
    np.testing.assert_allclose(found.value, (10 + 20) / 2 / ROWS)
    ours[0] = ours[0] | {"sha256": ours[0]["sha256"] | {"teacher": "of another"}}
    assert glue_stats.difference(ours, theirs, "accuracy").pairs == 1
    ours[1] = ours[1] | {"sha256": ours[1]["sha256"] | {"start": "of a checkpoint"}}
    assert glue_stats.difference(ours, theirs, "accuracy") is None
    assert glue_stats.difference(ours[2:], theirs, "accuracy") is None
    with pytest.raises(ValueError, match="one grid and task"):
        glue_stats.difference(ours, [line("uniform", task="sst2")], "accuracy")


def test_any_model_is_compared() -> None:
    ours = seeds("emd", right=150)
    for one in ours:
        one["models"]["int8"] = model(140)
    np.testing.assert_allclose(glue_stats.difference(ours, seeds("uniform"), "accuracy", model="int8").value, 0.05)


def test_tasks_weigh_the_same_when_pooled() -> None:
    tasks = [
        (seeds("emd", right=150, kl=0.05), seeds("uniform", right=130, kl=0.1)),
        (seeds("emd", task="sst2", right=134, kl=0.4)[:1], seeds("uniform", task="sst2", right=130, kl=0.2)),
        ([], seeds("uniform", task="rte")),
    ]
    accuracy = glue_stats.pooled_difference(tasks, "accuracy")
    assert (accuracy.pairs, accuracy.tasks) == (4, 2)
    np.testing.assert_allclose(accuracy.value, (0.1 + 0.02) / 2)
    ratio = glue_stats.pooled_kl_ratio(tasks)
    np.testing.assert_allclose((ratio.value, ratio.low, ratio.high), 1.0)  # sqrt(0.5 * 2), in every draw
    one = glue_stats.pooled_kl_ratio(tasks[:1])
    np.testing.assert_allclose((one.value, one.low, one.high), 0.5)
    assert glue_stats.pooled_kl_ratio(tasks[2:]) is None
    assert glue_stats.pooled_kl_ratio([(seeds("emd", kl=0.0), seeds("uniform"))]) is None


def test_mcnemar_counts_rows_of_every_seed_and_task() -> None:
    ours, theirs = seeds("emd", right=2), seeds("uniform", right=0)
    for one in ours:
        one["models"]["torch"]["right"] = "0" * (ROWS - 3) + "111"
    theirs[0]["models"]["torch"]["right"] = "10" * (ROWS // 2)
    found = glue_stats.pooled_mcnemar([(ours, theirs), (seeds("emd", task="sst2"), seeds("uniform", task="sst2"))])
    assert (found.lost, found.gained) == (ROWS // 2 - 1, 2 + 3 + 3)
    assert found.p == glue_stats.mcnemar(found.lost, found.gained) < 1e-10
    assert glue_stats.pooled_mcnemar([([], [])]) is None


def test_means_over_seeds_and_what_is_kept_of_the_teacher() -> None:
    found = [line("emd", seed=seed, right=right) for seed, right in ((1, 120), (2, 140))]
    np.testing.assert_allclose(glue_stats.mean_sd(found, "accuracy"), (0.65, 0.1 / np.sqrt(2)))
    np.testing.assert_allclose(glue_stats.mean_sd(found, "accuracy", model="teacher")[0], 0.8)
    assert glue_stats.mean_sd(found[:1], "kl", model="int8") == (0.1, None)
    assert glue_stats.mean_sd(found, "f1", model="fp16") is None
    np.testing.assert_allclose(glue_stats.retention(found, "accuracy"), 100 * 0.65 / 0.8)
    found[0]["teacher"] = {"metrics": {"accuracy": 0.0}, "right": ""}
    assert glue_stats.retention(found, "accuracy") is None
    assert glue_stats.retention([], "accuracy") is None


def test_lines_of_older_settings_or_another_teacher_are_left_out() -> None:
    old, new = line("emd", key="old", finished="2026-01-01"), line("emd", seed=2, finished="2026-01-03")
    other = line("uniform", finished="2026-01-01")
    other["recipe"] = other["recipe"] | {"teacher": {"keep_epoch": "best"}}
    again = line("emd", seed=2, finished="2026-01-02")
    assert glue_stats.current([new, old, other, again]) == [new]
    assert glue_stats.current([]) == []


def test_lines_whose_int8_was_made_otherwise_do_not_stand_beside_each_other(lines, tmp_path) -> None:
    smoothed = {"int8": {"commit": "ba9876543210", "smoothed_activations": {"int8": 9}}}
    old, new = line("emd", finished="2026-01-01"), line("emd", seed=2, finished="2026-01-03", **smoothed)
    assert glue_stats.current([line("uniform", finished="2026-01-02"), new, old]) == [new]
    assert "Int8 from before features that stand out were scaled down" in write(tmp_path / "old", lines)
    today = [one | smoothed for one in lines]
    page = write(tmp_path / "new", today)
    assert "Int8 with smoothing, exported by commit ba9876543210." in page
    assert "Int8 from before" not in page


def test_bars_that_are_met(lines) -> None:
    for one in lines:
        one["models"]["int8"] = model(156, task=one["task"])  # 0.78 of 0.8: 97.5%
    found = verdicts(lines)
    word, said = found["minilm-4l", "sst2", "kept", "accuracy", ""]
    assert word == "met"
    assert "keep at least 97% of its teacher's accuracy; it keeps 97.50% (3 of 3 seeds)" in said
    word, said = found["minilm-4l", "mean", "first", ""]
    assert word == "met"
    assert "it reaches 0.7500, the best of them, `uniform`, 0.6500 (6 of 6 seeds over mrpc and sst2)" in said
    word, said = found["minilm-4l", "ahead", "accuracy", "uniform"]
    assert word == "met"
    assert re.search(r"it is \+0\.1000 \[\+0\.0\d+, \+0\.1\d+\] \(6 of 6 pairs\)", said)
    word, said = found["minilm-4l", "ahead", "kl", "none"]
    assert word == "met"
    assert "it is 0.500 [0.500, 0.500]" in said
    assert {word for (grid, *_), (word, _) in found.items() if grid == "minilm-4l"} == {"met"}


def test_bars_that_are_missed(lines) -> None:
    for one in lines:
        if one["variant"] == "emd":
            one["models"] = {name: model(129, task=one["task"]) for name in one["models"]}
    found = verdicts(lines)
    word, said = found["minilm-4l", "mrpc", "kept", "f1", ""]
    assert word == "missed"
    assert "it keeps 80.62%" in said
    assert found["minilm-4l", "mean", "first", ""][0] == "missed"
    assert found["minilm-4l", "ahead", "accuracy", "uniform"][0] == "missed"  # 129 of 130
    assert found["minilm-4l", "ahead", "accuracy", "none"][0] == "met"  # 129 of 120
    assert found["minilm-4l", "ahead", "kl", "uniform"][0] == "missed"  # a ratio of 1


def test_a_tie_is_as_good_but_not_ahead(lines) -> None:
    for one in lines:
        one["models"]["torch"] = model(130, task=one["task"])
    found = verdicts(lines)
    assert found["minilm-4l", "mean", "first", ""][0] == "met"
    assert found["minilm-4l", "ahead", "agreement", "uniform"][0] == "missed"


def test_bars_without_numbers(lines) -> None:
    no_sst2 = [one for one in lines if one["task"] == "mrpc"]
    found = verdicts(no_sst2)
    assert found["minilm-4l", "sst2", "kept", "accuracy", ""][0] == "not measured yet"
    assert found["minilm-4l", "mrpc", "kept", "accuracy", ""][0] != "not measured yet"
    word, said = found["minilm-4l", "mean", "first", ""]
    assert word == "not measured yet"
    assert said.endswith("so far: sst2")
    word, said = found["minilm-4l", "ahead", "kl", "uniform"]
    assert word == "not measured yet"
    assert said.endswith("1 of 2 tasks have pairs")
    word, said = verdicts([one for one in lines if one["seed"] == 1])["minilm-4l", "ahead", "kl", "uniform"]
    assert (word, said.endswith("a task has fewer than 2 seeds")) == ("not measured yet", True)
    uneven = [one for one in lines if one["task"] == "mrpc" or one["seed"] == 1]  # 3 seeds and 1
    word, said = verdicts(uneven)["minilm-4l", "ahead", "kl", "uniform"]
    assert (word, said.endswith("a task has fewer than 2 seeds")) == ("not measured yet", True)
    for one in lines:
        if one["variant"] == "emd":
            one["sha256"] = one["sha256"] | {"teacher": "of another machine"}
    for name in (("mean", "first", ""), ("ahead", "accuracy", "uniform")):
        assert verdicts(lines)["minilm-4l", *name][0] == "not measured yet"
    assert {word for (grid, *_), (word, _) in found.items() if grid == "mpnet-6l"} == {"not measured yet"}


def test_every_bar_names_metrics_of_its_tasks() -> None:
    for bar in glue_bars.BARS:
        for task in bar.tasks:
            assert bar.of in TASKS[task].metrics or bar.what == "ahead"
        assert bool(bar.against) is (bar.what != "kept")


@pytest.mark.parametrize(("deviation", "low", "high"), [(0.0, 0.91, 0.99), (0.3, 0.6, 0.88)])
def test_what_an_interval_of_three_seeds_is_worth(deviation: float, low: float, high: float) -> None:
    """The page's words on it: about right where seeds differ little beside rows, too narrow where they differ much."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        rows = generator.normal(size=ROWS) + 0.3 * generator.normal(size=(3, ROWS))
        values = rows + deviation * generator.normal(size=(3, 1))
        left, right = glue_stats.interval(glue_stats._draws(np.stack([values, 0 * values]))[0])
        held += left <= 0 <= right
    assert low <= held / 200 <= high


def tables(page: str) -> list[list[str]]:
    """The page's tables, each its lines."""
    return [block.strip().splitlines() for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)]


def timed(lengths: str | int) -> list[dict[str, Any]]:
    """What glue_latency.py keeps of a teacher and an int8 student at some lengths."""
    shared = {"lengths": lengths, "threads": 2, "bytes": 90_000_000, "peak_rss_bytes": 500_000_000}
    scale = 1 if lengths == "replay" else 10
    teacher = {"model": "teacher-pytorch", "name": "teacher pytorch fp32", "speedup": None}
    student = {"model": "int8", "name": "student onnxruntime int8", "speedup": [13.5, 12.0, 15.0]}
    return [
        shared | teacher | {"latency_ms": {"p50": 8.1 * scale, "p95": 9.2 * scale}},
        shared | student | {"latency_ms": {"p50": 0.6 * scale, "p95": 0.9 * scale}, "peak_rss_bytes": None},
    ]


@pytest.mark.parametrize(
    ("student", "words", "start"),
    [
        ("{name: 4L}", "student 4L, ", ""),
        ("{name: 4L, init: teacher}", "student 4L, ", ""),
        ("{name: 4L, init: random}", "student 4L from random weights, ", ""),
        (
            "{layers: 6, hidden: 384, heads: 12, intermediate: 1536, init: minilm}",
            "student 6L-384 from minilm, ",
            " --start START",
        ),
    ],
)
def test_the_page_says_what_students_start_from(tmp_path, monkeypatch, student: str, words: str, start: str) -> None:
    path = tmp_path / "glue.yaml"
    path.write_text(PLAN.replace("{name: 4L}", student), encoding="utf-8")
    monkeypatch.setattr(glue_plan, "PLAN", path)
    page = write(tmp_path / "page", [])
    assert f"encoder minilm, {words}tasks" in page
    assert f"--encoder FOLDER{start} --tuning\n" in page


def test_the_page_states_the_numbers(lines, tmp_path) -> None:
    latency = {
        "grids": {"minilm-4l": {"mrpc": {"device": {"cpu": "a CPU"}, "models": [*timed("replay"), *timed(128)]}}}
    }
    page = write(tmp_path / "page", lines, tuning=tuning_lines(), latency=latency)
    assert "36 of 36 planned students are finished" in page
    assert "--grid minilm-4l --data GLUE --encoder FOLDER --tuning" in page
    assert "Nothing is chosen on dev" in page
    assert (
        "| emd | 3 of 3 | 0.7500 ± 0.0000 | 0.7500 ± 0.0000 | 0.8000 ± 0.0000 | 0.05000 ± 0.00000 | 3 | +0.1000 ["
        in page
    )
    assert "| mrpc | f1 0.8000, accuracy 0.8000 | 90.0 | 3,668 | 200 |" in page
    assert "| 0.500 [0.500, 0.500] | 0, 120 |" in page
    assert (
        "| emd | 0.7500 | 0.7500 | 0.7500 | 0.7500 | 93.75% | 19.0 | 90.0 | 0.60 | 0.90 | 13.50x [12.00, 15.00] |"
        in page
    )
    assert "| 19.0 | 90.0 | not measured | not measured | not measured |" in page  # sst2
    assert "a CPU, 2 threads" in page
    assert "| teacher pytorch fp32 | 90.0 | 500 | 8.10 | 9.20 | 1 |" in page
    assert "| student onnxruntime int8 | 90.0 | not measured | 0.60 | 0.90 | 13.50x [12.00, 15.00] |" in page
    assert "**met**" in page
    assert "not run yet" not in page
    assert str(tmp_path) not in page
    for table in tables(page):
        assert len({row.count("|") for row in table}) == 1, table[0]


def test_the_readme_states_what_is_deployed(lines, tmp_path) -> None:
    latency = {"grids": {"minilm-4l": {"mrpc": {"device": {"cpu": "a CPU"}, "models": timed("replay")}}}}
    write(tmp_path / "page", lines, latency=latency)
    readme = tmp_path / "page" / "README.md"
    text = readme.read_text(encoding="utf-8")
    size = "90.0 / 19.0 MB"
    assert (
        f"| `minilm-4l` mrpc, f1 | 0.8000 | 0.7500 ± 0.0000 | 93.8% | 80.0% | {size} | 13.50x [12.00, 15.00] | 3 of 3 |"
        in text
    ), text
    assert (
        f"| `minilm-4l` sst2, accuracy | 0.8000 | 0.7500 ± 0.0000 | 93.8% | 80.0% | {size} | not measured | 3 of 3 |"
        in text
    )
    assert (text.startswith("# A page\n<!--"), text.endswith("-->\nthe end\n")) == (True, True)
    assert glue_tables.with_table(text, ["new"]).count("|") == 0
    assert glue_tables.summary([], {}) == ["No student of mapping `emd` is finished yet."]
    assert "Times: median of single rows of dev, a CPU, all cores" in text
    for damaged in ("", glue_tables.MARKS[0], "\n".join(reversed(glue_tables.MARKS)), text + text):
        with pytest.raises(ValueError, match="are needed"):
            glue_tables.with_table(damaged, [])


def test_the_page_and_the_readme_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setattr(glue_plan, "PLAN", root / "benchmarks" / "glue.yaml")
    readme = tmp_path / "README.md"
    readme.write_text((root / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    glue_tables.write_results(out=tmp_path / "RESULTS.md", figures=tmp_path / "figures", readme=readme)
    for name, kept in (("RESULTS.md", root / "benchmarks" / "RESULTS.md"), ("README.md", root / "README.md")):
        assert (tmp_path / name).read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")


def test_tuning_is_sorted_and_marks_what_was_chosen(lines, tmp_path) -> None:
    tried = tuning_lines()
    page = write(tmp_path / "page", lines, tuning=tried[:2] + tried[3:])
    assert "Measured on 20% of train" in page
    assert "For all: epochs 2, keep_epoch last." in page
    rows = next(table for table in tables(page) if "in glue.yaml" in table[0])[2:]
    settings = ["beta 0.4", "beta 0.4", "beta 0.1", "beta 0.1, marginal_momentum 0.9"]
    assert [row.split(" | ")[1] for row in rows] == settings
    assert rows[0].startswith("| emd | beta 0.4 | 1 |")
    assert [row.endswith("chosen |") for row in rows] == [False, False, True, True]
    assert "not run yet" in rows[3]


def test_figures_are_files_of_their_own(lines, tmp_path) -> None:
    page = write(tmp_path / "page", lines)
    links = re.findall(r"!\[([^\]]+)\]\((figures/[^)]+\.svg)\)", page)
    assert len(links) == 2 * 2 * 2  # tasks, variants, kinds
    for words, link in links:
        root = ElementTree.parse(tmp_path / "page" / link).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("aria-label") == words
        texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert texts.count("25") == 4
    assert "teacher 4 to student 4" in links[0][0]


def test_flows_are_means_over_seeds() -> None:
    found = seeds("emd")[:2]
    found[1] = copy.deepcopy(found[1])
    found[1]["flows"]["last"]["hidden_flow"] = [[0.25] * 4, *[[0.0] * 4] * 3]
    flow = glue_figures.mean_flow(found, "hidden")
    np.testing.assert_allclose(flow[0], (0.25, 0.125, 0.125, 0.125))
    np.testing.assert_allclose(flow.sum(), 1)
    assert glue_figures.mean_flow(seeds("none"), "hidden") is None


def test_the_same_records_give_the_same_bytes(lines, tmp_path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, lines[:12], tuning=tuning_lines())
    one, two = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 4 + 8  # two records, the page and the README; maps
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_what_was_not_run_is_said(lines, tmp_path) -> None:
    page = write(tmp_path / "nothing", [])
    assert "No student of this grid is finished" in page
    assert "No setting was tried yet" in page
    assert "0 of 36 planned" in page
    assert tables(page) == []
    assert not (tmp_path / "nothing" / "figures").exists()
    some = [
        one for one in lines if one["task"] == "mrpc" and one["variant"] in ("none", "uniform") and one["seed"] == 1
    ]
    page = write(tmp_path / "some", some)
    assert "| emd | 0 of 3 | not run yet |" in page
    assert "| uniform | 1 of 3 | 0.6500 |" in page
    assert "| sst2 | not run yet |" in page
    assert "No student of this task is finished" in page
    assert "No flows of emd-fixed and emd yet" in page
    for table in tables(page):
        assert len({row.count("|") for row in table}) == 1, table[0]


def test_a_grid_that_the_plan_does_not_name_has_its_tables(tmp_path) -> None:
    other = [one | {"grid": "other"} for one in (*seeds("emd", task="rte"), *seeds("uniform", task="rte"))]
    page = write(tmp_path / "page", other)
    assert "## Grid other" in page
    assert "### other, rte" in page
    assert "| emd | 3 of 3 |" in page


def test_choices_on_dev_and_changed_settings_are_said(lines, tmp_path) -> None:
    first = [one for one in lines if (one["task"], one["variant"]) == ("mrpc", "none")]
    for one in first:
        one["recipe"]["distill"]["keep_epoch"] = "best"
    page = write(tmp_path / "page", lines)
    assert f"In {len(first)} line(s) an epoch or the form of int8 was chosen on dev" in page
    assert "no longer those of `glue.yaml`: mrpc none." in page
    assert "Nothing is chosen on dev" not in page
