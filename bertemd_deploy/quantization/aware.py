"""Quantization-aware training: a student that computes as its static int8 graph will, with gradients as if it did not.

    inputs of a linear map   q = clip(round(x / s_x) + z_x, 0, 255), one range for all, which follows the batches' extremes
    its weights              W_q = round(W / s_w), s_w = max|W| / 127 of every output, or of all that one product holds
    output                   s_x s_w (q - z_x) W_q^T + b
    rows of embedding tables int8 with a scale each, as `tables` stores them

Gradients pass straight through the rounding, and not at all where a value was clipped. Codes, not what they stand for, are
multiplied: whole numbers up to 255 are exact in bfloat16. From `first_step` on the extremes of real tokens are watched; the
first batch's set the ranges, and from the step after it everything is quantized, in training and evaluation alike. The
ranges are one buffer of the student, so they are in every checkpoint and with the best epoch's weights. `release` gives the
plain student back; `graph_ranges` finds the tensors of an exported graph that the ranges belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bertemd_deploy.errors import ArtifactError, ExportError, ModelError, TrainingError
from bertemd_deploy.facts import RANGES
from bertemd_deploy.files import read_json, write_json
from bertemd_deploy.models import output_layer
from bertemd_deploy.onnx_edit import Editor
from bertemd_deploy.processes import Processes
from bertemd_deploy.quantization.calibration import STEPS, Range
from bertemd_deploy.quantization.dynamic import SMALLEST_TABLE, weight_of

SCHEMA_VERSION = 1
BUFFER = "quantization_ranges"  # of the student while it trains: (inputs, 2) float32, low and high
KEPT = 0.99  # of a range at each step; the rest comes from the batch
_CODE = 127.0  # largest of a weight


@dataclass(frozen=True)
class TrainedRanges:
    """What a student folder says of the training of its static int8 form.

    Attributes:
        ranges: of the input of every linear map but the head's, by module name.
        per_channel: whether each output had a weight scale of its own.
    """

    ranges: dict[str, Range]
    per_channel: bool

    def write(self, folder: Path) -> None:
        """Write them beside the student in `folder`."""
        ranges = {name: [found.low, found.high] for name, found in self.ranges.items()}
        record = {"schema_version": SCHEMA_VERSION, "per_channel": self.per_channel, "ranges": ranges}
        write_json(folder / RANGES, record)

    @classmethod
    def read(cls, folder: Path) -> TrainedRanges | None:
        """Return what a student folder carries, or None where it was not trained for int8.

        Raises:
            ModelError: the file is damaged, or of another version.
        """
        path = folder / RANGES
        if not path.exists():
            return None
        try:
            record = read_json(path, what="student's ranges")
            if record["schema_version"] != SCHEMA_VERSION or not isinstance(record["per_channel"], bool):
                raise ValueError(f"schema_version {record['schema_version']}, known is {SCHEMA_VERSION}")
            ranges = {name: Range(float(low), float(high)) for name, (low, high) in record["ranges"].items()}
        except (ArtifactError, ExportError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: not ranges of activations ({error}). Distil the student again.") from error
        return cls(ranges, record["per_channel"])


def prepare(student: nn.Module, *, first_step: int = 0, per_channel: bool = True) -> QuantAware:
    """Make a student's linear maps and embedding tables such as compute in int8 once their ranges are known.

    To be called on the device where it trains, and before hooks are put on its modules: they are replaced by others, which
    share their parameters.

    Args:
        student: a BERT with a task's head, which stays float.
        first_step: training step (from 0) that first watches the ranges.
        per_channel: weights with a scale per output, or one for all that the exported graph multiplies in one product.
    """
    return QuantAware(student, first_step=first_step, per_channel=per_channel)


class QuantAware:
    """A student prepared for int8: its ranges, and what makes them follow the batches."""

    def __init__(self, student: nn.Module, *, first_step: int, per_channel: bool) -> None:
        """See `prepare`."""
        self.student, self.first_step, self.per_channel = student, first_step, per_channel
        self.active, self._watching = False, False
        self._mask: Tensor | None = None
        self.scales = self.zeros = torch.empty(0)  # of every input, (inputs,) float32, while `active`
        head = output_layer(student)
        self._plain = {
            name: module
            for name, module in student.named_modules()
            if (type(module) is nn.Linear and module is not head)
            or (type(module) is nn.Embedding and module.num_embeddings >= SMALLEST_TABLE)
        }
        self.names = [name for name, module in self._plain.items() if isinstance(module, nn.Linear)]
        for name, module in self._plain.items():
            if isinstance(module, nn.Linear):
                peers = [module] if per_channel else [self._plain[peer] for peer in _product_of(name, self._plain)]
                _put(student, name, _Linear(module, self, self.names.index(name), [peer.weight for peer in peers]))
            else:
                assert isinstance(module, nn.Embedding)
                _put(student, name, _Embedding(module, self))
        device = next(student.parameters()).device
        student.register_buffer(BUFFER, _unseen(len(self.names), device=device))
        self._batch = _unseen(len(self.names), device=device)
        self._hook = student.register_forward_pre_hook(self._begin_forward, with_kwargs=True)

    @property
    def _ranges(self) -> Tensor:
        return self.student.get_buffer(BUFFER)

    def begin(self, step: int) -> None:
        """Say which step (from 0) comes: from `first_step` on its batch is watched."""
        self._watching = step >= self.first_step
        self._batch = torch.full_like(self._batch, torch.inf)
        self._batch[:, 1] = -torch.inf

    def finish(self, processes: Processes) -> None:
        """Move the ranges on by what all processes saw of the batch; to be called by all of them, at the end of a step."""
        if not self._watching:
            return
        table = self._batch.new_zeros(processes.size, *self._batch.shape)
        table[processes.rank] = self._batch
        every = processes.sum(table)
        batch = torch.stack([every[..., 0].amin(0).clamp(max=0), every[..., 1].amax(0).clamp(min=0)], dim=-1)
        old, seen = self._ranges, every.isfinite().all(-1).any(0)[:, None]
        fresh = ~old.isfinite()
        moved = torch.where(fresh, batch, KEPT * old.nan_to_num(posinf=0, neginf=0) + (1 - KEPT) * batch)
        old.copy_(torch.where(seen, moved, old))
        self._watching = False

    def trained(self) -> TrainedRanges:
        """Return the ranges by module name.

        Raises:
            TrainingError: none were seen yet, or a value was not finite.
        """
        found = {name: (float(low), float(high)) for name, (low, high) in zip(self.names, self._ranges, strict=True)}
        if unknown := [name for name, bounds in found.items() if not np.isfinite(bounds).all()]:
            raise TrainingError(
                f"quantization-aware training: no range was seen for {len(unknown)} of {len(found)} inputs "
                f"({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}). Train a step with it at least."
            )
        return TrainedRanges({name: Range(*bounds) for name, bounds in found.items()}, self.per_channel)

    def release(self) -> None:
        """Put the plain modules back, with the trained parameters, and drop the ranges."""
        self._hook.remove()
        for name, module in self._plain.items():
            _put(self.student, name, module.train(self.student.training))
        delattr(self.student, BUFFER)

    def _begin_forward(self, _student: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        ranges = self._ranges.double()
        self.active = bool(ranges.isfinite().all())
        self._mask = named.get("attention_mask")
        if self.active:  # as Range.parameters, which the graph is written with
            low, high = ranges.unbind(-1)
            scales = ((high - low) / STEPS).float()
            self.scales = scales.where(scales > 0, 1)
            self.zeros = (-low / self.scales.double()).round().clamp(0, STEPS).float()

    def watch(self, at: int, inputs: Tensor) -> None:
        """Take the extremes of an input, (B, T, H) without padding or (B, H), where the step is watched."""
        if not (self._watching and self.student.training):
            return
        low, high = torch.aminmax(inputs.detach(), dim=-1)
        low, high = low.float(), high.float()
        if self._mask is not None and low.shape == self._mask.shape:
            padding = self._mask == 0
            low, high = low.masked_fill(padding, torch.inf), high.masked_fill(padding, -torch.inf)
        self._batch[at, 0] = torch.minimum(self._batch[at, 0], low.min())
        self._batch[at, 1] = torch.maximum(self._batch[at, 1], high.max())


class _Linear(nn.Linear):
    """A linear map that multiplies codes."""

    def __init__(self, source: nn.Linear, aware: QuantAware, at: int, peers: list[Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight, self.bias = source.weight, source.bias
        self.train(source.training)
        self.aware, self.at, self.peers = aware, at, peers

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output, of the dtype that a plain linear map's would have."""
        self.aware.watch(self.at, inputs)
        if not self.aware.active:
            return super().forward(inputs)
        scale, zero = self.aware.scales[self.at], self.aware.zeros[self.at]
        codes = _coded(inputs.float(), scale, -zero, STEPS - zero)
        with torch.no_grad():
            if self.aware.per_channel:
                largest = self.weight.abs().amax(1)
            else:
                largest = torch.stack([peer.abs().max() for peer in self.peers]).max()
            weight_scale = (largest / _CODE).where(largest > 0, 1)
        weights = _coded(self.weight, weight_scale.reshape(-1, 1))  # none is beyond the largest code
        product = functional.linear(codes, weights)
        total = product * (scale * weight_scale)
        return (total if self.bias is None else total + self.bias).to(product.dtype)


