from __future__ import annotations

import os
import signal
import site
import sys
from pathlib import Path

import psutil
import pytest

import bertemd_deploy
from bertemd_deploy.bench import limits
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.process import Worker, worker_environment
from bertemd_deploy.errors import MeasurementError, MemoryLimitError


def program(text: str) -> list[str]:
    """Return a stand-in worker's command line."""
    return [sys.executable, "-c", text]


ECHO = program("import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()")


def test_request_and_answer_are_one_line_each():
    with Worker("echo", threads=1, command=ECHO) as worker:
        assert worker.request("warm", batch=8, text="two\nlines") == {
            "command": "warm",
            "batch": 8,
            "text": "two\nlines",
        }
        pid = worker.pid
    assert not psutil.pid_exists(pid)


def test_error_answer_names_the_model():
    answer = program("""input(); print('{"error": "model.onnx: there is no such graph."}')""")
    with (
        pytest.raises(MeasurementError, match=r"bench, student int8: model\.onnx: there is no such graph\."),
        Worker("student int8", threads=1, command=answer) as worker,
    ):
        worker.request("open")


def test_dead_worker_is_a_sentence_with_its_last_lines():
    failing = program("input()\nfor at in range(9): print('old line')\nraise SystemError('no kernel for this node')")
    with Worker("teacher pytorch", threads=1, command=failing) as worker:
        worker.send("warm")
        for _ in range(9):
            worker._process.stdout.readline()
        with pytest.raises(MeasurementError) as error:
            worker.receive()
    message = str(error.value)
    assert message.startswith("bench, teacher pytorch: the worker process ended with exit code 1 during 'warm'.")
    assert message.endswith("SystemError: no kernel for this node")
    assert "old line" not in message


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize(
    ("name", "cause"),
    [("SIGKILL", "out of memory"), ("SIGILL", "instructions the processor lacks"), ("SIGTERM", "outside")],
)
def test_killed_worker_names_signal_and_likely_cause(name, cause):
    dying = program(f"import os, signal; input(); os.kill(os.getpid(), signal.{name})")
    with pytest.raises(MeasurementError) as error, Worker("student", threads=1, command=dying) as worker:
        worker.request("turn")
    assert f"was ended by {name}" in str(error.value)
    assert cause in str(error.value)
    assert str(error.value).endswith("(nothing)")


