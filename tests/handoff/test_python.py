"""The single-file predictor: what it says is what `Classifier` says."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from handoff_artifacts import AWKWARD, KINDS, assert_same, question, said, texts_of, write_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from bertemd_deploy import predictions, spans
from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.student import TEMPLATES
from bertemd_deploy.runtime import cpu_limits
from bertemd_deploy.targets import EXACT_INT8


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"handed_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return load_module(TEMPLATES / "python" / "predictor.py")


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a factory of an artifact and its bundle."""

    def build(kind: str = "classification", **options: Any) -> tuple[Path, Path]:
        artifact = write_artifact(tmp_path / "artifact", kind, **options)
        return artifact, write_bundle(artifact, kind="python", out=tmp_path / "out")

    return build


def predictor_of(out: Path, **options: Any) -> Any:
    return load_module(out / "predictor.py").Predictor(**({"threads": 1} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_classifier_says(kind: str, bundle) -> None:
    artifact, out = bundle(kind)
    texts, pairs = question(kind, 60)
    expected = said(artifact, texts, pairs)
    assert_same(predictor_of(out).predict(texts, pairs), expected)
    decided = {json.dumps(record.get("label", record.get("entities", record.get("answer")))) for record in expected}
    assert kind == "regression" or len(decided) > 2, "the answers differ, or the test would not show much"


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_pairs(kind: str, bundle) -> None:
    artifact, out = bundle(kind, task={"pairs": True})
    texts, pairs = question(kind, 60, pairs=True)
    assert_same(predictor_of(out).predict(texts, pairs), said(artifact, texts, pairs))


def test_more_texts_than_are_held_at_once(bundle) -> None:
    artifact, out = bundle(mates=True)
    texts = texts_of(1040)
    assert_same(predictor_of(out).predict(texts), said(artifact, texts, None))


def test_lists_of_words_and_tags_that_are_no_entities(bundle) -> None:
    artifact, out = bundle("token-classification", labels=("NOUN", "VERB", "O"))
    texts: list[Any] = [
        ["the", "film", "was", "very good"],
        [],
        [""],
        ["good"] * 60,
        "the film was good",
        ("a", "\x07", "b"),
    ]
    assert_same(predictor_of(out).predict(texts), said(artifact, texts, None))


@pytest.mark.parametrize("no_answer", [True, False])
@pytest.mark.parametrize("stride", [0, 4, 100])
def test_answers_in_long_contexts(no_answer: bool, stride: int, bundle) -> None:
    artifact, out = bundle("question-answering", task={"no_answer": no_answer, "doc_stride": stride})
    texts, pairs = question("question-answering", 40)
    expected = said(artifact, texts, pairs)
    assert_same(predictor_of(out).predict(texts, pairs), expected)
    assert any(record["answer"] is None for record in expected)


def test_awkward_labels(bundle) -> None:
    artifact, out = bundle(labels=AWKWARD)
    found = predictor_of(out).predict(texts_of(90))
    assert_same(found, said(artifact, texts_of(90), None))
    assert len({record["label"] for record in found}) > 2


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["U.S.", "it's", "'", " ", "a", "你", "é", "(", "3.5"])).map("".join)
)
def test_words_are_those_of_the_package(code: ModuleType, text: str) -> None:
    assert code.words_of(text) == predictions.words_of(text)
    assert code.joined(text.split()) == predictions.joined(text.split())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B"])))
def test_entities_are_those_of_the_package(code: ModuleType, tags: list[str]) -> None:
    assert list(code._spans(tags)) == spans.entities(tags)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20).filter(bool))
def test_entity_tags_are_those_of_the_package(code: ModuleType, tag: str) -> None:
    for label in (tag, f"B-{tag}", f"I{tag}"):
        assert bool(code._ENTITY_TAG.fullmatch(label)) == spans.is_entity_tag(label)


