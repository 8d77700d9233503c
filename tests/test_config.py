from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bertemd_deploy.config import Recipe, build_recipe, load_recipe, options_recipe
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.settings import MAPPINGS, STUDENT_NAMES, DataSettings

MINIMAL = "teacher: {model: teacher}\ndata: {path: demo}\nstudent: {name: 4L}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides=overrides)


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the listed faults of a recipe that has some."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    head, *listed = str(caught.value).split("\n")
    assert head == f"{tmp_path / 'recipe.yaml'}: {len(listed)} fault(s) in the recipe:"
    return [line.removeprefix("  - ") for line in listed]


def test_minimal_recipe_gets_the_defaults(tmp_path: Path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.teacher.model == "teacher"
    assert recipe.distill.mapping == "emd"
    assert recipe.distill.learning_rate == 2e-5
    assert recipe.bench.threads == (1, "all")
    assert recipe.export.opset == 17


def test_the_layer_loss_is_by_default_what_was_chosen_on_held_out_rows(tmp_path: Path):
    distill = load(tmp_path, MINIMAL).distill  # benchmarks/RESULTS.md and the changelog name these values
    assert (distill.beta, distill.cost_scale, distill.marginal_momentum) == (16.0, "relative", 0.9)
    assert (distill.transported_mass, distill.mapped_layers) == (None, "auto")


def test_values_of_every_kind(tmp_path: Path):
    recipe = load(
        tmp_path,
        MINIMAL + "distill: {mapping: none, beta: 0, learning_rate: 2e-5, separate_marginals: true}\n"
        "quantize: {mode: none}\n"
        "bench: {sequence_lengths: [8, max], threads: [all], graphs: [fp32, fused], batch_sizes: [1]}\n",
    )
    assert recipe.distill.mapping == "none"
    assert (recipe.distill.beta, recipe.distill.learning_rate) == (0.0, 2e-5)
    assert isinstance(recipe.distill.beta, float)
    assert recipe.distill.separate_marginals is True
    assert recipe.bench.sequence_lengths == (8, "max")
    assert recipe.bench.graphs == ("fp32", "fused")


@pytest.mark.parametrize("text", ["2e-5", "2E-05", "2.0e-5", ".2e-4", "+2e-5", "0.00002"])
def test_numbers_as_people_write_them(tmp_path: Path, text):
    assert load(tmp_path, MINIMAL + f"distill: {{learning_rate: {text}}}\n").distill.learning_rate == 2e-5


def test_empty_section_is_its_defaults(tmp_path: Path):
    assert load(tmp_path, MINIMAL + "distill:\n") == load(tmp_path, MINIMAL)


def test_explicit_student_sizes(tmp_path: Path):
    text = MINIMAL.replace("{name: 4L}", "{layers: 3, hidden: 120, heads: 12, intermediate: 480}")
    assert load(tmp_path, text).student.hidden == 120


def test_recipe_is_frozen(tmp_path: Path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tmp_path, MINIMAL).distill.beta = 1.0


# ---- one fault of each kind


@pytest.mark.parametrize(
    ("addition", "fault"),
    [
        (
            "distil: {}",
            "unknown section 'distil'; known: teacher, data, student, distill, export, quantize, bench, budget",
        ),
        ("1: {}", "unknown section 1; known: teacher, data, student, distill, export, quantize, bench, budget"),
        ("export: 17", "export should be a mapping of keys, found int 17"),
        ("export: [17]", "export should be a mapping of keys, found list [17]"),
        (
            "export: {opsett: 17}",
            "export.opsett: unknown key; known: exporter, opset, target, vocabulary, tokenizer_inside",
        ),
        ("export: {17: 17}", "export.17: unknown key; known: exporter, opset, target, vocabulary, tokenizer_inside"),
        ("export: {opset: 16}", "export.opset: found 16, allowed: from 17 to 21"),
        ("export: {opset: 22}", "export.opset: found 22, allowed: from 17 to 21"),
        ("export: {opset: 17.0}", "export.opset: found float 17.0, allowed: a whole number"),
        ("export: {opset: true}", "export.opset: found bool True, allowed: a whole number"),
        ("export: {opset: '17'}", "export.opset: found str '17', allowed: a whole number"),
        ("export: {opset: null}", "export.opset: found nothing, allowed: a whole number"),
        ("export: {exporter: tf}", "export.exporter: found str 'tf', allowed: torchscript, dynamo"),
        ("export: {exporter: [dynamo]}", "export.exporter: found list ['dynamo'], allowed: torchscript, dynamo"),
        ("distill: {mapping: best}", f"distill.mapping: found str 'best', allowed: {', '.join(MAPPINGS)}"),
        ("distill: {learning_rate: 0}", "distill.learning_rate: found 0, allowed: above 0 to 1"),
        ("distill: {learning_rate: fast}", "distill.learning_rate: found str 'fast', allowed: a number"),
        ("distill: {learning_rate: true}", "distill.learning_rate: found bool True, allowed: a number"),
        ("distill: {beta: -1}", "distill.beta: found -1, allowed: from 0"),
        ("distill: {beta: .inf}", "distill.beta: found float inf, allowed: a number"),
        ("distill: {beta: .nan}", "distill.beta: found float nan, allowed: a number"),
        ("distill: {epochs: 0}", "distill.epochs: found 0, allowed: from 1 to 1000"),
        ("distill: {separate_marginals: 1}", "distill.separate_marginals: found int 1, allowed: true or false"),
        ("quantize: {mode: int4}", "quantize.mode: found str 'int4', allowed: dynamic, static, float16, none"),
        (
            "bench: {sequence_lengths: 16}",
            "bench.sequence_lengths: found int 16, allowed: a list of a whole number or 'max'",
        ),
        (
            "bench: {sequence_lengths: []}",
            "bench.sequence_lengths: found list [], allowed: a list of a whole number or 'max'",
        ),
        (
            "bench: {sequence_lengths: [min]}",
            "bench.sequence_lengths: found str 'min', allowed: a whole number or 'max'",
        ),
        ("bench: {batch_sizes: [0, 1]}", "bench.batch_sizes: found [0, 1], allowed: numbers from 1"),
        ("bench: {threads: [true]}", "bench.threads: found bool True, allowed: a whole number or 'all'"),
        (
            "quantize: {mode: static}\ndistill: {quant_aware: true, quant_aware_epochs: 3, epochs: 2}",
            "distill.quant_aware_epochs is 3, distill.epochs 2; lower the first",
        ),
        (
            "distill: {quant_aware_epochs: 3}",
            "distill.quant_aware_epochs only acts with quant_aware: true; remove it or switch",
        ),
        (
            "distill: {quant_aware: true}",
            "distill.quant_aware trains for quantize.mode: static, and it is dynamic; set it to static",
        ),
        (
            "quantize: {mode: none, embedding_bits: 4}",
            "quantize.embedding_bits only acts on int8 graphs, and quantize.mode is none; remove it or switch",
        ),
        ("quantize: {embedding_bits: 4.0}", "quantize.embedding_bits: found float 4.0, allowed: 8, 4"),
        (
            "quantize: {float16_on_cpu: true}",
            "quantize.float16_on_cpu only acts with quantize.mode: float16; remove it or switch",
        ),
        (
            "export: {opset: 18}",
            "export.opset is 18, and portable reads up to 17; lower it, or name another export.target",
        ),
        (
            "bench: {graphs: [fp16]}",
            "bench.graphs asks for fp16, but quantize.mode is dynamic; leave it out, or set the mode to float16",
        ),
        ("quantize: {embedding_bits: 2}", "quantize.embedding_bits: found int 2, allowed: 8, 4"),
        (
            "quantize: {mode: float16}",
            "quantize.mode: float16 is for GPUs, and every target is a CPU, where it is slower than fp32; set "
            "quantize.float16_on_cpu to true to write it all the same",
        ),
        ("export: {vocabulary: 0}", "export.vocabulary: found 0, allowed: from 1"),
        (
            "export: {vocabulary: all}",
            "export.vocabulary: found str 'all', allowed: a whole number or 'corpus' or nothing",
        ),
        (
            "bench: {devices: [local, local]}",
            "bench.devices: local and local would share a folder. Name each device once.",
        ),
        ("bench: {device_file: nowhere.yaml}", "bench.devices: nowhere.yaml: there is no such file of devices."),
        (
            "budget: {max_p95_ms: 20 MB}",
            "budget.max_p95_ms: found '20 MB' with the unit 'MB', allowed units: µs, us, ms, s",
        ),
        (
            "budget: {raspberry-pi-9: {max_size_mb: 2}}",
            "budget.raspberry-pi-9: unknown device; known: local",
        ),
        ("bench: {graphs: [int4]}", "bench.graphs: unknown int4; known: fp32, int8, fused, fused-int8, fp16"),
        ("bench: {graphs: fp32}", "bench.graphs: found str 'fp32', allowed: a list of text or nothing"),
    ],
)
def test_fault(tmp_path: Path, addition, fault):
    assert faults(tmp_path, MINIMAL + addition) == [fault]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "teacher: {model: teacher}\n",
            "",
            "teacher.model is missing: a Hugging Face folder, a hub id, or package:IMPORT_NAME/sub/folder",
        ),
        ("data: {path: demo}\n", "", "data.path is missing: demo, glue/<task>, or a folder with train.* and dev.*"),
        ("path: demo", "path: demo, max_length: 3", "data.max_length: found 3, allowed: from 4 to 8192"),
        (
            "path: demo",
            "path: demo, max_length: long",
            "data.max_length: found str 'long', allowed: a whole number or nothing",
        ),
        ("path: demo", "path: demo, sentence2: b", "data.sentence2 is given without data.sentence1; name both columns"),
        (
            "name: 4L",
            "name: 4L, layers: 4",
            "student: give a name or the sizes layers, hidden, heads, intermediate, not both",
        ),
        (
            "name: 4L",
            "layers: 4",
            "student: give a name (4L-312, 6L-768, 4L, 6L) or all of layers, hidden, heads, intermediate",
        ),
        (
            "name: 4L",
            "layers: 4, hidden: 100, heads: 12, intermediate: 400",
            "student: hidden 100 is not a multiple of heads 12",
        ),
    ],
)
def test_fault_of_a_combination(tmp_path: Path, old, new, fault):
    assert faults(tmp_path, MINIMAL.replace(old, new)) == [fault]


