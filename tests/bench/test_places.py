from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertemd_deploy.bench import places as module
from bertemd_deploy.bench.places import Place, judge_again, plan_places
from bertemd_deploy.budget import Budget
from bertemd_deploy.devices import load_devices
from bertemd_deploy.errors import ArtifactError, MeasurementError, NoisyError, RecipeError
from bertemd_deploy.settings import BenchSettings

DEVICES = load_devices()
EARLIER = '{"device": {"kind": "measured"}}'


def record(name: str, kind: str) -> dict[str, Any]:
    artifact = {"task": {"name": "sst2", "metrics": ["accuracy"]}}
    return {
        "schema_version": 1,
        "device": {"name": name, "kind": kind, "cpu": "a CPU"},
        "artifact": artifact,
        "measurements": [
            {"model": "student", "backend": "onnxruntime", "graph": "fp32", "batch": 1, "sequence": 32, "threads": 1}
            | {"latency_ms": {"p50": 2.0}, "estimate_ms": {"p50": 2.0, "low": 1.0, "high": 3.0}}
        ],
        "started": "2026-01-01T00:00:00+00:00",
    }


class Stand:
    """Stands in for what measures; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Path, dict[str, Any]]] = []
        self.failing: dict[str, Exception] = {}
        self.calibrations = 0

    def bench(self, artifact: Path, *, out: Path, device: Any = None, **given: Any) -> dict[str, Any]:
        return self._write(
            "local" if device is None else device.name, "measured" if device is None else "constrained", out, given
        )

    def remote(self, artifact: Path, *, url: str, out: Path, **given: Any) -> dict[str, Any]:
        return self._write(url, "remote", out, given)

    def estimate(self, artifact: Path, *, device: Any, **given: Any) -> dict[str, Any]:
        self.asked.append((device.name, Path(), given))
        return record(device.name, "estimated")

    def calibrate(self) -> str:
        self.calibrations += 1
        return "tables"

    def _write(self, name: str, kind: str, out: Path, given: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((name, out, given))
        made, error = record(name, kind), self.failing.get(name)
        if error is None or isinstance(error, NoisyError):
            out.mkdir(parents=True, exist_ok=True)
            (out / "record.json").write_text(json.dumps(made))
        if error is not None:
            raise error
        return made


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand()
    monkeypatch.setattr(module, "bench", made.bench)
    monkeypatch.setattr(module.Artifact, "load", lambda folder: folder)
    monkeypatch.setattr("bertemd_deploy.remote.session.bench_remote", made.remote)
    monkeypatch.setattr("bertemd_deploy.estimate.record.estimate_record", made.estimate)
    monkeypatch.setattr("bertemd_deploy.estimate.record.calibrate_here", made.calibrate)
    monkeypatch.setattr(
        module,
        "way_of",
        lambda device, asked, **_: (
            asked or {"local": "measured", "laptop-x86": "constrained"}.get(device.name, "estimated")
        ),
    )
    return made


def bench_places(artifact: Path, **given: Any) -> list[Path]:
    done = module.bench_places(artifact, **given)
    done.check()
    return done.paths


def kinds(paths: list[Path]) -> list[tuple[str, str]]:
    read = [json.loads(path.read_text()) for path in paths]
    return [(one["device"]["name"], one["device"]["kind"]) for one in read]


def test_every_place_gets_a_record_of_its_own(stand: Stand, tmp_path: Path) -> None:
    names = ("local", "laptop-x86", "ssh://pi@garden.example:2222", "raspberry-pi-5", "raspberry-pi-4:estimated")
    found = bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=BenchSettings(devices=names))
    out = tmp_path / "out"
    assert found == [
        out / "record.json",
        out / "laptop-x86/record.json",
        out / "pi-garden.example-2222/record.json",
        out / "raspberry-pi-5/record.json",
        out / "raspberry-pi-4-estimated/record.json",
    ]
    assert kinds(found) == [
        ("local", "measured"),
        ("laptop-x86", "constrained"),
        ("ssh://pi@garden.example:2222", "remote"),
        ("raspberry-pi-5", "estimated"),
        ("raspberry-pi-4", "estimated"),
    ]
    confined = stand.asked[1][2]["limits"]
    assert (confined.cpus, confined.memory_bytes) == (DEVICES["laptop-x86"].threads, DEVICES["laptop-x86"].memory_bytes)
    assert stand.calibrations == 1
    assert {asked[2]["calibration"] for asked in stand.asked[3:]} == {"tables"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("raspberry-pi-6",), "unknown device 'raspberry-pi-6'. Did you mean 'raspberry-pi-5'"),
        (("local", "local"), r"^local and local would share a folder\. Name each device once\."),
        (("ssh://a@b:99999",), "is no address of a device"),
        (("browser-wasm:constrained",), "this machine cannot stand for it"),
        (("local:estimated",), "the machine at hand is measured as it is"),
        (("raspberry-pi-5:",), "there is no such way"),
        (("raspberry-pi-5", "raspberry-pi-5:estimated"), "^raspberry-pi-5 and raspberry-pi-5:estimated would share"),
    ],
)
def test_a_place_that_cannot_be_is_said_before_anything_is_measured(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_places(names, DEVICES)


def test_a_folder_s_name_holds_nothing_of_a_path() -> None:
    assert Place("ssh://../../etc", "remote", None).folder == "etc"
    assert Place("ssh://me@[::1]:22", "remote", None).folder == "me-1-22"


def test_budgets_are_written_into_the_records(stand: Stand, tmp_path: Path) -> None:
    settings = BenchSettings(devices=("local", "raspberry-pi-5:estimated"))
    budgets = {"default": Budget(max_size_mb=20.0), "raspberry-pi-5": Budget(max_p95_ms=60.0)}
    found = bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=settings, budgets=budgets)
    limits = [json.loads(path.read_text())["budget"]["limits"] for path in found]
    assert limits == [{"max_size_mb": 20.0}, {"max_p95_ms": 60.0}]
    judge_again(found, budgets={"default": Budget(max_rss_mb=1.0)}, settings=settings)
    assert [json.loads(path.read_text())["budget"]["limits"] for path in found] == [{"max_rss_mb": 1.0}] * 2
    judge_again(found, budgets={}, settings=settings)
    assert not any("budget" in json.loads(path.read_text()) for path in found)


def test_limits_of_the_command_line_come_first(stand: Stand, tmp_path: Path) -> None:
    found = bench_places(
        tmp_path,
        teacher=None,
        out=tmp_path / "out",
        settings=BenchSettings(),
        budgets={"default": Budget(max_size_mb=20.0, max_rss_mb=9.0)},
        flags={"max_size_mb": "30 MB", "min_retention": None},
    )
    assert json.loads(found[0].read_text())["budget"]["limits"] == {"max_rss_mb": 9.0, "max_size_mb": 30.0}


def test_a_place_that_fails_costs_no_other_its_record(stand: Stand, tmp_path: Path) -> None:
    stand.failing["local"] = MeasurementError("bench: the worker died.")
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text(EARLIER)
    settings = BenchSettings(devices=("local", "raspberry-pi-5"))
    with pytest.raises(MeasurementError, match="the worker died"):
        bench_places(tmp_path, teacher=None, out=out, settings=settings)
    assert (out / "record.json").read_text() == EARLIER
    assert not list(out.glob(".*"))
    assert kinds([out / "raspberry-pi-5/record.json"]) == [("raspberry-pi-5", "estimated")]
    stand.failing["laptop-x86"] = ArtifactError("no record came back.")
    several = BenchSettings(devices=("local", "laptop-x86", "raspberry-pi-5"))
    told = r"2 places failed; the others have their records:\n  - local: bench: the worker died\.\n  - laptop-x86: no record"
    with pytest.raises(MeasurementError, match=told):
        bench_places(tmp_path, teacher=None, out=out, settings=several)


def test_what_was_measured_already_is_taken_as_it_is(stand: Stand, tmp_path: Path) -> None:
    settings = BenchSettings(devices=("local", "raspberry-pi-5"))
    first = bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=settings)
    first[0].write_text(first[0].read_text().replace("{", '{"mark": 1, ', 1))
    found = bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=settings, reuse={"local"}, force=True)
    assert found == first
    assert ["mark" in json.loads(path.read_text()) for path in found] == [True, False]


def test_what_is_done_is_told_at_once(stand: Stand, tmp_path: Path) -> None:
    stand.failing |= {"local": NoisyError("noisy."), "laptop-x86": MeasurementError("died.")}
    told: list[tuple[str, Path]] = []
    settings = BenchSettings(devices=("local", "laptop-x86", "raspberry-pi-5"))
    with pytest.raises(MeasurementError):
        bench_places(
            tmp_path,
            teacher=None,
            out=tmp_path / "out",
            settings=settings,
            done=lambda name, path: told.append((name, path)),
        )
    assert told == [("raspberry-pi-5", tmp_path / "out/raspberry-pi-5/record.json")]


def test_a_noisy_measurement_is_kept_and_judged(stand: Stand, tmp_path: Path) -> None:
    stand.failing["local"] = NoisyError("bench: the measurement is noisy.")
    with pytest.raises(NoisyError):
        bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=BenchSettings(), flags={"max_p95_ms": 5.0})
    assert json.loads((tmp_path / "out/record.json").read_text())["budget"]["limits"] == {"max_p95_ms": 5.0}


def test_a_baseline_is_held_against_the_place_it_is_of(stand: Stand, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(record("raspberry-pi-5", "estimated")))
    settings = BenchSettings(devices=("local", "raspberry-pi-5"))
    found = bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=settings, baseline=earlier)
    read = [json.loads(path.read_text()) for path in found]
    assert "against_baseline" not in read[0]
    assert read[1]["against_baseline"] == {"started": "2026-01-01T00:00:00+00:00", "regressions": []}
    earlier.write_text(json.dumps(record("elsewhere", "measured")))
    asked = len(stand.asked)
    with pytest.raises(
        ArtifactError, match=r"is of the device elsewhere \(measured\), asked for are .* \(measured\); rasp"
    ):
        bench_places(tmp_path, teacher=None, out=tmp_path / "again", settings=settings, baseline=earlier)
    with pytest.raises(ArtifactError, match=r"record\.json: the baseline would be overwritten\. Choose another --out"):
        bench_places(tmp_path, teacher=None, out=tmp_path / "out", settings=settings, baseline=found[1])
    assert len(stand.asked) == asked


def test_a_record_that_was_got_in_another_way_is_kept(stand: Stand, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = BenchSettings(devices=("local", "raspberry-pi-5"))
    bench_places(tmp_path, teacher=None, out=out, settings=settings)
    carried = json.dumps(record("a board", "remote"))
    (out / "raspberry-pi-5/record.json").write_text(carried)
    (out / "raspberry-pi-5/churn.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="a record that is remote, and raspberry-pi-5 would be estimated"):
        bench_places(tmp_path, teacher=None, out=out, settings=settings)
    assert (out / "raspberry-pi-5/record.json").read_text() == carried
    bench_places(tmp_path, teacher=None, out=out, settings=settings, force=True)
    assert kinds([out / "raspberry-pi-5/record.json"]) == [("raspberry-pi-5", "estimated")]
    assert not (out / "raspberry-pi-5/churn.jsonl").exists()
    (out / "record.json").unlink()
    (out / "record.json").mkdir()
    with pytest.raises(ArtifactError, match="a folder has the record's name"):
        bench_places(tmp_path, teacher=None, out=out, settings=settings, force=True)


def test_a_folder_of_other_things_is_left_alone(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ArtifactError, match="--force"):
        bench_places(tmp_path, teacher=None, out=tmp_path, settings=BenchSettings())
    assert stand.asked == []
