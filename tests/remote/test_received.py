from __future__ import annotations

import json

import pytest
from remote_parts import remote_record

from bertemd_deploy.bench.record import artifact_excerpt
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.remote.received import MOST_DEPTH, MOST_MEASUREMENTS, MOST_TEXT, checked_lines, checked_record


def nested(levels: int):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_record_is_taken_with_what_is_known_of_the_artifact(artifact):
    found = checked_record(json.dumps(remote_record()), artifact=artifact, where="board")
    assert found["artifact"] == json.loads(json.dumps(artifact_excerpt(artifact)))
    assert found["distillation"] == artifact.manifest["distillation"]
    assert found["measurements"] == remote_record()["measurements"]


def test_a_value_that_was_not_measured_is_null(artifact):
    record = remote_record()
    record["device"]["memory_bytes"] = None
    record["measurements"][0]["energy_joules_per_inference"] = None
    assert checked_record(json.dumps(record), artifact=artifact, where="board")["device"]["memory_bytes"] is None


CHANGES = [
    (("schema_version",), 2, "schema_version is 2, not 1"),
    (("device",), [], "device should be an object, found []"),
    (("device", "kind"), "measured", "device.kind should be \"remote\", found 'measured'"),
    (("device", "name"), "", "device.name should be a text, found ''"),
    (("device", "cores"), -1, "device.cores should be a number of at least 0 or null, found -1"),
    (("device", "memory_bytes"), "much", "device.memory_bytes should be a number of at least 0 or null, found 'much'"),
    (("versions",), None, "versions should be an object, found None"),
    (("settings",), 1, "settings should be an object, found 1"),
    (("conditions",), "fine", "conditions should be an object"),
    (("started",), 5, "started should be a time, found 5"),
    (("notes",), [1], "notes should be a list of texts, found [1]"),
    (("models",), {}, "models should be a list, found {}"),
    (("models", 0), 1, "models[0] should be an object, found 1"),
    (("models", 0, "model"), "pupil", "models[0].model should be teacher or student, found 'pupil'"),
    (("models", 0, "backend"), ["x"], "models[0].backend should be onnxruntime, found ['x']"),
    (("models", 0, "graph"), {}, "models[0].graph should be one of fp32, int8, fused, fused-int8, fp16, found {}"),
    (("models", 0, "peak_rss_bytes"), True, "models[0].peak_rss_bytes should be a number of at least 0 or null, found True"),
    (("measurements",), [], "measurements should be a list of 1 to 20,000, found []"),
    (("measurements", 1, "batch"), 0, "measurements[1].batch should be a whole number above 0, found 0"),
    (("measurements", 0, "threads"), True, "measurements[0].threads should be a whole number above 0, found True"),
    (("measurements", 0, "n"), 1.5, "measurements[0].n should be a whole number above 0, found 1.5"),
    (("measurements", 0, "sequence"), "all", "measurements[0].sequence should be a whole number above 0 or \"replay\""),
    (("measurements", 0, "latency_ms"), None, "measurements[0].latency_ms should be an object, found None"),
    (("measurements", 0, "latency_ms", "p50"), None, "latency_ms.p50 should be a number of at least 0, found None"),
    (("measurements", 0, "latency_ms", "p95"), "fast", "latency_ms.p95 should be a number of at least 0, found 'fast'"),
    (("measurements", 0, "latency_ms", "samples"), [1, None], "samples should be a list of numbers, found [1, None]"),
    (("more",), "\x1b[31m", "the record holds a text with control characters: '?[31m'"),
    (("more\x07",), 1, "the record holds a text with control characters: 'more?'"),
    (("more",), "x" * (MOST_TEXT + 1), "the record holds a text of 20,001 characters"),
    (("more",), nested(MOST_DEPTH + 1), "the record holds more than 16 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "reason"), CHANGES)
def test_what_no_record_holds_is_refused(place, value, reason, artifact):
    record = remote_record()
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ArtifactError) as caught:
        checked_record(json.dumps(record), artifact=artifact, where="pi@board")
    said = str(caught.value)
    assert said.startswith("pi@board: what came back is no bench record (")
    assert reason in said
    assert "Nothing was written. Measure again; if it stays so, carry the folder of `bertemd bundle` there" in said


def test_too_many_measurements_are_refused(artifact):
    record = remote_record()
    record["measurements"] *= MOST_MEASUREMENTS
    with pytest.raises(ArtifactError, match="measurements should be a list of 1 to 20,000"):
        checked_record(json.dumps(record), artifact=artifact, where="board")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the record cannot be read: Expecting value"),
        ('{"a": NaN}', "the record cannot be read: NaN is no number"),
        ('{"a": -Infinity}', "the record cannot be read: -Infinity is no number"),
        ('{"a": 1e999}', "the record holds a number that is not finite"),
        ("[1]", "the record is list, not an object"),
        ("[" * 100_000, "the record cannot be read: maximum recursion depth exceeded"),
        ('{"a": ' + "1" * 5000 + "}", "the record cannot be read: Exceeds the limit"),
    ],
)
def test_what_is_no_record_at_all_is_refused(text, reason, artifact):
    with pytest.raises(ArtifactError) as caught:
        checked_record(text, artifact=artifact, where="board")
    assert reason in str(caught.value)


def test_lists_are_taken_line_by_line():
    text = '{"text": "ä\\tb", "gold": 1}\n{"text": "c"}\n'
    assert checked_lines(text, where="board") == '{"text": "ä\\tb", "gold": 1}\n{"text": "c"}\n'
    assert checked_lines("", where="board") == ""
    with pytest.raises(ArtifactError, match="the list, line 2 is int, not an object"):
        checked_lines("{}\n2\n", where="board")
    with pytest.raises(ArtifactError, match="the list, line 1 cannot be read"):
        checked_lines("{", where="board")
