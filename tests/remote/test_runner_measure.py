from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from remote_parts import SMALL, remote_record

from bertemd_deploy.devices import load_devices
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.remote.folder import write_runner
from bertemd_deploy.remote.received import checked_record
from bertemd_deploy.remote.runner import measure
from bertemd_deploy.settings import BenchSettings

INT8 = dataclasses.replace(SMALL, graphs=("int8",))
TOLD = {"installed": [], "stand_ins": [], "quick": False}


def stored(settings: BenchSettings):
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def test_settings_come_back_as_they_were():
    assert measure.read_settings(stored(SMALL), TOLD) == SMALL
    assert measure.read_settings(stored(BenchSettings()) | {"of_another_version": 1}, TOLD) == BenchSettings()


def test_what_cannot_be_measured_is_not_asked_for():
    found = measure.read_settings(stored(SMALL), TOLD | {"stand_ins": ["tokenizers"]})
    assert found == dataclasses.replace(SMALL, end_to_end=False)


def test_quick_takes_the_least():
    found = measure.read_settings(stored(BenchSettings()), TOLD | {"quick": True})
    assert (found.rounds, found.seconds_per_cell, found.paced_interval_ms, found.idle_seconds) == (2, 0.05, 0.0, 0.0)
    assert not found.arena
    assert found.sequence_lengths == BenchSettings().sequence_lengths


@pytest.mark.parametrize("device", load_devices().values(), ids=lambda device: device.name)
def test_devices_come_back_as_they_were(device):
    assert measure.read_device(json.loads(json.dumps(dataclasses.asdict(device)))) == device


def test_no_device_is_none():
    assert measure.read_device(None) is None


def test_the_record_says_how_it_came_about():
    told = {"installed": ["numpy"], "stand_ins": ["tokenizers", "psutil"], "quick": True}
    record = remote_record() | {"notes": ["before"]}
    record["device"]["kind"] = "measured"
    found = measure.remote_record(record, given={"notes": ["of the teacher"], "artifact": {"a": 1}}, told=told)
    assert found["device"]["kind"] == "remote"
    assert found["runner"] == told
    assert found["artifact"] == {"a": 1}
    assert found["notes"] == [
        "before",
        "of the teacher",
        measure.LEFT_OUT["tokenizers"],
        measure.LEFT_OUT["psutil"],
        "measured with --quick: too short to rely on",
    ]
    assert record["device"]["kind"] == "measured"


def run(folder, *arguments, environment=None):
    """Run the folder by hand, from another folder, with no variable of this process."""
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *arguments],
        cwd=folder.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent)} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_folder_measures_by_hand(artifact_folder, artifact, tmp_path):
    """For a device; nothing is left beside the record."""
    device = load_devices()["raspberry-pi-4"]
    home = tmp_path / "home"
    home.mkdir()
    out = write_runner(artifact_folder, home / "bundle", settings=INT8, device=device)
    before = files(home)
    done = run(out, "--out", "here/r.json", "--no-install")
    assert done.returncode == 0, done.stderr
    assert "record: " in done.stderr
    record = checked_record((home / "here" / "r.json").read_text(), artifact=artifact, where="here")
    assert (record["device"]["name"], record["device"]["target"]) == (device.name, device.target)
    assert record["device"]["kind"] == "remote"
    assert {entry["graph"] for entry in record["measurements"]} == {"int8"}
    replayed = [entry for entry in record["measurements"] if entry["sequence"] == "replay"]
    assert all(entry["end_to_end_ms"]["p50"] > 0 for entry in replayed)
    assert record["runner"] == {"installed": [], "stand_ins": [], "quick": False}
    assert files(home) == sorted([*before, "here/r.json"])
    again = run(out, "--out", "here/r.json", "--no-install")
    assert again.returncode == 3
    assert again.stderr == (
        "error: here/r.json exists, such as of an earlier measurement. Add --force to replace it, or name another file in "
        "another folder with --out.\n"
    )
    (home / "here" / "churn.jsonl").write_text("of the earlier record")
    done = run(out, "--out", "here/r.json", "--no-install", "--quick", "--force")
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "here" / "r.json").read_text())["runner"]["quick"]
    assert files(home) == sorted([*before, "here/r.json"])


def test_the_folder_measures_with_the_stand_ins(artifact_folder, artifact, tmp_path):
    """Where tokenizers and psutil cannot be imported; the record is where the folder is."""
    out = write_runner(artifact_folder, tmp_path / "bundle", settings=INT8)
    broken = tmp_path / "broken"
    for name in ("tokenizers", "psutil"):
        (broken / name).mkdir(parents=True)
        (broken / name / "__init__.py").write_text("raise ImportError('broken here')")
    # Behind the stand-ins, before what is installed: what fails to import is as good as absent.
    done = run(out, "--no-install", "--quick", environment={"PYTHONPATH": str(broken)})
    assert done.returncode == 0, done.stderr
    record = checked_record((out / "record.json").read_text(), artifact=artifact, where="here")
    assert record["runner"] == {"installed": [], "stand_ins": ["tokenizers", "psutil"], "quick": True}
    assert all(entry["end_to_end_ms"] is None for entry in record["measurements"])
    assert all(entry["peak_rss_bytes"] > 10**6 for entry in record["models"])
    assert measure.LEFT_OUT["tokenizers"] in record["notes"]


def test_what_cannot_be_measured_is_one_message(artifact_folder, tmp_path):
    settings = dataclasses.replace(SMALL, sequence_lengths=(64,), replay=False)
    out = write_runner(artifact_folder, tmp_path / "bundle", settings=settings)
    done = run(out, "--no-install")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(
        "error: bench: nothing is left to measure (sequence lengths [64] left out"
    )
    assert not (out / "record.json").exists()


def test_a_record_by_hand_is_refused_for_another_kind(artifact, tmp_path):
    record = remote_record()
    record["device"]["kind"] = "measured"
    with pytest.raises(ArtifactError, match=r'device\.kind should be "remote", found \'measured\''):
        checked_record(json.dumps(record), artifact=artifact, where="here")
