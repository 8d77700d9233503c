from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertemd_deploy.artifact import GRAPHS, Artifact, DataSlice, read_slices, write_slices
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import sha256_file

PART = DataSlice(
    Encoded(np.array([2, 7, 3, 2, 3], dtype=np.int32), np.zeros(5, dtype=np.int8), np.array([0, 3, 5])),
    np.array([1, 0]),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    for name in ("fp32", "int8"):
        (tmp_path / GRAPHS[name]).write_bytes(name.encode())
    write_slices(tmp_path / "eval.npz", {"evaluation": PART})
    write_manifest(tmp_path)
    return tmp_path


def write_manifest(folder: Path, **changes: Any) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path)}
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bertemd.json"
    }
    manifest = {
        "schema_version": 1,
        "task": {"name": "sst2", "kind": "classification", "metrics": ["accuracy"]},
        "labels": ["negative", "positive"],
        "max_length": 64,
        "files": files,
    }
    (folder / "bertemd.json").write_text(json.dumps(manifest | changes))


def test_load(folder: Path):
    artifact = Artifact.load(folder)
    assert artifact.labels == ["negative", "positive"]
    assert artifact.max_length == 64
    assert artifact.metric_names == ["accuracy"]
    assert artifact.graphs() == ["fp32", "int8"]
    assert artifact.graph() == ("int8", folder / GRAPHS["int8"])
    assert artifact.graph("fp32") == ("fp32", folder / GRAPHS["fp32"])
    assert artifact.evaluation().labels.tolist() == [1, 0]


def test_no_folder(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"there is no such folder\. An artifact is what `bertemd export` wrote"):
        Artifact.load(tmp_path / "none")


def test_no_manifest(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"bertemd\.json: the artifact's manifest is missing"):
        Artifact.load(tmp_path)


def test_truncated_manifest(folder: Path):
    path = folder / "bertemd.json"
    path.write_text(path.read_text()[:60])
    with pytest.raises(ArtifactError, match=r"bertemd\.json: the artifact's manifest cannot be read"):
        Artifact.load(folder)


def test_manifest_of_another_version(folder: Path):
    write_manifest(folder, schema_version=2)
    with pytest.raises(ArtifactError, match=r"schema_version is 2, this bertemd reads 1\. Export the student again"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("task", "sst2", "dict"), ("labels", None, "list"), ("max_length", "64", "int"), ("files", [], "dict")],
)
def test_manifest_of_another_shape(folder: Path, key, value, kind):
    write_manifest(folder, **{key: value})
    with pytest.raises(ArtifactError, match=rf"bertemd\.json: '{key}' should be a {kind}\. Export again"):
        Artifact.load(folder)


def test_file_that_changed(folder: Path):
    (folder / GRAPHS["fp32"]).write_bytes(b"fp3")
    with pytest.raises(
        ArtifactError, match=r"its SHA-256 is [0-9a-f]{12}…, the manifest says [0-9a-f]{12}…; the file is"
    ):
        Artifact.load(folder).graph("fp32")


def test_file_that_is_gone(folder: Path):
    (folder / GRAPHS["fp32"]).unlink()
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: missing, though the manifest names it\. Copy the whole folder"
    ):
        Artifact.load(folder).graph("fp32")


def test_file_the_manifest_does_not_name(folder: Path):
    with pytest.raises(ArtifactError, match=r"bertemd\.json: names no file 'config\.json'"):
        Artifact.load(folder).file("config.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_manifest_that_names_a_file_outside(folder: Path, name):
    write_manifest(folder, files={name: {"sha256": "0"}})
    with pytest.raises(ArtifactError, match="points outside the folder; refused"):
        Artifact.load(folder).file(name)


def test_graph_that_is_a_link_out_of_the_folder(folder: Path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    outside.write_bytes(b"fp32")
    (folder / GRAPHS["fp32"]).unlink()
    (folder / GRAPHS["fp32"]).symlink_to(outside)
    with pytest.raises(ArtifactError, match="points outside the folder; refused"):
        Artifact.load(folder).graph("fp32")


@pytest.mark.parametrize("name", ["fused", "int4"])
def test_graph_that_is_not_there(folder: Path, name):
    with pytest.raises(ArtifactError, match=rf"no graph '{name}'; this artifact has: fp32, int8"):
        Artifact.load(folder).graph(name)


@pytest.mark.parametrize("name", ["auto", "fp32"])
def test_artifact_without_graphs(folder: Path, name):
    write_manifest(folder, files={})
    with pytest.raises(ArtifactError, match=r"bertemd\.json: names no graph\. Export the student again"):
        Artifact.load(folder).graph(name)


def test_slices_round_trip(tmp_path: Path):
    regression = DataSlice(PART.examples, np.array([0.5, 2.0], dtype=np.float32))
    write_slices(tmp_path / "eval.npz", {"evaluation": PART, "calibration": regression})
    stored = read_slices(tmp_path / "eval.npz")
    assert list(stored) == ["evaluation", "calibration"]
    for name, part in (("evaluation", PART), ("calibration", regression)):
        for field in ("tokens", "types", "offsets"):
            expected = getattr(part.examples, field)
            np.testing.assert_array_equal(getattr(stored[name].examples, field), expected, strict=True)
        np.testing.assert_array_equal(stored[name].labels, part.labels, strict=True)


def test_slice_that_is_not_there(folder: Path):
    with pytest.raises(ArtifactError, match=r"eval\.npz: holds no slice 'calibration', only evaluation\. Export again"):
        Artifact.load(folder).calibration()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "array"])
def test_damaged_slices(folder: Path, damage):
    path = folder / "eval.npz"
    whole = path.read_bytes()
    if damage == "array":
        with path.open("wb") as handle:
            np.save(handle, np.arange(3))
    else:
        middle = bytes(byte ^ 255 for byte in whole[60:200])
        content = {"empty": b"", "cut": whole[:-40], "text": b"hello", "flipped": whole[:60] + middle + whole[200:]}
        path.write_bytes(content[damage])
    with pytest.raises(ArtifactError, match=r"eval\.npz: not a readable data slice \(.*Export again"):
        read_slices(path)


def test_slices_hold_no_pickle(tmp_path: Path):
    path = tmp_path / "eval.npz"
    arrays = {f"evaluation_{name}": np.zeros(1) for name in ("types", "offsets", "labels")}
    np.savez(path, evaluation_tokens=np.array([{}], dtype=object), **arrays)
    with pytest.raises(ArtifactError, match=r"not a readable data slice \(Object arrays cannot be loaded"):
        read_slices(path)


@pytest.mark.parametrize("labels", [[1], [1, 0, 1]])
def test_slices_of_unequal_length(tmp_path: Path, labels):
    write_slices(tmp_path / "eval.npz", {"evaluation": DataSlice(PART.examples, np.array(labels))})
    with pytest.raises(ArtifactError, match=r"slice 'evaluation' has arrays of unequal length\. Export again"):
        read_slices(tmp_path / "eval.npz")
