"""A fit is made once for all that follow from it: read to the bit, never for another teacher, layers or rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_comparison import call, write_recipe
from test_layer_fit import rows, wide_mpnet
from tiny_family import family_teacher

from bertemd_deploy import distill as distill_module
from bertemd_deploy import kept_fits, stages
from bertemd_deploy.data import load_data
from bertemd_deploy.distill import distill
from bertemd_deploy.errors import ArtifactError, TrainingError, UnfinishedError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.kept_fits import remove_fits
from bertemd_deploy.position_codes import code_coordinates, hold_codes
from bertemd_deploy.processes import Processes
from bertemd_deploy.settings import DistillSettings, StudentSettings
from bertemd_deploy.students import Shape, build_student

Task = Callable[..., tuple[Path, Path]]
STUDENT = StudentSettings(layers=2, hidden=16, heads=2, intermediate=32, fit_layers="always")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the layers of every fit that was really made."""
    done: list[list[int]] = []
    fit = kept_fits.fit_layers

    def counted(*arguments: Any, layers: list[int], **named: Any) -> Any:
        done.append(layers)
        return fit(*arguments, layers=layers, **named)

    monkeypatch.setattr(kept_fits, "fit_layers", counted)
    return done


def build(teacher: Any, encoder: Any, folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"init": "teacher", "seed": 1, "encoder": encoder, "fits": [folder]}
    settings |= {"shape": Shape(2, 96, 4, 128), "examples": rows(300, seed=1)} | changes
    return build_student(teacher, **settings)[0]


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what was said of the student since the last call."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("student: ")]


