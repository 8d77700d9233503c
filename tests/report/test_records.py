from __future__ import annotations

from tiny_record import estimated, held

from bertemd_deploy.report.records import Cell, Failure, Record, Span, Variant


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


def test_a_failed_teacher_is_no_teacher(record) -> None:
    found = Record(held(record), "device")
    assert found.teacher is None
    torch = Variant("teacher", "pytorch", None)
    assert found.failures[torch] == Failure("out of memory", 512e6, 511e6)
    assert found.variants[0] == torch


def test_the_teacher_is_the_one_that_speed_ups_are_against(record) -> None:
    record["baseline"] = "teacher onnxruntime fp32 fp32"
    assert Record(record, "device").teacher == Variant("teacher", "onnxruntime", "fp32")
    record["baseline"] = None
    assert Record(record, "device").teacher == Variant("teacher", "pytorch", None)


def test_intervals_are_those_of_the_kind(record) -> None:
    student, cell = Variant("student", "onnxruntime", "int8"), Cell(1, 32, 1)
    measured = Record(record, "device")
    low, high = measured.cells[student, cell]["latency_ms"]["p50_ci95"]
    assert measured.interval(student, cell) == Span(low, high)
    assert measured.interval(student, cell, "p95") is None  # 60 samples do not bear one
    guessed = Record(estimated(record, factor=1.0), "device")
    p50 = guessed.latency(student, cell)
    assert p50 is not None
    assert guessed.interval(student, cell) == Span(0.7 * p50, 1.5 * p50)
    assert guessed.interval(student, cell, "p95") is None


def test_what_is_no_interval_is_none() -> None:
    assert [Span.of(value) for value in (None, [1], [2, 1], [None, 1], "12", [0, 1])] == [None] * 5 + [Span(0, 1)]


def test_keys_are_identifiers_whatever_the_record_says() -> None:
    assert Variant("student", '"><script>', "fp32").key == "student-fp32-script"
