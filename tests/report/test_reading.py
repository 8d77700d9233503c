from __future__ import annotations

import copy

import pytest
from tiny_record import estimated, other_student

from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.report.reading import named, read_records


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


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        ("1e999", "inf"),
        ("1" + "0" * 400, "a whole number too large for any measurement"),
    ],
)
def test_a_number_that_is_none_is_refused(record, save, value, found) -> None:
    record["measurements"][2]["latency_ms"]["samples"][1] = "HERE"
    path = save(record)
    path.write_text(path.read_text(encoding="utf-8").replace('"HERE"', value), encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        read_records([path])
    assert str(caught.value) == (
        f"{path}: measurements[2].latency_ms.samples[1] is {found}, allowed are finite numbers, and null for what was not "
        "measured. Run `bertemd bench` again."
    )


@pytest.mark.parametrize(
    ("depth", "said"), [(200, "is nested deeper than 64 levels; this is no bench"), (200_000, "too deeply")]
)
def test_deep_nesting_is_refused(tmp_path, depth, said) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"schema_version": ' + "[" * depth + "]" * depth + "}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"record\.json: .*{said}"):
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
        ("labels", ["yes", "no"]),
        ("teacher", {"name": "other", "layers": 12, "sha256": "cd"}),
    ],
)
def test_records_of_another_task_or_teacher_are_refused(record, save, key, value) -> None:
    first = save(record, "a.json")
    record["artifact"][key] = value
    second = save(record, "b.json")
    with pytest.raises(
        ArtifactError,
        match=rf"b\.json: its {key} is .*, that of .*a\.json is .* One report holds one task and one teacher",
    ):
        read_records([first, second])


@pytest.mark.parametrize("version", [None, "1", True, 1.5])
def test_a_schema_version_is_one_whole_number(record, save, version) -> None:
    with pytest.raises(ArtifactError, match=r"record\.json: schema_version is .*, this bertemd reads 1\."):
        read_records([save(record | {"schema_version": version})])


def test_an_unknown_way_of_getting_numbers_is_refused(record, save) -> None:
    record["device"]["kind"] = "guessed"
    with pytest.raises(
        ArtifactError, match=r'device\.kind is "guessed", allowed are measured, constrained, remote, estimated'
    ):
        read_records([save(record)])


def test_a_teacher_is_known_by_its_weights(record, save) -> None:
    first = save(record, "a.json")
    record["artifact"]["teacher"]["name"] = "the same, elsewhere"
    assert len(read_records([first, save(record, "b.json")])) == 2


def test_one_device_measured_and_estimated_has_two_titles(record) -> None:
    other = estimated(record, name=record["device"]["name"])
    titles = [found.title for found in named([record, other])]
    assert titles == [f"{record['device']['name']} (measured)", f"{record['device']['name']} (estimated)"]


def test_students_of_one_teacher_are_named_by_their_sizes(record) -> None:
    records = named([record, other_student(record), estimated(record)])
    assert [found.student for found in records] == ["4 layers, width 312", "6 layers, width 768", "4 layers, width 312"]
    assert records[1].name == "6 layers, width 768 on AMD EPYC (2 cores, Linux x86_64)"


def test_students_of_one_size_are_named_by_their_training(record) -> None:
    others = [copy.deepcopy(record) for _ in range(2)]
    for seed, other in enumerate(others, start=1):
        other["artifact"]["created"] = f"2026-01-0{seed}"
        other["distillation"] |= {"mapping": "uniform", "seed": 1}
    names = [found.student for found in named([record, *others])]
    assert names == [
        "4 layers, width 312, mapping emd, seed 7",
        "4 layers, width 312, mapping uniform, seed 1 (1)",
        "4 layers, width 312, mapping uniform, seed 1 (2)",
    ]
