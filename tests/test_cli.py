"""The command line: results on stdout, progress on stderr, exit codes, and predictions that stream in order."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from bertemd_deploy import Classifier, __version__
from bertemd_deploy.bench.places import Benched
from bertemd_deploy.cli import app
from bertemd_deploy.errors import NoisyError
from bertemd_deploy.files import sha256_file

Task = Callable[..., tuple[Path, Path]]
Artifacts = Callable[..., Path]
COMMAND = [sys.executable, "-m", "bertemd_deploy"]
SMALL = ["student.layers=2", "student.hidden=16", "student.heads=2", "student.intermediate=32", "data.max_length=32"]


def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


def write_recipe(path: Path, teacher: Path, data: Path, **sections: dict[str, Any]) -> Path:
    content: dict[str, Any] = {
        "teacher": {"model": str(teacher)},
        "data": {"path": str(data), "max_length": 32},
        "student": {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 32},
        "distill": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
        "quantize": {"mode": "none"},
    }
    for name, body in sections.items():
        content[name] = content.get(name, {}) | body
    path.write_text(yaml.safe_dump(content))
    return path


def test_version_and_help() -> None:
    assert call("--version").stdout.strip() == __version__
    told = call("--help").stdout
    commands = (
        "run",
        "check",
        "finetune",
        "distill",
        "evaluate",
        "export",
        "bench",
        "report",
        "bundle",
        "devices",
        "predict",
    )
    assert all(name in told for name in commands)
    for name in commands:
        assert call(name, "--help").exit_code == 0


def test_check_prints_a_recipe_that_reads_back(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", Path("teacher"), Path("data"))
    shown = call("check", path, "--set", "distill.epochs=7")
    assert shown.exit_code == 0
    assert yaml.safe_load(shown.stdout)["distill"]["epochs"] == 7
    as_json = json.loads(call("check", path, "--json").stdout)
    assert as_json["distill"]["epochs"] == 2
    (tmp_path / "again.yaml").write_text(shown.stdout)
    assert json.loads(call("check", tmp_path / "again.yaml", "--json").stdout)["distill"]["epochs"] == 7


def test_finetune_then_distill_then_evaluate(
    tiny_bert: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    model, data, teacher = tiny_bert(layers=4, head=False), tiny_data(), tmp_path / "teacher"
    quick = ["--set", "teacher.learning_rate=5e-3", "--set", "teacher.batch_size=8", "--set", "data.max_length=32"]
    tuned = call("finetune", "--model", model, "--data", data, "--out", teacher, "--epochs", 8, *quick, "--json")
    assert tuned.exit_code == 0, tuned.stderr
    record = json.loads(tuned.stdout)
    assert record["epochs"] == 8
    assert record["metrics"]["accuracy"] > 0.7
    assert "epoch 8: dev accuracy" in tuned.stderr

    scored = call("evaluate", teacher, "--data", data, "--set", "data.max_length=32", "--json")
    assert json.loads(scored.stdout)["metrics"] == record["metrics"]

    settings = [part for setting in SMALL for part in ("--set", setting)]
    recipe = write_recipe(tmp_path / "recipe.yaml", teacher, data)
    out = tmp_path / "student"
    first = call("distill", recipe, "--out", out, "--mapping", "uniform", "--epochs", 1, "--seed", 3, *settings)
    assert first.exit_code == 0, first.stderr
    assert first.stdout.splitlines()[0].startswith("teacher  accuracy ")
    assert first.stdout.splitlines()[-1] == str(out)
    stage = json.loads((out / "stage.json").read_text())
    assert stage["given"]["distill"]["mapping"] == "uniform"
    assert (stage["given"]["distill"]["seed"], stage["status"]) == (3, "done")

    same = call("distill", recipe, "--out", out, "--mapping", "uniform", "--epochs", 1, "--seed", 3, *settings)
    assert same.stdout == first.stdout
    assert "nothing to do" in same.stderr
    other = call("distill", recipe, "--out", out, "--mapping", "uniform", "--epochs", 1, "--seed", 4, *settings)
    assert other.exit_code == 3
    assert "other inputs (distill.seed). Choose another --out, or add --force" in other.stderr
    assert other.stdout == ""


def test_distill_says_what_it_needs(tmp_path: Path) -> None:
    lacking = call("distill", "--teacher", "t", "--out", tmp_path / "out")
    assert (lacking.exit_code, lacking.stdout) == (2, "")
    assert lacking.stderr == "error: distill: name a RECIPE, or all of --teacher, --data and --student.\n"
    nowhere = call("distill", "--teacher", "t", "--data", "d", "--student", "4L")
    assert nowhere.exit_code == 2
    assert nowhere.stderr == "error: distill: name the student folder with --out.\n"
    assert call("distill", "--mapping", "magic").exit_code == 2
    assert call("no-such-command").exit_code == 2


def test_export_evaluate_and_predict(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task()
    out = tmp_path / "artifact"
    limit = ["--set", "data.max_length=32"]
    exported = call("export", teacher, "--onnx", "--out", out, "--data", data, "--quantize", "none", *limit, "--json")
    assert exported.exit_code == 0, exported.stderr
    record = json.loads(exported.stdout)
    assert record["metrics"]["student"] == {"accuracy": 1.0}
    assert set(record["bytes"]) == {"onnx/model.onnx", "onnx/model_fused.onnx"}
    scored = call("evaluate", out, "--data", data, "--graph", "fp32")
    assert scored.stdout == "dev accuracy 1.0000 (24 rows, onnxruntime fp32)\n"
    predicted = call("predict", out, "good film", "bad film", "--json")
    rows = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [set(row) for row in rows] == [{"label", "score", "scores"}] * 2
    assert all(sum(row["scores"].values()) == pytest.approx(1) for row in rows)


def test_a_missed_gate_is_exit_4(tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bertemd_deploy.errors import GateError

    def miss(*_: Any, **__: Any) -> None:
        raise GateError("model.onnx differs from the torch student")

    teacher, data = tiny_task()
    monkeypatch.setattr("bertemd_deploy.export.export", miss)
    missed = call("export", teacher, "--out", tmp_path / "a", "--data", data, "--set", "data.max_length=32")
    assert missed.exit_code == 4
    assert missed.stderr == "error: model.onnx differs from the torch student\n"


def test_our_own_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slip(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("bertemd_deploy.config.load_recipe", slip)
    assert isinstance(call("check", tmp_path).exception, ZeroDivisionError)

    def absent(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr("bertemd_deploy.config.load_recipe", absent)
    assert isinstance(call("check", tmp_path).exception, ModuleNotFoundError)


def test_run_bench_and_report_hand_over_what_was_asked(
    tiny_bert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_bert()
    parts = ("pipeline.run", "bench.places.bench_places", "report.report", "report.enforce")
    names = [f"bertemd_deploy.{part}" for part in parts]
    run, bench, report, enforce = (create_autospec(pkgutil.resolve_name(name)) for name in names)
    for name, stand_in in zip(names, (run, bench, report, enforce), strict=True):
        monkeypatch.setattr(name, stand_in)
    run.return_value = {
        "distill": {"metrics": {"teacher": {"accuracy": 0.9}, "student": {"accuracy": 0.8}}},
        "export": {"metrics": {"teacher": {"accuracy": 0.9}, "int8": {"accuracy": 0.75}}},
        "artifact": "runs/r/artifact",
        "page": "runs/r/report/index.html",
    }
    recipe = write_recipe(tmp_path / "r.yaml", teacher, Path("data"))
    shown = call("run", recipe, "--from", "quantize", "--set", "distill.seed=5", "--force")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.split() == [
        *("teacher", "accuracy", "0.9000", "student", "accuracy", "0.8000", "int8", "accuracy", "0.7500"),
        *("artifact", "runs/r/artifact", "report", "runs/r/report/index.html"),
    ]
    (settings,), options = run.call_args
    assert settings.distill.seed == 5
    assert options == {
        "out": Path("runs/r"),
        "from_stage": "export",
        "stop_after": None,
        "force": True,
        "max_minutes": None,
    }
    run.return_value = {"finetune": {"metrics": {"accuracy": 0.9}}}
    part = call("run", recipe, "--to", "finetune", "--out", tmp_path / "run")
    assert part.stdout.split() == ["teacher", "accuracy", "0.9000", "run", str(tmp_path / "run")]
    assert run.call_args.kwargs["stop_after"] == "finetune"

    plain = {"schema_version": 1, "device": {"name": "a"}, "artifact": {}, "measurements": []}
    records = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in records:
        path.write_text(json.dumps(plain))
    bench.return_value = Benched({"local": records[0]}, {})
    measured = call("bench", "a", "--teacher", teacher, "--out", tmp_path / "b", "--set", "bench.rounds=3", "--json")
    assert json.loads(measured.stdout) == plain
    assert bench.call_args.args == (Path("a"),)
    assert bench.call_args.kwargs["teacher"] == teacher
    assert bench.call_args.kwargs["settings"].rounds == 3
    assert call("bench", "a", "--out", tmp_path / "b").stdout == f"{records[0]}\n"
    assert bench.call_args.kwargs["teacher"] is None
    bench.return_value = Benched(dict(enumerate(records)), {})
    devices = ("--device", "local", "--device", "raspberry-pi-5", "--strict", "--max-p95-ms", "20 ms")
    shown = call("bench", "a", "--out", tmp_path / "b", *devices, "--min-retention", "97%", "--json")
    assert json.loads(shown.stdout) == {"records": [plain, plain]}
    asked = bench.call_args.kwargs
    assert (asked["settings"].devices, asked["settings"].strict) == (("local", "raspberry-pi-5"), True)
    assert asked["flags"] == {"max_p95_ms": "20 ms", "min_retention": "97%"}
    line = {
        "name": "size",
        "limit": "max_size_mb",
        "allowed": 1.0,
        "found": 2.0,
        "passed": False,
        "words": "2 MB of 1 MB",
    }
    records[0].write_text(json.dumps(plain | {"budget": {"limits": {"max_size_mb": 1.0}, "lines": [line]}}))
    missed = call("bench", "a", "--out", tmp_path / "b", "--max-size-mb", "1")
    assert (missed.exit_code, missed.stdout.splitlines()[0]) == (4, "2 MB of 1 MB")
    assert "error: 1 line(s) of budget or baseline missed" in missed.stderr
    bench.return_value = Benched(dict(enumerate(records)), {"local": NoisyError("too noisy.")})
    noisy = call("bench", "a", "--out", tmp_path / "b", "--strict")
    assert (noisy.exit_code, noisy.stdout.splitlines()[-1]) == (3, str(records[1]))
    empty = call("bench", "a", "--out", tmp_path / "b", "--max-size-mb", "")
    assert (empty.exit_code, empty.stderr) == (2, "error: --max-size-mb is empty. Give a limit, or leave it out.\n")

    report.return_value = tmp_path / "index.html"
    page = call("report", "one.json", "two.json", "--out", tmp_path / "page")
    assert page.stdout == f"{tmp_path / 'index.html'}\n"
    assert report.call_args.args == ([Path("one.json"), Path("two.json")],)
    assert enforce.call_args.args == (tmp_path / "page",)


def test_devices_are_listed_with_their_facts(tmp_path: Path) -> None:
    assert {"raspberry-pi-5", "container-500m-512mb", "local"} <= set(call("devices").stdout.split())
    facts = json.loads(call("devices", "raspberry-pi-5", "--json").stdout)
    assert (facts["cores"], facts["target"]) == (4, "arm64-dotprod")
    assert "Cortex-A76" in call("devices", "raspberry-pi-5").stdout
    mine = tmp_path / "mine.yaml"
    mine.write_text("kiosk: {like: raspberry-pi-5, title: The kiosk, memory_bytes: 2_000_000_000}\n")
    assert "The kiosk" in call("devices", "kiosk", "--devices", mine).stdout
    missing = call("devices", "raspbery-pi-5")
    assert missing.exit_code == 2
    assert "Did you mean 'raspberry-pi-5'?" in missing.stderr


def test_a_bundle_is_written_by_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bertemd_deploy.handoff.write_bundle", "bertemd_deploy.remote.folder.write_runner")
    handoff, runner = (create_autospec(pkgutil.resolve_name(name)) for name in names)
    for name, stand_in in zip(names, (handoff, runner), strict=True):
        monkeypatch.setattr(name, stand_in)
        stand_in.return_value = tmp_path / "made"
    assert call("bundle", "a", "--out", "b", "--for", "triton").stdout == f"{tmp_path / 'made'}\n"
    assert handoff.call_args.kwargs == {"kind": "triton", "out": Path("b"), "force": False}
    refused = call("bundle", "a", "--out", "b", "--for", "python", "--device", "raspberry-pi-5")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: bundle: --device only acts with --for device; leave it out.\n",
    )
    shown = call("bundle", "a", "--out", "b", "--device", "raspberry-pi-5", "--set", "bench.rounds=3")
    assert "python3 run.py" in shown.stdout
    asked = runner.call_args.kwargs
    assert (asked["device"].name, asked["settings"].rounds, asked["teacher"]) == ("raspberry-pi-5", 3, None)


def test_predict_answers_ten_thousand_lines_in_order(tiny_artifact: Artifacts) -> None:
    folder = tiny_artifact()
    generator = np.random.default_rng(0)
    words = ["good", "bad", "fine", "dull", "film", "the", "was", "zzz"]
    kinds = [" ".join(generator.choice(words, size=size)) for size in generator.integers(1, 12, size=50)]
    texts = [kinds[at] for at in generator.integers(0, 50, size=10_000)]
    answer = dict(zip(kinds, Classifier.load(folder).predict(kinds), strict=True))
    told = call("predict", folder, "--threads", 1, stdin="\r\n".join(texts) + "\n")
    assert told.exit_code == 0, told.stderr
    lines = [line.split("\t") for line in told.stdout.splitlines()]
    assert [label for label, _ in lines] == [answer[text].label for text in texts]
    np.testing.assert_allclose([float(score) for _, score in lines], [answer[text].score for text in texts], atol=1e-3)


def test_predict_reads_pairs_split_at_the_tab(tiny_artifact: Artifacts) -> None:
    folder = tiny_artifact("pair")
    told = call("predict", folder, "--pair", "--json", stdin="good film\tbad song\nbad song\tgood film\n")
    assert told.exit_code == 0, told.stderr
    scores = [json.loads(line)["scores"]["yes"] for line in told.stdout.splitlines()]
    pairs = Classifier.load(folder).predict(["good film", "bad song"], ["bad song", "good film"])
    assert scores == pytest.approx([one.scores["yes"] for one in pairs], abs=1e-5)
    assert scores[0] != scores[1]
    torn = call("predict", folder, "--pair", stdin="a\tb\nno tab here\n")
    assert torn.exit_code == 3
    assert torn.stderr == ("error: text 2: --pair needs two texts separated by a tab, found one: 'no tab here'.\n")


def test_predict_names_the_line_that_is_not_utf_8(tiny_artifact: Artifacts) -> None:
    told = call("predict", tiny_artifact(), stdin=b"fine film\ncaf\xe9\n")
    assert told.exit_code == 3
    assert told.stderr == "error: stdin line 2: not UTF-8. Convert it, e.g. with iconv -t UTF-8.\n"


def test_predict_is_quiet_when_its_reader_leaves(tiny_artifact: Artifacts, tmp_path: Path) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("the film was good\n" * 20_000)
    with source.open("rb") as stdin:
        process = subprocess.Popen(
            [*COMMAND, "predict", str(tiny_artifact()), "--json"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["label"] in ("no", "yes")
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(60) == 0


def distillation(teacher: Path, data: Path, out: Path) -> list[str]:
    recipe = write_recipe(out.with_name("killed.yaml"), teacher, data)
    settings = ["distill.epochs=4", "distill.batch_size=4", "distill.checkpoint_seconds=0", "distill.logging_steps=1"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [*COMMAND, "distill", str(recipe), "--out", str(out), *overrides]


def newest_step(out: Path) -> int:
    found = sorted(path.stem for path in out.glob("checkpoints/step-*.safetensors"))
    return int(found[-1].removeprefix("step-")) if found else 0


def stop_when(command: list[str], reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Run a command, send it a signal when something is reached, and return its exit code and stderr."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline, "the command did not come so far"
        time.sleep(0.001)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def without_clock(log: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, log.read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_distillation_killed_and_interrupted_ends_in_the_same_bits(tiny_task: Task, tmp_path: Path) -> None:
    teacher, data = tiny_task(train=64)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*distillation(teacher, data, whole)[len(COMMAND) :]).exit_code == 0
    command = distillation(teacher, data, cut)
    for step in (3, 20, 40):  # of 64
        code, told = stop_when(command, lambda step=step: newest_step(cut) >= step, signal.SIGKILL)
        assert code == -signal.SIGKILL, told
    at = newest_step(cut)
    code, told = stop_when(command, lambda: newest_step(cut) > at, signal.SIGINT)
    assert code == 130, told
    assert "distill: continuing after step" in told
    assert told.endswith(
        "interrupted; what is finished is kept, the same command (without --force or --from) continues\n"
    )
    assert "stopping after this step; the state is kept" in told
    last = call(*command[len(COMMAND) :], "--json")
    assert last.exit_code == 0, last.stderr
    assert json.loads(last.stdout)["steps"] == 64
    assert sha256_file(cut / "model.safetensors") == sha256_file(whole / "model.safetensors")
    assert without_clock(cut / "distill.jsonl") == without_clock(whole / "distill.jsonl")
    assert not list(tmp_path.rglob(".partial-*"))
