from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from tiny_student import LABELS, VOCABULARY, examples, labelled, tiny_model, write_student
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from bertemd_deploy import bert_graph, targets
from bertemd_deploy import export as module
from bertemd_deploy.artifact import GRAPHS, Artifact
from bertemd_deploy.bench import environment
from bertemd_deploy.bert_graph import check_shapes, load_model, portable_graph
from bertemd_deploy.classifier import Classifier
from bertemd_deploy.errors import ArtifactError, ExportError, GateError, ModelError, RecipeError
from bertemd_deploy.export import export, export_fp32
from bertemd_deploy.manifest import WITH_TOKENIZER
from bertemd_deploy.onnx_edit import IR_VERSIONS, histogram, save
from bertemd_deploy.runtime import INPUT_NAMES, open_session, predict_logits
from bertemd_deploy.settings import ExportSettings, QuantizeSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.tokenizer_inside import open_text_session

WRITTEN = {graph: path for graph, path in GRAPHS.items() if graph != "fp16"}
TASK = {"name": "mrpc", "kind": "classification", "metrics": ["f1", "accuracy"]}


def arguments(student: Path, out: Path, **changes: Any) -> dict[str, Any]:
    kind = changes.get("task", TASK)["kind"]
    model = load_model(student, kind=kind)
    return {
        "student": student,
        "out": out,
        "task": TASK,
        "labels": list(LABELS[kind]),
        "max_length": 32,
        "evaluation": labelled(model, 60, kind=kind),
        "calibration": labelled(model, 20, seed=1, kind=kind),
        "teacher": {"name": "big", "layers": 12, "sha256": "0" * 64},
        "reference_metrics": {"teacher": {"f1": 0.9, "accuracy": 0.88}},
        "distillation": {"mapping": "emd", "seed": 3},
        "settings": ExportSettings(),
        "quantization": QuantizeSettings(max_drop=20, max_changed=100),  # random weights decide by a hair
    } | changes


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def artifact(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(**arguments(student, tmp_path_factory.mktemp("run") / "artifact"))


def test_the_folder_holds_what_the_contract_lists(artifact: Artifact) -> None:
    names = {path.relative_to(artifact.folder).as_posix() for path in artifact.folder.rglob("*") if path.is_file()}
    assert names == {
        *WRITTEN.values(),
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "bertemd.json",
        "eval.npz",
        "README.md",
    }
    assert [path.name for path in artifact.folder.parent.iterdir()] == ["artifact"]
    assert artifact.graphs() == list(WRITTEN)
    for name in artifact.manifest["files"]:
        artifact.file(name)


def test_the_manifest_is_complete(artifact: Artifact) -> None:
    manifest = artifact.manifest
    assert manifest["task"] == TASK
    assert manifest["labels"] == ["no", "yes"]
    parameters = sum(weight.numel() for weight in tiny_model().parameters())
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 64, "parameters": parameters}
    assert manifest["student"] == sizes
    assert manifest["teacher"]["layers"] == 12
    assert manifest["distillation"] == {"mapping": "emd", "seed": 3}
    assert set(manifest["metrics"]) == {"teacher", "student", *WRITTEN}
    assert manifest["metrics"]["student"] == {"f1": 1.0, "accuracy": 1.0}
    for graph in ("fp32", "fused"):
        parity = manifest["parity"]["graphs"][graph]
        assert parity["max_abs_logit_difference"] < 1e-4
        assert parity["decision_agreement"] == 1
        assert parity["inputs"] == 76
    assert 0 < manifest["parity"]["graphs"]["int8"]["max_abs_logit_difference"] < 2
    quantization = manifest["quantization"]
    assert (quantization["mode"], quantization["activation_type"]) == ("dynamic", "uint8")
    assert quantization["weight_type"] == {"int8": "int8", "fused-int8": "int8"}
    assert quantization["reduce_range"] == {"int8": False, "fused-int8": False}
    assert quantization["per_channel"].keys() == quantization["excluded"].keys() == {"int8", "fused-int8"}
    assert [trial["passed"] for trial in quantization["trials"]].count(True) == 2
    assert len(quantization["operators"]["int8"]) == 12
    assert manifest["files"]["onnx/model_fused.onnx"]["fused"]["attention"] == 2
    assert manifest["files"]["onnx/model_quantized.onnx"]["operators"]["MatMulInteger"] == 10
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["requires"]["target"] == "portable"
    assert manifest["requires"]["isa"] == {}  # any CPU: what saturating sums would lose was predicted
    assert all(trial["saturating_metric"] is not None for trial in quantization["trials"] if trial["passed"])
    assert manifest["requires"]["onnxruntime"] == {
        "fp32": "1.12",
        "int8": "1.12",
        "fused": "1.16",
        "fused-int8": "1.16",
    }
    assert manifest["vocabulary"] is None
    for graph, path in WRITTEN.items():
        assert sum(manifest["files"][path]["components"].values()) == manifest["files"][path]["bytes"]
        found = manifest["invariance"][graph]
        assert found["activation_scales"] == quantization["activations"].get(graph, "float")
        assert found["changed_decision_share"] <= found["changed_decision_share_allowed"]
    assert manifest["created"].endswith("+00:00")
    assert "commit" in manifest


