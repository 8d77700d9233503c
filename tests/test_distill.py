"""Distillation: every mapping trains, the folder carries what export needs, and a resumed run is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bertemd_deploy.artifact import read_slices
from bertemd_deploy.data import load_data
from bertemd_deploy.distill import distill
from bertemd_deploy.errors import ArtifactError, ModelError
from bertemd_deploy.evaluate import evaluate_folder
from bertemd_deploy.export import export
from bertemd_deploy.facts import facts_from_data, read_student
from bertemd_deploy.files import sha256_file
from bertemd_deploy.objective import Distiller
from bertemd_deploy.settings import MAPPINGS, DistillSettings, ExportSettings, QuantizeSettings, StudentSettings

Make = Callable[..., Path]
Task = Callable[..., tuple[Path, Path]]
SMALL = StudentSettings(layers=2, hidden=16, heads=2, intermediate=32)
NARROW = StudentSettings(layers=2, hidden=8, heads=1, intermediate=16, init="random")
FLOWS = {"attention_flow", "hidden_flow", "attention_teacher", "hidden_student"}


def train(
    teacher: Path,
    data: Path,
    out: Path,
    *,
    task: str | None = None,
    student: StudentSettings = SMALL,
    **settings: Any,
) -> dict[str, Any]:
    plain = {"epochs": 2, "batch_size": 8, "learning_rate": 2e-3, "beta": 0.05, "logging_steps": 2}
    return distill(
        teacher,
        data=load_data(str(data), task=task),
        max_length=32,
        student=student,
        settings=DistillSettings(**(plain | settings)),
        out=out,
        checkpoints=out.with_name(f"{out.name}-checkpoints"),
        log=out.with_name(f"{out.name}.jsonl"),
        teacher_name="the-teacher",
    )


def steps(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, out.with_name(f"{out.name}.jsonl").read_text().splitlines())
    return [line for line in lines if "losses" in line]


@pytest.mark.parametrize("mapping", ["emd", "emd-fixed"])
def test_flows_between_intermediate_layers_reach_no_last_layer(tiny_task: Task, tmp_path: Path, mapping: str) -> None:
    teacher, data = tiny_task()
    train(teacher, data, tmp_path / "student", mapping=mapping, mapped_layers="intermediate")
    for line in steps(tmp_path / "student"):
        for side in ("attention", "hidden"):
            flow = np.array(line[f"{side}_flow"])
            assert flow.shape == (4, 2)
            np.testing.assert_allclose(flow[:3, 0].sum(), 1.0)
            assert (flow[3] == 0).all()
            assert (flow[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("student", "mapped", "mass"),
    [({}, "intermediate", 1 / 3), ({"fit_layers": "always"}, "all", 1.0), ({"init": "random"}, "all", 1.0)],
)
def test_what_is_left_open_follows_the_student_s_start(
    tiny_task: Task, tmp_path: Path, student: dict[str, str], mapped: str, mass: float
) -> None:
    teacher, data = tiny_task()
    own = replace(SMALL, **student)
    record = train(teacher, data, tmp_path / "student", student=own, epochs=1)
    assert (record["mapped_layers"], record["transported_mass"]) == (mapped, pytest.approx(mass))
    for line in steps(tmp_path / "student"):
        flow = np.array(line["hidden_flow"])
        np.testing.assert_allclose(flow.sum(), 1.0)
        assert bool((flow[3] == 0).all() and (flow[:, 1] == 0).all()) is (mapped == "intermediate")


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_mapping_trains(tiny_task: Task, tmp_path: Path, mapping: str) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "student"
    record = train(teacher, data, out, mapping=mapping, epochs=4)
    logged = steps(out)
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert record["metrics"]["teacher"] == {"accuracy": 1.0}
    assert record["start"] == "teacher layers 2, 4"
    assert (record["teacher_layers"], record["student_layers"], record["steps"]) == (4, 2, 24)
    again = evaluate_folder(out, data=load_data(str(data)), max_length=32)
    assert again["metrics"] == record["metrics"]["student"]
    summary = read_student(out).distillation
    if mapping == "none":
        assert set(logged[0]["losses"]) == {"prediction"}
        assert not FLOWS & set(logged[0])
        assert summary["first"] is summary["last"] is None
        assert summary["marginals"] == []
        return
    assert set(logged[0]["losses"]) == {"attention", "hidden", "embedding", "prediction"}
    assert set(logged[0]) >= FLOWS
    for line in logged:
        for side in ("attention", "hidden"):
            flow = np.array(line[f"{side}_flow"])
            assert flow.shape == (4, 2)
            np.testing.assert_allclose(flow.sum(), 1.0)
    np.testing.assert_array_equal(summary["first"]["hidden_flow"], logged[0]["hidden_flow"])
    np.testing.assert_array_equal(summary["last"]["hidden_flow"], logged[-1]["hidden_flow"])
    parts = logged[0]["losses"]
    total = 0.05 * (parts["attention"] + parts["hidden"] + parts["embedding"]) + parts["prediction"]
    assert logged[0]["loss"] == pytest.approx(total, rel=1e-5)


def test_the_last_epoch_is_kept_where_that_is_asked_for(tiny_task: Task, tmp_path: Path) -> None:
    """A student that forgets: its best epoch is the first, and only `keep_epoch: last` takes another."""
    teacher, data = tiny_task()
    dev = {}
    for keep in ("best", "last"):
        record = train(teacher, data, tmp_path / keep, epochs=6, learning_rate=1e-6, keep_epoch=keep, mapping="none")
        dev[keep] = [line["accuracy"] for line in read_student(tmp_path / keep).distillation["dev"]]
        assert record["best_epoch"] == (6 if keep == "last" else 1 + int(np.argmax(dev[keep])))
        assert record["metrics"]["student"]["accuracy"] == dev[keep][record["best_epoch"] - 1]
    assert dev["best"] == dev["last"]
    assert np.argmax(dev["best"]) < 5


def test_marginals_move_with_emd_alone(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    for mapping, moves in (("emd", True), ("emd-fixed", False)):
        train(teacher, data, tmp_path / mapping, mapping=mapping, mapped_layers="all", epochs=1)
        weights = np.array(steps(tmp_path / mapping)[-1]["hidden_teacher"])
        np.testing.assert_allclose(weights.sum(), 1.0)
        assert np.allclose(weights, 0.25) is not moves


def test_separate_marginals_part_and_shared_ones_agree(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    for separate in (False, True):
        out = tmp_path / f"student-{separate}"
        train(teacher, data, out, separate_marginals=separate, epochs=1)
        line = steps(out)[-1]
        same = np.allclose(line["attention_teacher"], line["hidden_teacher"])
        assert same is not separate


def test_softmax_cost_attention_trains_on_other_marginals(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    train(teacher, data, tmp_path / "ratio", epochs=1)
    train(teacher, data, tmp_path / "softmax", epochs=1, cost_attention="softmax", emd_temperature=2.0)
    ratio, softmax = (steps(tmp_path / name)[-1]["hidden_teacher"] for name in ("ratio", "softmax"))
    assert not np.allclose(ratio, softmax)


def test_a_projection_starts_as_the_identity_where_widths_agree() -> None:
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = Distiller(torch.nn.Linear(1, 1), student_hidden=4, teacher_hidden=4, project=False, seed=0)
    asked = Distiller(torch.nn.Linear(1, 1), student_hidden=4, teacher_hidden=4, project=True, seed=0)
    assert plain.projection is None
    torch.testing.assert_close(plain.project(hidden), hidden)
    torch.testing.assert_close(asked.project(hidden), hidden)
    wider = Distiller(torch.nn.Linear(1, 1), student_hidden=4, teacher_hidden=6, project=True, seed=0)
    assert wider.project(hidden).shape == (2, 3, 6)
    some = Distiller(
        torch.nn.Linear(1, 1), student_hidden=4, teacher_hidden=4, project=True, seed=0, left_out=torch.tensor([1, 3])
    )
    torch.testing.assert_close(some.project(hidden), hidden * torch.tensor([1.0, 0, 1, 0]))
    assert some.state_dict().keys() == asked.state_dict().keys()  # checkpoints stay as they are


def test_a_learned_projection_changes_the_student_but_is_not_in_it(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    train(teacher, data, tmp_path / "plain", epochs=1)
    train(teacher, data, tmp_path / "projected", epochs=1, hidden_projection=True)
    first, second = (steps(tmp_path / name)[0]["losses"] for name in ("plain", "projected"))
    assert first == pytest.approx(second, rel=1e-3)  # the identity, so the first step is the same but for rounding
    plain, projected = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "projected"))
    assert plain.keys() == projected.keys()
    assert any(not torch.equal(value, projected[name]) for name, value in plain.items())


@pytest.mark.parametrize("mapping", ["emd", "none"])
def test_a_random_student_of_another_width_trains_and_resumes(
    tiny_task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], mapping: str
) -> None:
    teacher, data = tiny_task()
    settings: dict[str, Any] = {"student": NARROW, "mapping": mapping, "epochs": 3}
    record = train(teacher, data, tmp_path / "student", **settings)
    told = capsys.readouterr().err
    assert record["start"] == "random weights"
    assert "! the student starts from RANDOM weights" in told
    assert ("heads differ (teacher 2, student 1)" in told) is (mapping == "emd")
    logged = steps(tmp_path / "student")
    if mapping == "emd":
        assert logged[-1]["losses"]["hidden"] < logged[0]["losses"]["hidden"]
    train(teacher, data, tmp_path / "cut", **settings)
    shutil.rmtree(tmp_path / "cut")  # as if killed before the student was saved: the checkpoint is continued
    train(teacher, data, tmp_path / "cut", **settings)
    assert sha256_file(tmp_path / "cut" / "model.safetensors") == sha256_file(
        tmp_path / "student" / "model.safetensors"
    )


@pytest.mark.parametrize("kind", ["pair", "regression"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_pairs_and_regression_are_distilled(tiny_task: Task, tmp_path: Path, kind: str, alpha: float) -> None:
    teacher, data = tiny_task(kind)
    task = "regression" if kind == "regression" else None
    record = train(teacher, data, tmp_path / "student", task=task, alpha=alpha, epochs=4)
    logged = steps(tmp_path / "student")
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert list(record["metrics"]["student"]) == (["pearson", "spearman"] if task else ["accuracy"])
    assert read_student(tmp_path / "student").labels == ([] if task else ["no", "yes"])


def test_the_student_folder_carries_what_export_needs(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "student"
    record = train(teacher, data, out)
    facts = read_student(out)
    assert facts.labels == ["no", "yes"]
    assert facts.max_length == 32
    assert facts.metrics == record["metrics"]
    weights = sha256_file(teacher / "model.safetensors")
    assert facts.teacher == {"name": "the-teacher", "layers": 4, "sha256": weights}
    assert facts.task == {"name": "classification", "kind": "classification", "metrics": ["accuracy"], "pairs": False}
    assert len(facts.evaluation.labels) == 24
    assert len(facts.calibration.labels) == 48
    assert set(read_slices(out / "eval.npz")) == {"evaluation", "calibration"}
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert [line["epoch"] for line in facts.distillation["dev"]] == [1, 2]
    assert facts.distillation["seed"] == 42


def test_a_student_of_the_data_s_order_though_the_teacher_s_is_another(tiny_task: Task, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    teacher, data = tiny_task()
    config = json.loads((teacher / "config.json").read_text())
    swapped = {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (teacher / "config.json").write_text(json.dumps(config | swapped))
    weights = load_file(teacher / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    record = train(teacher, data, tmp_path / "student", epochs=1)
    assert record["metrics"]["teacher"] == {"accuracy": 1.0}
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}


def test_a_teacher_that_knows_nothing_is_refused(tiny_task: Task, tiny_bert: Make, tmp_path: Path) -> None:
    _, data = tiny_task()
    stranger = tiny_bert("stranger", layers=4, labels=("yes", "no"), seed=3)
    weights = load_file(stranger / "model.safetensors")
    weights["classifier.bias"][0] = 1000.0  # always "yes"
    from safetensors.torch import save_file

    save_file(weights, stranger / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stranger: its dev accuracy is .*no better than always answering the most"):
        train(stranger, data, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_student_trained_for_int8_is_exported_with_the_ranges_it_learnt(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "student"
    record = train(teacher, data, out, epochs=4, quant_aware=True, quant_aware_epochs=2)
    assert record["best_epoch"] >= 3  # earlier ones had no ranges
    facts = read_student(out)
    made = export(
        out,
        out=tmp_path / "artifact",
        task=facts.task,
        labels=facts.labels,
        max_length=facts.max_length,
        evaluation=facts.evaluation,
        calibration=facts.calibration,
        teacher=facts.teacher,
        reference_metrics=facts.metrics,
        distillation=facts.distillation,
        settings=ExportSettings(target="x86-avx512-vnni"),
        quantization=QuantizeSettings(mode="static", max_drop=50),
    )
    trials = made.manifest["quantization"]["trials"]
    assert {trial["method"] for trial in trials} == {"training"}
    assert made.manifest["quantization"]["method"] == {"int8": "training", "fused-int8": "training"}


def test_a_student_from_a_checkpoint(tiny_task: Task, tiny_bert: Make, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    small = tiny_bert("small", layers=2, hidden=8, intermediate=16, head=False)
    student = StudentSettings(layers=2, hidden=8, heads=2, intermediate=16, init=str(small))
    record = train(teacher, data, tmp_path / "student", student=student, epochs=1)
    assert record["start"] == f"checkpoint {small}"


def test_a_checkpoint_of_another_tokenizer_is_refused(tiny_task: Task, tiny_bert: Make, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    small = tiny_bert("small", layers=2, head=False)
    content = json.loads((small / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["goo"] = vocabulary.pop("good")
    (small / "tokenizer.json").write_text(json.dumps(content))
    student = StudentSettings(layers=2, hidden=16, heads=2, intermediate=32, init=str(small))
    with pytest.raises(ModelError) as raised:
        train(teacher, data, tmp_path / "student", student=student)
    count = len(vocabulary)
    assert f"its tokenizer has {count - 1} of the teacher's {count} tokens (96.6%; at least 99%" in str(raised.value)
    assert "it lacks 'good'. Start from teacher layers" in str(raised.value)


@pytest.mark.parametrize("missing", ["labels", "evaluation"])
def test_a_damaged_student_folder_is_named(tiny_task: Task, tmp_path: Path, missing: str) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "student"
    train(teacher, data, out, epochs=1)
    if missing == "labels":
        facts = json.loads((out / "bertemd_student.json").read_text())
        del facts["labels"]
        (out / "bertemd_student.json").write_text(json.dumps(facts))
    else:
        stored = dict(np.load(out / "eval.npz"))
        np.savez(out / "eval.npz", **{name: value for name, value in stored.items() if "evaluation" not in name})
    with pytest.raises(ModelError, match=rf"bertemd_student\.json: lacks {missing}\. Distil the student again\."):
        read_student(out)
    (out / "bertemd_student.json").unlink()
    with pytest.raises(ArtifactError, match="the student's facts is missing"):
        read_student(out)


def test_facts_of_a_classifier_made_elsewhere(tiny_task: Task) -> None:
    teacher, folder = tiny_task()
    data = load_data(str(folder))
    facts = facts_from_data(teacher, data, max_length=32)
    assert facts.labels == ["no", "yes"]
    assert facts.teacher == facts.metrics == facts.distillation == {}
    assert (len(facts.evaluation.labels), len(facts.calibration.labels)) == (24, 48)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"id2label": {"0": "yes", "1": "no"}}))
    with pytest.raises(ModelError, match=r"its labels stand in another order \(yes, no\) than the data's \(no, yes\)"):
        facts_from_data(teacher, data, max_length=32)
