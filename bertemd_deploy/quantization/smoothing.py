"""Features of an activation that stand out are scaled down, and the weights that read them up, before both become int8.

    x W = (x / s) (s W),  s_k ~ max |x_k|^a / max_n |W_kn|^(1 - a)        (SmoothQuant, Xiao et al. 2023, equation 4)

A scale for a whole tensor is stretched by the few features that are ten times as large as the rest behind BERT's LayerNorms
and Gelus, and leaves the rest a few codes. Weights have a scale per column, and room. Here s is 1 at the median and never
below: no range grows, whatever the input. The strength a is chosen for each activation, and whether the division pays at
all, by the error of the int8 product itself on calibration tokens. Graph in, graph out, torch-free; one Mul an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.encoding import Encoded
from bertemd_deploy.onnx_edit import Editor, attribute, tidy
from bertemd_deploy.quantization.calibration import Range, observe
from bertemd_deploy.quantization.dynamic import operators, quantize_weight, weight_of

EXAMPLES = 64  # calibration rows that run
TOKENS = 512  # of them that products are judged on
STRENGTHS = (0.5, 0.65, 0.8, 0.9, 1.0)  # tried for a
LEAST_GAIN = 2.0  # the error falls by this factor, or the activation stays as it is: the division takes time


@dataclass(frozen=True)
class Smoothed:
    """One activation that is divided by `s`.

    Attributes:
        tensor: its name in the graph given.
        strength: a.
        before: mean squared error of its int8 products over their mean square, as it was.
        after: the same, divided.
    """

    tensor: str
    strength: float
    before: float
    after: float


class _Seen:
    """What calibration rows hold in one activation: each feature's bounds, and some tokens, evenly spread over the calls."""

    def __init__(self, tokens_a_call: int) -> None:
        self._count = tokens_a_call
        self._rows: list[NDArray[np.float32]] = []
        self.low = self.high = np.zeros(0, dtype=np.float32)

    def add(self, values: NDArray[np.float32]) -> None:
        rows = values.reshape(-1, values.shape[-1])
        low, high = rows.min(axis=0), rows.max(axis=0)
        if not np.isfinite([low, high]).all():
            raise ValueError("values that are not finite")
        self.low = np.minimum(self.low, low) if len(self._rows) else np.minimum(low, 0)
        self.high = np.maximum(self.high, high) if len(self._rows) else np.maximum(high, 0)
        chosen = np.linspace(0, len(rows) - 1, min(self._count, len(rows))).round().astype(np.int64)
        self._rows.append(rows[chosen])

    def tokens(self) -> NDArray[np.float32]:
        return np.concatenate(self._rows)


def smooth(
    model: onnx.ModelProto, *, examples: Encoded, pad_id: int, per_channel: bool = True
) -> tuple[onnx.ModelProto, list[Smoothed]]:
    """Return a graph that computes the same, whose products lose less in int8, and the activations that it divides.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        examples: rows of the train split, 1 or more; the first `EXAMPLES` run.
        pad_id: token id of padding.
        per_channel: weights are to have a scale per column; else one per matrix.

    Raises:
        ExportError: an activation is not finite.
    """
    groups = _groups(model)
    count = min(EXAMPLES, len(examples))
    seen: dict[str, _Seen] = {}
    share = max(1, TOKENS // count)

    def visit(tensor: str, values: NDArray[np.float32], rows: int) -> None:
        seen.setdefault(tensor, _Seen(share * rows)).add(values)

    observe(model, list(groups), examples=examples, pad_id=pad_id, count=count, visit=visit)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    editor = Editor(result)
    found: list[Smoothed] = []
    scales: dict[str, NDArray[np.float32]] = {}
    for tensor, nodes in groups.items():
        weights = [_weight(editor, node) for node in nodes]
        best = _best(tensor, seen[tensor], np.concatenate(weights, axis=1), per_channel=per_channel)
        if best is not None:
            found.append(best[0])
            scales[tensor] = best[1]
    divided: dict[str, str] = {}

    def replace(node: onnx.NodeProto) -> bool:
        tensor = node.input[0] if node.input else ""
        if tensor not in scales or node.name not in {chosen.name for chosen in groups[tensor]}:
            return False
        if tensor not in divided:
            factor = editor.constant((1 / scales[tensor]).astype(np.float32), f"{node.name}/inverse")
            (divided[tensor],) = editor.emit("Mul", [tensor, factor], name=f"{node.name}/smooth")
        weight = editor.array(node.input[1])
        assert weight is not None
        scale = scales[tensor] if attribute(node, "transB", 0) else scales[tensor][:, None]
        node.input[0], node.input[1] = divided[tensor], editor.constant(weight * scale, f"{node.name}/scaled")
        return False

    editor.rewrite(replace)
    tidy(result, opset=next(entry.version for entry in result.opset_import if not entry.domain))
    return result, found


def _groups(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the products that can become int8, by the activation that they read."""
    names = set(operators(model))
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.name in names and node.op_type != "Gather":
            groups.setdefault(node.input[0], []).append(node)
    return groups


def _weight(editor: Editor, node: onnx.NodeProto) -> NDArray[np.float32]:
    weight = weight_of(editor, node)
    assert weight is not None
    return weight


def _best(
    tensor: str, seen: _Seen, weight: NDArray[np.float32], *, per_channel: bool
) -> tuple[Smoothed, NDArray[np.float32]] | None:
    """Return what to divide an activation by, (K,), or None where that gains too little."""
    tokens = seen.tokens()
    exact = tokens @ weight
    power = float(np.square(exact).mean())
    largest = np.maximum(seen.high, -seen.low)
    middle = float(np.median(largest))
    if not power or not middle:
        return None

    def error(scale: NDArray[np.float32]) -> float:
        bounds = Range(float((seen.low / scale).min()), float((seen.high / scale).max()))
        step, zero = bounds.parameters
        codes = np.clip(np.rint(tokens / (scale * step)) + np.float32(zero), 0, 255) - np.float32(zero)
        columns, steps = quantize_weight(weight * scale[:, None], per_channel=per_channel)
        return float(np.square((codes @ columns.astype(np.float32)) * (step * steps) - exact).mean()) / power

    before = error(np.ones_like(largest))
    tried = []
    for strength in STRENGTHS:
        scale = _scale(largest, np.abs(weight).max(axis=1), strength=strength, middle=middle)
        tried.append((error(scale), strength, scale))
    after, strength, scale = min(tried, key=lambda entry: entry[0])
    if after * LEAST_GAIN > before:
        return None
    return Smoothed(tensor, strength, before, after), scale


def _scale(
    activations: NDArray[np.float32], weights: NDArray[np.float32], *, strength: float, middle: float
) -> NDArray[np.float32]:
    """Return s (K,), 1 at the median and never below; at most what brings a feature down to the median of `activations`."""
    smallest = np.finfo(np.float32).tiny
    raw = strength * np.log(np.maximum(activations, smallest)) - (1 - strength) * np.log(np.maximum(weights, smallest))
    largest = np.maximum(activations / middle, 1)
    return np.asarray(np.clip(np.exp(raw - np.median(raw)), 1, largest), dtype=np.float32)
