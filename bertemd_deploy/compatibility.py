"""Which releases of ONNX Runtime run a graph rightly, by what the graph is made of: operator set, file format, operators.

Measured, not read off release notes: `tests/compat` runs artifacts of every kind in each release named here and in the one
below it. An old release refuses an operator set or a file format that it does not know. Its fused attention is worse than
that: it loads, and answers wrongly. 1.15 does so always, 1.16 to 1.20 where a mask over keys comes with fewer queries than
keys, as in the last layer of a decision that reads one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Ceiling(NamedTuple):
    """What a program reads at most: the operator set and the file format's version (`ir_version`)."""

    opset: int
    ir_version: int


# From which release of ONNX Runtime on.
SINCE: dict[str, Ceiling] = {
    "1.12": Ceiling(17, 8),
    "1.14": Ceiling(18, 8),
    "1.16": Ceiling(19, 9),
    "1.17": Ceiling(20, 9),
    "1.18": Ceiling(21, 10),
}
# The highest that was run elsewhere, with the release it was run in; they may read more.
TESTED: dict[str, tuple[str, Ceiling]] = {
    "optimum-onnx": ("0.1.0", Ceiling(21, 10)),
    "transformers.js": ("4.3.1", Ceiling(21, 10)),
    "openvino": ("2026.4.1", Ceiling(21, 10)),
}
_FUSED_ATTENTION = "1.16"
_MASKED_ATTENTION = "1.21"
_KEY_MASK = 4  # place of MultiHeadAttention's input key_padding_mask


def release(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers, major and minor, for comparing.

    Raises:
        ValueError: it does not start with two numbers.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is not a version such as 1.21.0")
    return tuple(map(int, found.groups()))


def oldest_onnxruntime(model: Any) -> str:
    """Return the oldest release of ONNX Runtime, such as "1.12", that runs a graph and answers rightly.

    Args:
        model: `onnx.ModelProto` that `export` wrote.

    Raises:
        ValueError: its operator set or file format is newer than all of `SINCE`.
    """
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    fitting = [name for name, most in SINCE.items() if opset <= most.opset and model.ir_version <= most.ir_version]
    if not fitting:
        highest = list(SINCE.values())[-1]
        raise ValueError(
            f"operator set {opset} in file format {model.ir_version}; no release is known to run more than "
            f"{highest.opset} in {highest.ir_version}"
        )
    return max(fitting[0], _attention(model.graph.node), key=release)


def _attention(nodes: Iterable[Any]) -> str:
    """Return the oldest release whose fused attention computes what these nodes ask of it."""
    found = next(iter(SINCE))
    for node in nodes:
        if node.op_type == "MultiHeadAttention":
            masked = len(node.input) > _KEY_MASK and node.input[_KEY_MASK]
            found = max(found, _MASKED_ATTENTION if masked else _FUSED_ATTENTION, key=release)
    return found


def highest_opset(onnxruntime: str) -> int | None:
    """Return the highest operator set that a release of ONNX Runtime reads; None below what `export` writes."""
    allowed = [most.opset for name, most in SINCE.items() if release(name) <= release(onnxruntime)]
    return max(allowed, default=None)


def release_fault(required: str, *, installed: str) -> str | None:
    """Return what is wrong with running a graph in an ONNX Runtime, or None.

    Args:
        required: the oldest release that answers rightly.
        installed: the version at hand.
    """
    if release(installed) >= release(required):
        return None
    return f"it needs ONNX Runtime {required} or newer; {installed} would refuse it or answer wrongly"
