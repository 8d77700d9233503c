from __future__ import annotations

import json
import math

import pytest
from tiny_speeds import make_calibration, make_speeds

from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.estimate.speeds import Calibration, Surface, amdahl

LINE = Surface(((8.0, ((10.0, 1.0), (1000.0, 100.0))),))
TWO = Surface(((8.0, ((10.0, 1.0),)), (32.0, ((10.0, 4.0),))))


def test_lines_are_straight_in_logarithms():
    assert LINE.at(100, 8) == pytest.approx(10.0)
    assert LINE.at(10 * math.sqrt(10), 8) == pytest.approx(math.sqrt(10))
    assert TWO.at(10, 16) == pytest.approx(2.0)


def test_outside_the_points():
    assert LINE.at(1, 8) == LINE.at(0, 8) == pytest.approx(1.0)
    assert LINE.at(5000, 8) == pytest.approx(100.0)
    assert LINE.at(5000, 8, grows=True) == pytest.approx(500.0)
    assert (TWO.at(10, 1), TWO.at(10, 999)) == (pytest.approx(1.0), pytest.approx(4.0))


def test_start_is_the_least_at_the_least_size():
    assert (LINE.start, TWO.start) == (1.0, 1.0)


def test_surfaces_changed_and_merged():
    assert TWO.changed(lambda value: 2 * value).lines == ((8.0, ((10.0, 2.0),)), (32.0, ((10.0, 8.0),)))
    other = TWO.changed(lambda value: value + 1)
    assert TWO.merged(other, lambda left, right: right - left).lines == ((8.0, ((10.0, 1.0),)), (32.0, ((10.0, 1.0),)))


@pytest.mark.parametrize(
    ("one", "many", "expected"),
    [
        (12.0, 6.0, 3.0),  # all of it is divided
        (12.0, 12.0, 12.0),  # nothing is
        (12.0, 9.0, 7.5),  # half of it: 6 + 6 / 4
        (12.0, 15.0, 15.0),  # more threads are slower, and stay so
        (12.0, 4.0, 3.0),  # more than can be: 12 / 4
    ],
)
def test_amdahl_from_two_threads_to_four(one, many, expected):
    assert amdahl(one, many, most=2, threads=4) == pytest.approx(expected)
    assert amdahl(one, many, most=2, threads=1) == pytest.approx(one if many < one else many)


def test_threads_that_were_not_measured():
    calibration = make_calibration()
    best = [calibration.at(threads).best("fp32_product") for threads in (1, 2, 4)]
    assert best == [pytest.approx(count * best[0]) for count in (1, 2, 4)]
    assert calibration.at(4).call_ms == calibration.at(1).call_ms
    assert calibration.at(2) is calibration.speeds[2]


def test_more_threads_than_cores_are_no_faster():
    calibration = Calibration(make_calibration().speeds, {}, cores=3)
    assert calibration.at(8) == calibration.at(3)
    assert calibration.at(3).best("fp32_product") == pytest.approx(3 * calibration.at(1).best("fp32_product"))


def test_one_thread_says_nothing_of_more():
    calibration = make_calibration(threads=(1,))
    assert calibration.at(1).call_ms == make_speeds().call_ms
    with pytest.raises(
        MeasurementError, match=r"4 threads asked for, and the calibration has 1 only.*bench.threads to \[1\]"
    ):
        calibration.at(4)


def test_bandwidth_of_one_row():
    """2e-8 ms per multiply-add of 4 bytes and a stall of 1e-7 ms a byte: 1.05e-7 ms a byte are 9.5 GB/s."""
    assert make_speeds().stream_gb_s == pytest.approx(1e-6 / 1.05e-7)


def test_json_and_back():
    calibration = make_calibration()
    calibration = Calibration(
        calibration.speeds,
        calibration.machine,
        {"1": {"call": [0.01, 0.02]}},
        {"memory": 2.0},
        {"memory": (0.5, 2.0)},
        4,
        0.5,
    )
    text = json.dumps(calibration.record(samples=True), allow_nan=False)
    assert Calibration.read(json.loads(text), where="here") == calibration
    assert "samples_ms" not in calibration.record()
    assert Calibration.read(json.loads(json.dumps(calibration.record())), where="here").samples == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("speeds"), "KeyError: 'speeds'"),
        (lambda record: record.update(version=99), "version 99"),
        (lambda record: record["speeds"]["1"]["tables"].update(gelu=[]), "do not ascend"),
        (lambda record: record["speeds"]["1"]["tables"].update(gelu=[[1, [[1, 0.0]]]]), "not above 0"),
        (lambda record: record["speeds"]["1"]["tables"].update(gelu=[[1, [[1, 1], [1, 2]]]]), "do not ascend"),
        (lambda record: record["speeds"]["1"]["tables"].update(gelu=[[1, [[1, math.inf]]]]), "not above 0"),
        (lambda record: record["speeds"].update(many={}), "ValueError"),
        (lambda record: record.update(spread={"memory": [1]}), "ValueError"),
        (lambda record: record.update(factors=[]), "AttributeError"),
    ],
)
def test_a_calibration_of_another_form_is_refused(change, message):
    record = json.loads(json.dumps(make_calibration().record()))
    change(record)
    with pytest.raises(
        ArtifactError, match=rf"file.json: this is no calibration of version 1 \(.*{message}.*Calibrate again"
    ):
        Calibration.read(record, where="file.json")
