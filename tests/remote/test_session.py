"""Visits to a device behind a stand-in for ssh; `test_sshd` has the real one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from remote_parts import SMALL, URL, remote_record, write_stub

from bertemd_deploy.devices import load_devices
from bertemd_deploy.errors import ArtifactError, MeasurementError, RecipeError
from bertemd_deploy.remote import session
from bertemd_deploy.remote.runner.keeper import MARK
from bertemd_deploy.remote.session import bench_remote
from bertemd_deploy.report import report


@pytest.fixture
def stub(monkeypatch):
    """Have a folder sent that only writes a record; returns the function that says what else it does."""
    options = {}
    monkeypatch.setattr(session, "write_runner", lambda artifact, out, **_: write_stub(out, **options))
    return options.update


@pytest.fixture
def said(monkeypatch):
    """Return the lines told to the user."""
    lines = []
    monkeypatch.setattr(session, "note", lines.append)
    monkeypatch.setattr(session, "warn", lambda line: lines.append(f"! {line}"))
    return lines


@pytest.fixture
def visit(artifact_folder, tmp_path, device):
    """Return the function that measures on the device."""

    def go(**options):
        given = {"url": URL, "teacher": None, "out": tmp_path / "out", "settings": SMALL, "ssh": device.ssh}
        return bench_remote(artifact_folder, **(given | options))

    return go


def test_a_device_measures(visit, device, graph_teacher, no_torch, tmp_path, artifact, said):
    """All of it: the folder as it is written, numpy and ONNX Runtime there, the record into a report."""
    record = visit(teacher=graph_teacher, device=load_devices()["raspberry-pi-4"])
    out = tmp_path / "out"
    assert json.loads((out / "record.json").read_text()) == record
    assert record["device"]["kind"] == "remote"
    assert record["device"]["name"] == "raspberry-pi-4"
    assert record["artifact"]["labels"] == artifact.labels
    assert {(entry["model"], entry["graph"]) for entry in record["measurements"]} == {
        ("teacher", "fp32"), ("student", "fp32"), ("student", "int8"),
    }  # fmt: skip
    assert len((out / "churn.jsonl").read_text().splitlines()) == record["churn"]["examples"]
    assert device.verbs == ["open", "have", "receive", "start", "follow", "fetch", "fetch", "stop"]
    assert any("with onnxruntime" in line for line in said)
    assert str(device.temporary) not in json.dumps(record)
    assert report([out / "record.json"], out=tmp_path / "report", force=False)


def test_what_it_says_is_shown(visit, stub, said):
    visit()
    assert said[0] == "pi@board: connecting"
    assert "pi@board: measuring 1/2" in said
    assert "pi@board: measuring 2/2 ?[31m" in said


def test_old_files_of_the_out_folder(visit, stub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(mine\.txt\) and no record\.json"):
        visit()
    (out / "churn.jsonl").write_text("old")
    visit(force=True)
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "record.json"]


def test_the_address_is_read_first(visit, tmp_path):
    with pytest.raises(RecipeError, match="is no address of a device"):
        visit(url="ssh://-oProxyCommand=x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", [{}, {"folder": None}, {"folder": 3}, {"folder": "here"}], ids=str)
def test_an_answer_without_a_folder_cannot_be_used(named, visit, stub, device, monkeypatch):
    program = f"print({MARK!r} + {json.dumps(named)!r})"
    monkeypatch.setattr(session, "opening", lambda needed: program.encode())
    found = repr(named.get("folder"))
    with pytest.raises(
        MeasurementError,
        match=rf"pi@board: its answer cannot be used: it should name the folder .* found {found}\. See",
    ):
        visit()
    assert device.verbs == ["open"]


def test_a_lost_upload_goes_on(visit, stub, device, said):
    stub(extra=3_000_000)
    device.set(drops=["receive", "receive"])
    visit()
    assert device.verbs[:8] == ["open", "have", "receive", "have", "receive", "have", "receive", "start"]
    assert sum(line.startswith("! pi@board: connection lost while sending") for line in said) == 2


def test_a_lost_connection_does_not_end_the_measurement(visit, stub, device, said):
    stub(seconds=1.5)
    device.set(drops=["follow", "follow"])
    assert visit()["device"]["name"] == "A board (4 cores)"
    assert device.verbs.count("follow") == 3
    assert device.verbs.count("start") == 1
    assert said.count("pi@board: measuring 1/2") == 1


@pytest.mark.parametrize("verb", ["receive", "follow"])
def test_a_connection_lost_for_good_is_told(verb, visit, stub, device, tmp_path):
    stub(extra=200_000)
    device.set(drops=[verb] * 3)
    with pytest.raises(MeasurementError, match=r"pi@board: the connection ended \(client_loop: send disconnect"):
        visit()
    assert device.verbs[-1] == "stop"
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unreachable_device_is_not_asked_again(visit, stub, device):
    device.set(exit=255, stderr="ssh: connect to host board port 22: Connection refused\n")
    with pytest.raises(MeasurementError, match="pi@board cannot be reached: nothing listens there"):
        visit()
    assert device.verbs == ["open"]


def test_a_python_that_is_too_old_is_told(visit, stub, device, tmp_path):
    """A python3 that says it is 3.7: the program that opens the folder is the first to look."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "python3").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 7, 3); exec(sys.stdin.read())'\n"
    )
    (folder / "python3").chmod(0o755)
    device.python(folder)
    with pytest.raises(
        MeasurementError, match=r"pi@board: python3 there is 3\.7\.3; measuring needs 3\.9 or newer\. Install one"
    ):
        visit()
    assert device.verbs == ["open"]


