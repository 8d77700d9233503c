from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from bertemd_deploy.answers import Answers
from bertemd_deploy.artifact import GRAPHS, Artifact, DataSlice, read_slices, write_slices
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.tasks import Kind

PART = DataSlice(
    Encoded(np.array([2, 7, 3, 2, 3], dtype=np.int32), np.zeros(5, dtype=np.int8), np.array([0, 3, 5])),
    np.array([1, 0]),
)
GOLD = Answers(np.array([0, 0], np.int32), np.full((5, 2), -1, np.int32), ("Straße 1",), (("Straße", "1"),), ("first",))
KINDS = {
    "classification": PART,
    "regression": DataSlice(PART.examples, np.array([0.5, 2.0], dtype=np.float32), "regression"),
    "multilabel": DataSlice(PART.examples, np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float32), "multilabel"),
    "token-classification": DataSlice(PART.examples, np.array([-100, 3, 4, 5, -100]), "token-classification"),
    "question-answering": DataSlice(PART.examples, np.array([[1, 2], [0, 0]]), "question-answering", GOLD),
}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "task.name should be text, found None"),
        ({"task": {"name": "a", "metrics": []}}, r"task.metrics should be a list of at least one name, found \[\]"),
        ({"task": {"name": "a", "metrics": [1]}}, r"task.metrics should be a list of at least one name, found \[1\]"),
        ({"labels": ["a", 1]}, "'labels' should all be text, found 1"),
        ({"labels": []}, "0 labels do not fit classification"),
        ({"max_length": 0}, "'max_length' should be from 1 to 100,000, found 0"),
        ({"max_length": True}, "'max_length' should be from 1 to 100,000, found True"),
        ({"max_length": 10**9}, "'max_length' should be from 1 to 100,000, found 1000000000"),
        ({"doc_stride": "8"}, "task.doc_stride should be a whole number from 0, found '8'"),
        ({"doc_stride": -1}, "task.doc_stride should be a whole number from 0, found -1"),
        ({"pairs": "yes"}, "task.pairs should be true or false, found 'yes'"),
        ({"no_answer": 1}, "task.no_answer should be true or false, found 1"),
    ],
)
def test_manifest_of_unusable_values(folder: Path, changes: dict[str, Any], message: str):
    task = {"name": "sst2", "kind": "classification", "metrics": ["accuracy"]}
    inner = {key: value for key, value in changes.items() if key in ("doc_stride", "pairs", "no_answer")}
    write_manifest(folder, **(changes if not inner else {"task": task | inner}))
    with pytest.raises(ArtifactError, match=rf"bertemd\.json: {message}\. Export again\."):
        Artifact.load(folder)


def test_inputs_longer_than_the_model_beside_the_manifest_takes(folder: Path):
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    write_manifest(folder)
    assert Artifact.load(folder).max_length == 64
    write_manifest(folder, max_length=65)
    with pytest.raises(ArtifactError, match="'max_length' should be from 1 to 64, found 65"):
        Artifact.load(folder)


@pytest.mark.parametrize("pairs", [None, True, False])
def test_whether_the_model_takes_pairs(folder: Path, pairs):
    task = {"name": "a", "kind": "classification", "metrics": ["accuracy"]}
    write_manifest(folder, task=task if pairs is None else task | {"pairs": pairs})
    assert Artifact.load(folder).pairs is pairs


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


