"""The bundle for Node, run: answers on every kind of text and tokenizer that it takes are those of `Classifier`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compat_asking import ANSWERING, ask, executable, installed
from compat_bundles import fp32_only, records
from compat_cases import DESIGNS, GIVEN, NAMES, Case

from bertemd_deploy.classifier import Classifier
from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.node import KINDS
from bertemd_deploy.handoff.student import TEMPLATES

pytestmark = pytest.mark.compat
TAKEN = [name for name in NAMES if name == GIVEN or DESIGNS[name].kind in KINDS]
FP32_TOLERANCE, INT8_AGREEMENT = 1e-4, 0.9
IDEOGRAPHS = (
    "\U00020000\U0002b920 and x\U0002f800\u4f60 light",
    "ΟΔΟΣ ΣΑΣ",
)  # what its tokenizer by itself reads otherwise


@pytest.fixture(scope="module")
def modules() -> Path:
    return installed("node", program="node_modules/onnxruntime-node") / "node_modules"


def bundle_of(artifact: Path, out: Path, modules: Path) -> Path:
    write_bundle(artifact, kind="onnxruntime-node", out=out)
    (out / "node_modules").symlink_to(modules, target_is_directory=True)
    return out


def texts_of(case: Case) -> tuple[list[str], list[str] | None]:
    """Return a case's texts, and more that are cut as pairs: short and long ones together."""
    texts = [*case.texts, *IDEOGRAPHS]
    if case.pairs is None:
        return texts, None
    seconds = [*case.pairs, *reversed(IDEOGRAPHS)]
    long = max(texts, key=len)
    return [*texts, "", long, long, "light"], [*seconds, "", "", long, long]


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, modules: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return what the script says of every case, from its fp32 graph and from the one it takes by itself."""
    node, cases = executable("node"), request.getfixturevalue("cases")
    work = tmp_path_factory.mktemp("handoff-node")
    questions = {}
    for name in TAKEN:
        case: Case = cases[name]
        texts, pairs = texts_of(case)
        plain = bundle_of(fp32_only(case.artifact, work / name / "fp32"), work / name / "plain", modules)
        questions[f"{name} fp32"] = {"bundle": str(plain), "texts": texts, "pairs": pairs}
        fastest = bundle_of(case.artifact.folder, work / name / "fastest", modules)
        questions[f"{name} fastest"] = {"bundle": str(fastest), "texts": texts, "pairs": pairs}
    return ask([node, str(ANSWERING / "handoff_node.mjs")], questions, work=work, folder=work)


@pytest.mark.parametrize("name", TAKEN)
def test_fp32_answers_are_the_classifier_s(name: str, answers: dict[str, Any], request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    texts, pairs = texts_of(case)
    said = records(case, "fp32", texts, pairs)
    for text, found, expected in zip(texts, answers[f"{name} fp32"], said, strict=True):
        assert found.keys() == expected.keys()
        assert found["score"] == pytest.approx(expected["score"], abs=FP32_TOLERANCE), text
        assert found["scores"] == pytest.approx(expected["scores"], abs=FP32_TOLERANCE), text
        close = sorted(expected["scores"].values())[-2:]
        if len(close) == 2 and close[1] - close[0] > FP32_TOLERANCE and case.kind == "classification":
            assert found["label"] == expected["label"], text


@pytest.mark.parametrize("name", TAKEN)
def test_the_fastest_graph_decides_alike(name: str, answers: dict[str, Any], request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("cases")[name]
    texts, pairs = texts_of(case)
    found = answers[f"{name} fastest"]
    expected = Classifier.load(case.artifact.folder, threads=1).predict(texts, pairs)
    if case.kind == "regression":
        assert [one["score"] for one in found] == pytest.approx([one.score for one in expected], abs=0.5)
        return
    same = [one["label"] == other.label for one, other in zip(found, expected, strict=True)]
    assert sum(same) >= INT8_AGREEMENT * len(same)


def test_the_packages_are_those_that_it_pins(modules: Path) -> None:
    pinned = json.loads((TEMPLATES / "node/package.json").read_text())["dependencies"]
    for name, version in pinned.items():
        assert json.loads((modules / name / "package.json").read_text())["version"] == version, name


def test_the_command(modules: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    node, cases = executable("node"), request.getfixturevalue("cases")
    case: Case = cases["pairs"]
    out = bundle_of(fp32_only(case.artifact, tmp_path / "fp32"), tmp_path / "out", modules)

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [node, str(out / "predict.mjs"), "--threads", "1", *arguments]
        kept = {"PATH": os.environ["PATH"]}
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=kept, cwd=tmp_path, check=False)

    expected = Classifier.load(case.artifact.folder, graph="fp32", threads=1).predict(["dim it"], ["light\ton"])
    for done in (run("--pair", "dim it\tlight\ton"), run("--pair", stdin="dim it\tlight\ton\n")):
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        assert json.loads(line)["scores"] == pytest.approx(expected[0].scores, abs=FP32_TOLERANCE)
    for arguments, message in [
        (["dim it"], "error: this model takes two texts: pairs.\n"),
        (["--pair", "dim it"], "error: a pair needs a tab between its texts.\n"),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    graph = out / "model" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-5])
    done = run("--pair", "a\tb")
    assert (done.returncode, done.stdout) == (1, "")
    assert "truncated or changed. Copy the whole folder again." in done.stderr
