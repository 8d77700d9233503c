"""Where a process trains and in which precision: CPU or GPU, float32 or bfloat16 matrix products.

Weights, optimiser state, costs and losses are float32 everywhere; bfloat16 is for matrix products only.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import nn

from bertemd_deploy.bench.environment import uses_bfloat16


def training_device() -> torch.device:
    """Return where this process trains: its GPU where there is one and it is not told to keep to the CPU."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if told or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def trains_in_bfloat16(precision: str) -> bool:
    """Say whether training of this `precision` multiplies in bfloat16: for "auto", where the processor or GPU has it."""
    if precision == "auto" and training_device().type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return uses_bfloat16(precision)


def matrix_precision(device: torch.device, *, bfloat16: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which matrix products are bfloat16, or as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is torch's or Python's word for a machine or GPU without memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))


def keep_products_in_bfloat16(model: nn.Module) -> None:
    """Keep a frozen model's linear weights in bfloat16: the same values that autocast makes of them at every step."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