def test_unknown_task_lists_the_known(tmp_path: Path):
    (fault,) = faults(tmp_path, MINIMAL, "data.task=sst3")
    assert fault.startswith("data.task: unknown task 'sst3'; known: cola, sst2, mrpc, stsb")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (("distill.alpha=0", "distill.beta=0"), "distill: alpha 0 and beta 0 leave nothing of the teacher"),
        (("distill.emd_temperature=5",), "distill.emd_temperature only acts with cost_attention: softmax"),
        (
            ("data.task=token-classification", "distill.augmentation=dropout"),
            "distill.augmentation: labels of token-classification belong to token positions",
        ),
        (
            ("student.init=random", "student.init_layers=first"),
            "student.init_layers only acts where layers are copied, and student.init is random; remove one",
        ),
        (
            ("student.init_layers=[1, 2, 3]",),
            "student.init_layers: found [1, 2, 3], allowed: 4 different layers in rising order",
        ),
        (
            ("student.init_layers=[1, 3, 2, 4]",),
            "student.init_layers: found [1, 3, 2, 4], allowed: 4 different layers in rising order",
        ),
        (
            ("student.init_layers=[1, 2, 2, 3]",),
            "student.init_layers: found [1, 2, 2, 3], allowed: 4 different layers in rising order",
        ),
        (
            ("student.init_layers=last",),
            "student.init_layers: found str 'last', allowed: 'auto', 'even', 'first' or a list of a whole number",
        ),
        (("student.init_layers=[0, 1, 2, 3]",), "student.init_layers: found [0, 1, 2, 3], allowed: numbers from 1"),
        (("student.init_layers=[1, x]",), "student.init_layers: found str 'x', allowed: a whole number"),
        (
            ("student.init_layers=[]",),
            "student.init_layers: found list [], allowed: 'auto', 'even', 'first' or a list of",
        ),
        (("quantize.mode=none", "bench.graphs=[int8]"), "bench.graphs asks for int8 graphs, but quantize.mode is none"),
    ],
)
def test_fault_of_settings_that_cannot_work_together(tmp_path: Path, overrides, fault):
    (found,) = faults(tmp_path, MINIMAL, *overrides)
    assert found.startswith(fault)


