from __future__ import annotations

import os
import signal
import site
import sys
from pathlib import Path

import psutil
import pytest

import bertemd_deploy
from bertemd_deploy.bench.process import Worker, worker_environment
from bertemd_deploy.errors import MeasurementError


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
