from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertemd_deploy import files
from bertemd_deploy.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[1]
FULL = "No space left on device"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_killed(code: str, *arguments: Path) -> None:
    """Run Python `code` in a process that ends by `os._exit(9)`, as a killed one does: no cleaning up."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 9, process.stderr


# ---- hashes


def test_hashes_of_known_content(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_json({"b": 1, "a": [2]}) == files.sha256_json({"a": [2], "b": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})


def test_folder_hash_follows_names_and_contents_only(tmp_path: Path):
    for name, order in (("one", ("x", "sub/y")), ("two", ("sub/y", "x"))):
        for file in order:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
    before = files.sha256_folder(tmp_path / "one")
    assert before == files.sha256_folder(tmp_path / "two")
    (tmp_path / "two" / "x").write_text("changed")
    assert files.sha256_folder(tmp_path / "two") != before
    (tmp_path / "one" / "x").rename(tmp_path / "one" / "z")
    assert files.sha256_folder(tmp_path / "one") != before


# ---- new_file


def test_new_file_replaces_the_old_one_at_the_end(tmp_path: Path):
    path = tmp_path / "sub" / "a.txt"
    files.write_text(path, "old")
    with files.new_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_new_file_leaves_the_destination_alone_when_the_block_raises(tmp_path: Path, failure):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.new_file(path) as partial:
            partial.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_new_file_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"file/a\.txt: could not be written \(File exists\)"):
        files.write_text(tmp_path / "file" / "a.txt", "y")


# ---- new_folder


def write_folder(folder: Path, content: str) -> None:
    with files.new_folder(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text(content)


def test_new_folder_replaces_the_old_one_whole(tmp_path: Path):
    folder = tmp_path / "deep" / "out"
    with files.new_folder(folder) as partial:
        (partial / "old-only").write_text("x")
    with files.new_folder(folder) as partial:
        (partial / "a").write_text("new")
        assert names(folder) == ["old-only"]
    assert names(folder) == ["a"]
    assert names(folder.parent) == ["out"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_new_folder_leaves_the_destination_alone_when_the_block_raises(tmp_path: Path, failure):
    folder = tmp_path / "out"
    write_folder(folder, "old")

    def interrupted() -> None:
        with files.new_folder(folder) as partial:
            (partial / "a").write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        interrupted()
    assert (folder / "sub" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_new_folder_whose_second_rename_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch, failure):
    folder = tmp_path / "out"
    write_folder(folder, "old")
    replace = Path.replace

    def broken(path: Path, target: Path) -> Path:
        if path.name.startswith(files.PARTIAL):
            raise failure
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        write_folder(folder, "new")
    assert (folder / "sub" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


KILLED_BETWEEN_RENAMES = """
import os, sys
from pathlib import Path
from bertemd_deploy import files
replace = Path.replace
def kill(path, target):
    if path.name.startswith(files.PARTIAL):
        os._exit(9)
    return replace(path, target)
Path.replace = kill
with files.new_folder(Path(sys.argv[1])) as partial:
    (partial / "a").write_text("new")
"""

KILLED_AFTER_RENAMES = """
import os, shutil, sys
from pathlib import Path
from bertemd_deploy import files
shutil.rmtree = lambda *args, **kwargs: os._exit(9)
with files.new_folder(Path(sys.argv[1])) as partial:
    (partial / "a").write_text("new")
"""

KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
from bertemd_deploy import files
with files.new_folder(Path(sys.argv[1])) as partial, files.new_file(Path(sys.argv[2])) as single:
    (partial / "a").write_text("new")
    single.write_text("new")
    os._exit(9)
"""


