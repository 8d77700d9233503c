"""Devices: where a process trains and in which precision, whatever this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bertemd_deploy.training_device import (
    is_out_of_memory,
    keep_products_in_bfloat16,
    matrix_precision,
    training_device,
    trains_in_bfloat16,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_CPU", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("gpu", "environment", "expected"),
    [
        (False, {}, "cpu"),
        (False, {"LOCAL_RANK": "1"}, "cpu"),
        (True, {}, "cuda:0"),
        (True, {"LOCAL_RANK": "3"}, "cuda:3"),
        (True, {"LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "true"}, "cpu"),
        (True, {"ACCELERATE_USE_CPU": "1"}, "cpu"),
        (True, {"ACCELERATE_USE_CPU": "False"}, "cuda:0"),
    ],
)
def test_a_process_trains_on_its_gpu_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert training_device() == torch.device(expected)


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch, gpu: bool, hardware: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: hardware or including_emulation
    )
    monkeypatch.setattr("bertemd_deploy.training_device.uses_bfloat16", lambda precision: hardware != gpu)
    assert trains_in_bfloat16("auto") is hardware  # of the GPU where there is one, of the processor where there is none


@pytest.mark.parametrize("gpu", [False, True])
def test_a_named_precision_is_taken_on_every_device(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert trains_in_bfloat16("bfloat16") is True
    assert trains_in_bfloat16("float32") is False


@pytest.mark.parametrize(("bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_alone_are_bfloat16(bfloat16: bool, dtype: torch.dtype) -> None:
    layer, values = nn.Linear(4, 4), torch.ones(2, 4)
    with matrix_precision(torch.device("cpu"), bfloat16=bfloat16):
        assert layer(values).dtype == dtype
        assert (values + values).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


def test_a_frozen_model_keeps_its_products_in_bfloat16_to_the_bit() -> None:
    torch.manual_seed(0)
    model, values = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(3, 8)
    with torch.no_grad(), matrix_precision(torch.device("cpu"), bfloat16=True):
        before = model(values)
        keep_products_in_bfloat16(model)
        after = model(values)
    assert {value.dtype for value in model[0].parameters()} == {torch.bfloat16}
    assert {value.dtype for value in model[1].parameters()} == {torch.float32}
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_an_error_for_want_of_memory_is_told_from_others(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
