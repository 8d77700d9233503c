"""Students of several mappings side by side: what is trained, what is skipped, what the table says, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from bertemd_deploy import stages
from bertemd_deploy.cli import app
from bertemd_deploy.comparison import _interval, markdown_table, parse_mappings, parse_seeds, text_table
from bertemd_deploy.evaluate import evaluate_folder
from bertemd_deploy.files import sha256_file
from bertemd_deploy.settings import MAPPINGS

Task = Callable[..., tuple[Path, Path]]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_recipe(path: Path, teacher: Path, data: Path, **distill: Any) -> Path:
    settings = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "precision": "float32"}
    content = {
        "teacher": {"model": str(teacher)},
        "data": {"path": str(data), "max_length": 32},
        "student": {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 32},
        "distill": settings | distill,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the (mapping, seed) of every student that was really trained."""
    done: list[tuple[str, int]] = []
    stage = stages.distill_stage

    def counted(recipe: Any, *arguments: Any, **extra: Any) -> dict[str, Any]:
        done.append((recipe.distill.mapping, recipe.distill.seed))
        return stage(recipe, *arguments, **extra)

    monkeypatch.setattr(stages, "distill_stage", counted)
    return done


def test_a_student_per_mapping_and_seed_and_one_table(
    tiny_task: Task, tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    teacher, data = tiny_task()
    recipe, out = write_recipe(tmp_path / "recipe.yaml", teacher, data), tmp_path / "out"
    command = ("distill", recipe, "--compare", "uniform, skip,emd", "--seeds", "1,2", "--out", out)
    first = call(*command)
    assert first.exit_code == 0, first.stderr
    assert trained == [(name, seed) for seed in (1, 2) for name in ("uniform", "skip", "emd")]
    assert "compare: mapping emd, seed 2 (6 of 6)" in first.stderr
    record = json.loads((out / "comparison.json").read_text())
    assert (record["status"], record["seeds"], record["metrics"], record["dev"]) == ("done", [1, 2], ["accuracy"], 24)
    assert [row["mapping"] for row in record["mappings"]] == ["uniform", "skip", "emd"]
    loaded, length = stages.load_recipe_data(pipeline_recipe(recipe).data)
    for row in record["mappings"]:
        assert row["students"] == [f"{row['mapping']}-seed{seed}" for seed in (1, 2)]
        scores = []
        for student in row["students"]:
            stage = json.loads((out / student / "stage.json").read_text())
            assert (stage["status"], stage["given"]["distill"]["mapping"]) == ("done", row["mapping"])
            assert (out / student / "eval.npz").is_file()
            scores.append(evaluate_folder(out / student, data=loaded, max_length=length)["metrics"]["accuracy"])
        spread = row["metrics"]["accuracy"]
        assert spread["values"] == scores
        assert spread["mean"] == pytest.approx(np.mean(scores))
        assert spread["sd"] == pytest.approx(np.std(scores, ddof=1))
        assert row["seconds"] > 0
        assert row["tokens_per_s"] > 0
    uniform, skip, _ = record["mappings"]
    assert uniform["difference"] is None
    pairs = zip(skip["metrics"]["accuracy"]["values"], uniform["metrics"]["accuracy"]["values"], strict=True)
    assert skip["difference"]["against"] == "uniform"
    assert skip["difference"]["accuracy"]["values"] == pytest.approx([one - other for one, other in pairs])

    lines = first.stdout.splitlines()
    assert lines[0].split() == ["mapping", "accuracy", "accuracy", "against", "uniform", "[95%]", "seconds", "tokens/s"]
    assert [line.split()[0] for line in lines[1:4]] == ["uniform", "skip", "emd"]
    assert lines[4].startswith(
        "24 dev rows, seeds 1, 2 (mean ± standard deviation); teacher accuracy 1.0000; seconds and"
    )
    assert '"no difference shown" where it covers 0' in lines[5]
    assert lines[6] == "2 seeds tell little of how much seeds differ; the interval is rather too narrow."
    assert lines[7:] == [str(out)]
    assert (out / "comparison.md").read_text() == markdown_table(record)
    assert not list(out.rglob(".partial-*"))

    trained.clear()
    again = call(*command, "--json")
    assert trained == []
    assert json.loads(again.stdout) == record

    more = call("distill", recipe, "--compare", "emd,last", "--seeds", "2", "--out", out)
    assert trained == [("last", 2)], more.stderr
    assert "accuracy against emd" in more.stdout
    assert "One seed: how much another seed would change is not in the interval" in more.stdout

    other = call("distill", recipe, "--compare", "uniform", "--out", out, "--epochs", 2)
    assert other.exit_code == 3
    assert other.stderr.endswith(
        f"error: {out}: holds students of other settings (distill.epochs). Choose another --out, or add --force to start "
        "over.\n"
    )
    assert trained == [("last", 2)]
    trained.clear()
    assert (
        call("distill", recipe, "--compare", "uniform", "--seeds", 1, "--out", out, "--epochs", 2, "--force").exit_code
        == 0
    )
    assert trained == [("uniform", 1)]


def pipeline_recipe(path: Path) -> Any:
    from bertemd_deploy.config import load_recipe

    return load_recipe(path)


def test_a_student_is_the_one_that_distill_alone_gives_and_a_cut_run_goes_on(
    tiny_task: Task, tmp_path: Path, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    recipe, out = write_recipe(tmp_path / "recipe.yaml", teacher, data, seed=7), tmp_path / "out"
    stage = stages.distill_stage

    def interrupted(variant: Any, *arguments: Any, **extra: Any) -> dict[str, Any]:
        if variant.distill.mapping == "emd":
            raise KeyboardInterrupt
        return stage(variant, *arguments, **extra)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_stage", interrupted)
        cut = call("distill", recipe, "--compare", "none,emd", "--out", out)
    assert cut.exit_code == 130
    assert cut.stderr.endswith(
        "interrupted; what is finished is kept, the same command (without --force or --from) continues\n"
    )
    assert json.loads((out / "comparison.json").read_text())["status"] == "running"
    assert trained == [("none", 7)]
    assert call("distill", recipe, "--compare", "none,emd", "--out", out).exit_code == 0
    assert trained == [("none", 7), ("emd", 7)]
    alone = tmp_path / "alone"
    assert call("distill", recipe, "--mapping", "emd", "--out", alone).exit_code == 0
    assert sha256_file(alone / "model.safetensors") == sha256_file(out / "emd-seed7" / "model.safetensors")


def test_numbers_have_their_own_metrics(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task("regression")
    data_recipe = write_recipe(tmp_path / "recipe.yaml", teacher, data)
    out = tmp_path / "out"
    done = call(
        "distill", data_recipe, "--compare", "emd,emd-fixed", "--out", out, "--set", "data.task=regression", "--json"
    )
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["metrics"] == ["pearson", "spearman"]
    difference = record["mappings"][1]["difference"]
    assert set(difference) == {"pearson", "spearman", "against", "ci95", "shown"}
    low, high = difference["ci95"]
    assert low <= difference["pearson"]["mean"] <= high


def test_wrong_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_recipe(recipe, tmp_path / "no-teacher", tmp_path / "no-data")
    known = ", ".join(MAPPINGS)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--compare", "uniform,magic"), f"--compare: unknown mapping 'magic'; known: {known}."),
        (("--compare", "emd,,skip"), f"--compare: unknown mapping ''; known: {known}."),
        (("--compare", "emd,skip,emd"), f"--compare: emd stands twice; name each mapping once; known: {known}."),
        (
            ("--compare", " "),
            f"--compare: names no mapping. Name them as in --compare uniform,skip,emd; known: {known}.",
        ),
        (
            ("--compare", "emd", "--mapping", "emd"),
            "distill: --compare names the mappings; leave out --mapping (and --set distill.mapping).",
        ),
        (
            ("--compare", "emd", "--set", "distill.mapping=skip"),
            "distill: --compare names the mappings; leave out --mapping (and --set distill.mapping).",
        ),
        (
            ("--compare", "emd", "--seeds", "1", "--seed", 2),
            "distill: --seeds names the seeds; leave out --seed (and --set distill.seed).",
        ),
        (
            ("--compare", "emd", "--seeds", "1,-2,x"),
            "--seeds: found '-2', 'x', allowed: whole numbers from 0 to 2147483648, as in --seeds 1,2,3.",
        ),
        (
            ("--compare", "emd", "--seeds", "1,01"),
            "--seeds: 1,01 names a seed twice; the same seed gives the same student.",
        ),
        (("--seeds", "1,2"), "distill: --seeds belongs to --compare; for one student use --seed."),
    ]
    for options, message in cases:
        refused = call("distill", recipe, "--out", tmp_path / "out", *options)
        assert (refused.exit_code, refused.stdout, refused.stderr) == (2, "", f"error: {message}\n")
    assert not (tmp_path / "out").exists()
    assert parse_mappings(" emd ") == ("emd",)
    assert parse_seeds("3, 1") == (3, 1)


def test_what_cannot_work_is_refused_before_the_first_student(
    tiny_task: Task, tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    teacher, data = tiny_task()
    recipe = write_recipe(tmp_path / "recipe.yaml", teacher, data, mapping="none", alpha=0.0, beta=0.0)
    told = call("distill", recipe, "--compare", "none,emd", "--out", tmp_path / "out")
    assert told.exit_code == 2
    assert "--compare emd: 1 fault(s) in the recipe:\n  - distill: alpha 0 and beta 0 leave nothing" in told.stderr
    write_recipe(recipe, teacher, data)
    told = call("distill", recipe, "--compare", "emd,skip", "--out", tmp_path / "out", "--set", "student.layers=1")
    assert (told.exit_code, told.stderr) == (2, "error: distill.mapping: skip needs a student of at least 2 layers.\n")
    one, between = ("--set", "student.layers=1"), ("--set", "distill.mapped_layers=intermediate")
    told = call("distill", recipe, "--compare", "uniform,emd", "--out", tmp_path / "out", *one, *between)
    assert (told.exit_code, told.stderr) == (
        2,
        "error: distill.mapped_layers: intermediate needs a student of at least 2 layers.\n",
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    told = call("distill", recipe, "--compare", "emd,skip", "--out", tmp_path / "out")
    assert told.exit_code == 3
    assert "holds something else (mine.txt) and no comparison.json" in told.stderr
    assert trained == []


def test_the_table_says_what_is_shown_and_what_is_not() -> None:
    def row(name: str, mean: float, difference: dict[str, Any] | None) -> dict[str, Any]:
        spread = {"mean": mean, "sd": None, "values": [mean]}
        return {
            "mapping": name,
            "students": [f"{name}-seed1"],
            "metrics": {"f1": spread, "accuracy": spread},
            "difference": difference,
            "seconds": 1234.56,
            "tokens_per_s": 9876.5,
        }

    def against(mean: float, low: float, high: float, shown: str | None) -> dict[str, Any]:
        return {"f1": {"mean": mean}, "against": "uniform", "ci95": [low, high], "shown": shown}

    record = {
        "task": {"name": "mrpc", "kind": "classification", "metrics": ["f1", "accuracy"]},
        "dev": 408,
        "metrics": ["f1", "accuracy"],
        "seeds": [1],
        "resamples": 1000,
        "teacher": {"f1": 0.9, "accuracy": 0.875},
        "mappings": [
            row("uniform", 0.8, None),
            row("emd", 0.85, against(0.05, 0.01, 0.09, "higher")),
            row("skip", 0.7, against(-0.1, -0.2, -0.05, "lower")),
            row("last", 0.81, against(0.01, -0.02, 0.04, None)),
        ],
    }
    lines = text_table(record).splitlines()
    assert lines[2] == "emd      0.8500  0.8500    +0.0500 [+0.0100, +0.0900] higher               1,234.6     9,876"
    assert "-0.1000 [-0.2000, -0.0500] lower" in lines[3]
    assert "+0.0100 [-0.0200, +0.0400] no difference shown" in lines[4]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5].startswith("408 dev rows, seed 1; teacher f1 0.9000, accuracy 0.8750;")
    assert lines[6] == (
        '[95%]: paired bootstrap over dev rows, 1,000 resamples; "no difference shown" where it covers 0, which does not '
        "show that the mappings are equal."
    )
    page = markdown_table(record).splitlines()
    assert page[0] == "## Layer mappings on mrpc"
    assert page[2] == "| mapping | f1 | accuracy | f1 against uniform [95%] | seconds | tokens/s |"
    assert page[3] == "| :-- | --: | --: | :-- | --: | --: |"
    assert page[4] == "| uniform | 0.8000 | 0.8000 |  | 1,234.6 | 9,876 |"


@pytest.mark.parametrize(
    ("draws", "expected"),
    [([0.01, 0.02], "higher"), ([-0.02, -0.01], "lower"), ([-0.01, 0.01], None), ([-1e-6, -2e-6], None), ([0.0], None)],
)
def test_a_difference_too_small_to_be_printed_is_none(draws: list[float], expected: str | None) -> None:
    assert _interval(np.array(draws))["shown"] == expected