@pytest.mark.parametrize("mend", ["claim the folder", "claim its parent", "write it again", "fail to write it again"])
def test_kill_between_the_two_renames_does_not_lose_the_old_folder(tmp_path: Path, mend: str):
    folder = tmp_path / "run" / "out"
    write_folder(folder, "old")
    (tmp_path / "run" / "state.json").write_text("{}")
    run_killed(KILLED_BETWEEN_RENAMES, folder)
    assert not folder.exists()
    if mend == "claim the folder":
        files.claim_folder(folder, marker="sub", force=False)
    elif mend == "claim its parent":
        files.claim_folder(folder.parent, marker="state.json", force=False)
    elif mend == "write it again":
        with files.new_folder(folder) as partial:
            assert (folder / "sub" / "a").read_text() == "old"
            (partial / "b").write_text("newer")
    else:
        with pytest.raises(ValueError, match="again"), files.new_folder(folder):
            raise ValueError("again")
    if mend == "write it again":
        assert names(folder) == ["b"]
    else:
        assert (folder / "sub" / "a").read_text() == "old"
    assert names(tmp_path / "run") == ["out", "state.json"] or mend == "claim the folder"
    assert not [name for name in names(tmp_path / "run") if name.startswith(".")]


def test_restored_folder_of_another_kind_is_not_claimed(tmp_path: Path):
    """What came back is there like any other folder: without its marker it is somebody else's."""
    folder = tmp_path / "out"
    write_folder(folder, "old")
    run_killed(KILLED_BETWEEN_RENAMES, folder)
    with pytest.raises(ArtifactError, match=r"holds something else \(sub\) and no bertemd\.json"):
        files.claim_folder(folder, marker="bertemd.json", force=False)
    assert (folder / "sub" / "a").read_text() == "old"


def test_kill_after_the_renames_leaves_the_new_folder(tmp_path: Path):
    folder = tmp_path / "out"
    write_folder(folder, "old")
    run_killed(KILLED_AFTER_RENAMES, folder)
    assert names(folder) == ["a"]
    assert len(names(tmp_path)) == 2
    files.claim_folder(folder, marker="a", force=False)
    assert names(tmp_path) == ["out"]
    assert names(folder) == ["a"]


def test_leftovers_beside_the_destination_are_removed(tmp_path: Path):
    folder, single = tmp_path / "out", tmp_path / "other.json"
    write_folder(folder, "old")
    run_killed(KILLED_WHILE_WRITING, folder, single)
    left = [name for name in names(tmp_path) if name.startswith(files.PARTIAL)]
    assert len(left) == 2
    write_folder(folder, "new")
    left = [name for name in names(tmp_path) if name.startswith(files.PARTIAL)]
    assert [name.endswith("-other.json") for name in left] == [True]  # another destination's is not ours to judge
    files.discard_partial(tmp_path)
    assert names(tmp_path) == ["out"]


def test_a_name_that_ends_alike_is_not_taken_for_ours(tmp_path: Path):
    """Writing `out` leaves alone what a writer of `my-out` has open beside it."""
    with files.new_folder(tmp_path / "my-out") as mine:
        (mine / "a").write_text("x")
        write_folder(tmp_path / "out", "y")
    assert names(tmp_path) == ["my-out", "out"]


def test_users_own_hidden_files_stay(tmp_path: Path):
    (tmp_path / ".partial-notes").write_text("mine")
    (tmp_path / ".previous-work").mkdir()
    files.discard_partial(tmp_path)
    assert names(tmp_path) == [".partial-notes", ".previous-work"]


def test_new_folder_through_a_link_keeps_the_link(tmp_path: Path):
    (tmp_path / "disk" / "big").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "big")
    write_folder(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "big" / "sub" / "a").read_text() == "new"
    assert names(tmp_path / "disk") == ["big"]


