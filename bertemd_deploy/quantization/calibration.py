"""Calibration: what an fp32 graph's activations hold, and the range that static int8 spends its 256 steps on. Torch-free.

The fp32 graph runs on calibration examples (of train, never dev), a bounded number of tokens at a time, padding left out
(`observe`). For a range only a histogram is kept of every tensor: 2,048 bins, joined in pairs where a batch goes beyond their
bounds, which doubles the range. What it holds is therefore the same for ten examples and a million. A range [low, high]
holds 0, and is

    minmax      [min, max]
    percentile  what is left after (1 - p) / 2 of the values were cut off at either end
    mse         argmin sum_b n_b (x_b - Q(x_b))^2, Q being the nearest of the 256 steps
    entropy     argmin KL(P || Q) over [-t, t]: P is the histogram with what lies outside in its edge bins, Q what 256 steps
                keep of the part inside
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from bertemd_deploy.console import progress
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import DataError, ExportError
from bertemd_deploy.runtime import open_session

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
PERCENTILE = 99.99
BINS = 2048
TOKENS_AT_ONCE = 2048  # padding included; a longer row runs alone
STEPS = 255  # between the 256 codes of an activation
_SHRUNK = np.geomspace(1, 1 / 16, 25)  # the bounds tried for the least squares, over the largest
_BOUND_STEP = 8  # bins from one candidate bound of the least divergence to the next
_CHUNK = 1 << 15  # values sorted into bins at once: they stay in the cache
_LEAST_SHARE = 1e-9  # of Q where nothing is kept of what P clips into a bin


@dataclass(frozen=True)
class Range:
    """The real numbers that an activation's codes 0 to 255 stand for: finite, and 0 among them."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ExportError: they are not finite, or 0 is not between them.
        """
        if not (np.isfinite([self.low, self.high]).all() and self.low <= 0 <= self.high):
            raise ExportError(f"activation range [{self.low:g}, {self.high:g}]: it must be finite and hold 0.")

    @property
    def parameters(self) -> tuple[np.float32, np.uint8]:
        """Scale s and zero point z: q = clip(round(x / s) + z, 0, 255), x ~ s (q - z)."""
        scale = np.float32((self.high - self.low) / STEPS)
        if scale == 0:  # nothing but zeros, or all too small for a float
            return np.float32(1), np.uint8(0)
        return scale, np.uint8(np.clip(np.rint(-self.low / float(scale)), 0, STEPS))


class Histogram:
    """How often a tensor's values fall where, in `BINS` bins of one width."""

    def __init__(self) -> None:
        """Start from nothing; the first values set the bounds."""
        self.counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
        self.start, self.width = 0.0, 0.0  # of the first bin; of each
        self.minimum, self.maximum = np.inf, -np.inf

    @property
    def edges(self) -> NDArray[np.float64]:
        """(BINS + 1,) the bins' bounds."""
        return np.asarray(self.start + self.width * np.arange(BINS + 1), dtype=np.float64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count `values`, of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())  # not finite where any value is not
        if not np.isfinite([low, high]).all():
            raise ValueError("values that are not finite")
        if not self.width:
            self.start = low
            self.width = max(high - low, float(np.finfo(np.float32).eps) * max(abs(low), abs(high)), 1e-30) / BINS
        while high > self.start + self.width * BINS:
            self._double(upwards=True)
        while low < self.start:
            self._double(upwards=False)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        flat = values.ravel()
        for at in range(0, len(flat), _CHUNK):
            offsets = flat[at : at + _CHUNK] - np.float32(self.start)
            offsets *= np.float32(1 / self.width)
            places = offsets.astype(np.int16)  # at most BINS
            self.counts += np.bincount(np.clip(places, 0, BINS - 1, out=places), minlength=BINS)

    def _double(self, *, upwards: bool) -> None:
        pairs = self.counts.reshape(-1, 2).sum(axis=1)
        empty = np.zeros(BINS // 2, dtype=np.int64)
        self.counts = np.concatenate([pairs, empty] if upwards else [empty, pairs])
        if not upwards:
            self.start -= self.width * BINS
        self.width *= 2

    def range(self, method: Method, *, percentile: float = PERCENTILE) -> Range:
        """Return the range that `method` chooses (see the module's first lines).

        Args:
            method: how.
            percentile: of the values that stay inside, in percent; for "percentile".
        """
        assert self.width, "no values"
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        if low == high:
            return Range(low, high)
        if method == "percentile":
            tail = (1 - percentile / 100) / 2
            low, high = max(low, self._quantile(tail)), min(high, self._quantile(1 - tail))
        elif method == "mse":
            low, high = self._least_squares(low, high)
        elif method == "entropy":
            low, high = self._least_divergence(low, high)
        return Range(min(low, 0.0), max(high, 0.0))

    def _quantile(self, share: float) -> float:
        """Return the value that `share` of all values are below, taken as evenly spread in their bin."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        return float(np.interp(share * below[-1], below, self.edges))

    def _least_squares(self, low: float, high: float) -> tuple[float, float]:
        """Return the bounds of least squared error, both shrunk from [low, high] by factors of `_SHRUNK`."""
        filled = np.flatnonzero(self.counts)
        values, counts = self.edges[filled] + self.width / 2, self.counts[filled]
        best, least = (low, high), np.inf
        highs = (high * _SHRUNK if high else np.zeros(1))[:, None]
        for bound in low * _SHRUNK if low else np.zeros(1):
            scales = (highs - bound) / STEPS
            zeros = np.rint(-bound / scales)
            codes = np.clip(np.rint(values / scales) + zeros, 0, STEPS)
            errors = np.square((codes - zeros) * scales - values) @ counts
            at = int(errors.argmin())
            if errors[at] < least:
                best, least = (float(bound), float(highs[at, 0])), float(errors[at])
        return best

    def _least_divergence(self, low: float, high: float) -> tuple[float, float]:
        """Return the bounds of least KL(P || Q), of those that leave a bin or more for every code."""
        centres = self.edges[:-1] + self.width / 2
        best, least = (low, high), np.inf
        for bound in max(-low, high) - self.width * np.arange(0, BINS, _BOUND_STEP):
            cut = max(low, -bound), min(high, bound)
            if bound <= 0 or (cut[1] - cut[0] < (STEPS + 1) * self.width and np.isfinite(least)):
                break
            inside = np.flatnonzero((centres > cut[0]) & (centres < cut[1]))
            divergence = _divergence(self.counts, inside, (centres[inside] - cut[0]) / (cut[1] - cut[0]))
            if divergence < least:
                best, least = cut, divergence
        return float(best[0]), float(best[1])


def _divergence(counts: NDArray[np.int64], inside: NDArray[np.int64], places: NDArray[np.float64]) -> float:
    """Return KL(P || Q) of the bins `inside`, neighbours, whose `places` between the bounds are in [0, 1]."""
    kept = counts[inside].astype(np.float64)
    if not kept.sum():
        return np.inf
    clipped = kept.copy()
    clipped[0] += counts[: inside[0]].sum()
    clipped[-1] += counts[inside[-1] + 1 :].sum()
    codes = np.rint(places * STEPS).astype(np.int64)
    shares = np.bincount(codes, kept) / np.maximum(np.bincount(codes, kept > 0), 1)  # of each filled bin of a code
    stepped = np.where(kept > 0, shares[codes], 0) / kept.sum()
    filled = clipped > 0
    mass = clipped[filled] / clipped.sum()
    return float((mass * np.log(mass / np.maximum(stepped[filled], _LEAST_SHARE))).sum())


@dataclass(frozen=True)
class Calibration:
    """What was seen of each tensor.

    Attributes:
        histograms: by tensor.
        examples: rows that ran.
        memory_bytes: the most that is held at once beside the session itself: the histograms, every tensor of a full batch
            (`TOKENS_AT_ONCE` tokens, or the longest row), and a copy of the widest of them without padding. The number of
            examples is not in it.
    """

    histograms: dict[str, Histogram]
    examples: int
    memory_bytes: int

    def ranges(self, method: Method, *, percentile: float = PERCENTILE) -> dict[str, Range]:
        """Return every tensor's range; arguments as for `Histogram.range`."""
        return {name: found.range(method, percentile=percentile) for name, found in self.histograms.items()}


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    *,
    examples: Encoded,
    pad_id: int,
    method: Method,
    count: int,
    percentile: float = PERCENTILE,
) -> dict[str, Range]:
    """Return the ranges of `tensors` by one method; see `collect` and `Histogram.range` for arguments and errors."""
    found = collect(model, tensors, examples=examples, pad_id=pad_id, count=count)
    return found.ranges(method, percentile=percentile)