def same(one: Any, other: Any) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_fit_is_read_to_the_bit_with_what_was_said_of_it(
    made: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    first = build(teacher, encoder, tmp_path / "fits")
    (said,) = told(capsys)
    assert said.startswith("student: layers fitted (cosine to what the teacher's compute ")
    again = build(teacher, encoder, tmp_path / "fits", seed=2, dropout=0.3)
    (path,) = (tmp_path / "fits").iterdir()
    assert told(capsys) == [f"student: the fit of its layers is read from {path}", said]
    assert made == [[0, 1]]
    assert same(first, again)
    assert torch.equal(code_coordinates(first), code_coordinates(again))
    assert again.config.hidden_dropout_prob == 0.3


@pytest.mark.parametrize("family", ["electra", "distilbert"])
def test_a_head_that_starts_random_is_its_own_seed_s(family: str, made: list[list[int]], tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, family)
    given: dict[str, Any] = {"shape": Shape(2, 16, 2, 32), "examples": rows(100, seed=1)}
    shared = [build(teacher, encoder, tmp_path / "fits", seed=seed, **given) for seed in (1, 2, 1)]
    alone = build(teacher, encoder, tmp_path / "other", seed=2, **given)
    assert not same(shared[0], shared[1])
    assert same(shared[0], shared[2])
    assert same(shared[1], alone)
    assert len(made) == 3


def test_a_fit_stands_in_every_folder_and_is_read_from_any(
    made: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    own, shared, later = (tmp_path / name for name in ("own", "shared", "later"))
    first = build(teacher, encoder, own, fits=[own, shared])
    (path,), (twin,) = own.iterdir(), shared.iterdir()
    assert path.samefile(twin)
    remove_fits(shared)
    assert same(build(teacher, encoder, own, fits=[own]), first)
    monkeypatch.setattr("os.link", Mock(side_effect=OSError(95, "Operation not supported")))
    assert same(build(teacher, encoder, own, fits=[later, own]), first)
    (copy,) = later.iterdir()
    assert not copy.samefile(path)
    assert copy.read_bytes() == path.read_bytes()
    assert len(made) == 1


def test_whatever_a_fit_follows_from_makes_another(made: list[list[int]], tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    folder = tmp_path / "fits"
    build(teacher, encoder, folder)
    build(teacher, encoder, folder, init_layers="even")
    build(teacher, encoder, folder, examples=rows(300, seed=2))
    teacher.config.transformers_version = "0.0.0"  # of no account
    shorter = type(encoder).load(tmp_path / "mpnet", max_length=encoder.max_length - 1)
    build(teacher, shorter, folder)
    changed = teacher.mpnet.encoder.layer[3].output.dense.weight  # of a layer that is not copied
    before = changed.detach().clone()
    with torch.no_grad():
        changed[0, 0] += 1e-3
    build(teacher, encoder, folder)
    assert made == [[0, 1], [1, 3], [0, 1], [0, 1], [0, 1]]
    assert len(list(folder.iterdir())) == 5
    with torch.no_grad():
        changed.copy_(before)
    build(teacher, encoder, folder, init_layers=(2, 4))  # "even" by another name
    build(teacher, encoder, folder)
    assert len(made) == 5


def test_a_fit_that_does_not_help_is_not_tried_again(
    made: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, encoder = family_teacher(tmp_path, "mpnet")
    teacher.mpnet.encoder.relative_attention_bias.weight.data.mul_(0.01)  # next to nothing is lost by copying
    given: dict[str, Any] = {"shape": Shape(4, 16, 2, 32), "examples": rows(100, seed=1)}
    first = build(teacher, encoder, tmp_path / "fits", **given)
    said = told(capsys)
    again = build(teacher, encoder, tmp_path / "fits", **given)
    assert told(capsys)[1:] == said
    assert "layers stay as copied" in said[0]
    assert made == [[0, 1, 2, 3]]
    assert code_coordinates(again) is None
    assert same(first, again)


def test_another_process_than_the_first_reads_and_writes_nothing(made: list[list[int]], tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    folder = tmp_path / "fits"
    first = build(teacher, encoder, folder, keeps_fits=False)
    assert not folder.exists()
    build(teacher, encoder, folder)
    assert same(build(teacher, encoder, folder, keeps_fits=False), first)
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["cut", "no facts", "other weights", "no list"])
def test_a_damaged_fit_is_named_and_left(damage: str, made: list[list[int]], tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    build(teacher, encoder, tmp_path / "fits")
    (path,) = (tmp_path / "fits").iterdir()
    weights = load_file(path)
    with safe_open(path, framework="pt") as stored:
        facts = stored.metadata()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no facts":
        save_file(weights, path)
    elif damage == "no list":
        save_file(weights, path, metadata={"cosines": "[1]"})
    else:
        weights.pop("bert.embeddings.LayerNorm.weight")
        save_file(weights, path, metadata=facts)
    before = path.read_bytes()
    with pytest.raises(TrainingError) as error:
        build(teacher, encoder, tmp_path / "fits")
    said = str(error.value)
    assert said.startswith(f"{path}: the kept fit of the student's layers is damaged (")
    assert said.endswith("). Remove the file; they are fitted anew.")
    assert "\n" not in said
    assert path.read_bytes() == before
    path.unlink()
    build(teacher, encoder, tmp_path / "fits")
    assert len(made) == 2


def test_a_full_disk_leaves_no_part_of_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, encoder = wide_mpnet(tmp_path)

    def full(_tensors: Any, path: Path, **_named: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            build(teacher, encoder, tmp_path / "fits")
    assert list((tmp_path / "fits").iterdir()) == []


def test_what_others_put_beside_fits_stays(tmp_path: Path) -> None:
    folder = tmp_path / "fits"
    remove_fits(folder)  # there is none
    folder.mkdir()
    for name in ("0123456789abcdef.safetensors", "mine.safetensors", "notes.txt", ".partial-01234567-half"):
        (folder / name).write_text("x")
    remove_fits(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "notes.txt"]
    for path in folder.iterdir():
        path.unlink()
    (folder / "0123456789abcdef.safetensors").write_text("x")
    remove_fits(folder)
    assert not folder.exists()


def train(teacher: Path, data: Path, out: Path, **extra: Any) -> Path:
    """Distil into `out`; return the file of the weights."""
    distill(
        teacher,
        data=load_data(str(data)),
        max_length=32,
        student=STUDENT,
        settings=DistillSettings(epochs=2, batch_size=8, learning_rate=2e-3, beta=0.05, precision="float32"),
        out=out,
        checkpoints=checkpoints(out),
        log=out.with_name(f"{out.name}.jsonl"),
        teacher_name="teacher",
        **extra,
    )
    return out / "model.safetensors"


def checkpoints(out: Path) -> Path:
    return out.with_name(f"{out.name}-checkpoints")


def test_a_run_that_goes_on_reads_the_fit_it_began_with(
    tiny_task: Task, made: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    whole = train(teacher, data, tmp_path / "whole")
    fits = checkpoints(tmp_path / "cut") / "fits"
    with pytest.raises(UnfinishedError):
        train(teacher, data, tmp_path / "cut", max_minutes=0, fits=tmp_path / "shared")
    assert len(made) == 2
    (path,) = fits.iterdir()
    assert [path.name] == [shared.name for shared in (tmp_path / "shared").iterdir()]
    assert list(fits.parent.glob("step-*"))
    monkeypatch.setattr(kept_fits, "fit_layers", None)  # not to be called
    (fits / ".partial-01234567-half.safetensors").write_text("of a killed process")
    assert sha256_file(train(teacher, data, tmp_path / "cut")) == sha256_file(whole)
    assert list(fits.iterdir()) == [path]


def test_of_several_processes_the_main_one_keeps_the_fit(
    tiny_task: Task, made: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    monkeypatch.setattr(distill_module, "join_processes", lambda: Processes(rank=1, size=1))
    with pytest.raises(TrainingError, match=r"best-1\.safetensors"):  # which the main process would have written
        train(teacher, data, tmp_path / "out")
    assert made == [[1, 3]]
    assert not (checkpoints(tmp_path / "out") / "fits").exists()


def test_a_checkpoint_with_positions_elsewhere_is_refused(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    first = build(teacher, encoder, tmp_path / "fits")
    again = build(teacher, encoder, tmp_path / "fits")
    where = hold_codes(again)
    again.load_state_dict(first.state_dict())
    moved = {name: value.clone() for name, value in first.state_dict().items()}
    free = next(at for at in range(96) if at not in where)
    for name, value in moved.items():
        if value.dim() and "intermediate" not in name and value.shape[-1] == 96 and "embeddings" in name:
            value[..., [free, int(where[0])]] = value[..., [int(where[0]), free]]
    with pytest.raises(RuntimeError, match="carries positions in other coordinates than the one that is trained"):
        again.load_state_dict(moved)
    plain = build(teacher, encoder, tmp_path / "fits", examples=None)
    plain.load_state_dict(first.state_dict())  # nothing is held there
    again.load_state_dict(plain.state_dict())  # as of a fine-tuning from before codes were held: it has none to lose


def test_mappings_and_seeds_share_one_fit_which_goes_with_the_last(
    tiny_task: Task, made: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    recipe, out = write_recipe(tmp_path / "recipe.yaml", teacher, data, seed=1), tmp_path / "out"
    command = ("distill", recipe, "--compare", "none,emd", "--seeds", "1,2", "--set", "student.fit_layers=always")
    stage = stages.distill_stage

    def interrupted(variant: Any, *arguments: Any, **extra: Any) -> dict[str, Any]:
        if (variant.distill.mapping, variant.distill.seed) == ("none", 2):
            raise KeyboardInterrupt
        return stage(variant, *arguments, **extra)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_stage", interrupted)
        assert call(*command, "--out", out).exit_code == 130
    assert len(list((out / "fits").iterdir())) == 1
    done = call(*command, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert len(made) == 1
    assert json.loads((out / "comparison.json").read_text())["status"] == "done"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "emd-seed1", "emd-seed2", "none-seed1", "none-seed2",
    ]  # fmt: skip
    alone = call(*command[:2], "--mapping", "emd", "--set", "student.fit_layers=always", "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.stderr
    assert len(made) == 2
    weights = [sha256_file(folder / "model.safetensors") for folder in (tmp_path / "alone", out / "emd-seed1")]
    assert weights[0] == weights[1]


def test_force_makes_the_fit_anew(
    tiny_task: Task, made: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = tiny_task()
    recipe, out = write_recipe(tmp_path / "recipe.yaml", teacher, data, seed=1), tmp_path / "out"
    command = ("distill", recipe, "--compare", "none,emd", "--set", "student.fit_layers=always", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_stage", Mock(side_effect=KeyboardInterrupt))
        assert call(*command).exit_code == 130
    (out / "fits").mkdir()
    damaged = out / "fits" / "0123456789abcdef.safetensors"
    damaged.write_text("x")
    (out / "fits" / ".partial-01234567-half").write_text("x")
    (out / "fits" / "mine.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_stage", Mock(side_effect=KeyboardInterrupt))
        assert call(*command).exit_code == 130
        assert sorted(path.name for path in (out / "fits").iterdir()) == [damaged.name, "mine.txt"]
        assert call(*command, "--force").exit_code == 130
    assert [path.name for path in (out / "fits").iterdir()] == ["mine.txt"]
    assert call(*command).exit_code == 0
    assert [path.name for path in (out / "fits").iterdir()] == ["mine.txt"]
    assert len(made) == 1
