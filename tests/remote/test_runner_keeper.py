"""The device's end of a visit: one folder, what arrives in it, a process that watches over it."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bertemd_deploy.remote.runner import keeper


@pytest.fixture
def answers(capsys):
    """Return the function that gives the answers so far."""

    def read():
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(keeper.MARK)) for line in lines if line.startswith(keeper.MARK)]

    return read


@pytest.fixture
def folder(tmp_path):
    """A folder as `open_folder` leaves it, watched over by this process."""
    found = tmp_path / "bertemd-x"
    found.mkdir()
    (found / "beat").touch()
    (found / "pid").write_text(str(os.getpid()))
    return found


def archive(**files: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name.replace("__", "/"))
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return held.getvalue()


def receive(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    keeper.receive(folder)


def test_files_arrive_whole(folder, answers, monkeypatch):
    receive(folder, archive(one=b"1" * 100_000, deep__two=b"2"), monkeypatch)
    assert answers() == [{"received": True}]
    assert (folder / "one").read_bytes() == b"1" * 100_000
    keeper.have(folder)
    (found,) = answers()
    assert found["files"] | {"pid": 0} == {"beat": 0, "one": 100_000, "deep/two": 1, "pid": 0}


def test_a_cut_stream_leaves_no_half_file(folder, answers, monkeypatch):
    whole = archive(one=b"1" * 2000, two=b"2" * 200_000)
    receive(folder, whole[:100_000], monkeypatch)
    assert answers() == [{"fault": "cut"}]
    keeper.have(folder)
    assert "one" in answers()[0]["files"]
    assert not (folder / "two").exists()
    receive(folder, archive(two=b"2"), monkeypatch)
    assert (folder / "two").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["../outside", "/tmp/bertemd-outside", "a/../../outside"])
def test_names_that_leave_the_folder_are_refused(name, folder, answers, monkeypatch):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    receive(folder, held.getvalue(), monkeypatch)
    assert answers() == [{"fault": "name"}]
    assert not (folder.parent / "outside").exists()


def test_links_are_refused(folder, answers, monkeypatch):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        header = tarfile.TarInfo("link")
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(header)
    receive(folder, held.getvalue(), monkeypatch)
    assert answers() == [{"fault": "name"}]


def test_a_full_disk_is_told(folder, answers, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keeper, "beat", full)
    receive(folder, archive(one=b"1"), monkeypatch)
    (found,) = answers()
    assert (found["fault"], found["place"]) == ("full", str(folder.parent))
    assert found["free"] > 0


def test_another_error_is_not_called_a_full_disk(folder, monkeypatch):
    (folder / "one").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        receive(folder, archive(one=b"1"), monkeypatch)


def test_only_one_measures_at_a_time(answers, monkeypatch, tmp_path):
    monkeypatch.setattr(keeper, "ONLY_ONE", f"\0bertemd-test-{os.getpid()}")
    held = keeper.only_one()
    keeper.open_folder("", 0)
    assert answers() == [{"fault": "busy"}]
    held.close()
    keeper.only_one().close()


def test_no_lock_is_needed_where_there_is_none(monkeypatch):
    monkeypatch.setattr(keeper.sys, "platform", "darwin")
    first, second = keeper.only_one(), keeper.only_one()
    assert [held.getsockname() for held in (first, second)] == ["", ""]
    first.close()
    second.close()


def test_a_place_with_too_little_space_is_told(answers, monkeypatch, tmp_path):
    monkeypatch.setattr(keeper, "ONLY_ONE", f"\0bertemd-test-{os.getpid()}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keeper.open_folder("", 2**60)
    (found,) = answers()
    assert (found["fault"], found["place"], found["needed"]) == ("space", str(tmp_path), 2**60)
    assert 0 < found["free"] < 2**60
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    keeper.open_folder("", 1)
    assert answers() == [{"fault": "space", "place": None, "free": 0, "needed": 1}]
    assert list(tmp_path.iterdir()) == []


def test_space_for_an_installation_counts(answers, monkeypatch, tmp_path):
    monkeypatch.setattr(keeper, "ONLY_ONE", f"\0bertemd-test-{os.getpid()}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(keeper.importlib.util, "find_spec", lambda name: None)
    keeper.open_folder("", 2**60)
    assert answers()[0]["needed"] == 2**60 + keeper.INSTALL_BYTES


def test_places_prefer_what_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert keeper.places() == [str(tmp_path)]
    monkeypatch.delenv("TMPDIR")
    assert set(keeper.places()) <= {"/var/tmp", "/tmp"}
    assert keeper.places()


def watch(folder: Path, *, patience: float = 60.0) -> threading.Thread:
    thread = threading.Thread(target=keeper.keep, args=(folder,), kwargs={"patience": patience, "tick": 0.01})
    thread.start()
    return thread


def until(condition) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.01)


def test_silence_removes_the_folder(folder):
    (folder / "run.py").write_text("")
    watch(folder, patience=0.05).join(20)
    assert not folder.exists()


def test_a_sign_of_life_keeps_the_folder(folder):
    thread = watch(folder, patience=0.6)
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends:
        keeper.beat(folder)
        time.sleep(0.02)
    assert folder.exists()
    thread.join(20)
    assert not folder.exists()
    keeper.beat(folder)  # of a folder that is gone


def test_the_measurement_is_started_once_and_its_end_noted(folder):
    (folder / "run.py").write_text(
        "import os, sys; print(sys.argv[1:], os.environ['PYTHONDONTWRITEBYTECODE']); sys.exit(5)"
    )
    thread = watch(folder)
    (folder / "start").touch()
    until(lambda: (folder / "done5").exists())
    assert (folder / "log").read_text() == "['--out', 'back/record.json'] 1\n"
    assert not (folder / "start").exists()
    (folder / "stop").touch()
    thread.join(20)
    assert not folder.exists()


def test_stopping_ends_what_runs_with_its_children(folder, tmp_path):
    (folder / "run.py").write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    thread = watch(folder)
    (folder / "start").touch()
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    (folder / "stop").touch()
    thread.join(20)
    assert not folder.exists()
    until(lambda: not keeper.runs(int((tmp_path / "child").read_text())))


def test_starting_needs_the_watching_process(folder, answers):
    keeper.start(folder)
    assert answers() == [{"started": True}]
    assert (folder / "start").exists()
    (folder / "pid").write_text("999999999")
    keeper.start(folder)
    assert answers() == [{"fault": "gone"}]
    (folder / "pid").unlink()
    assert keeper.watcher(folder) is None


def test_a_process_that_was_not_waited_for_does_not_run():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        until(lambda: not keeper.runs(child.pid))  # ended, and a zombie until this block ends
    assert keeper.runs(os.getpid())


def follow(folder: Path, offset: int, **options):
    command = [sys.executable, keeper.__file__, "follow", str(offset)]
    program = folder / "keeper.py"
    program.write_text(Path(keeper.__file__).read_text())
    command[1] = str(program)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def test_following_gives_the_log_and_the_end(folder):
    (folder / "log").write_text("first\n")
    with follow(folder, 2) as process:
        assert json.loads(process.stdout.readline().removeprefix(keeper.MARK)) == {"log": "rst\n", "offset": 6}
        before = (folder / "beat").stat().st_mtime_ns
        time.sleep(0.02)
        process.stdin.write("\n")
        process.stdin.flush()
        until(lambda: (folder / "beat").stat().st_mtime_ns > before)
        with (folder / "log").open("a") as log:
            log.write("last\n")
        (folder / "done-9").touch()
        lines = [json.loads(line.removeprefix(keeper.MARK)) for line in process.stdout]
        process.stdin.close()
    assert lines[0] == {"log": "last\n", "offset": 11}
    assert lines[1]["done"] == -9
    assert lines[1]["free"] > 0
    assert process.returncode == 0


def test_following_ends_with_the_other_end(folder):
    with follow(folder, 0) as process:
        process.stdin.close()
        assert process.stdout.read() == ""


def test_following_tells_that_nobody_watches(folder):
    (folder / "pid").write_text("999999999")
    with follow(folder, 0) as process:
        assert json.loads(process.stdout.readline().removeprefix(keeper.MARK)) == {"fault": "gone"}


def test_what_came_out_is_fetched_up_to_a_size(folder, answers):
    (folder / keeper.BACK).mkdir()
    keeper.main(["fetch", "record.json", "10"], folder)
    (folder / keeper.BACK / "record.json").write_text('{"ä": 1}')
    keeper.main(["fetch", "record.json", "10"], folder)
    keeper.main(["fetch", "record.json", "5"], folder)
    assert answers() == [{"text": None}, {"text": '{"ä": 1}'}, {"fault": "large", "bytes": 9}]


def test_stopping_removes_a_folder_that_nobody_watches(folder, answers):
    (folder / "pid").write_text("999999999")
    keeper.main(["stop"], folder)
    assert answers() == [{"gone": True}]
    assert not folder.exists()


def test_stopping_ends_what_a_killed_watching_process_left(folder, answers):
    (folder / "run.py").write_text("import time; time.sleep(60)")
    with keeper.begin(folder) as child:
        (folder / "pid").write_text("999999999")
        keeper.stop(folder)
        assert child.wait(20) == -9
    assert answers() == [{"gone": True}]


def test_the_opened_folder_is_watched(tmp_path):
    """The whole of `open_folder`, in a process of its own as it forks; then `stop`, which waits for the watching process."""
    source = Path(keeper.__file__).read_text()
    program = f"scope = {{'__name__': 'keeper'}}\nexec({source!r}, scope)\nscope['open_folder']({source!r}, 10)\n"
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-"], input=program, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.removeprefix(keeper.MARK))
    folder = Path(found["folder"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert keeper.watcher(folder) is not None
    again = subprocess.run(
        [sys.executable, "-"], input=program, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(again.stdout.removeprefix(keeper.MARK)) == {"fault": "busy"}
    stopped = subprocess.run(
        [sys.executable, str(folder / "keeper.py"), "stop"], capture_output=True, text=True, check=True
    )
    assert json.loads(stopped.stdout.removeprefix(keeper.MARK)) == {"gone": True}
    assert list(tmp_path.iterdir()) == []
