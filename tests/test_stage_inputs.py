"""What a stage's result depends on: what changes it is in, what does not is out, and runs of earlier versions stay the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_family import write_family

from bertemd_deploy.checkpoints import WEIGHTS
from bertemd_deploy.config import Recipe, build_recipe
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.facts import FACTS, RANGES
from bertemd_deploy.files import sha256_file, sha256_json
from bertemd_deploy.settings import MAPPINGS
from bertemd_deploy.stage_inputs import changed_inputs, distill_inputs, export_inputs, finetune_inputs, is_same
from bertemd_deploy.targets import resolve

SHARED = {"data": "abc", "max_length": 32}
SIZES = {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 32}
# The settings that the first version had, and so hashed.
FIRST_DISTILL = re.findall(
    r"\w+",
    """
    mapping epochs batch_size learning_rate warmup_ratio weight_decay max_grad_norm beta theta alpha temperature reduction
    cost_attention emd_temperature separate_marginals hidden_projection seed precision logging_steps checkpoint_seconds
    """,
)
FIRST_TEACHER = re.findall(
    r"\w+",
    """
    model sha256 finetune epochs batch_size learning_rate warmup_ratio weight_decay seed precision checkpoint_seconds
    """,
)
# What was done before there were settings for it.
BEFORE = {"marginal_momentum": 0.0, "transported_mass": 1.0, "mapped_layers": "all", "cost_scale": "absolute"}
FIRST_STUDENT = ("name", "layers", "hidden", "heads", "intermediate", "init")


def recipe(model: Path, **changes: dict[str, Any]) -> Recipe:
    content: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(model), "precision": "float32"},
        "data": {"path": "demo"},
        "student": SIZES,
        "distill": BEFORE | {"precision": "float32"},
    }
    for section, body in changes.items():
        content[section] = content.get(section, {}) | body
    return build_recipe(content, where="test")


@pytest.mark.parametrize(
    "change",
    [
        {"distill": {"keep_epoch": "last"}},
        {"distill": {"marginal_momentum": 0.5}},
        {"distill": {"transported_mass": 0.5}},
        {"distill": {"mapped_layers": "intermediate"}},
        {"distill": {"cost_scale": "relative"}},
        {"distill": {"dropout": 0.0}},
    ],
)
def test_later_settings_are_inputs_where_they_do_something(teacher: Path, change: dict[str, Any]) -> None:
    plain = distill_inputs(recipe(teacher), teacher, SHARED)
    assert not is_same(sha256_json(plain), distill_inputs(recipe(teacher, **change), teacher, SHARED))


@pytest.mark.parametrize(
    ("mapping", "name", "value"),
    [
        ("uniform", "marginal_momentum", 0.5),
        ("emd-fixed", "marginal_momentum", 0.5),
        ("uniform", "transported_mass", 0.5),
        ("skip", "mapped_layers", "intermediate"),
        ("none", "cost_scale", "relative"),
    ],
)
def test_later_settings_are_no_inputs_where_they_do_nothing(teacher: Path, mapping: str, name: str, value: Any) -> None:
    plain = distill_inputs(recipe(teacher, distill={"mapping": mapping}), teacher, SHARED)
    with_it = recipe(teacher, distill={"mapping": mapping, name: value})
    assert distill_inputs(with_it, teacher, SHARED) == plain


@pytest.mark.parametrize(
    ("student", "mapped", "mass"),
    [
        ({"layers": 2}, "intermediate", 1 / 3),  # copies of two of the teacher's four layers
        ({"layers": 2, "fit_layers": "always"}, "all", 1.0),
        ({"layers": 2, "init": "random"}, "all", 1.0),
    ],
)
def test_settings_left_to_the_student_s_start_are_inputs_as_they_come_to(
    tiny_bert: Callable[..., Path], student: dict[str, Any], mapped: str, mass: float
) -> None:
    teacher = tiny_bert("deep", layers=4)

    def inputs(**flow: Any) -> dict[str, Any]:
        return distill_inputs(recipe(teacher, student=student, distill=flow), teacher, SHARED)

    left = inputs(transported_mass=None, mapped_layers="auto")
    assert left == inputs(transported_mass=mass, mapped_layers=mapped)
    assert left != inputs(transported_mass=0.5, mapped_layers=mapped)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_other_defaults_are_other_inputs_where_they_do_something(teacher: Path, mapping: str) -> None:
    content = {
        "teacher": {"model": str(teacher)},
        "data": {"path": "demo"},
        "student": SIZES | {"layers": 2, "init": "random"},
    }
    now = build_recipe(content | {"distill": {"mapping": mapping}}, where="test")
    then = build_recipe(content | {"distill": {"mapping": mapping, "beta": 0.005} | BEFORE}, where="test")
    before = sha256_json(distill_inputs(then, teacher, SHARED))
    assert is_same(before, distill_inputs(now, teacher, SHARED)) is (mapping == "none")


def test_the_epoch_that_is_kept_is_an_input_of_the_teacher(teacher: Path) -> None:
    plain = finetune_inputs(recipe(teacher), teacher, SHARED)
    last = finetune_inputs(recipe(teacher, teacher={"keep_epoch": "last"}), teacher, SHARED)
    assert not is_same(sha256_json(plain), last)


@pytest.fixture
def teacher(tiny_bert: Callable[..., Path]) -> Path:
    return tiny_bert("teacher")


def test_the_inputs_of_earlier_versions_are_recognised(teacher: Path) -> None:
    settings = recipe(teacher)
    distil = asdict(settings.distill)
    first = SHARED | {
        "teacher": sha256_file(teacher / WEIGHTS),
        "student": {name: asdict(settings.student)[name] for name in FIRST_STUDENT},
        "distill": {name: distil[name] for name in FIRST_DISTILL},
    }
    assert is_same(sha256_json(first), distill_inputs(settings, teacher, SHARED))
    assert not is_same(sha256_json(first | {"data": "abd"}), distill_inputs(settings, teacher, SHARED))
    tuned = SHARED | {
        "weights": sha256_file(teacher / WEIGHTS),
        "teacher": {name: asdict(settings.teacher)[name] for name in FIRST_TEACHER},
    }
    assert is_same(sha256_json(tuned), finetune_inputs(settings, teacher, SHARED))
    assert not is_same(None, finetune_inputs(settings, teacher, SHARED))


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4},
        {"teacher_cache_bytes": 10**9},
        {"logging_steps": 3},
        {"checkpoint_seconds": 1},
        {"augmentation_copies": 3, "augmentation_rate": 0.5},  # of an augmentation that is off
    ],
)
def test_what_changes_no_student_is_no_input(teacher: Path, changes: dict[str, Any]) -> None:
    plain = distill_inputs(recipe(teacher), teacher, SHARED)
    assert distill_inputs(recipe(teacher, distill=changes), teacher, SHARED) == plain


@pytest.mark.parametrize("changes", [{"micro_batch_size": 4}, {"checkpoint_seconds": 1}])
def test_what_changes_no_teacher_is_no_input(teacher: Path, changes: dict[str, Any]) -> None:
    plain = finetune_inputs(recipe(teacher), teacher, SHARED)
    assert finetune_inputs(recipe(teacher, teacher=changes), teacher, SHARED) == plain


def test_augmentation_is_an_input_with_its_settings_and_language_model(teacher: Path) -> None:
    def inputs(**changes: Any) -> dict[str, Any]:
        return distill_inputs(recipe(teacher, distill=changes), teacher, SHARED)

    found = [
        inputs(),
        inputs(augmentation="dropout"),
        inputs(augmentation="dropout", augmentation_rate=0.5),
        inputs(augmentation="mlm"),
    ]
    assert len({sha256_json(each) for each in found}) == 4
    assert found[3]["language_model"] == sha256_file(teacher / WEIGHTS)
    assert not is_same(sha256_json(found[0]), found[1])


def test_what_an_artifact_depends_on(teacher: Path) -> None:
    def inputs(**changes: dict[str, Any]) -> dict[str, Any]:
        return export_inputs(recipe(teacher, **changes), teacher)

    (teacher / FACTS).write_text("{}")
    plain = inputs()
    first = {
        "weights": sha256_file(teacher / WEIGHTS),
        "facts": sha256_file(teacher / FACTS),
        "export": {"exporter": "torchscript", "opset": 17},
        "quantize": {"mode": "dynamic", "max_drop": 1.0},
    }
    assert is_same(sha256_json(first), plain)
    assert inputs(export={"target": "auto"}) == inputs(export={"target": resolve("auto").name})
    others = [
        inputs(export={"target": "arm64"}),
        inputs(export={"vocabulary": 100}),
        inputs(export={"tokenizer_inside": True}),
        inputs(quantize={"embedding_bits": 4}),
        inputs(quantize={"max_changed": 1.0}),
    ]
    (teacher / RANGES).write_text("{}")
    others.append(inputs())
    assert changed_inputs(plain, others[-1]) == "ranges"
    assert len({sha256_json(each) for each in (plain, *others)}) == 7


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("make", [distill_inputs, finetune_inputs])
def test_a_model_s_config_and_tokenizer_are_inputs(teacher: Path, name: str, make: Callable[..., Any]) -> None:
    before = make(recipe(teacher), teacher, SHARED)
    content = json.loads((teacher / name).read_text())
    (teacher / name).write_text(json.dumps(content | {"hidden_dropout_prob": 0.25}))
    after = make(recipe(teacher), teacher, SHARED)
    assert not is_same(sha256_json(before), after)
    assert changed_inputs(before, after) == f"model_files.{name}"


def test_the_weights_a_student_starts_from_are_an_input(
    teacher: Path, tiny_bert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bertemd_deploy import students

    start = tiny_bert("start", seed=3)
    monkeypatch.setitem(students.STUDENTS, "4L", students.Shape(2, start=str(start)))
    settings = [
        recipe(teacher, student={"init": str(start)}),
        recipe(teacher, student=dict.fromkeys(SIZES) | {"name": "4L"}),
    ]
    before = [distill_inputs(one, teacher, SHARED) for one in settings]
    for one in before:
        assert one["initial_weights"][WEIGHTS] == sha256_file(start / WEIGHTS)
    (start / WEIGHTS).write_bytes((teacher / WEIGHTS).read_bytes())
    for one, old in zip(settings, before, strict=True):
        new = distill_inputs(one, teacher, SHARED)
        assert not is_same(sha256_json(old), new)
        assert changed_inputs(old, new) == f"initial_weights.{WEIGHTS}"
    for init in ("auto", "random", "teacher"):
        assert "initial_weights" not in distill_inputs(recipe(teacher, student={"init": init}), teacher, SHARED)
    with pytest.raises(ModelError, match="there is no such folder"):
        distill_inputs(recipe(teacher, student={"init": "./absent"}), teacher, SHARED)


def test_fitted_layers_and_whole_scores_are_inputs_where_there_are_any(
    teacher: Path, tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    plain = distill_inputs(recipe(teacher), teacher, SHARED)
    assert "fit_layers" not in plain["student"]
    assert distill_inputs(recipe(teacher, student={"fit_layers": "never"}), teacher, SHARED) == plain
    always = distill_inputs(recipe(teacher, student={"fit_layers": "always"}), teacher, SHARED)
    assert changed_inputs(plain, always) == "student.fit_layers"
    random = {"init": "random"}
    elsewhere = [recipe(teacher, student=random | {"fit_layers": setting}) for setting in ("auto", "always", "never")]
    assert len({sha256_json(distill_inputs(one, teacher, SHARED)) for one in elsewhere}) == 1
    mpnet = write_family(tmp_path / "mpnet", "mpnet")
    found = distill_inputs(recipe(mpnet), mpnet, SHARED)
    assert found["student"]["fit_layers"] == "codes held"
    assert found["scores"] == "whole"
    assert found["student"]["init_layers"] == [1, 2]
    never = distill_inputs(recipe(mpnet, student={"fit_layers": "never"}), mpnet, SHARED)
    assert changed_inputs(never, found) == "student.fit_layers"
    content = json.loads((teacher / "config.json").read_text())
    del content["model_type"]  # as old checkpoints are
    (teacher / "config.json").write_text(json.dumps(content))
    assert "fit_layers" not in distill_inputs(recipe(teacher), teacher, SHARED)["student"]
    logits_only = distill_inputs(recipe(mpnet, distill={"mapping": "none"}), mpnet, SHARED)
    assert "scores" not in plain | logits_only


def test_the_layers_that_are_copied_are_inputs_where_they_are_not_evenly_spaced(
    tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    def inputs(model: Path, **student: Any) -> dict[str, Any]:
        return distill_inputs(recipe(model, student=student), model, SHARED)

    teacher = tiny_bert("of-four", layers=4)
    plain = inputs(teacher)
    for rule in ("auto", "even", [2, 4]):
        assert inputs(teacher, init_layers=rule) == plain
    first = inputs(teacher, init_layers="first")
    assert changed_inputs(plain, first) == "student.init_layers"
    assert inputs(teacher, init_layers=[1, 2]) == first
    assert changed_inputs(json.loads(json.dumps(first)), first) == ""
    assert inputs(teacher, init="random") == plain | {"student": plain["student"] | {"init": "random"}}
    mpnet = write_family(tmp_path / "mpnet", "mpnet")
    assert inputs(mpnet) == inputs(mpnet, init_layers="first")
    assert changed_inputs(inputs(mpnet), inputs(mpnet, init_layers="even")) == "student.init_layers"
    same, deeper = (str(tiny_bert(f"start-{layers}", layers=layers)) for layers in (2, 3))
    assert inputs(teacher, init=same, init_layers="first") == inputs(teacher, init=same)
    assert changed_inputs(inputs(teacher, init=deeper), inputs(teacher, init=deeper, init_layers=[2, 3])) == (
        "student.init_layers"
    )
    for start, layers, of in (("teacher", [1, 5], "4 of the teacher"), (deeper, [1, 4], f"3 of {deeper}")):
        with pytest.raises(RecipeError, match=re.escape(f"different layers of 1 to {of}, in rising order")):
            inputs(teacher, init=start, init_layers=layers)


def test_changed_inputs_are_named() -> None:
    before = {"data": "a", "distill": {"epochs": 1, "seed": 1}}
    assert changed_inputs(before, {"data": "b", "distill": {"epochs": 2, "seed": 1}}) == "data, distill.epochs"
    assert changed_inputs(before, before | {"model_files": {"config.json": "x"}}) == ""  # an earlier version had none
    assert changed_inputs(None, before) == "unknown"
