"""The HTTP service: its Dockerfile's own command is started, asked, and brought to its limits."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from handoff_artifacts import AWKWARD, KINDS, assert_same, question, said, write_artifact

from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.student import TEMPLATES

DOCKERFILE = TEMPLATES / "fastapi" / "Dockerfile"


def instructions(folder: Path) -> list[tuple[str, str]]:
    """Return the (instruction, arguments) pairs of a Dockerfile."""
    lines = re.sub(r"\\\n\s*", "", (folder / "Dockerfile").read_text()).splitlines()
    parts = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, rest) for name, _, rest in parts]


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a factory of an artifact and its bundle."""

    def build(kind: str = "classification", **options: Any) -> tuple[Path, Path]:
        artifact = write_artifact(tmp_path / "artifact", kind, **options)
        return artifact, write_bundle(artifact, kind="fastapi-docker", out=tmp_path / "out")

    return build


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """A started service."""

    def __init__(self, out: Path, port: int, python: Path = Path(sys.executable)) -> None:
        self.out, self.url, self.python = out, f"http://127.0.0.1:{port}", python
        self.environment = os.environ | {"PORT": str(port), "HOST": "127.0.0.1", "THREADS": "1", "PYTHONPATH": ""}

    def run(self, instruction: str) -> list[str]:
        """Return the command of a Dockerfile's instruction, for this Python."""
        (rest,) = [rest for name, rest in instructions(self.out) if name == instruction]
        program, *arguments = json.loads(rest[rest.index("[") :])
        assert program == "python"
        return [str(self.python), *arguments]

    def ask(self, path: str, body: Any = None, *, raw: bytes | None = None) -> tuple[int, Any]:
        """Return status and content of an answer."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def healthcheck(self) -> subprocess.CompletedProcess[str]:
        """Run what the container's health check runs."""
        command = self.run("HEALTHCHECK")
        return subprocess.run(command, cwd=self.out, env=self.environment, capture_output=True, text=True, check=False)


@contextmanager
def started(out: Path, python: Path | None = None) -> Iterator[Service]:
    """Start what the container starts, with this Python or another; stop it as the container's end does."""
    if python is None:
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
    service = Service(out, free_port(), python or Path(sys.executable))
    log = out.with_name("log.txt")
    with log.open("w") as said_there:
        process = subprocess.Popen(
            service.run("CMD"), cwd=out, env=service.environment, stderr=said_there, stdout=said_there
        )
        try:
            until = time.monotonic() + 60
            while service.healthcheck().returncode:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield service
        finally:
            process.terminate()
            assert process.wait(30) in (0, -15), log.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_classifier_s(kind: str, bundle) -> None:
    artifact, out = bundle(kind)
    texts, pairs = question(kind, 40)
    with started(out) as service:
        body = {"texts": texts} if pairs is None else {"texts": texts, "pairs": pairs}
        status, found = service.ask("/predict", body)
        health = service.ask("/health")
    assert (status, list(found)) == (200, ["predictions"])
    assert_same(found["predictions"], said(artifact, texts, pairs))
    assert health == (200, {"status": "ok", "kind": kind, "graph": "fp32", "threads": 1})


def test_limits_and_errors(bundle) -> None:
    artifact, out = bundle(labels=AWKWARD, task={"pairs": None})
    limits = {"texts": 3, "characters": 50, "words": 4, "body_bytes": 2000, "requests": 2}
    assert json.loads((out / "service.json").read_text()).keys() == limits.keys()
    (out / "service.json").write_text(json.dumps(limits))
    with started(out) as service:
        status, found = service.ask("/predict", {"texts": ["good", "bad"], "pairs": ["", "film"]})
        assert status == 200
        assert_same(found["predictions"], said(artifact, ["good", "bad"], ["", "film"]))
        for body, where, what in [
            ({"texts": ["a"] * 4}, "texts", "at most 3 items"),
            ({"texts": []}, "texts", "at least 1 item"),
            ({"texts": ["a" * 51]}, "texts", "at most 50 characters"),
            ({"texts": "a text"}, "texts", "valid list"),
            ({"texts": [3]}, "texts", "valid string"),
            ({"texts": ["a"], "pairs": ["a"] * 4}, "pairs", "at most 3 items"),
            ({"texts": ["a"], "pair": ["a"]}, "pair", "not permitted"),
            ({"texts": ["a"], "\ud800": 1}, "body", "unicode"),
            ({"texts": ["\ud800"]}, "texts", ""),
            ({}, "texts", "required"),
        ]:
            status, found = service.ask("/predict", body)
            assert status == 422, (body, found)
            assert any(where in str(fault["where"]) and what in fault["what"] for fault in found["detail"]), found
        for raw in (b"{", b"[" * 900, b""):
            assert service.ask("/predict", raw=raw)[0] in (400, 422)
        assert service.ask("/predict", {"texts": ["a", "b"], "pairs": ["c"]}) == (
            422,
            {"detail": "2 texts but 1 pairs."},
        )
        status, found = service.ask("/predict", {"texts": ["a"], "more": "b" * 3000})
        assert (status, found) == (413, {"detail": "the body is larger than 2000 bytes."})
        assert service.ask("/predict")[0] == 405
        assert service.ask("/docs")[0] == 404
        assert service.ask("/predict", {"texts": ["good"]})[0] == 200
        status, found = service.ask("/predict", {"texts": [["good", "film"]]})
        assert (status, found) == (422, {"detail": "text 1 should be text, found list."})