def test_no_onnxruntime_there(visit, device, tmp_path):
    """A Python with its standard library alone, and so without a pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "plain")], check=True)
    device.python(tmp_path / "plain" / "bin")
    with pytest.raises(
        MeasurementError, match=r"pi@board: numpy is not installed for Python .* and neither is pip\. Install"
    ):
        visit()


def test_an_illegal_instruction_there(visit, device, tmp_path):
    packages = tmp_path / "packages"
    (packages / "onnxruntime").mkdir(parents=True)
    (packages / "onnxruntime" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    known = json.loads((tmp_path / "device" / "state" / "device.json").read_text())["environment"]
    device.set(environment=known | {"PYTHONPATH": str(packages)})
    with pytest.raises(
        MeasurementError, match=r"pi@board: importing onnxruntime on this machine .* illegal instruction"
    ):
        visit()


def test_two_at_once_are_one_too_many(visit, stub, device, monkeypatch):
    during = []

    def note(line):
        if line == "pi@board: measuring 1/2" and not during:
            during.append(line)
            with pytest.raises(
                MeasurementError, match="another measurement is running there, and two at once would disturb"
            ):
                visit()

    stub(seconds=0.5)
    monkeypatch.setattr(session, "note", note)
    visit()
    assert during


def test_a_full_disk_before(visit, stub, device, monkeypatch):
    monkeypatch.setattr(session, "opening", lambda needed, real=session.opening: real(2**50))
    with pytest.raises(
        MeasurementError, match=r"pi@board: no space in .*temporary: \d+ MB are free, 1125899907 MB are needed"
    ):
        visit()


def test_a_full_disk_while_sending(visit, stub, device, monkeypatch):
    source = session.opening(1000).decode()
    broken = source.replace("file.write(block)", 'raise OSError(28, "")')
    assert broken != source
    monkeypatch.setattr(session, "opening", lambda needed: broken.encode())
    with pytest.raises(MeasurementError, match=r"pi@board: no space in .*temporary: \d+ MB are free, 0 MB are needed"):
        visit()


def test_a_full_disk_while_measuring(visit, stub, device, monkeypatch):
    stub(code=3, files={})
    monkeypatch.setattr(session, "FULL", 2**70)
    with pytest.raises(MeasurementError, match=r"pi@board: no space in .*bertemd-.*Free some, or set TMPDIR there"):
        visit()


def test_a_failure_there_is_one_message(visit, stub, device, tmp_path):
    stub(code=3, files={}, said="error: artifact: it is broken\nand more")
    with pytest.raises(MeasurementError, match=r"^pi@board: artifact: it is broken$"):
        visit()
    stub(said="Traceback\nKeyError: 1")
    with pytest.raises(MeasurementError, match=r"^pi@board: .*Traceback / KeyError: 1$"):
        visit()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_record_of_a_measurement_that_failed_is_kept(visit, stub, tmp_path):
    stub(code=3, said="error: the measurement is noisy")
    with pytest.raises(MeasurementError, match=r"^pi@board: the measurement is noisy$"):
        visit()
    assert json.loads((tmp_path / "out" / "record.json").read_text())["device"]["kind"] == "remote"


def test_no_record_after_all(visit, stub):
    stub(files={})
    with pytest.raises(MeasurementError, match=r"pi@board: measured, and wrote no record\. Measure again\."):
        visit()


def test_a_record_that_is_too_large_is_left_there(visit, stub, monkeypatch):
    monkeypatch.setattr(session, "MOST_RECORD_BYTES", 100)
    with pytest.raises(
        MeasurementError, match=r"record\.json has [\d,]+ bytes there, allowed are 100\. Measure fewer cells"
    ):
        visit()


@pytest.mark.parametrize("name", ["record.json", "churn.jsonl"])
def test_what_is_no_record_is_not_written(name, visit, stub, tmp_path):
    stub(files={"record.json": json.dumps(remote_record()), name: '{"device": "<script>"'})
    with pytest.raises(ArtifactError, match=r"pi@board: what came back is no bench record \(the .* cannot be read"):
        visit()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_list_comes_along(visit, stub, tmp_path):
    stub(files={"record.json": json.dumps(remote_record()), "churn.jsonl": '{"text": "a"}\n'})
    visit()
    assert (tmp_path / "out" / "churn.jsonl").read_text() == '{"text": "a"}\n'


def test_an_interrupt_removes_the_folder(visit, stub, device, monkeypatch):
    def note(line):
        if line == "pi@board: measuring 1/2":
            raise KeyboardInterrupt

    stub(seconds=60)
    monkeypatch.setattr(session, "note", note)
    with pytest.raises(KeyboardInterrupt):
        visit()
    assert device.verbs[-1] == "stop"  # and the fixture looks that nothing is left


def test_a_watching_process_that_was_ended_is_told(visit, stub, device, monkeypatch):
    def note(line):
        if line == "pi@board: measuring 1/2":
            (folder,) = device.temporary.iterdir()
            os.kill(int((folder / "pid").read_text()), 9)

    stub(seconds=3)
    monkeypatch.setattr(session, "note", note)
    with pytest.raises(
        MeasurementError, match="the process that watches over the measurement there was ended from outside"
    ):
        visit()


def test_a_folder_that_cannot_be_removed_is_told(visit, stub, device, said):
    stub(said="error: x", code=3, files={})
    device.set(drops=["stop"])
    with pytest.raises(MeasurementError, match="pi@board: x"):
        visit()
    assert any("could not be removed now; it is removed there by itself 10 minutes after" in line for line in said)
    assert device.verbs[-1] == "stop"


def test_another_folder_of_the_device_is_no_way_into_a_shell(visit, stub, device, tmp_path):
    folder = device.temporary / "a b; touch hacked"
    folder.mkdir()
    known = json.loads((tmp_path / "device" / "state" / "device.json").read_text())["environment"]
    device.set(environment=known | {"TMPDIR": str(folder)})
    with pytest.raises(MeasurementError, match=r"of characters that a shell reads\. Set TMPDIR there"):
        visit()
    for path in folder.iterdir():  # the watching process would remove it in ten minutes
        (path / "stop").touch()
    until = time.monotonic() + 10
    while any(folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    folder.rmdir()


def test_settings_travel(artifact_folder, tmp_path, device, monkeypatch):
    written = []
    monkeypatch.setattr(
        session, "write_runner", lambda artifact, out, **given: written.append(given) or write_stub(out)
    )
    settings = dataclasses.replace(SMALL, rounds=4)
    bench_remote(artifact_folder, url=URL, teacher=None, out=tmp_path / "out", settings=settings, ssh=device.ssh)
    assert written == [{"settings": settings, "device": None, "teacher": None}]