def test_there_is_a_slice_of_every_kind():
    assert set(KINDS) == set(get_args(Kind))
    assert all(part.fault() is None and len(part) == 2 for part in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_slices_round_trip(tmp_path: Path, kind):
    write_slices(tmp_path / "eval.npz", {"evaluation": PART, "calibration": KINDS[kind]})
    stored = read_slices(tmp_path / "eval.npz")
    assert list(stored) == ["evaluation", "calibration"]
    for name, part in (("evaluation", PART), ("calibration", KINDS[kind])):
        for field in ("tokens", "types", "offsets"):
            expected = getattr(part.examples, field)
            np.testing.assert_array_equal(getattr(stored[name].examples, field), expected, strict=True)
        np.testing.assert_array_equal(stored[name].labels, part.labels, strict=True)
        assert stored[name].kind == part.kind
        found = stored[name].gold
        assert (found is None) == (part.gold is None)
        if found is not None:
            assert (found.contexts, found.accepted, found.ids) == (GOLD.contexts, GOLD.accepted, GOLD.ids)
            np.testing.assert_array_equal(found.spans, GOLD.spans, strict=True)
            np.testing.assert_array_equal(found.example, GOLD.example, strict=True)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_slices_of_an_older_version_name_no_kind(tmp_path: Path, kind):
    write_slices(tmp_path / "new.npz", {"evaluation": KINDS[kind]})
    with np.load(tmp_path / "new.npz") as stored:
        np.savez(tmp_path / "old.npz", **{key: stored[key] for key in stored.files if not key.endswith("_kind")})
    assert read_slices(tmp_path / "old.npz")["evaluation"].kind == kind


@pytest.mark.parametrize(
    ("releases", "message"),
    [
        ([], r"requires\.onnxruntime should name a release for graph 'fp32', found \[\]\. Export again"),
        ({"int8": "1.12"}, r"should name a release for graph 'fp32', found \{'int8': '1\.12'\}"),
        ({"fp32": 1.12}, r"should name a release for graph 'fp32', found \{'fp32': 1\.12\}"),
        ({"fp32": "new"}, r"requires\.onnxruntime: 'new' is not a version such as 1\.21\.0\. Export again"),
        ({"fp32": "9.0"}, r"graph 'fp32': it needs ONNX Runtime 9\.0 or newer; "),
    ],
)
def test_releases_that_a_graph_cannot_be_held_against(folder: Path, releases: Any, message: str):
    write_manifest(folder, requires={"onnxruntime": releases})
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(folder).graph("fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_rows_in_the_given_order(kind):
    turned = KINDS[kind].select([1, 0])
    assert turned.examples.tokens.tolist() == [2, 3, 2, 7, 3]
    assert turned.kind == kind
    assert turned.fault() is None
    expected = KINDS[kind].labels[[3, 4, 0, 1, 2]] if kind == "token-classification" else KINDS[kind].labels[::-1]
    np.testing.assert_array_equal(turned.labels, expected, strict=True)
    assert len(KINDS[kind].select([])) == 0
    one = KINDS[kind].select(np.array([1]))
    assert (len(one), one.fault()) == (1, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_labels_of_its_rows(kind):
    inputs, labels = KINDS[kind].batch([1, 0], pad_id=9)
    assert inputs["input_ids"].tolist() == [[2, 3, 9], [2, 7, 3]]
    if kind == "token-classification":
        assert labels.tolist() == [[5, -100, -100], [-100, 3, 4]]
        assert labels.dtype == np.int64
    else:
        np.testing.assert_array_equal(labels, KINDS[kind].labels[[1, 0]], strict=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            DataSlice(PART.examples, PART.labels.astype(np.float32)),
            "labels of float32 with 1 dimension.s., unlike classif",
        ),
        (DataSlice(replace(PART.examples, tokens=np.zeros(5)), PART.labels), "tokens that are not whole numbers"),
        (DataSlice(PART.examples, PART.labels, "multilabel"), "labels of int64 with 1 dimension.s., unlike multilabel"),
        (DataSlice(PART.examples, PART.labels, "token-classification"), "arrays of unequal length"),
        (DataSlice(PART.examples, np.zeros((2, 2), np.int64), "question-answering"), "no answers"),
        (
            DataSlice(
                PART.examples, np.zeros((2, 2), np.int64), "question-answering", GOLD.select([0], offsets=[0, 3])
            ),
            "answers for other rows",
        ),
        (DataSlice(Encoded(*[PART.examples.tokens] * 2, np.array([1, 5])), PART.labels[:1]), "row starts that do not"),
    ],
)
def test_slices_that_do_not_fit_together(tmp_path: Path, part, message):
    write_slices(tmp_path / "eval.npz", {"evaluation": part})
    with pytest.raises(ArtifactError, match=f"slice 'evaluation' has {message}.*Export again"):
        read_slices(tmp_path / "eval.npz")


@pytest.mark.parametrize(("key", "value"), [("kind", b"poetry"), ("gold_text", b"{]"), ("gold_text", None)])
def test_slices_of_no_known_kind_or_with_damaged_answers(tmp_path: Path, key, value):
    write_slices(tmp_path / "whole.npz", {"evaluation": KINDS["question-answering"]})
    with np.load(tmp_path / "whole.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    del arrays[f"evaluation_{key}"]
    if value is not None:
        arrays[f"evaluation_{key}"] = np.frombuffer(value, dtype=np.uint8)
    np.savez(tmp_path / "eval.npz", **arrays)
    with pytest.raises(ArtifactError, match=r"not a readable data slice \(.*Export again"):
        read_slices(tmp_path / "eval.npz")


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
