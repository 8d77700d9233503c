"""The grid runner of the GLUE benchmark: it fills what is missing, line by line, and measures what a student is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.facts import read_student

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
Task = Callable[..., tuple[Path, Path]]

PLAN = """
grids:
  tiny:
    encoder: a-teacher
    student: {layers: 2, hidden: 16, heads: 2, intermediate: 32}
    quantize: {max_drop: 100}
    variants:
      none: {mapping: none}
      emd: {mapping: emd}
    tasks:
      small:
        folder: SMALL
        seeds: [1, 2]
        data: {task: classification, max_length: 32}
        teacher: {finetune: never}
        distill: {epochs: 1, batch_size: 8, learning_rate: 2.0e-3, keep_epoch: last, precision: float32}
        variants:
          none: {}
          emd: {beta: 0.05}
    tuning:
      held_out: 0.25
      seeds: [11]
      tasks:
        small:
          - {variant: emd, beta: 0.5}
"""


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch, tiny_task: Task, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return the command as a function of its options; it returns the lines that there are after it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import glue
    import glue_plan

    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN, encoding="utf-8")
    monkeypatch.setattr(glue_plan, "PLAN", plan)
    teacher, data = tiny_task()
    (tmp_path / "data").mkdir()
    data.rename(tmp_path / "data" / "SMALL")
    out = tmp_path / "lines.jsonl"

    def call(*options: str) -> list[dict[str, Any]]:
        places = ("--data", tmp_path / "data", "--encoder", teacher, "--work", tmp_path / "work", "--out", out)
        monkeypatch.setattr(sys, "argv", ["glue.py", "--grid", "tiny", *map(str, places), *options])
        with contextlib.suppress(SystemExit):
            glue.main()
        return glue.read_lines(out)

    return call


def test_a_grid_is_filled_once(grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import glue_plan

    _, emd = [cell for cell in glue_plan.cells(glue_plan.read_plan(), "tiny", tuning=False) if cell.first]
    left = tmp_path / "work" / "students" / f"{emd.name}-judged"  # by a run that was killed
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    first = grid("--variant", "emd")
    assert not left.exists()
    assert [(line["variant"], line["seed"]) for line in first] == [("emd", 1), ("emd", 2)]
    lines = grid()
    assert lines[:2] == first
    assert [(line["variant"], line["seed"]) for line in lines[2:]] == [("none", 1), ("none", 2)]
    before = (tmp_path / "lines.jsonl").read_bytes()
    capsys.readouterr()
    grid()
    assert (tmp_path / "lines.jsonl").read_bytes() == before
    assert "distill" not in capsys.readouterr().err
    grid("--plan")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done"] * 4
    assert sorted(path.name for path in (tmp_path / "work" / "artifacts").iterdir()) == [
        "tiny-small-emd-seed1",
        "tiny-small-none-seed1",
    ]


def test_a_line_says_what_was_trained_and_what_came_out(grid, tmp_path: Path) -> None:
    none, emd = grid()[:2]
    assert (none["key"] == emd["key"], emd["held_out"], emd["dev_rows"]) == (False, 0.0, 24)
    assert (emd["recipe"]["teacher"]["model"], emd["recipe"]["data"]["path"]) == ("a-teacher", "small")
    assert str(tmp_path) not in json.dumps(emd)
    assert emd["commit"]
    assert emd["machine"]["cpu"]
    assert (emd["steps"], emd["best_epoch"], len(emd["epochs"])) == (6, 1, 1)
    assert np.array(emd["flows"]["last"]["hidden_flow"]).shape == (4, 2)
    assert none["flows"] == {"first": None, "last": None, "marginals": []}
    assert emd["teacher"] == {"metrics": {"accuracy": 1.0}, "right": "1" * 24}
    assert set(emd["models"]) == {"torch", "fp32", "int8", "fused", "fused-int8"}
    assert emd["bytes"]["int8"] < emd["bytes"]["fp32"]
    assert [name for name, model in emd["models"].items() if "kls" in model] == ["torch", "int8"]
    for model in (emd["models"]["torch"], emd["models"]["int8"]):
        right = [int(bit) for bit in model["right"]]
        assert model["metrics"]["accuracy"] == pytest.approx(np.mean(right))
        assert model["agrees"] == model["right"]  # of a teacher that is always right
        assert model["agreement"] == model["metrics"]["accuracy"]
        assert model["kl"] == pytest.approx(np.mean(model["kls"]), abs=1e-5)
        assert min(model["kls"]) >= 0
    artifact = Artifact.load(tmp_path / "work" / "artifacts" / "tiny-small-emd-seed1")
    assert (len(artifact.evaluation()), emd["int8_judged_on"]) == (emd["train_rows"], "train")
    quantization = artifact.manifest["quantization"]
    assert emd["int8"] == {"commit": emd["commit"]} | {
        name: quantization[name] for name in ("activations", "smoothed_activations", "excluded")
    }
    assert set(emd["int8"]["smoothed_activations"]) == {"int8", "fused-int8"}
    (student,) = (tmp_path / "work" / "students").glob("tiny-small-emd-*-seed1")
    assert len(read_student(student).evaluation) == emd["dev_rows"]
    assert emd["models"]["fp32"]["kl"] == pytest.approx(emd["models"]["torch"]["kl"], rel=1e-3)


def test_students_start_from_a_checkpoint_of_their_own(
    grid, tiny_bert: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bertemd_deploy.files import sha256_file

    start = tiny_bert("start", head=False)
    grid("--start", str(start))
    assert "error: --start: the students of tiny have no use for it" in capsys.readouterr().err
    plan = tmp_path / "plan.yaml"
    text = plan.read_text(encoding="utf-8")
    plan.write_text(text.replace("intermediate: 32}", "intermediate: 32, init: other}"), encoding="utf-8")
    assert grid("--variant", "emd") == []
    assert "error: --start: the students of tiny need it" in capsys.readouterr().err
    assert grid("--variant", "emd", "--start", str(tmp_path / "nothing")) == []
    assert "nothing: there is no such folder" in capsys.readouterr().err
    assert grid("--variant", "emd", "--start", str(tmp_path / "data")) == []
    assert "config.json" in capsys.readouterr().err
    line, _ = grid("--variant", "emd", "--start", str(start))
    assert line["recipe"]["student"]["init"] == "other"
    assert line["sha256"]["start"] == sha256_file(start / "model.safetensors")
    assert str(tmp_path) not in json.dumps(line)
    assert f"checkpoint {start}" in capsys.readouterr().err


def test_settings_are_chosen_on_a_part_of_train(grid) -> None:
    (line,) = grid("--tuning")
    assert (line["held_out"], line["seed"], line["dev_rows"], line["train_rows"]) == (0.25, 11, 12, 36)
    assert line["recipe"]["distill"]["beta"] == 0.5
    assert set(line["models"]["torch"]) == {"metrics", "agreement", "kl"}


def test_the_student_s_settings_are_tried_beside_those_of_training(grid, tmp_path: Path) -> None:
    import glue_plan
    import glue_settings

    (plain,) = grid("--tuning")
    plan = (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    student = {"init_layers": [1, 3], "fit_layers": "always"}
    tried = plan.replace(
        "{variant: emd, beta: 0.5}", "{variant: emd, beta: 0.5, init_layers: [1, 3], fit_layers: always}"
    )
    (tmp_path / "plan.yaml").write_text(tried, encoding="utf-8")
    (cell,) = glue_plan.cells(glue_plan.read_plan(), "tiny", tuning=True)
    assert (cell.recipe.student.init_layers, cell.recipe.student.fit_layers) == ((1, 3), "always")
    assert cell.key != plain["key"]
    settings = glue_settings.distill_settings(cell.recipe.to_dict())
    assert {name: settings[name] for name in student} == student
    assert glue_settings.distill_settings(plain["recipe"]) == settings | {"init_layers": "auto", "fit_layers": "auto"}


def test_disk_for_the_teacher_s_outputs_makes_no_other_student(grid, tmp_path: Path) -> None:
    (line,) = grid("--tuning")
    plan = tmp_path / "plan.yaml"
    written = plan.read_text(encoding="utf-8")
    for setting, again in (("teacher_cache_bytes: 1000", []), ("temperature: 2", [line])):
        changed = written.replace("beta: 0.5}", f"beta: 0.5, {setting}}}")
        assert changed != written
        plan.write_text(changed, encoding="utf-8")
        assert len(grid("--tuning")) == 1 + len(again)


def test_held_out_rows_are_none_of_those_trained_on(grid, tmp_path: Path) -> None:
    import glue_plan

    (cell,) = glue_plan.cells(glue_plan.read_plan(), "tiny", tuning=True)
    data = glue_plan.cell_data(cell, tmp_path / "data" / "SMALL")
    again = glue_plan.cell_data(cell, tmp_path / "data" / "SMALL")
    whole = glue_plan.load_data(str(tmp_path / "data" / "SMALL"))
    texts = {name: list(part.texts) for name, part in data.splits.items()}
    assert sorted(texts["train"] + texts["dev"]) == sorted(whole.splits["train"].texts)
    assert list(again.splits["dev"].texts) == texts["dev"]
    assert data.sha256 != whole.sha256


def test_a_killed_run_leaves_no_half_line_and_goes_on(grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import glue

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    measure = sys.modules["glue_measure"].measure if "glue_measure" in sys.modules else None
    import glue_measure

    measure = measure or glue_measure.measure
    monkeypatch.setattr(glue_measure, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        grid("--variant", "none")
    assert not (tmp_path / "lines.jsonl").exists()
    monkeypatch.setattr(glue_measure, "measure", measure)
    assert len(grid("--variant", "none")) == 2
    assert glue.finished(tmp_path / "lines.jsonl")


def test_half_a_line_is_not_read_and_not_kept(grid, tmp_path: Path) -> None:
    import glue

    path = tmp_path / "lines.jsonl"
    glue.append(path, {"recipe": {}, "number": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"numb')
    assert glue.read_lines(path) == [{"recipe": {}, "number": 1}]
    glue.append(path, {"recipe": {}, "number": 2})
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")  # as some editors leave it
    glue.append(path, {"recipe": {}, "number": 3})
    assert [line["number"] for line in glue.read_lines(path)] == [1, 2, 3]
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == '{"recipe": {}, "number": 1}\n{"recipe": {}, "number": 2}\n'


def test_a_line_older_than_a_setting_still_counts(grid, tmp_path: Path) -> None:
    lines = grid("--variant", "none")
    for line in lines:
        del line["recipe"]["distill"]["cost_scale"]
        line["key"] = "of another time"
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    again = grid("--variant", "none")
    assert [line["finished"] for line in again] == [line["finished"] for line in lines]
    assert {line["recipe"]["distill"]["cost_scale"] for line in again} == {"absolute"}
    lines[0]["recipe"]["distill"]["beta"] = 0.7
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert len(grid("--variant", "none")) == 3


def test_what_another_process_is_at_is_left_to_it(grid, tmp_path: Path) -> None:
    import glue
    import glue_plan

    first, *_ = glue_plan.cells(glue_plan.read_plan(), "tiny", tuning=False)
    with glue.claimed(tmp_path / "work" / "locks" / first.name) as ours:
        assert ours
        lines = grid()
    assert len(lines) == 3
    assert (first.variant, first.seed) not in {(line["variant"], line["seed"]) for line in lines}


def test_divergence_by_hand(grid) -> None:
    import glue_measure

    teacher = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    student = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float32)) + 3
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0]
    np.testing.assert_allclose(glue_measure.divergences(teacher, student), expected, atol=1e-6)


def test_teachers_are_fine_tuned_once_and_students_timed_beside_them(
    grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import glue_latency

    from bertemd_deploy.bench import compare
    from bertemd_deploy.files import sha256_file

    plan = tmp_path / "plan.yaml"
    tuned = "{finetune: always, epochs: 6, batch_size: 8, learning_rate: 2.0e-3, keep_epoch: last, precision: float32}"
    plan.write_text(plan.read_text(encoding="utf-8").replace("{finetune: never}", tuned), encoding="utf-8")
    lines = grid("--variant", "emd")
    assert len({line["sha256"]["teacher"] for line in lines}) == 1
    (teacher,) = (tmp_path / "work" / "teachers").iterdir()
    assert sha256_file(teacher / "model.safetensors") == lines[0]["sha256"]["teacher"]

    out, really = tmp_path / "latency.json", compare.bench
    noisy, records = True, []

    def bench(*places: Any, settings: Any, **options: Any) -> dict[str, Any]:
        if not records:  # measured once, briefly
            records.append(really(*places, settings=dataclasses.replace(settings, seconds_per_cell=0.02), **options))
        return records[0] | {"noise": {"noisy": noisy, "reasons": []}}

    def measure() -> int:
        places = ("--work", tmp_path / "work", "--out", out, "--rounds", "5")
        monkeypatch.setattr(sys, "argv", ["glue_latency.py", "--grid", "tiny", *map(str, places)])
        with pytest.raises(SystemExit) as ended:
            glue_latency.main()
        return int(ended.value.code or 0)

    monkeypatch.setattr(compare, "bench", bench)
    assert (measure(), out.exists()) == (3, False)
    assert "tiny: small: too noisy, not kept" in capsys.readouterr().err
    noisy = False
    out.write_text(json.dumps({"grids": {"another": {"task": {}}}}), encoding="utf-8")
    assert measure() == 0
    kept = json.loads(out.read_text(encoding="utf-8"))["grids"]
    assert kept["another"] == {"task": {}}
    models = {(one["model"], one["lengths"]): one for one in kept["tiny"]["small"]["models"]}
    teachers = {"teacher-pytorch", "teacher-onnxruntime"}
    assert {name for name, _ in models} == teachers | {"fp32", "int8", "fused", "fused-int8"}
    assert {lengths for _, lengths in models} == {"replay", 32}
    assert models["teacher-pytorch", "replay"]["speedup"] is None
    int8 = models["int8", "replay"]
    assert len(int8["latency_ms"]["samples"]) == int8["latency_ms"]["n"] > 2
    assert int8["speedup"][1] <= int8["speedup"][0] <= int8["speedup"][2]
    assert int8["bytes"] == lines[0]["bytes"]["int8"]
    assert str(tmp_path) not in json.dumps(kept)
