from __future__ import annotations

import json
from pathlib import Path

import pytest
from handoff_artifacts import AWKWARD, KINDS, write_artifact

from bertemd_deploy import handoff
from bertemd_deploy.errors import ArtifactError, RecipeError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.handoff import WRITERS, write_bundle

CODE = (".py", ".mjs", "Dockerfile", ".pbtxt")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("kind", WRITERS)
def test_a_bundle_lists_its_files_with_their_hashes(kind: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    out = write_bundle(artifact, kind=kind, out=tmp_path / "deep" / "out")
    about = json.loads((out / "bundle.json").read_text())
    assert (about["kind"], about["graph"], about["schema_version"]) == (kind, "fp32", 1)
    assert about["artifact"] == {"manifest_sha256": sha256_file(artifact / "bertemd.json")}
    assert about["files"] == {name: sha256_file(out / name) for name in contents(out) if name != "bundle.json"}
    readme = (out / "README.md").read_text()
    assert "one of several classes" in readme
    assert "`fp32`" in readme


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_of_an_artifact_becomes_code(kind: str, tmp_path: Path) -> None:
    """The same code comes out whatever the labels are; only data files differ."""
    plain = write_bundle(write_artifact(tmp_path / "plain", labels="abcd"), kind=kind, out=tmp_path / "one")
    awkward = write_artifact(tmp_path / "awkward", labels=AWKWARD, task={"name": "x\n$name `id`"})
    other = contents(write_bundle(awkward, kind=kind, out=tmp_path / "two"))
    for name, code in contents(plain).items():
        if name.endswith(CODE) and not name.endswith("config.pbtxt"):
            assert other[name] == code, name
    model = json.loads(next(code for name, code in other.items() if name.endswith("model.json")))
    assert model["labels"] == list(AWKWARD)
    for name, code in other.items():
        if not name.endswith((".json", ".onnx")):
            assert not [label for label in AWKWARD if label.encode() in code], name
            assert b"`id`" not in code, name


def test_half_a_surrogate_pair_in_a_label_is_kept(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", labels=("a", "b\ud800"))
    out = write_bundle(artifact, kind="python", out=tmp_path / "out")
    assert json.loads((out / "model" / "model.json").read_text())["labels"] == ["a", "b\ud800"]


def test_bundles_are_equal_each_time(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    first = write_bundle(artifact, kind="triton", out=tmp_path / "one")
    assert contents(write_bundle(artifact, kind="triton", out=tmp_path / "two")) == contents(first)


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="no bundle for 'kserve'; bundles are for triton, onnxruntime-node, fastapi-d"
    ):
        write_bundle(write_artifact(tmp_path / "artifact"), kind="kserve", out=tmp_path / "out")


def test_a_folder_that_is_not_empty_needs_force(tmp_path: Path) -> None:
    artifact, out = write_artifact(tmp_path / "artifact"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"out: is not empty \(notes\.txt\)\. Choose an empty .* add --force"):
        write_bundle(artifact, kind="python", out=out)
    assert contents(out) == {"notes.txt": b"mine"}
    write_bundle(artifact, kind="python", out=out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "predictor.py").is_file()
    assert not [name for name in contents(out) if name.startswith(".")]


def test_force_replaces_an_earlier_bundle_whole(tmp_path: Path) -> None:
    artifact, out = write_artifact(tmp_path / "artifact"), tmp_path / "out"
    write_bundle(artifact, kind="triton", out=out)
    with pytest.raises(ArtifactError, match="is not empty"):
        write_bundle(artifact, kind="python", out=out)
    write_bundle(artifact, kind="python", out=out, force=True)
    fresh = write_bundle(artifact, kind="python", out=tmp_path / "fresh")
    assert contents(out) == contents(fresh)


def test_of_an_earlier_bundle_nothing_is_left_between_other_files(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    out = write_bundle(artifact, kind="triton", out=tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    write_bundle(artifact, kind="python", out=out, force=True)
    fresh = write_bundle(artifact, kind="python", out=tmp_path / "fresh")
    assert contents(out) == contents(fresh) | {"notes.txt": b"mine"}


@pytest.mark.parametrize("listing", ["[]", "{", '{"files": 3}'])
def test_a_damaged_list_of_files_loses_no_file(listing: str, tmp_path: Path) -> None:
    artifact, out = write_artifact(tmp_path / "artifact"), tmp_path / "out"
    out.mkdir()
    (out / "bundle.json").write_text(listing)
    (out / "notes.txt").write_text("mine")
    write_bundle(artifact, kind="python", out=out, force=True)
    assert (out / "notes.txt").is_file()
    assert json.loads((out / "bundle.json").read_text())["kind"] == "python"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ArtifactError, match="out: is a file; --out needs a folder"):
        write_bundle(write_artifact(tmp_path / "artifact"), kind="python", out=tmp_path / "out")


@pytest.mark.parametrize("place", ["", "artifact", "artifact/bundle"])
def test_the_artifact_is_never_written_over(place: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="is, holds or lies in the artifact itself"):
        write_bundle(artifact, kind="python", out=tmp_path / place, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("existed", [True, False])
def test_what_fails_half_way_leaves_nothing(existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, out = write_artifact(tmp_path / "artifact"), tmp_path / "out"
    if existed:
        out.mkdir()

    def full_disk(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handoff, "write_json", full_disk)
    with pytest.raises(ArtifactError, match=r"could not be written \(No space left on device\)"):
        write_bundle(artifact, kind="python", out=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", *(["out"] if existed else [])]
    assert not existed or list(out.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bundle", WRITERS)
def test_every_kind_of_task_is_taken_or_refused_in_one_message(kind: str, bundle: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", kind)
    if bundle == "onnxruntime-node" and kind in ("token-classification", "question-answering"):
        message = rf"is for {kind}\. Take --for python, fastapi-docker or triton; transformers\.js reads"
        with pytest.raises(ArtifactError, match=message):
            write_bundle(artifact, kind=bundle, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        assert (write_bundle(artifact, kind=bundle, out=tmp_path / "out") / "bundle.json").is_file()
