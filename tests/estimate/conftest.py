from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # tiny_artifact

from bertemd_deploy.estimate import cases


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every kind of calibration case as small as can be."""
    small = {
        "ROWS": (1, 2),
        "SOFTMAX_WIDTHS": (16,),
        "LENGTHS": (4,),
        "HEAD_WIDTHS": (8,),
        "PRODUCT_ROWS": (1, 2),
        "PRODUCT_SHAPES": ((24, 32),),
        "STREAM_SHAPE": (24, 32),
        "STREAM_COPIES": (1, 2),
        "STREAM_ROWS": (1,),
        "TABLE_ROWS": 50,
    }
    for name, value in small.items():
        monkeypatch.setattr(cases, name, value)
