from __future__ import annotations

import pytest
from tiny_artifact import WORDS, write_artifact, write_graph_teacher, write_tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.candidates import output_order, students, teachers
from bertemd_deploy.errors import ArtifactError, BertemdError, MeasurementError, ModelError


def test_students_are_the_graphs_present(artifact):
    found, notes = students(artifact, None)
    assert [candidate.name for candidate in found] == ["student onnxruntime fp32", "student onnxruntime int8"]
    assert [candidate.precision for candidate in found] == ["fp32", "int8"]
    assert found[0].model_bytes == (artifact.folder / "onnx/model.onnx").stat().st_size
    assert (found[0].layers, found[0].parameters, found[0].outputs) == (1, 26, (0, 1))
    assert notes == []


def test_graphs_asked_for_and_absent_are_noted(artifact):
    found, notes = students(artifact, ("int8", "fused-int8"))
    assert [candidate.graph for candidate in found] == ["int8"]
    assert notes == ["graphs ['fused-int8'] left out: the artifact does not hold them"]


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        (("int4",), r"bench\.graphs: unknown int4; known are fp32, int8, fused, fused-int8, fp16\."),
        (("fused",), r"has none of the graphs asked for \(fused\); it has: fp32, int8\."),
        ((), r"has none of the graphs asked for \(none\)"),
    ],
)
def test_no_usable_graph_is_an_error(artifact, graphs, message):
    with pytest.raises(MeasurementError, match=message):
        students(artifact, graphs)


def test_a_damaged_graph_is_refused(artifact):
    (artifact.folder / "onnx/model.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="its SHA-256 is"):
        students(artifact, None)


def test_teacher_outputs_are_matched_by_name_whatever_the_case(tmp_path):
    config = {"id2label": {"2": "ENTAILMENT", "0": "Contradiction", "1": "neutral"}}
    order = output_order(config, labels=["entailment", "neutral", "contradiction"], where=tmp_path)
    assert order == ((2, 1, 0), None)


@pytest.mark.parametrize("config", [{}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}])
def test_unnamed_outputs_are_taken_in_order_and_that_is_noted(tmp_path, config):
    order, note = output_order(config, labels=["no", "yes"], where=tmp_path)
    assert order == (0, 1)
    assert "have no names" in note


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["yes", "no"], ["negative", "positive"], "labels are yes, no; the artifact's are negative, positive"),
        (["yes", "YES"], ["yes", "no"], "matched by name"),
        (["a", "b", "c"], ["a", "b"], r"has 3 outputs \(a, b, c\), the artifact 2 \(a, b\)"),
        (["a", "b"], [], r"has 2 outputs \(a, b\), the artifact 1 \(regression\)"),
    ],
)
def test_labels_that_do_not_match_are_an_error(tmp_path, names, labels, message):
    config = {"id2label": {str(at): name for at, name in enumerate(names)}}
    with pytest.raises(ModelError, match=message):
        output_order(config, labels=labels, where=tmp_path)


def test_regression_teacher_has_one_output(tmp_path):
    assert output_order({"id2label": {"0": "LABEL_0"}}, labels=[], where=tmp_path) == ((0,), None)


def test_teacher_of_another_family_is_measured_in_pytorch_alone(artifact, tmp_path):
    teacher = write_graph_teacher(tmp_path / "teacher", model_type="roberta")
    (teacher / "model.safetensors").write_bytes(b"weights")
    (found,), notes = teachers(teacher, artifact, scratch=tmp_path)
    assert found.name == "teacher pytorch fp32"
    assert notes == ["the teacher is measured in PyTorch only: the graph of a roberta is not written"]


@pytest.mark.usefixtures("no_torch")
def test_ready_graph_serves_where_torch_is_missing(artifact, graph_teacher, tmp_path):
    (found,), notes = teachers(graph_teacher, artifact, scratch=tmp_path)
    assert found.name == "teacher onnxruntime fp32"
    assert (found.outputs, found.layers, found.parameters) == ((1, 0), 2, None)
    assert found.path == graph_teacher / "onnx/model.onnx"
    assert notes == []


@pytest.mark.usefixtures("no_torch")
def test_teacher_without_torch_names_the_extra(artifact, graph_teacher, tmp_path):
    (graph_teacher / "onnx/model.onnx").unlink()
    with pytest.raises(BertemdError, match=r"needs the 'train' extra \(torch is not installed\)"):
        teachers(graph_teacher, artifact, scratch=tmp_path)


def test_teacher_must_be_a_model_folder(artifact, graph_teacher, tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        teachers(tmp_path / "absent", artifact, scratch=tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        teachers(graph_teacher, artifact, scratch=tmp_path)
    (graph_teacher / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        teachers(graph_teacher, artifact, scratch=tmp_path)


def test_teacher_too_short_for_the_artifact(artifact, tmp_path):
    teacher = write_graph_teacher(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(ModelError, match="takes 8 tokens, the artifact up to 12"):
        teachers(teacher, artifact, scratch=tmp_path)


@pytest.mark.usefixtures("no_torch")
def test_a_trimmed_vocabulary_is_translated_for_the_teacher(artifact, graph_teacher, tmp_path):
    write_tokenizer(graph_teacher, words=(*WORDS[:5], "rare", *WORDS[5:]))
    trimmed = Artifact(artifact.folder, artifact.manifest | {"vocabulary": {"kept": len(WORDS)}})
    found, notes = teachers(graph_teacher, trimmed, scratch=tmp_path)
    assert {candidate.token_ids for candidate in found} == {(0, 1, 2, 3, 4, *range(6, len(WORDS) + 1))}
    assert "the teacher reads the pieces of words that the student's trimmed vocabulary makes" in notes


def test_teacher_with_another_vocabulary(artifact, graph_teacher, tmp_path):
    write_tokenizer(graph_teacher, words=(*WORDS[:-1], "quite"))
    with pytest.raises(ModelError, match="vocabulary differs from the artifact's in 2 entries"):
        teachers(graph_teacher, artifact, scratch=tmp_path)


def test_teacher_of_another_task(graph_teacher, tmp_path):
    artifact = Artifact.load(write_artifact(tmp_path / "other", labels=["unacceptable", "acceptable"]))
    with pytest.raises(ModelError, match="matched by name"):
        teachers(graph_teacher, artifact, scratch=tmp_path)