@pytest.mark.parametrize("name", [".", ".."])
def test_current_folder_cannot_be_replaced_whole(tmp_path: Path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be replaced whole\. Name a folder below it"):
        write_folder(Path(name), "x")
    assert names(tmp_path) == []


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_disk_leaves_the_file_as_it_was(small_disk: Path):
    path = small_disk / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(
        ArtifactError, match=rf"a\.json: could not be written \({FULL}\)\. Nothing that was there"
    ) as caught:
        files.write_text(path, "x" * 200_000)
    assert "Free space or choose another --out, then run the same command again." in str(caught.value)
    assert files.read_json(path, what="test") == {"old": 1}
    assert names(small_disk) == ["a.json"]


def test_full_disk_leaves_the_folder_as_it_was(small_disk: Path):
    folder = small_disk / "out"
    write_folder(folder, "old")
    with pytest.raises(ArtifactError, match=rf"out: could not be written \({FULL}\)"):
        write_folder(folder, "x" * 200_000)
    assert (folder / "sub" / "a").read_text() == "old"
    assert names(small_disk) == ["out"]


def test_mount_point_cannot_be_replaced_whole(small_disk: Path):
    with pytest.raises(ArtifactError, match="a mount point and cannot be replaced whole"):
        write_folder(small_disk, "x")


def test_write_error_without_a_number():
    assert "could not be written (odd)" in str(files.write_error(Path("a"), OSError("odd")))


# ---- JSON


def test_json_round_trip(tmp_path: Path):
    value = {"text": "naïve 😀", "numbers": [1, 2.5], "none": None}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", what="test") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite(tmp_path: Path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"value": number})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json: the manifest is missing\."),
        (b"{", r"a\.json: the manifest cannot be read \(Expecting"),
        (b'{"a": "\xff"}', r"a\.json: the manifest cannot be read \('utf-8' codec"),
        (b"[1]", r"a\.json: the manifest should be a JSON object, found list\."),
        (b'{"a":' + b"[" * 200_000, r"a\.json: the manifest cannot be read \(it is nested too deeply\)\."),
        (b'{"a":' + b"9" * 5_000 + b"}", r"a\.json: the manifest cannot be read \(Exceeds the limit \(4300 digits\)"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        files.read_json(tmp_path / "a.json", what="manifest")


# ---- names from outside


def test_inside_gives_the_path(tmp_path: Path):
    assert files.inside(tmp_path, "onnx/model.onnx") == tmp_path / "onnx" / "model.onnx"


@pytest.mark.parametrize("name", ["../a", "onnx/../../a", "/etc/hostname", "link/a"])
def test_name_that_leaves_the_folder_is_refused(tmp_path: Path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match=rf"root: the file name '{name}' points outside the folder; refused"):
        files.inside(root, name)


# ---- claim_folder


def claim(folder: Path, *, force: bool = False) -> None:
    files.claim_folder(folder, marker="state.json", force=force)


def test_claim_makes_a_new_folder(tmp_path: Path):
    claim(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_claim_takes_an_empty_one_and_its_own(tmp_path: Path):
    claim(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "other").write_text("x")
    claim(tmp_path)
    assert names(tmp_path) == ["other", "state.json"]


def test_claim_refuses_something_else(tmp_path: Path):
    for name in "edcba":
        (tmp_path / name).write_text("x")
    with pytest.raises(ArtifactError, match=r"holds something else \(a, b, c, d\) and no state\.json\. .* add --force"):
        claim(tmp_path)
    assert names(tmp_path) == list("abcde")


def test_claim_forced_leaves_what_is_there(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    claim(tmp_path, force=True)
    assert names(tmp_path) == ["thesis.tex"]


def test_claim_of_a_folder_with_nothing_but_leftovers(tmp_path: Path):
    (tmp_path / f"{files.PARTIAL}0123abcd-state.json").write_text("half")
    (tmp_path / f"{files.PARTIAL}0123abcd-artifact").mkdir()
    claim(tmp_path)
    assert names(tmp_path) == []


def test_claim_of_a_file(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArtifactError, match="a: is a file; --out needs a folder"):
        claim(tmp_path / "a", force=True)


def test_claim_below_a_file(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArtifactError, match=r"a/b: could not be written \("):
        claim(tmp_path / "a" / "b")


def test_every_write_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("flush") or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda path, target: order.append("rename") or replace(path, target))
    files.write_text(tmp_path / "a", "x")
    assert order == ["flush", "rename", "flush"]
    order.clear()
    write_folder(tmp_path / "out", "x")
    assert order == ["flush", "flush", "rename", "flush"]
