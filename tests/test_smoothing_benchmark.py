"""The benchmark of smoothing: the forms of int8 that it sets beside each other, and what it says of them. No timings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from tiny_student import LABELS, labelled, outliers, write_student

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import smoothing  # noqa: E402 - found through the line above

from bertemd_deploy import facts  # noqa: E402
from bertemd_deploy.onnx_edit import histogram  # noqa: E402


@pytest.mark.parametrize("fused", [False, True])
def test_every_form_is_built_and_judged(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = outliers()
    folder = write_student(tmp_path / "student")
    model.save_pretrained(folder)
    found = SimpleNamespace(
        labels=LABELS["classification"],
        max_length=32,
        evaluation=labelled(model, 60),
        calibration=labelled(model, 30, seed=1),
    )
    monkeypatch.setattr(facts, "read_student", lambda _folder: found)
    (tmp_path / "graphs").mkdir()
    graphs, count = smoothing.build(folder, tmp_path / "graphs", fused=fused)
    loaded = {name: histogram(onnx.load_model(path)) for name, path in graphs.items()}
    assert count > 0
    assert list(loaded) == ["fp32", *smoothing.FORMS]
    for form in ("plain", "plain, per row"):
        assert loaded[form.replace("plain", "smoothed")]["Mul"] - loaded[form].get("Mul", 0) == count
    loss = smoothing.losses(folder, graphs)
    assert loss["smoothed"]["kl"] * 2 < loss["plain"]["kl"]
    assert loss["smoothed"]["squared_error"] * 2 < loss["plain"]["squared_error"]
    assert {entry["rows"] for entry in loss.values()} == {60}
    assert loss["plain"]["bytes"] == graphs["plain"].stat().st_size
    times = {form: [[2.0 + place] * 3] * 4 for place, form in enumerate(smoothing.FORMS)}
    latency = [{"settings": {"sequence": 16}, "latency_ms": times}]
    entry = {"smoothed_activations": count, "loss": loss, "latency": latency}
    smoothing.print_table({"students": {"a": {"graphs": {"fused" if fused else "portable": entry}}}})
    printed = capsys.readouterr().out.splitlines()
    assert "16: 1.500 [1.500, 1.500]" in printed[2]
    assert f"{loss['smoothed']['kl']:.5f}" in printed[2]
    assert np.isfinite(loss["smoothed, per row"]["kl"])


def test_a_folder_that_is_no_student_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["smoothing.py", "--student", f"a={tmp_path}", "--out", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as caught:
        smoothing.main()
    assert caught.value.code == 2
    assert "--student: no student's folder: a" in capsys.readouterr().err