def test_all_faults_are_listed_at_once_and_each_once(tmp_path: Path):
    text = "teacher: {modle: x}\nstudent: {layers: 0}\ndistill: {epochs: many, beta: -1}\nextra: {}\n"
    found = faults(tmp_path, text, "distill.epochs=many", "nonsense")
    assert [fault.split(":")[0].split(" ")[0] for fault in found] == [
        "--set",
        "teacher.modle",
        "student.layers",
        "distill.epochs",
        "distill.beta",
        "unknown",
        "teacher.model",
        "data.path",
        "student",
    ]


# ---- files that are no recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"teacher:\n  model: [a\ndata: {}\n", r"recipe\.yaml: line 3 not valid YAML \("),
        (b"data: {path: a}\ndata: {path: b}\n", r"recipe\.yaml: line 2 not valid YAML \(the key 'data' stands twice\)"),
        (b"data:\n  path: a\n  path: b\n", r"recipe\.yaml: line 3 not valid YAML \(the key 'path' stands twice\)"),
        (b"{[a]: 1}\n", r"recipe\.yaml: line 1 not valid YAML \(found unhashable key\)"),
        (
            b"data: {path: 2020-13-01}\n",
            r"recipe\.yaml: not valid YAML \(month must be in 1\.\.12\); put quotes around",
        ),
        (b"data: !!python/object/apply:os.getcwd []\n", r"recipe\.yaml: line 1 not valid YAML \(could not determine"),
        (b"data: \x00\n", r"recipe\.yaml: not valid YAML \(unacceptable character #x0000"),
        (b"- a\n- b\n", r"recipe\.yaml: a recipe is a mapping of sections \(teacher, data, student, distill"),
        (b"just text\n", r"recipe\.yaml: a recipe is a mapping of sections \("),
        (b"\xff\xfe", r"recipe\.yaml: the recipe cannot be read \('utf-8' codec"),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_no_file(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"none\.yaml: there is no such recipe\."):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"the recipe cannot be read \(.*[Dd]irectory"):
        load_recipe(tmp_path)