def test_what_is_not_taken(bundle) -> None:
    _, out = bundle(task={"pairs": False})
    predictor = predictor_of(out)
    assert predictor.predict([]) == []
    for texts, pairs, message in [
        ("a text", None, r"texts should be a list of texts, found a single one\. Write \[text\]"),
        (["a"], "b", "pairs should be a list of texts"),
        (["a", "b"], ["c"], "2 texts but 1 pairs"),
        (["a", 3], None, "text 2 should be text, found int"),
        ([["a"]], None, "text 1 should be text, found list"),
        (["a", "b\ud800"], None, "text 2 is not valid Unicode: surrogates not allowed"),
        (["a"], ["b"], "this model takes single texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.predict(texts, pairs)


def test_what_other_kinds_do_not_take(bundle) -> None:
    _, out = bundle("question-answering")
    predictor = predictor_of(out)
    with pytest.raises(ValueError, match="this model needs two texts, or a question and its context: pairs"):
        predictor.predict(["who"])
    with pytest.raises(ValueError, match=r"question 2 leaves no room for its context\. Shorten it\."):
        predictor.predict(["who", "good " * 30], ["the film", "the film"])
    shutil.rmtree(out)
    shutil.rmtree(out.parent / "artifact")
    _, out = bundle("token-classification")
    predictor = predictor_of(out)
    with pytest.raises(ValueError, match="text 1 should be text or a list of words, found dict"):
        predictor.predict([{}])
    with pytest.raises(ValueError, match="this model takes single texts"):
        predictor.predict(["a"], ["b"])


def test_values_that_are_not_finite(bundle) -> None:
    _, out = bundle()
    broken = predictor_of(out, run=lambda inputs: np.full((len(inputs["input_ids"]), 3), np.nan, np.float32))
    with pytest.raises(RuntimeError, match="the graph answered with values that are not finite"):
        broken.predict(["a text"])


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_damaged_file(name: str, bundle) -> None:
    _, out = bundle()
    path = out / "model" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RuntimeError, match=rf"{name}: missing, truncated or changed\. Copy the whole folder again"):
        predictor_of(out)
    path.unlink()
    with pytest.raises(RuntimeError, match="missing, truncated or changed"):
        predictor_of(out)


def test_an_onnxruntime_that_is_too_old(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    _, out = bundle(requires={"onnxruntime": {"fp32": "1.21"}})
    predictor_of(out)
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    with pytest.raises(RuntimeError, match=r"model\.onnx needs onnxruntime 1\.21 or newer, found 1\.19\.2"):
        predictor_of(out)


def test_a_cpu_that_clips_sums(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened = onnxruntime.InferenceSession

    class Clipping:
        """Answers as ONNX Runtime does where two products are added in 16 bits."""

        def __init__(self, path: str, *arguments: Any, **options: Any) -> None:
            self.session = opened(path, *arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, outputs: Any, inputs: dict[str, Any]) -> list[Any]:
            found = self.session.run(outputs, inputs)
            return [np.minimum(found[0], 2 * 32767)] if set(inputs) == {"a", "b"} else found

    monkeypatch.setattr(onnxruntime, "InferenceSession", Clipping)
    _, out = bundle(requires={"isa": {"fp32": list(EXACT_INT8)}})
    with pytest.raises(RuntimeError, match=r"needs a CPU with one of avx512_vnni, .*: this one clips sums .* --target"):
        predictor_of(out)
    shutil.rmtree(out)
    shutil.rmtree(out.parent / "artifact")
    _, out = bundle()
    predictor_of(out)


def test_a_cpu_that_is_exact_is_taken(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = bundle(requires={"isa": {"fp32": list(EXACT_INT8)}})
    ran = []
    monkeypatch.setattr("onnxruntime.InferenceSession", _recording(ran))
    predictor_of(out)
    assert ran == ["saturation.onnx", "model.onnx"]


def _recording(ran: list[str]) -> Any:
    class Session:
        def __init__(self, path: str, options: Any, **given: Any) -> None:
            ran.append(Path(path).name)
            self.threads = options.intra_op_num_threads

        def get_inputs(self) -> list[Any]:
            return []

        def run(self, outputs: Any, inputs: Any) -> list[Any]:
            return [inputs["a"].astype(np.int32) @ inputs["b"].astype(np.int32)]

    return Session


def test_threads_are_those_of_the_package(code: ModuleType) -> None:
    assert code.usable_threads() == cpu_limits().threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_threads_of_a_container(
    files: dict[str, str], expected: int, code: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        path = tmp_path / "fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for cpu in range(16):  # two threads a core
        path = tmp_path / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    monkeypatch.setattr(code.os, "sched_getaffinity", lambda process: set(range(16)))
    assert code.usable_threads(tmp_path) == expected
    monkeypatch.setattr(code.os, "sched_getaffinity", lambda process: {0})
    assert code.usable_threads(tmp_path) == 1


def command(out: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the predictor where only the packages it names are to be had, in another folder."""
    refuse = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"bertemd_deploy", "onnx", "torch", "psutil", "yaml", "transformers"}}:
            raise ModuleNotFoundError(f"refused: {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = [{str(out / "predictor.py")!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    call = [sys.executable, "-c", refuse, "--threads", "1", *arguments]
    return subprocess.run(call, input=stdin, cwd=out.parent, capture_output=True, check=False)


def lines(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command(bundle) -> None:
    artifact, out = bundle(labels=AWKWARD, task={"pairs": None})
    texts = ["the film was good", "you 你好"]
    expected = said(artifact, texts, None)
    assert_same(lines(command(out, *texts)), expected)
    assert_same(lines(command(out, stdin="the film was good\r\nyou 你好\n".encode())), expected)
    pairs = said(artifact, ["good"], ["bad\tfilm"])
    assert_same(lines(command(out, "--pair", "good\tbad\tfilm")), pairs)


def test_the_command_s_errors(bundle) -> None:
    _, out = bundle(task={"pairs": False})
    for arguments, stdin, message in [
        (["--pair", "good"], b"", b"error: text 1: there is no tab between the two texts."),
        (["--pair", "good\tbad"], b"", b"error: this model takes single texts."),
        ([], b"caf\xe9\n", b"error: 'utf-8' codec can't decode"),
    ]:
        done = command(out, *arguments, stdin=stdin)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(message), done.stderr
        assert b"Traceback" not in done.stderr


def test_an_older_python_reads_it() -> None:
    for name in ("python/predictor.py", "triton/client.py"):
        assert ast.parse((TEMPLATES / name).read_text(encoding="utf-8"), feature_version=(3, 9)).body


def test_python_files_pass_the_linter() -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *check, "--no-cache", str(TEMPLATES)],
            cwd=TEMPLATES.parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
