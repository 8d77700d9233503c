from __future__ import annotations

import sys

import numpy as np
import pytest

from bertemd_deploy.bench import memory
from bertemd_deploy.bench.memory import graph_bytes, peak_in_status, peak_rss_bytes, rss_bytes, weight_bytes
from bertemd_deploy.errors import ModelError


def test_peak_is_read_in_kibibytes():
    assert peak_in_status("Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n") == 2048 * 1024


def test_status_without_a_peak_is_not_zero():
    assert peak_in_status("Name:\tkthread\n") is None


def test_peak_stays_after_memory_is_given_back():
    before = rss_bytes()
    block = np.ones(256 * 2**20, dtype=np.uint8)
    del block
    assert rss_bytes() < before + 128 * 2**20
    assert peak_rss_bytes() > before + 192 * 2**20


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_peak_without_proc_comes_from_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC_STATUS", tmp_path / "absent")
    # Both count this very process; KiB taken for bytes, or the reverse, would be off by a thousand.
    assert 0.5 < peak_rss_bytes() / rss_bytes() < 100


def test_graph_bytes_count_external_weights(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 100)
    (tmp_path / "model_quantized.onnx").write_bytes(b"x" * 1000)
    assert graph_bytes(tmp_path / "model.onnx") == 110


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (["model.safetensors", "pytorch_model.bin"], 5),
        (["pytorch_model.bin"], 5),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "optimizer.pt"], 10),
    ],
)
def test_weight_bytes_count_one_copy_of_the_weights(tmp_path, names, size):
    for name in names:
        (tmp_path / name).write_bytes(b"12345")
    assert weight_bytes(tmp_path) == size


def test_weight_bytes_of_a_folder_without_weights(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights \(model.safetensors or pytorch_model.bin\)"):
        weight_bytes(tmp_path)


@pytest.mark.parametrize("known", [True, False], ids=["proc", "psutil"])
def test_memory_now_grows_with_what_is_touched(monkeypatch, tmp_path, known):
    if not known:
        monkeypatch.setattr(memory, "PROC_STATUS", tmp_path / "absent")
    before = rss_bytes()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert 32 * 2**20 < rss_bytes() - before < 128 * 2**20
    assert block.nbytes == 64 * 2**20


def test_memory_now_is_read_from_the_status_where_there_is_one(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("VmHWM:\t 4096 kB\nVmRSS:\t 2048 kB\n")
    monkeypatch.setattr(memory, "PROC_STATUS", tmp_path / "status")
    assert (rss_bytes(), peak_rss_bytes()) == (2 * 2**20, 4 * 2**20)