def test_empty_file_misses_what_has_no_default(tmp_path: Path):
    assert [fault.split(" ")[0] for fault in faults(tmp_path, "")] == ["teacher.model", "data.path", "student:"]


# ---- overrides


def test_overrides_win_and_keep_the_rest(tmp_path: Path):
    recipe = load(
        tmp_path,
        MINIMAL + "distill: {epochs: 3, beta: 0.1}\nbench:\n",
        "distill.epochs=7",
        "distill.learning_rate=3e-4",
        "data.path=some/folder",
        "bench.threads=[1, 2]",
        "bench.replay=false",
        "data.max_length=null",
        "distill.epochs=8",
    )
    assert (recipe.distill.epochs, recipe.distill.beta, recipe.distill.learning_rate) == (8, 0.1, 3e-4)
    assert recipe.data == DataSettings(path="some/folder")
    assert (recipe.bench.threads, recipe.bench.replay) == ((1, 2), False)


def test_override_keeps_what_follows_the_first_equals_sign(tmp_path: Path):
    assert load(tmp_path, MINIMAL, "data.path=a=b").data.path == "a=b"


@pytest.mark.parametrize("override", ["distill", "distill.epochs", "epochs=3", ".epochs=3", "distill.=3"])
def test_override_written_otherwise(tmp_path: Path, override):
    assert faults(tmp_path, MINIMAL, override) == [f"--set {override!r}: write it as section.key=value"]


