"""Features of an activation that stand out are scaled down, and the weights that read them up, before both become int8.

    x W = (x / s) (s W),  s_k ~ max |x_k|^a / max_n |W_kn|^(1 - a)        (SmoothQuant, Xiao et al. 2023, equation 4)

A scale for a whole tensor is stretched by the few features that are ten times as large as the rest behind BERT's LayerNorms
and Gelus, and leaves the rest a few codes. Weights have a scale per column, and room. Here s is 1 at the median and never
below, so no range grows. The strength a is chosen for each activation, and whether the division pays at all, by the error of
the int8 product itself on calibration tokens. Graph in, graph out, torch-free; one Mul an activation, which takes time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import Editor, attribute, tidy
from bertemd_deploy.quantization.calibration import Range, observe, spread
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
    """What calibration rows hold in one activation: each feature's bounds, and tokens evenly spread over every batch."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.float32]] = []
        self.low: NDArray[np.float32] = np.zeros(1, dtype=np.float32)
        self.high: NDArray[np.float32] = np.zeros(1, dtype=np.float32)

    def add(self, values: NDArray[np.float32], *, most: int) -> None:
        """Take in (..., K) values, at most so many tokens of them as examples; a ValueError where one is not finite."""
        rows = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, rows.min(axis=0)), np.maximum(self.high, rows.max(axis=0))
        if not np.isfinite([self.low, self.high]).all():
            raise ValueError("values that are not finite")
        self._rows.append(rows[spread(len(rows), most)])

    def tokens(self) -> NDArray[np.float32]:
        return np.concatenate(self._rows)


def smooth(model: onnx.ModelProto, *, examples: Encoded, pad_id: int) -> tuple[onnx.ModelProto, list[Smoothed]]:
    """Return a graph that computes the same, whose products lose less in int8, and the activations that it divides.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        examples: rows of the train split, 1 or more; `EXAMPLES` of them run, evenly spread.
        pad_id: token id of padding.

    Raises:
        ExportError: an activation is not finite, or no product can become int8.
    """
    groups = _groups(model)
    if not groups:
        raise ExportError("int8: the graph has no product that can become int8. Set quantize.mode to none.")
    examples = examples.select(spread(len(examples), EXAMPLES))
    count = len(examples)
    seen: dict[str, _Seen] = {tensor: _Seen() for tensor in groups}

    def visit(tensor: str, values: NDArray[np.float32], rows: int) -> None:
        seen[tensor].add(values, most=math.ceil(TOKENS * rows / count))

    observe(model, list(groups), examples=examples, pad_id=pad_id, count=count, visit=visit)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    editor = Editor(result)
    found: list[Smoothed] = []
    scales: dict[str, NDArray[np.float32]] = {}
    for tensor, nodes in groups.items():
        weights = [_weight(editor, node) for node in nodes]
        best = _best(tensor, seen[tensor], np.concatenate(weights, axis=1))
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


def _best(tensor: str, seen: _Seen, weight: NDArray[np.float32]) -> tuple[Smoothed, NDArray[np.float32]] | None:
    """Return what to divide an activation by, (K,), or None where that gains too little."""
    tokens = seen.tokens()
    exact = tokens @ weight
    power = float(np.square(exact, dtype=np.float64).mean())
    largest = np.maximum(seen.high, -seen.low)
    middle = float(np.median(largest))
    if not power or not middle:
        return None

    def error(scale: NDArray[np.float32]) -> float:
        bounds = Range(float((seen.low / scale).min()), float((seen.high / scale).max()))
        step, zero = bounds.parameters
        codes = np.clip(np.rint(tokens / (scale * step)) + np.float32(zero), 0, 255) - np.float32(zero)
        columns, steps = quantize_weight(weight * scale[:, None], per_channel=True)
        lost = (codes @ columns.astype(np.float32)) * (step * steps) - exact
        return float(np.square(lost, dtype=np.float64).mean()) / power

    before = error(np.ones_like(largest))
    tried = []
    for strength in STRENGTHS:
        scale = _scale(largest, np.abs(weight).max(axis=1), strength=strength, middle=middle)
        tried.append((error(scale), strength, scale))
    after, strength, scale = min(tried, key=lambda entry: entry[0])
    if not 0 < after * LEAST_GAIN <= before:  # nor where one is not a number
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