def test_graphs_are_dynamic_old_enough_and_labelled(artifact: Artifact) -> None:
    for graph, name in WRITTEN.items():
        model = onnx.load_model(artifact.folder / name)
        entry = artifact.manifest["files"][name]
        assert model.ir_version == entry["ir_version"] <= 8
        assert {item.domain: item.version for item in model.opset_import}[""] == entry["opset"] == 17
        assert histogram(model) == entry["operators"]
        dims = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
        assert dims == {name: ["batch", "sequence"] for name in INPUT_NAMES}
        assert {value.type.tensor_type.elem_type for value in model.graph.input} == {onnx.TensorProto.INT64}
        assert [value.name for value in model.graph.output] == ["logits"]
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert properties == {"task": "mrpc", "kind": "classification", "max_length": "32"} | {
            "id2label": '{"0": "no", "1": "yes"}'
        }
        arrays = [
            (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer
        ]
        assert len(set(arrays)) == len(arrays)
        assert ("fused" in graph) == any(node.domain for node in model.graph.node)
        assert {node.domain for node in model.graph.node} <= {item.domain for item in model.opset_import}


def test_every_graph_scores_what_the_manifest_says_from_the_slice_it_carries(artifact: Artifact) -> None:
    part = artifact.evaluation()
    for graph in WRITTEN:
        logits = predict_logits(open_session(artifact.graph(graph)[1]), part.examples, pad_id=0)
        found = float((logits.argmax(axis=-1) == part.labels).mean())
        assert found == artifact.manifest["metrics"][graph]["accuracy"]


def test_tokenizer_files_are_written_though_the_student_has_two_of_four(artifact: Artifact, student: Path) -> None:
    folder = artifact.folder
    assert not (student / "vocab.txt").exists()
    assert (folder / "vocab.txt").read_text().splitlines() == VOCABULARY
    assert (folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special["cls_token"] == "[CLS]"
    assert special["mask_token"] == "[MASK]"
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 32
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_the_model_card_shows_the_measured_table(artifact: Artifact) -> None:
    text = (artifact.folder / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| fused-int8 |"))
    assert f"{artifact.manifest['metrics']['fused-int8']['f1']:.4f}" in row
    assert "| teacher (torch) |" in text
    assert "distilled from big (12 layers)" in text


def test_a_damaged_artifact_is_refused(student: Path, artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(artifact.folder, folder)
    graph = folder / WRITTEN["int8"]
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated or was changed"):
        Artifact.load(folder).graph("int8")
    manifest = json.loads((folder / "bertemd.json").read_text())
    manifest["files"][WRITTEN["fp32"]]["sha256"] = "0" * 64
    manifest["files"]["../outside"] = {"sha256": "0" * 64}
    (folder / "bertemd.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="the manifest says 000000000000"):
        Artifact.load(folder).graph("fp32")
    with pytest.raises(ArtifactError, match="points outside"):
        Artifact.load(folder).file("../outside")
    (folder / "bertemd.json").write_text(json.dumps(manifest)[:-40])
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.load(folder)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes((artifact.folder / WRITTEN["fused"]).read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="cannot load this file"):
        open_session(cut)


def test_regression(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", labels=())
    task = {"name": "stsb", "kind": "regression", "metrics": ["pearson", "spearman"]}
    found = export(**arguments(student, tmp_path / "artifact", task=task))
    assert found.labels == []
    assert found.manifest["metrics"]["fused"]["pearson"] == pytest.approx(1)
    assert found.manifest["metrics"]["fused-int8"]["pearson"] > 0.8
    assert found.manifest["parity"]["graphs"]["fp32"]["decision_agreement"] is None


METRICS = {
    "multilabel": ["f1_micro", "f1_macro"],
    "token-classification": ["entity_f1", "accuracy"],
    "question-answering": ["f1_squad", "exact_match"],
}
OUTPUTS = {
    "multilabel": {"logits": ["batch", 3]},
    "token-classification": {"logits": ["batch", "sequence", 5]},
    "question-answering": {"start_logits": ["batch", "sequence"], "end_logits": ["batch", "sequence"]},
}


@pytest.mark.parametrize("kind", METRICS)
def test_other_kinds_of_task(tmp_path: Path, kind: Kind) -> None:
    """Four graphs of each: outputs by name and axes, parity with transformers' own head in plain ONNX Runtime, gates."""
    student = write_student(tmp_path / "student", kind=kind)
    task = {"name": "mine", "kind": kind, "metrics": METRICS[kind], "doc_stride": 8}
    limits = QuantizeSettings(max_drop=60, max_changed=100)
    found = export(**arguments(student, tmp_path / "artifact", task=task, quantization=limits, reference_metrics={}))
    head = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}.get(
        kind, "SequenceClassification"
    )
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(student).eval()
    batches = [
        examples(rows, longest=longest).batch(range(rows), pad_id=0) for rows, longest in ((1, 3), (4, 32), (3, 60))
    ]
    for graph, name in WRITTEN.items():
        stored = onnx.load_model(found.folder / name)
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in stored.graph.output
        }
        assert shapes == OUTPUTS[kind]
        properties = {entry.key: entry.value for entry in stored.metadata_props}
        assert (properties["kind"], "id2label" in properties) == (kind, kind != "question-answering")
        session = onnxruntime.InferenceSession(str(found.folder / name), providers=["CPUExecutionProvider"])
        for inputs in batches:
            expected = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
            real = inputs["attention_mask"].astype(bool) if kind != "multilabel" else slice(None)
            for output, values in zip(shapes, session.run(None, inputs), strict=True):
                wanted = expected[output].detach().numpy()
                assert values.shape == wanted.shape
                assert np.abs(values - wanted)[real].max() < (4 if "int8" in graph else 1e-4)
        parity = found.manifest["parity"]["graphs"][graph]
        assert (parity["inputs"], parity["decision_agreement"] == 1) == (76, "int8" not in graph)
        assert found.manifest["metrics"][graph].keys() == set(METRICS[kind])
    assert found.manifest["metrics"]["fused"][METRICS[kind][0]] == pytest.approx(1)
    assert found.manifest["files"][WRITTEN["fused"]]["fused"]["attention"] == 2
    # One row of the last layer is enough for a decision on the whole input, and only for that.
    assert [node.op_type for node in onnx.load_model(found.folder / WRITTEN["fused"]).graph.node].count("Slice") == (
        2 if kind == "multilabel" else 1
    )
    assert found.manifest["task"] == task | ({"no_answer": False} if kind == "question-answering" else {})
    assert found.kind == kind
    card = (found.folder / "README.md").read_text()
    assert f"pipeline_tag: {'text-classification' if kind == 'multilabel' else kind}\n" in card
    assert "regression" not in card
    assert f"| {METRICS[kind][0]} |" in card
    config = json.loads((found.folder / "config.json").read_text())
    assert config.get("problem_type") == ("multi_label_classification" if kind == "multilabel" else None)
    assert found.evaluation().kind == kind
    assert len(found.manifest["quantization"]["operators"]["int8"]) == (12 if kind == "multilabel" else 10)


def test_no_answer_is_possible_where_training_or_evaluation_has_such(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", kind="question-answering")
    task = {"name": "mine", "kind": "question-answering", "metrics": ["f1_squad"]}
    asked = arguments(student, tmp_path / "artifact", task=task, quantization=QuantizeSettings(mode="none"))
    gold = asked["calibration"].gold
    without = replace(gold, accepted=((), *gold.accepted[1:]))
    found = export(**asked | {"calibration": replace(asked["calibration"], gold=without)})
    assert found.manifest["task"]["no_answer"] is True
    assert found.calibration().gold.accepted[0] == ()


def test_slices_of_another_kind_are_refused(student: Path, tmp_path: Path) -> None:
    asked = arguments(student, tmp_path / "a")
    other = replace(asked["evaluation"], kind="regression")
    with pytest.raises(ExportError, match="the task is classification, the slices are for regression"):
        export(**asked | {"evaluation": other})


def test_without_quantization_there_are_two_graphs(student: Path, tmp_path: Path) -> None:
    changes = {"quantization": QuantizeSettings(mode="none"), "teacher": None, "reference_metrics": {}}
    found = export(**arguments(student, tmp_path / "a", **changes))
    assert found.graphs() == ["fp32", "fused"]
    assert found.manifest["quantization"]["trials"] == []
    assert found.manifest["teacher"] is None
    assert not (tmp_path / "a" / WRITTEN["int8"]).exists()


def test_a_parity_miss_leaves_the_artifact_as_it_was(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"
    quick = arguments(student, out, quantization=QuantizeSettings(mode="none"))

    def off(*args: Any, **kwargs: Any) -> Any:
        found = bert_graph.torch_logits(*args, **kwargs)
        return found + np.float32(0.031)

    monkeypatch.setattr(module, "torch_logits", off)
    with pytest.raises(GateError, match=r"model.onnx differs from the torch student by 3.1e-02 on logits"):
        export(**quick)
    assert [path.relative_to(out).as_posix() for path in out.rglob("*")] == ["onnx", "onnx/model.rejected.onnx"]
    monkeypatch.undo()
    good = export(**quick)  # the folder of a rejected graph needs no --force
    assert not (out / "onnx/model.rejected.onnx").exists()
    before = (out / "bertemd.json").read_bytes()
    monkeypatch.setattr(module, "torch_logits", off)
    with pytest.raises(GateError):
        export(**quick)
    assert (out / "bertemd.json").read_bytes() == before
    assert (out / "onnx/model.rejected.onnx").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    for name in good.manifest["files"]:
        Artifact.load(out).file(name)


def test_an_accuracy_miss_keeps_the_rejected_graph_only(student: Path, tmp_path: Path) -> None:
    request = arguments(student, tmp_path / "artifact")
    wrong = replace(request["evaluation"], labels=request["evaluation"].labels)
    strict = request | {"evaluation": wrong, "quantization": QuantizeSettings(max_drop=-1.0)}
    with pytest.raises(GateError, match=r"model_quantized.onnx loses too much f1 against the fp32 student") as caught:
        export(**strict)
    assert caught.value.exit_code == 4
    kept = [path.name for path in (tmp_path / "artifact").rglob("*") if path.is_file()]
    assert kept == ["model_quantized.rejected.onnx"]


def test_a_folder_with_something_else_is_refused_or_with_force_shared(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    quick = arguments(student, out, quantization=QuantizeSettings(mode="none"))
    with pytest.raises(ArtifactError, match="holds something else"):
        export(**quick)
    export(**quick, force=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert Artifact.load(out).graphs() == ["fp32", "fused"]
    assert not list(out.glob(".*"))


def test_requests_that_do_not_fit_the_student(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"outputs are no, yes; the data's labels are yes, no"):
        export(**arguments(student, tmp_path / "a", labels=["yes", "no"]))
    with pytest.raises(ExportError, match="max_length 65; the student has positions for 1 to 64 tokens"):
        export(**arguments(student, tmp_path / "a", max_length=65))
    with pytest.raises(ExportError, match=r"evaluation slice has an example of .* tokens, max_length is 8"):
        export(**arguments(student, tmp_path / "a", max_length=8))
    empty = arguments(student, tmp_path / "a")
    part = empty["calibration"]
    with pytest.raises(ExportError, match="calibration slice is empty"):
        export(**empty | {"calibration": replace(part, examples=part.examples.select([]), labels=part.labels[:0])})


def test_tokenizers_that_cannot_become_a_vocabulary_are_refused(student: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["far"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ExportError, match=r"no token of id 100 \(101 tokens\)"):
        export(**arguments(folder, tmp_path / "a"))
    from bertemd_deploy.handout import write_tokenizer

    stored["model"] = {"type": "WordLevel", "vocab": {"a": 0}}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ExportError, match="a WordLevel tokenizer"):
        write_tokenizer(folder, tmp_path, max_length=8)


@pytest.mark.parametrize("opset", [17, 18])
def test_export_fp32_of_any_bert_folder(tmp_path: Path, opset: int) -> None:
    folder = write_student(tmp_path / "teacher", labels=("a", "b", "c"), num_hidden_layers=3, hidden_act="gelu_new")
    export_fp32(folder, tmp_path / "teacher.onnx", exporter="torchscript", opset=opset)
    model = onnx.load_model(tmp_path / "teacher.onnx")
    assert model.ir_version == IR_VERSIONS[opset]
    assert {node.domain for node in model.graph.node} == {""}
    # The last layer's feed-forward sees one row; each of the others is spelled out once.
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 3 * 6 + 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_dynamo_exporter(tmp_path: Path) -> None:
    model = tiny_model()
    save(portable_graph(model, exporter="dynamo", opset=17), tmp_path / "m.onnx")
    stored = onnx.load_model(tmp_path / "m.onnx")
    assert stored.ir_version == 8
    assert {entry.domain: entry.version for entry in stored.opset_import}[""] == 17
    assert check_shapes(tmp_path / "m.onnx", model=model, name="m.onnx")[-1] == [2, 64]


def test_a_fixed_dimension_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.onnx.export

    def fixed(*args: Any, **options: Any) -> Any:
        del options["dynamic_axes"]["attention_mask"][1]
        return real(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(ExportError, match=r"'attention_mask': \['batch', 13\].*allowed are dynamic dimensions only"):
        portable_graph(tiny_model(), exporter="torchscript", opset=17)


def test_an_exporter_that_fails_or_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(portable_graph(tiny_model(), exporter="torchscript", opset=17), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"model.onnx: at batch 1, sequence 1 its logits .* differ from torch's"):
        check_shapes(tmp_path / "m.onnx", model=tiny_model(seed=1), name="model.onnx")

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("unsupported operator\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"torchscript exporter of torch .* failed \(unsupported operator\)"):
        portable_graph(tiny_model(), exporter="torchscript", opset=17)


def test_models_that_are_computed_differently_are_refused(tmp_path: Path) -> None:
    folder = write_student(tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ModelError, match="position_embedding_type is 'relative_key'"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    with pytest.raises(ExportError, match=r"config.json: model_type is 'roberta'; export writes BERT's graph only"):
        load_model(folder)
    with pytest.raises(ModelError):
        export_fp32(tmp_path / "nothing", tmp_path / "x.onnx", exporter="torchscript", opset=17)


def test_static_graphs_do_not_depend_on_their_batch(student: Path, tmp_path: Path) -> None:
    limits = QuantizeSettings(mode="static", max_drop=60)
    made = export(**arguments(student, tmp_path / "artifact", quantization=limits))
    assert made.graphs() == list(WRITTEN)
    assert set(made.manifest["quantization"]["method"].values()) <= {"minmax", "percentile", "mse", "entropy"}
    assert made.manifest["files"]["onnx/model_quantized.onnx"]["operators"]["QuantizeLinear"] > 0
    for graph in ("int8", "fused-int8"):
        found = made.manifest["invariance"][graph]
        assert found["activation_scales"] == "fixed"
        assert found["changed_decision_share"] == 0
        assert found["max_abs_logit_difference"] <= found["max_abs_logit_difference_allowed"] == 1e-3


def test_float16_is_written_for_those_who_insist(student: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fp16: asked for on a CPU"):
        export(**arguments(student, tmp_path / "refused", quantization=QuantizeSettings(mode="float16")))
    assert not (tmp_path / "refused").exists()
    limits = QuantizeSettings(mode="float16", float16_on_cpu=True, max_drop=5)
    made = export(**arguments(student, tmp_path / "artifact", quantization=limits))
    assert made.graphs() == ["fp32", "fused", "fp16"]
    assert made.manifest["parity"]["graphs"]["fp16"]["max_abs_logit_difference"] < 0.05
    sizes = [made.manifest["files"][GRAPHS[graph]]["bytes"] for graph in ("fp16", "fp32")]
    assert sizes[0] < 0.75 * sizes[1]


def test_what_was_made_for_exact_cpus_is_refused_on_others(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(target="x86-avx512-vnni")
    made = export(**arguments(student, tmp_path / "artifact", settings=settings))
    assert set(made.manifest["requires"]["isa"]) == {"int8", "fused-int8"}
    assert {trial["saturating_metric"] for trial in made.manifest["quantization"]["trials"]} == {None}
    monkeypatch.setattr(environment, "instruction_sets", lambda: ["avx2", "fma"])
    with pytest.raises(ArtifactError, match="graph 'fused-int8' needs a CPU with one of avx512_vnni"):
        made.graph("auto")
    assert made.graph("fp32")[0] == "fp32"
    monkeypatch.setattr("onnxruntime.__version__", "1.15.1")
    with pytest.raises(ArtifactError, match=r"graph 'fused': it needs ONNX Runtime 1\.16 or newer; 1\.15\.1 would"):
        made.graph("fused")


def test_a_target_that_does_not_read_the_graphs_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no target 'z80'; targets are portable, x86-avx2"):
        export(**arguments(student, tmp_path / "artifact", settings=ExportSettings(target="z80")))
    with pytest.raises(ExportError, match=r"would not run on portable.*set export\.opset to 17 or less"):
        export(**arguments(student, tmp_path / "artifact", settings=ExportSettings(opset=18)))
    assert not (tmp_path / "artifact").exists()


def test_a_graph_that_takes_texts(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student")
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.save(str(student / "tokenizer.json"))
    settings, limits = ExportSettings(tokenizer_inside=True), QuantizeSettings(mode="none")
    made = export(**arguments(student, tmp_path / "artifact", settings=settings, quantization=limits))
    session = open_text_session(str(made.file(WITH_TOKENIZER)))
    texts, pairs = ["word1 word2", "word3"], ["word4", "word5 word6 word7"]
    feeds = {"text": np.array(texts, dtype=object), "text_pair": np.array(pairs, dtype=object)}
    (found,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(found, Classifier.load(made.folder, graph="fp32").logits(texts, pairs), atol=1e-5)
    described = made.manifest["files"][WITH_TOKENIZER]
    assert (described["opset"], described["ir_version"]) == (17, 8)
    assert described["operators"]["ai.onnx.contrib.StringRegexReplace"] > 0
    needed = {"graph": "fp32", "onnxruntime_extensions": metadata.version("onnxruntime_extensions")}
    assert made.manifest["requires"]["with_tokenizer"] == needed


def test_a_tokenizer_that_cannot_be_inside_is_found_first(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "portable_graph", None)  # what takes minutes
    with pytest.raises(ExportError, match="a graph with the tokenizer inside cannot do that"):
        export(**arguments(student, tmp_path / "artifact", settings=ExportSettings(tokenizer_inside=True)))
    assert not (tmp_path / "artifact").exists()


def test_a_cpu_that_clips_does_not_judge_for_those_that_do_not(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "products_saturate", lambda: True)
    settings = ExportSettings(target="x86-avx512-vnni")
    with pytest.raises(
        ExportError, match="int8 graphs for x86-avx512-vnni cannot be judged here: this CPU adds two int8"
    ):
        export(**arguments(student, tmp_path / "artifact", settings=settings))
    assert not (tmp_path / "artifact").exists()
    made = export(
        **arguments(student, tmp_path / "artifact", settings=settings, quantization=QuantizeSettings(mode="none"))
    )
    assert made.graphs() == ["fp32", "fused"]


def test_a_graph_that_takes_texts_is_for_decisions_on_the_whole(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", kind="token-classification")
    task = {"name": "token-classification", "kind": "token-classification", "metrics": ["entity_f1"]}
    settings, limits = ExportSettings(tokenizer_inside=True), QuantizeSettings(mode="none")
    with pytest.raises(
        RecipeError, match=r"export\.tokenizer_inside: what token-classification says belongs to tokens"
    ):
        export(**arguments(student, tmp_path / "artifact", task=task, settings=settings, quantization=limits))


def test_files_beside_an_artifact_outlive_the_next_export(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    quick = arguments(student, out, quantization=QuantizeSettings(mode="none"))
    export(**quick)
    (out / "notes.txt").write_text("mine")
    (out / "mine").mkdir()
    (out / "mine/model.safetensors").write_text("mine")
    made = export(**quick)
    assert (out / "notes.txt").read_text() == (out / "mine/model.safetensors").read_text() == "mine"
    assert not (out / ".bertemd-new").exists()
    for name in made.manifest["files"]:
        made.file(name)


def test_a_name_in_the_way_is_found_before_anything_is_placed(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "onnx").write_text("mine")
    (out / "README.md").write_text("mine")
    quick = arguments(student, out, quantization=QuantizeSettings(mode="none"), force=True)
    with pytest.raises(ArtifactError, match="something of this name is in the way"):
        export(**quick)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"onnx": "mine", "README.md": "mine"}


def test_a_refused_folder_keeps_what_looks_rejected(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (out / "onnx").mkdir(parents=True)
    (out / "onnx/mine.rejected.onnx").write_text("mine")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds something else"):
        export(**arguments(student, out, quantization=QuantizeSettings(mode="none")))
    assert (out / "onnx/mine.rejected.onnx").read_text() == "mine"