HELD = """
import pathlib, time
import predictor
def held(self, texts, pairs=None, predict=predictor.Predictor.predict):
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return predict(self, texts, pairs)
predictor.Predictor.predict = held
"""


def test_too_many_requests_are_turned_away_while_health_answers(bundle) -> None:
    _, out = bundle()
    limits = json.loads((out / "service.json").read_text())
    (out / "service.json").write_text(json.dumps(limits | {"requests": 2}))
    (out / "service.py").write_text(f"{HELD}\n{(out / 'service.py').read_text()}")
    answers: list[tuple[int, Any]] = []

    def turned_away() -> int:
        return sum(status == 503 for status, _ in answers)

    with started(out) as service:
        askers = [
            threading.Thread(target=lambda: answers.append(service.ask("/predict", {"texts": ["good"]})))
            for _ in range(5)
        ]
        for asker in askers:
            asker.start()
        until = time.monotonic() + 30
        while turned_away() < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert [status for status, _ in answers] == [503, 503, 503]
        assert service.ask("/health")[0] == 200
        (out / "go").touch()
        for asker in askers:
            asker.join()
    assert [status for status, _ in answers] == [503, 503, 503, 200, 200]
    assert answers[0][1] == {"detail": "too many requests are waiting."}


def test_the_health_check_fails_where_nothing_answers(bundle) -> None:
    _, out = bundle()
    done = Service(out, free_port()).healthcheck()
    assert (done.returncode, done.stderr.startswith("no answer: ")) == (1, True)


def test_the_dockerfile_runs_as_an_ordinary_user_and_copies_all_there_is_to_run(bundle) -> None:
    _, out = bundle()
    listed = instructions(out)
    by_name = dict(listed)
    assert by_name["USER"] == "10001"
    assert listed.index(("USER", "10001")) > max(at for at, (name, _) in enumerate(listed) if name in ("RUN", "COPY"))
    assert f"--uid {by_name['USER']} " in dict(listed[:4])["RUN"]
    assert by_name["EXPOSE"] == "8000"
    copied = {name for instruction, rest in listed if instruction == "COPY" for name in rest.split()[:-1]}
    there = {path.name for path in out.iterdir()}
    assert copied == there - {"Dockerfile", "README.md", "bundle.json"}
    pinned = (out / "requirements.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[a-z]+==\d+(\.\d+)+(\.post\d+)?", line) for line in pinned)


@pytest.mark.network
def test_the_image_s_packages_are_enough(bundle, tmp_path: Path) -> None:
    """What the Dockerfile installs, in an empty environment, starts the service and passes its health check."""
    _, out = bundle()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (install,) = [rest for name, rest in instructions(out) if (name, rest[:3]) == ("RUN", "pip")]
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    command = [str(venv / "bin" / "pip"), *install.split()[1:], "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with started(out, python=venv / "bin" / "python") as service:
        assert service.ask("/predict", {"texts": ["the film was good"]})[0] == 200


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_lists_of_packages_agree_with_what_is_tested() -> None:
    """The service's packages are those of constraints.txt, which the tests of this file run with."""
    known = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)$", (TEMPLATES.parents[2] / "constraints.txt").read_text(), re.M))
    pinned = dict(re.findall(r"^([a-z]+)==(\d\S+)$", (TEMPLATES / "fastapi/requirements.txt").read_text(), re.M))
    assert pinned.keys() == {"fastapi", "pydantic", "uvicorn"}
    assert pinned == {name: known[name] for name in pinned}
