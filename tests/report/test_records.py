from __future__ import annotations

import pytest

from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.report.records import Cell, Record, Variant, read_records


def test_variants_stand_teacher_first_and_student_in_the_artifact_order(record) -> None:
    labels = [variant.label for variant in Record(record, "device").variants]
    assert labels == [
        "Teacher, PyTorch",
        "Teacher, ONNX Runtime",
        "Student fp32",
        "Student int8",
        "Student fp32, fused",
        "Student int8, fused",
    ]


def test_compared_cell_is_the_replay_with_most_threads(record) -> None:
    assert Record(record, "device").cell(batch=1) == Cell(1, "replay", 2)


def test_compared_cell_without_replay_is_the_length_nearest_to_32(record) -> None:
    record["measurements"] = [entry for entry in record["measurements"] if entry["sequence"] not in ("replay", 32)]
    assert Record(record, "device").cell(batch=1) == Cell(1, 16, 2)
    assert Record(record, "device").cell(batch=4) is None


def test_compared_cell_is_one_the_teacher_has_too(record) -> None:
    record["measurements"] = [
        entry for entry in record["measurements"] if entry["model"] == "student" or entry["sequence"] == 64
    ]
    assert Record(record, "device").cell(batch=1) == Cell(1, 64, 2)


def test_default_graph_is_the_one_predict_uses(record) -> None:
    assert Record(record, "device").default == Variant("student", "onnxruntime", "fused-int8")
    record["measurements"] = [entry for entry in record["measurements"] if entry["graph"] in (None, "fp32", "int8")]
    assert Record(record, "device").default == Variant("student", "onnxruntime", "int8")


def test_facts_come_from_models_then_from_measurements(record) -> None:
    student = Variant("student", "onnxruntime", "int8")
    assert Record(record, "device").metric(student, "accuracy") == 0.940
    del record["models"]
    assert Record(record, "device").metric(student, "accuracy") == 0.940
    assert Record(record, "device").metric(student, "f1") is None
    assert Record(record, "device").fact(student, "model_bytes") == 15_000_000


def test_same_device_name_is_numbered(record, save) -> None:
    first, second = read_records([save(record, "a.json"), save(record, "b.json")])
    assert (first.name, second.name) == ("AMD EPYC (2 cores, Linux x86_64)", "AMD EPYC (2 cores, Linux x86_64) (2)")


def test_no_record_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"no bench record was given\. Name at least one record\.json"):
        read_records([])


def test_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.json: the bench record is missing"):
        read_records([tmp_path / "gone.json"])


def test_broken_json_is_refused(tmp_path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"schema_version": 1,', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"record\.json: the bench record cannot be read"):
        read_records([path])


def test_merged_list_is_refused_as_input(record, save) -> None:
    with pytest.raises(ArtifactError, match="should be a JSON object, found list"):
        read_records([save([record])])


def test_other_schema_version_is_refused(record, save) -> None:
    path = save(record | {"schema_version": 9})
    with pytest.raises(ArtifactError, match=r"schema_version is 9, this bertemd reads 1\. Run `bertemd bench` again"):
        read_records([path])


@pytest.mark.parametrize("key", ["device", "artifact", "measurements"])
def test_other_shape_is_refused(record, save, key) -> None:
    with pytest.raises(ArtifactError, match=f"'{key}' should be a .*, found str; this is no bench record"):
        read_records([save(record | {key: "x"})])


@pytest.mark.parametrize(
    "change", [{"batch": None}, {"sequence": "long"}, {"threads": {}}, {"batch": 0}, {"sequence": 1.5}]
)
def test_measurement_without_conditions_is_refused(record, save, change) -> None:
    record["measurements"][3] |= change
    with pytest.raises(ArtifactError, match=r"measurements\[3\] needs whole numbers above 0 for batch, sequence"):
        read_records([save(record)])


def test_the_same_cell_twice_is_refused(record, save) -> None:
    record["measurements"].append(record["measurements"][0])
    with pytest.raises(ArtifactError, match=r"\[120\] measures Teacher, PyTorch, batch 1, 16 tokens, 1 thread once"):
        read_records([save(record)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", {"name": "rte", "kind": "classification", "metrics": ["accuracy"]}),
        ("student", {"layers": 6}),
        ("labels", ["yes", "no"]),
        ("teacher", {"name": "other", "layers": 12, "sha256": "cd"}),
    ],
)
def test_records_of_different_artifacts_are_refused(record, save, key, value) -> None:
    first = save(record, "a.json")
    record["artifact"][key] = value
    second = save(record, "b.json")
    with pytest.raises(ArtifactError, match=rf"b\.json: its {key} is .*, that of .*a\.json is .* One report holds one"):
        read_records([first, second])