class _Embedding(nn.Embedding):
    """An embedding table whose rows are int8, with a scale each."""

    def __init__(self, source: nn.Embedding, aware: QuantAware) -> None:
        nn.Module.__init__(self)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
            setattr(self, name, getattr(source, name))
        self.sparse, self.weight = source.sparse, source.weight
        self.train(source.training)
        self.aware = aware

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of `input` (...) as (..., H)."""
        rows = super().forward(input)
        if not self.aware.active:
            return rows
        with torch.no_grad():
            largest = rows.abs().amax(-1, keepdim=True)
            scale = _as_stored((largest / _CODE).where(largest > 0, 1))
        return _coded(rows, scale) * scale


class _Coded(Function):
    """clip(round(values / scale), low, high), or without the clip; the gradient of values / scale where nothing was clipped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        codes = (values / scale).round_()
        if low is None or high is None:
            ctx.save_for_backward(scale, None)
            return codes
        clipped = codes.clamp(low, high)
        ctx.save_for_backward(scale, codes == clipped)
        return clipped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scale, inside = ctx.saved_tensors
        return (gradient if inside is None else gradient * inside) / scale, None, None, None


def _coded(values: Tensor, scale: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    codes: Tensor = _Coded.apply(values, scale, low, high)  # type: ignore[no-untyped-call]
    return codes


def _as_stored(scale: Tensor) -> Tensor:
    """Return positive scales as a table keeps them: rounded up to float16, where they are normal numbers of that type."""
    half = scale.to(torch.float16)
    above = (half.view(torch.int16) + (half.float() < scale).to(torch.int16)).view(torch.float16).float()
    limits = torch.finfo(torch.float16)
    return above.where((scale >= limits.smallest_normal) & (scale < limits.max), scale)


def _unseen(count: int, *, device: torch.device) -> Tensor:
    return torch.tensor([torch.inf, -torch.inf], device=device).repeat(count, 1)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _product_of(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the linear maps that share a product, and with it a weight scale, with the one called `name`.

    Queries, keys and values are one product; in the last layer below a head that reads the first token only (it has a
    pooler), queries are another, of fewer rows.
    """
    parent, _, last = name.rpartition(".")
    parts: tuple[str, ...] = ("query", "key", "value")
    if last not in parts:
        return [name]
    deepest = max(_numbers(found) for found in modules if found.rpartition(".")[2] in parts)
    if _numbers(name) == deepest and any(".pooler." in f".{found}" for found in modules):
        parts = ("query",) if last == "query" else ("key", "value")
    return [f"{parent}.{part}" for part in parts]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def graph_ranges(model: onnx.ModelProto, *, student: nn.Module, trained: TrainedRanges) -> dict[str, Range]:
    """Return the ranges of an exported graph's tensors, for `static.quantize_static`.

    A product is recognised by its weights, whatever the exporter called it and whichever linear maps it joins.

    Args:
        model: fp32 graph of `student`, portable or fused.
        student: the plain model, whose weights the graph holds.
        trained: ranges by module name.

    Raises:
        ExportError: a product's weights are no linear map's for which there is a range.
    """
    owner: dict[bytes, str] = {}
    shared: set[bytes] = set()
    for name in trained.ranges:
        try:
            weight = student.get_submodule(name).get_parameter("weight")
        except AttributeError as error:
            raise ExportError(f"{RANGES}: the student has no linear map {name}. {_AGAIN}") from error
        for key in _row_keys(weight.detach().cpu().numpy()):
            if owner.setdefault(key, name) != name:
                shared.add(key)
    editor = Editor(model)
    found: dict[str, Range] = {}
    for node in model.graph.node:
        matrix = weight_of(editor, node)
        if matrix is None or node.op_type == "Gather":
            continue
        names = {owner[key] for key in _row_keys(matrix.T) if key in owner and key not in shared}
        if not names:
            raise ExportError(f"{node.name}: its weights are of no linear map in {RANGES}. {_AGAIN}")
        parts = [trained.ranges[name] for name in names]  # queries, keys and values take in the same
        joined = Range(min(part.low for part in parts), max(part.high for part in parts))
        if found.setdefault(node.input[0], joined) != joined:
            raise ExportError(f"{node.name}: its input has two ranges in {RANGES}. {_AGAIN}")
    return found


_AGAIN = "Distil the student again."


def _row_keys(rows: NDArray[np.float32]) -> Iterator[bytes]:
    for row in np.ascontiguousarray(rows):
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()
