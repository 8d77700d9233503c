"""The Node bundle as far as it needs no packages of npm; it is run in tests/compat."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from handoff_artifacts import write_artifact
from tiny_words import VOCABULARY
from tokenizers import Tokenizer, processors

from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.student import TEMPLATES

CLS, SEP = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")


def with_tokenizer(folder: Path, change: Any) -> Path:
    """Write an artifact whose tokenizer was changed, with its new hash."""
    artifact = write_artifact(folder)
    path = artifact / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))
    manifest = json.loads((artifact / "bertemd.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = sha256_file(path)
    (artifact / "bertemd.json").write_text(json.dumps(manifest))
    return artifact


def model_of(artifact: Path) -> dict[str, Any]:
    out = write_bundle(artifact, kind="onnxruntime-node", out=artifact.with_name("out"))
    found: dict[str, Any] = json.loads((out / "model" / "model.json").read_text())
    return found


def special(token: int, segment: int = 0) -> dict[str, int]:
    return {"token": token, "type": segment}


def sequence(number: int, segment: int) -> dict[str, int]:
    return {"sequence": number, "type": segment}


def test_what_stands_around_texts_is_data(tmp_path: Path) -> None:
    model = model_of(write_artifact(tmp_path / "artifact"))
    single = [special(CLS), sequence(0, 0), special(SEP)]
    assert model["frames"] == [single, [*single, sequence(1, 1), special(SEP, 1)]]
    assert model["normalizer"] == {"lowers": True, "parts_ideographs": True}
    assert model["files"].keys() == {"model.onnx", "tokenizer.json"}


def test_other_frames_and_normalizers(tmp_path: Path) -> None:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = None
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", SEP), ("[CLS]", CLS))
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=9)

    model = model_of(with_tokenizer(tmp_path / "artifact", change))
    assert model["frames"] == [
        [special(CLS), sequence(0, 0), special(SEP)],
        [special(CLS), sequence(0, 0), special(SEP), special(SEP), sequence(1, 0), special(SEP)],
    ]
    assert model["normalizer"] == {"lowers": False, "parts_ideographs": False}


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$B:1 $A:0", special_tokens=[])

    model = model_of(with_tokenizer(tmp_path / "artifact", change))
    assert model["frames"] == [[sequence(0, 0)], [sequence(1, 1), sequence(0, 0)]]


def test_a_tokenizer_that_drops_letters(tmp_path: Path) -> None:
    from tokenizers import normalizers

    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Replace("a", "")

    with pytest.raises(ArtifactError, match=r"could not be told, as it reads no token in the letter a\. Take --for"):
        model_of(with_tokenizer(tmp_path / "artifact", change))


def test_a_tokenizer_that_javascript_has_not(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    path = artifact / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path.write_text(json.dumps(content))
    manifest = json.loads((artifact / "bertemd.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = sha256_file(path)
    (artifact / "bertemd.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match="a WordLevel tokenizer; @huggingface/tokenizers has WordPiece, BPE, Unigram"
    ):
        model_of(artifact)


def test_the_package_pins_what_it_needs() -> None:
    package = json.loads((TEMPLATES / "node/package.json").read_text())
    script = (TEMPLATES / "node/predict.mjs").read_text()
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package["dependencies"].values())
    assert {name for name in re.findall(r"from '([^']+)'", script) if not name.startswith((".", "node:"))} == set(
        package["dependencies"]
    )
    assert package["private"] is True


def test_node_reads_the_script() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine")
    done = subprocess.run(
        [node, "--check", str(TEMPLATES / "node/predict.mjs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
