"""Which graph is handed off, and what of a manifest is believed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from handoff_artifacts import write_artifact

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.handoff import WRITERS, write_bundle
from bertemd_deploy.handoff.student import TEMPLATES, fill_template, find_student, pins

ALL = ("fp32", "int8", "fused", "fused-int8")


def requires(**tables: Any) -> dict[str, Any]:
    return {"requires": {"target": "portable", "isa": {}, "onnxruntime": dict.fromkeys(ALL, "1.12")} | tables}


def chosen(folder: Path, release: str, **manifest: Any) -> str:
    artifact = Artifact.load(write_artifact(folder / "artifact", graphs=ALL, **manifest))
    return find_student(artifact, runtime="a runtime", release=release).graph


@pytest.mark.parametrize(
    ("release", "expected"),
    [("1.31.1", "fused-int8"), ("1.21", "fused-int8"), ("1.20.1", "int8"), ("1.15", "int8"), ("1.12.0", "fp32")],
)
def test_the_fastest_graph_that_the_runtime_can_run(release: str, expected: str, tmp_path: Path) -> None:
    needs = {"fused-int8": "1.21", "int8": "1.14", "fused": "1.16", "fp32": "1.12"}
    assert chosen(tmp_path, release, **requires(onnxruntime=needs)) == expected


def test_without_a_word_on_releases_the_fastest(tmp_path: Path) -> None:
    assert chosen(tmp_path, "1.12") == "fused-int8"


@pytest.mark.parametrize("kind", WRITERS)
def test_graphs_beyond_the_runtime_are_refused(kind: str, tmp_path: Path) -> None:
    needs = dict.fromkeys(ALL, "9.9")
    artifact = write_artifact(tmp_path / "artifact", graphs=ALL, **requires(onnxruntime=needs))
    message = r"can run none of its graphs\. graph 'fused-int8': it needs ONNX Runtime 9\.9 or newer; .* graph 'fp32'"
    with pytest.raises(ArtifactError, match=message):
        write_bundle(artifact, kind=kind, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", ["new", "1.21\nnumpy", 1.21, ["1.21"]])
def test_releases_that_are_no_version(found: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"requires\.onnxruntime of graph 'fused-int8' should be a version"):
        chosen(tmp_path, "1.31", **requires(onnxruntime=dict.fromkeys(ALL, found)))


@pytest.mark.parametrize("found", ["avx", [1], ["avx2`"], {"a": 1}])
def test_flags_that_are_no_names(found: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"requires\.isa of graph 'fused-int8' should be a list of names"):
        chosen(tmp_path, "1.31", **requires(isa=dict.fromkeys(ALL, found)))


def test_graphs_that_do_not_fit_the_manifest(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "one", labels=("a", "b"))
    content = json.loads((artifact / "bertemd.json").read_text())
    (artifact / "bertemd.json").write_text(json.dumps(content | {"labels": ["a", "b", "c"]}))
    with pytest.raises(ArtifactError, match="it has 2 outputs, the manifest names 3 labels"):
        write_bundle(artifact, kind="python", out=tmp_path / "out")
    content["task"]["kind"] = "token-classification"
    (artifact / "bertemd.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"token-classification needs inputs among .* of 3 dimensions"):
        write_bundle(artifact, kind="python", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    (artifact / name).write_bytes((artifact / name).read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="the file is truncated or was changed"):
        write_bundle(artifact, kind="triton", out=tmp_path / "out")


def test_an_artifact_without_graphs(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"can run none of its graphs\. It names none\. Export the student"):
        find_student(
            Artifact.load(write_artifact(tmp_path / "artifact", graphs=())), runtime="a runtime", release="1.31"
        )


def test_versions_are_those_the_artifact_was_checked_with(tmp_path: Path) -> None:
    told = {"numpy": "2.1.0", "onnxruntime": "1.22.0\nevil", "tokenizers": None, "torch": "2.13.0+cpu"}
    artifact = write_artifact(tmp_path / "artifact", versions=told)
    here = importlib.metadata.version
    expected = {"numpy": "2.1.0", "onnxruntime": here("onnxruntime"), "tokenizers": here("tokenizers")}
    assert pins(Artifact.load(artifact)) == expected
    out = write_bundle(artifact, kind="python", out=tmp_path / "out")
    lines = (out / "requirements.txt").read_text().splitlines()
    assert 'numpy==2.1.0; python_version >= "3.11"' in lines
    assert not [line for line in lines if "evil" in line]


def test_every_place_of_a_template_is_filled(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", **requires())
    for kind in WRITERS:
        out = write_bundle(artifact, kind=kind, out=tmp_path / kind)
        for path in out.rglob("*"):
            if path.suffix in (".md", ".txt", ".pbtxt"):
                assert "$" not in path.read_text().replace('"$PWD/', "").replace("$'", ""), path
    with pytest.raises(KeyError):
        fill_template("triton/input.pbtxt")


def test_a_cpu_that_is_needed_is_named(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", **requires(isa={"fp32": ["avx512_vnni", "asimd"]}))
    for kind in WRITERS:
        out = write_bundle(artifact, kind=kind, out=tmp_path / kind)
        assert "one of `avx512_vnni`, `asimd`" in (out / "README.md").read_text()
        model = next(out.rglob("model.json"))
        assert json.loads(model.read_text())["isa"] == ["avx512_vnni", "asimd"]
        assert (model.parent / "saturation.onnx").exists() == (kind != "triton")


def test_templates_are_package_data() -> None:
    names = {path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*") if path.is_file()}
    assert {"python/predictor.py", "fastapi/service.py", "triton/client.py", "node/predict.mjs"} <= names
    assert not any(path.name == "__init__.py" for path in TEMPLATES.rglob("*"))