def test_override_that_is_no_yaml(tmp_path: Path):
    (fault,) = faults(tmp_path, MINIMAL, "data.task=[a")
    assert fault.startswith("--set data.task: line 1 not valid YAML (")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("distill.epoch=3", "distill.epoch: unknown key; known: mapping, epochs"),
        ("distil.epochs=3", "unknown section 'distil'"),
        ("distill.epochs=", "distill.epochs: found nothing, allowed: a whole number"),
    ],
)
def test_override_that_does_not_fit(tmp_path: Path, override, fault):
    (found,) = faults(tmp_path, MINIMAL, override)
    assert found.startswith(fault)


def test_override_into_a_section_that_is_none(tmp_path: Path):
    assert faults(tmp_path, MINIMAL + "export: 3\n", "export.opset=17") == [
        "export should be a mapping of keys, found int 3"
    ]


def test_options_alone_make_a_recipe():
    recipe = options_recipe(["teacher.model=m", "data.path=demo", "student.name=6L", "distill.seed=7"])
    assert (recipe.teacher.model, recipe.student.name, recipe.distill.seed) == ("m", "6L", 7)
    with pytest.raises(RecipeError, match=r"options: 1 fault\(s\) in the recipe:\n  - distill\.seed: found -1"):
        options_recipe(["teacher.model=m", "data.path=demo", "student.name=6L", "distill.seed=-1"])


def test_build_from_plain_values_names_where():
    with pytest.raises(RecipeError, match=r"^here: 3 fault"):
        build_recipe({}, where="here")


def test_number_beyond_floats_is_a_fault(tmp_path: Path):
    (fault,) = faults(tmp_path, MINIMAL, "distill.beta=1" + "0" * 400)
    assert fault.endswith("allowed: a number")


def test_an_unknown_student_is_a_fault(tmp_path: Path):
    (fault,) = faults(tmp_path, MINIMAL, "student.name=5L")
    assert fault == "student.name: unknown '5L'; known: 4L-312, 6L-768, 4L, 6L, or give the sizes"


def test_columns_that_a_task_lacks_or_has_no_use_for_are_faults(tmp_path: Path):
    (fault,) = faults(tmp_path, MINIMAL, "data.path=glue/rte", "data.sentence1=a")
    assert fault.startswith("data.sentence1 is given without data.sentence2, but rte reads pairs of texts; name both")
    (fault,) = faults(tmp_path, MINIMAL, "data.task=tagging", "data.sentence1=a", "data.sentence2=b")
    assert fault.startswith(
        "data.sentence2 is given, but tagging reads one column of tokens, data.sentence1; remove it"
    )


# ---- round trip


def test_resolved_recipe_reads_back_equal(tmp_path: Path):
    text = MINIMAL + "bench: {threads: [2, all], graphs: [int8]}\ndistill: {learning_rate: 1e-7}\n"
    recipe = load(tmp_path, text.replace("name: 4L", "name: 4L, init_layers: [1, 2, 4, 6]"))
    assert recipe.student.init_layers == (1, 2, 4, 6)
    assert load(tmp_path, recipe.to_yaml()) == recipe
    assert yaml.safe_load(recipe.to_yaml())["bench"]["threads"] == [2, "all"]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co", "Zl", "Zp"]), min_size=1)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    path=st.one_of(
        words, st.sampled_from(["1e5", "2E-3", "yes", "null", "~", "1:30", "2020-01-01", "0x1f", "- a", "a: b"])
    ),
    name=st.sampled_from(STUDENT_NAMES),
    rate=st.floats(0, 1, exclude_min=True),
    lengths=st.lists(st.one_of(st.integers(1, 4096), st.just("max")), min_size=1),
    replay=st.booleans(),
)
def test_any_recipe_reads_back_equal(tmp_path_factory, path, name, rate, lengths, replay):
    recipe = build_recipe(
        {
            "teacher": {"model": path, "learning_rate": rate},
            "data": {"path": path, "label": path},
            "student": {"name": name, "init": path},
            "bench": {"sequence_lengths": lengths, "replay": replay},
        },
        where="here",
    )
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