def collect(
    model: onnx.ModelProto, tensors: Sequence[str], *, examples: Encoded, pad_id: int, count: int
) -> Calibration:
    """Run an fp32 graph on calibration examples and count what its tensors hold.

    Args:
        model: the graph; it is left as it is.
        tensors: names of float tensors in it, each (B, T, ...), (B, 1, ...) or (B, ...); of the first kind only real
            tokens count.
        examples: rows of the train split; the first `count` are used.
        pad_id: token id of padding.
        count: rows, 1 or more.

    Raises:
        DataError: there are fewer examples than `count`.
        ExportError: a tensor is not in the graph, or holds a value that is not finite.
    """
    if not 1 <= count <= len(examples):
        raise DataError(
            f"calibration: {len(examples)} examples, {count} asked for. Give more train rows, or ask for 1 to "
            f"{len(examples)}."
        )
    made = {name for node in model.graph.node for name in node.output}
    if absent := [name for name in tensors if name not in made]:
        raise ExportError(
            f"calibration: the graph has no tensor {', '.join(absent)}. Calibrate the graph to be quantized."
        )
    histograms = {name: Histogram() for name in tensors}

    def visit(name: str, values: NDArray[np.float32], rows: int) -> None:
        histograms[name].add(values)

    held = observe(model, tensors, examples=examples, pad_id=pad_id, count=count, visit=visit)
    return Calibration(histograms, count, held + sum(found.counts.nbytes for found in histograms.values()))


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    *,
    examples: Encoded,
    pad_id: int,
    count: int,
    visit: Callable[[str, NDArray[np.float32], int], None],
) -> int:
    """Run an fp32 graph on calibration examples, hand out what its tensors hold; return the most bytes held at once.

    Args:
        model: as for `collect`.
        tensors: likewise.
        examples: likewise.
        pad_id: likewise.
        count: rows, 1 to as many as there are.
        visit: called with a tensor's name, its values of one batch without those of padding, and the batch's rows; raises a
            ValueError at values that are not finite.

    Raises:
        ExportError: `visit` found values that are not finite.
    """
    examples = examples.select(np.arange(count))
    widths: list[int] = []
    with tempfile.TemporaryDirectory() as folder, progress("calibrate", count) as bar:
        path = Path(folder) / "calibrated.onnx"
        onnx.save_model(_with_outputs(model, tensors), path)  # unchecked: outputs without a shape are ours alone
        session = open_session(path)
        names = [node.name for node in session.get_inputs()]
        for rows in _batches(examples.lengths):
            inputs = examples.batch(rows, pad_id=pad_id)
            found = session.run(list(tensors), {name: inputs[name] for name in names})
            widths = [int(np.prod(value.shape[2:])) if value.ndim > 2 else value.shape[-1] for value in found]
            for name, value in zip(tensors, found, strict=True):
                real = _unpadded(value, inputs["attention_mask"])
                try:
                    visit(name, real, len(rows))
                except ValueError as error:
                    raise ExportError(
                        f"calibration: {name} is not finite on a train row of {inputs['input_ids'].shape[1]} tokens or "
                        "fewer. Train the student again at a lower learning rate."
                    ) from error
            del found  # before the next batch makes its own
            bar.advance(len(rows))
    tokens = max(TOKENS_AT_ONCE, int(examples.lengths.max()))
    return 4 * tokens * (sum(widths) + max(widths, default=0))


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return up to `most` of the numbers 0 to `count` - 1, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    given = {value.name for value in result.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in given:
            result.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return result


def _batches(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield row numbers in batches of like length that are, padded, at most `TOKENS_AT_ONCE` tokens or one row."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, TOKENS_AT_ONCE // int(lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def _unpadded(values: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the values of a batch's tensor without those of padding: of (B, T, ...) the real tokens', else all."""
    return values[mask.astype(bool)] if values.ndim > 2 and values.shape[:2] == mask.shape else values
