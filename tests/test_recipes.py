from __future__ import annotations

from pathlib import Path

import pytest

from bertemd_deploy.config import load_recipe
from bertemd_deploy.tasks import GLUE, TASKS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# beta, T_emd, tau_kd and learning rate as published, per student and task
PUBLISHED = {
    ("4l", "cola"): (0.001, 5, 1, 2e-5),
    ("4l", "mnli"): (0.005, 1, 3, 5e-5),
    ("4l", "mrpc"): (0.001, 10, 1, 2e-5),
    ("4l", "qqp"): (0.005, 1, 3, 2e-5),
    ("4l", "qnli"): (0.005, 1, 3, 2e-5),
    ("4l", "rte"): (0.005, 1, 1, 2e-5),
    ("4l", "sst2"): (0.001, 1, 1, 2e-5),
    ("4l", "stsb"): (0.005, 1, 1, 3e-5),
    ("6l", "cola"): (0.001, 1, 7, 2e-5),
    ("6l", "mnli"): (0.005, 1, 1, 5e-5),
    ("6l", "mrpc"): (0.005, 1, 1, 2e-5),
    ("6l", "qqp"): (0.005, 1, 1, 2e-5),
    ("6l", "qnli"): (0.001, 1, 1, 5e-5),
    ("6l", "rte"): (0.005, 1, 1, 2e-5),
    ("6l", "sst2"): (0.001, 1, 1, 2e-5),
    ("6l", "stsb"): (0.005, 1, 1, 3e-5),
}
EPOCHS = {"cola": 50, "mnli": 5, "mrpc": 20, "sst2": 8, "stsb": 30, "qqp": 10, "qnli": 10, "rte": 20}
LENGTHS = dict.fromkeys(GLUE, 128) | {"cola": 64, "sst2": 64}


def test_all_recipes_are_there():
    assert len(RECIPES) == 17
    names = {f"{task}-{size}" for size, task in PUBLISHED} | {"quickstart"}
    assert {path.stem for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.distill.mapping == "emd"
    assert recipe.quantize.mode == "dynamic"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_line_is_the_command_that_runs_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# bertemd run {path.relative_to(ROOT).as_posix()} --out runs/{path.stem}"


@pytest.mark.parametrize(("size", "task"), PUBLISHED)
def test_published_settings(size, task):
    recipe = load_recipe(ROOT / "recipes" / f"{task}-{size}.yaml")
    distill = recipe.distill
    found = (distill.beta, distill.emd_temperature, distill.temperature, distill.learning_rate)
    assert found == PUBLISHED[size, task]
    assert (distill.epochs, recipe.data.max_length) == (EPOCHS[task], LENGTHS[task])
    assert (distill.alpha, distill.theta, distill.batch_size) == (1, 1, 32)
    assert (distill.warmup_ratio, distill.weight_decay) == (0.1, 0.01)
    # T_emd belongs to the softmax form, beta to the mean over batch and classes; the marginals are shared.
    assert (distill.cost_attention, distill.reduction, distill.separate_marginals) == ("softmax", "element", False)
    # The layer weights follow cost attention at once, all mass moves between all layers, and costs are as they are.
    assert (distill.marginal_momentum, distill.transported_mass) == (0, 1)
    assert (distill.mapped_layers, distill.cost_scale) == ("all", "absolute")
    assert (recipe.data.path, recipe.data.task) == (f"glue/{task}", task)
    assert recipe.student.name == {"4l": "4L-312", "6l": "6L-768"}[size]
    assert recipe.data.max_length == TASKS[task].max_length


def test_quickstart_needs_no_network():
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.data.path == "demo"
    assert recipe.teacher.model.startswith("package:")
    assert len(recipe.teacher.sha256 or "") == 64
    assert recipe.student.name == "4L"