def test_a_worker_dead_before_the_command_is_reported_too():
    with Worker("student", threads=1, command=program("raise SystemExit(5)")) as worker:
        worker._process.wait()
        with pytest.raises(MeasurementError, match="ended with exit code 5"):
            worker.request("open")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_parent_leaves_no_process(error):
    # This stand-in neither reads nor ends when its stdin closes.
    stubborn = program("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    worker = Worker("student", threads=1, command=stubborn)

    def interrupted() -> None:
        with worker:
            raise error

    with pytest.raises(error):
        interrupted()
    assert not psutil.pid_exists(worker.pid)


def test_thread_pools_of_a_worker_are_sized():
    environment = worker_environment(3)
    assert environment["OMP_NUM_THREADS"] == environment["RAYON_NUM_THREADS"] == "3"
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert worker_environment(1)["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_checkout_is_importable_in_a_worker_but_site_packages_stay_in_their_place(monkeypatch):
    root = str(Path(bertemd_deploy.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(site, "getsitepackages", list)
    assert worker_environment(1)["PYTHONPATH"] == f"{root}{os.pathsep}/elsewhere"
    monkeypatch.setattr(site, "getsitepackages", lambda: [root])
    assert worker_environment(1)["PYTHONPATH"] == "/elsewhere"


def test_parents_interrupt_key_does_not_end_the_worker_first():
    command = program(
        "import sys\nfrom bertemd_deploy.bench import worker\nworker.Session.ping = lambda self: {'pong': True}\nworker.main()"
    )
    with Worker("student", threads=1, command=command) as worker:
        assert worker.request("ping") == {"pong": True}
        os.kill(worker.pid, signal.SIGINT)
        assert worker.request("ping") == {"pong": True}


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux'")
TELL = program(
    "import json, os, resource\n"
    "for line in iter(input, ''):\n"
    "    print(json.dumps({'cpus': sorted(os.sched_getaffinity(0)), 'data': resource.getrlimit(resource.RLIMIT_DATA),\n"
    "        'groups': open('/proc/self/cgroup').read().split(), 'pid': os.getpid()}), flush=True)"
)
TAKE = program("input()\nheld = bytearray(400 << 20)\nprint('{}', flush=True)\ninput()")


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a system that lets us make no control groups."""
    monkeypatch.setattr(limits, "make_groups", lambda wanted, root: [])


def test_a_worker_without_limits_says_so():
    with Worker("student", threads=1, command=ECHO) as worker:
        assert worker.confinement is None


@linux
@pytest.mark.usefixtures("no_groups")
def test_limits_hold_in_the_worker_and_not_here():
    mine = os.sched_getaffinity(0)
    with Worker("student", threads=1, command=TELL, limits=Limits(cpus=1, memory_bytes=2**29)) as worker:
        told = worker.request("tell")
        assert worker.confinement == {"cpus": "affinity", "cpu_share": None, "memory": "rlimit"}
    assert told["cpus"] == sorted(mine)[:1]
    assert told["data"] == [2**29, 2**29]
    assert os.sched_getaffinity(0) == mine


@linux
@pytest.mark.usefixtures("no_groups")
def test_a_worker_that_is_refused_memory_is_a_result_of_its_own():
    with (
        pytest.raises(MemoryLimitError) as error,
        Worker("student fp32", threads=1, command=TAKE, limits=Limits(memory_bytes=2**28)) as worker,
    ):
        worker.request("memory")
    assert error.value.limit_bytes == 2**28
    assert error.value.peak_bytes is None  # it had ended
    assert error.value.exit_code == 3
    assert str(error.value).startswith(
        "bench, student fp32: does not fit into 256 MiB during 'memory' (memory was refused to it; no control group could be "
    )
    assert not psutil.pid_exists(worker.pid)


@linux
@pytest.mark.usefixtures("no_groups")
def test_a_worker_with_memory_enough_goes_on():
    with Worker("student", threads=1, command=TAKE, limits=Limits(memory_bytes=2**30)) as worker:
        assert worker.request("memory") == {}


@linux
@pytest.mark.usefixtures("no_groups")
def test_an_error_answer_for_want_of_memory_is_one_too_and_tells_the_peak():
    answer = program(
        """input(); print('{"error": "model.onnx: cannot load this file (std::bad_alloc)"}', flush=True); input()"""
    )
    with (
        pytest.raises(MemoryLimitError, match=r"It is known to have held \d+ MiB\. Choose a smaller model") as error,
        Worker("student", threads=1, command=answer, limits=Limits(memory_bytes=2**29)) as worker,
    ):
        worker.request("open")
    assert 2**20 < error.value.peak_bytes < 2**29
    with (
        pytest.raises(MeasurementError) as other,
        Worker("student", threads=1, command=answer) as worker,
    ):
        worker.request("open")
    assert not isinstance(other.value, MemoryLimitError)


@linux
@pytest.mark.usefixtures("no_groups")
@pytest.mark.parametrize("megabytes", [16, 48])
def test_the_real_worker_does_not_start_in_too_little_memory(artifact_folder, megabytes):
    with (
        pytest.raises(MemoryLimitError) as error,
        Worker("student fp32", threads=1, limits=Limits(memory_bytes=megabytes << 20)) as worker,
    ):
        worker.request(
            "open",
            backend="onnxruntime",
            path=str(artifact_folder / "onnx/model.onnx"),
            threads=1,
            artifact=str(artifact_folder),
            seed=0,
        )
    assert error.value.limit_bytes == megabytes << 20


@linux
@pytest.mark.usefixtures("no_groups")
def test_a_kill_from_outside_is_no_want_of_memory():
    dying = program("import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)")
    with (
        pytest.raises(MeasurementError, match="was ended by SIGKILL") as error,
        Worker("student", threads=1, command=dying, limits=Limits(memory_bytes=2**29)) as worker,
    ):
        worker.request("turn")
    assert not isinstance(error.value, MemoryLimitError)


@linux
def test_a_cpu_share_is_the_kernels_where_it_lets_us():
    with Worker("student", threads=1, command=TELL, limits=Limits(cpu_share=0.5)) as worker:
        told = worker.request("tell")
        kept = worker.confinement
        if kept != {"cpus": None, "cpu_share": "cgroup", "memory": None}:
            assert kept == {"cpus": None, "cpu_share": "not limited", "memory": None}
            pytest.skip("this system lets us make no control group for CPU time")
        (name,) = {Path(line).name for line in told["groups"] if Path(line).name.startswith("bertemd-")}
        (folder,) = [path for path in Path("/sys/fs/cgroup").glob(f"**/{name}") if path.is_dir()]
        quota = [
            path.read_text().split()[0] for path in folder.iterdir() if path.name in ("cpu.max", "cpu.cfs_quota_us")
        ]
        assert quota == ["50000"]
        assert told["pid"] == worker.pid
    assert not folder.exists()


@linux
def test_a_worker_killed_at_the_control_groups_limit_is_a_result_with_its_peak():
    limit = Limits(memory_bytes=2**26)
    with Worker("student", threads=1, command=TAKE, limits=limit) as worker:
        if worker.confinement is None or worker.confinement["memory"] != "cgroup":
            pytest.skip("this system lets us make no control group for memory")
        with pytest.raises(MemoryLimitError, match=r"the kernel ended it at the limit") as error:
            worker.request("memory")
    assert error.value.limit_bytes == 2**26
    assert error.value.peak_bytes is None or 2**25 < error.value.peak_bytes <= 2**26


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_more_cpus_than_there_are_are_refused_before_anything_starts():
    with pytest.raises(MeasurementError, match="asked for 4097 CPUs"):
        Worker("student", threads=1, command=ECHO, limits=Limits(cpus=4097))
