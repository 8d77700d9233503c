"""A BERT task model from torch to a portable fp32 ONNX graph: standard operators, any batch, any length.

A decision on the whole input (classification, multilabel, regression) reads one row of the last layer, that of [CLS]. The
portable form computes just that row's query, attention and feed-forward there, which is exact and saves most of a layer;
it also multiplies queries, keys and values in one product. Heads that read every token need the whole last layer. The
fusable form spells every layer out in full, the way ONNX Runtime's fusion patterns expect it.

    Inputs   input_ids, attention_mask, token_type_ids: int64 (batch, sequence)
    Outputs  logits: float32 (batch, outputs), or (batch, sequence, labels) for token classification;
             start_logits, end_logits: float32 (batch, sequence) for question answering

Every exported graph is run at several shapes against the torch model before it is handed out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertemd_deploy.errors import ExportError
from bertemd_deploy.files import new_file
from bertemd_deploy.gate import PARITY_TOLERANCE
from bertemd_deploy.models import load_classifier, output_logits
from bertemd_deploy.onnx_edit import Editor, save, tidy
from bertemd_deploy.runtime import INPUT_NAMES, OUTPUT_NAME, SPAN_OUTPUTS, open_session, run_session
from bertemd_deploy.tasks import Kind

Exporter = Literal["torchscript", "dynamo"]
Head = Literal["sequence", "token", "span"]
_EXAMPLE = (2, 13)  # a size of 1 or a round one would let an exporter fix the dimension


class BertGraph(nn.Module):
    """The inference of a BERT with a task's head, in plain tensor operations that export the same everywhere."""

    def __init__(self, model: nn.Module, *, portable: bool) -> None:
        """Share the weights of `model`; `portable` chooses the portable form over the fusable one."""
        super().__init__()
        self.kind = head_kind(model)
        source: Any = model
        config = source.config
        encoder = source.bert
        self.embeddings = encoder.embeddings
        last = len(encoder.encoder.layer) - 1
        self.layers = nn.ModuleList(
            _Layer(
                layer,
                heads=config.num_attention_heads,
                merge=portable,
                first_row=portable and at == last and self.kind == "sequence",
            )
            for at, layer in enumerate(encoder.encoder.layer)
        )
        self.pooler = encoder.pooler.dense if self.kind == "sequence" else None
        self.classifier = source.qa_outputs if self.kind == "span" else source.classifier
        self.register_buffer("positions", torch.arange(config.max_position_embeddings)[None], persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, outputs) or (B, T, labels), or start and end logits (B, T), for three (B, T) int64 inputs."""
        tables: Any = self.embeddings
        positions: Any = self.positions
        hidden = tables.word_embeddings(input_ids) + tables.token_type_embeddings(token_type_ids)
        hidden = tables.LayerNorm(hidden + tables.position_embeddings(positions[:, : input_ids.size(1)]))
        visible = attention_mask.unsqueeze(1).unsqueeze(2).to(hidden.dtype)
        bias = (1.0 - visible) * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, bias)
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden[:, 0]))
        logits: Tensor = self.classifier(hidden)
        if self.kind != "span":
            return logits
        return logits[..., 0], logits[..., 1]


def head_kind(model: nn.Module) -> Head:
    """Return what a BERT's head reads and gives: one row per input, every token, or where a span starts and ends."""
    if hasattr(model, "qa_outputs"):
        return "span"
    encoder: Any = model
    return "sequence" if encoder.bert.pooler is not None else "token"


def output_dimensions(head: Head) -> dict[str, list[str]]:
    """Return a graph's outputs with their dynamic dimensions, the leading ones."""
    if head == "span":
        return {name: ["batch", "sequence"] for name in SPAN_OUTPUTS}
    return {OUTPUT_NAME: ["batch"] if head == "sequence" else ["batch", "sequence"]}


class _Layer(nn.Module):
    """One encoder layer; `first_row` computes the output of the first token only."""

    def __init__(self, layer: Any, *, heads: int, merge: bool, first_row: bool) -> None:
        super().__init__()
        attention = layer.attention.self
        query, key, value = attention.query, attention.key, attention.value
        self.heads, self.size, self.first_row = heads, query.out_features // heads, first_row
        self.merged: nn.Linear | None = None
        self.query: nn.Linear | None = query
        self.key: nn.Linear | None = None
        self.value: nn.Linear | None = None
        if merge:
            self.merged = _stack([key, value] if first_row else [query, key, value])
            self.query = query if first_row else None
        else:
            self.key, self.value = key, value
        self.attention_output = layer.attention.output.dense
        self.attention_norm = layer.attention.output.LayerNorm
        self.intermediate = layer.intermediate.dense
        self.activation = layer.intermediate.intermediate_act_fn
        self.output = layer.output.dense
        self.output_norm = layer.output.LayerNorm

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(states.size(0), states.size(1), self.heads, self.size).transpose(1, 2)

    def _project(self, hidden: Tensor, rows: Tensor) -> list[Tensor]:
        """Return query, key and value (B, T, H); the query for `rows` only."""
        width = self.heads * self.size
        if self.merged is None:
            assert self.query is not None
            assert self.key is not None
            assert self.value is not None
            return [self.query(rows), self.key(hidden), self.value(hidden)]
        parts = list(self.merged(hidden).split([width] * (self.merged.out_features // width), dim=-1))
        return [self.query(rows), *parts] if self.query is not None else parts

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Return the layer's output (B, T or 1, H) from its input (B, T, H) and the mask's bias (B, 1, 1, T)."""
        rows = hidden[:, :1] if self.first_row else hidden
        query, key, value = (self._heads(part) for part in self._project(hidden, rows))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.size) + bias
        context = torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2)
        context = context.reshape(context.size(0), context.size(1), self.heads * self.size)
        hidden = self.attention_norm(self.attention_output(context) + rows)
        inner = self.activation(self.intermediate(hidden))
        return self.output_norm(self.output(inner) + hidden)  # type: ignore[no-any-return]  # as above


def _stack(parts: list[nn.Linear]) -> nn.Linear:
    with torch.no_grad():
        stacked = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
        stacked.weight.copy_(torch.cat([part.weight for part in parts]))
        stacked.bias.copy_(torch.cat([part.bias for part in parts]))
    return stacked


def load_model(folder: Path, *, kind: Kind = "classification") -> nn.Module:
    """Load a model of a kind of task whatever its labels, and check that this module can write its graph.

    Raises:
        ModelError: the folder is missing, incomplete or of another family.
        ExportError: a setting of the model that `BertGraph` does not compute.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        stored = {}  # load_classifier says what is wrong with it
    names = stored.get("id2label") or ({0: ""} if stored.get("num_labels") == 1 else {0: "", 1: ""})
    # A regression model's one output has a placeholder for a name; any other single output is a label.
    unnamed = kind == "question-answering" or (kind in ("classification", "regression") and len(names) == 1)
    if stored.get("model_type", "bert") != "bert":
        raise ExportError(f"{path}: model_type is {stored['model_type']!r}; export writes BERT's graph only.")
    return load_classifier(folder, labels=[] if unnamed else [str(name) for name in names.values()], kind=kind)


def export_fp32(
    model_folder: Path, path: Path, *, exporter: Exporter, opset: int, kind: Kind = "classification"
) -> None:
    """Write the portable fp32 graph of a Hugging Face BERT with a task's head (a student or a teacher).

    Args:
        model_folder: config.json and model.safetensors.
        path: the ONNX file to write, whole or not at all.
        exporter: which of torch's two exporters.
        opset: ONNX operator set.
        kind: of the task.

    Raises:
        ModelError: the folder does not hold such a model.
        ExportError: the exporter failed, fixed a dimension, or wrote a graph that differs from torch.
    """
    model = load_model(model_folder, kind=kind)
    with new_file(path) as partial:
        save(portable_graph(model, exporter=exporter, opset=opset), partial)
        check_shapes(partial, model=model, name=path.name)


def portable_graph(model: nn.Module, *, exporter: Exporter, opset: int) -> onnx.ModelProto:
    """Return the portable fp32 graph of `model`.

    Raises:
        ExportError: the exporter failed, fixed a dimension, or used an operator outside the standard set.
    """
    graph = _export(BertGraph(model, portable=True), exporter=exporter, opset=opset)
    foreign = sorted({node.domain for node in graph.graph.node if node.domain})
    if foreign:
        raise ExportError(f"the {exporter} exporter used operators of {', '.join(foreign)}. Use the other exporter.")
    unfuse_residuals(graph)
    return graph


def fusable_graph(model: nn.Module, *, exporter: Exporter, opset: int) -> onnx.ModelProto:
    """Return the graph of `model` in the spelling that ONNX Runtime's fusion patterns match.

    Raises:
        ExportError: the exporter failed or fixed a dimension.
    """
    graph = _export(BertGraph(model, portable=False), exporter=exporter, opset=opset)
    _classic_spelling(graph)
    return graph


def unfuse_residuals(model: onnx.ModelProto) -> None:
    """Write the additions in front of LayerNormalization as Sum, which is the same.

    At load ONNX Runtime turns Add + LayerNormalization into SkipLayerNormalization, whose CPU kernel takes five times
    as long as the two (measured, 128 x 312: 155 against 30 microseconds).
    """
    editor = Editor(model)

    def replace(node: onnx.NodeProto) -> bool:
        following = editor.consumers.get(node.output[0], [])
        if node.op_type != "Add" or not any(after.op_type == "LayerNormalization" for after in following):
            return False
        if any(editor.array(name) is not None for name in node.input):
            return False
        editor.emit("Sum", list(node.input), name=f"{node.name}/sum", outputs=list(node.output))
        return True

    editor.rewrite(replace)


def _classic_spelling(model: onnx.ModelProto) -> None:
    """Spell two operations as the TorchScript exporter does, which is all the dynamo exporter's graph lacks.

    A double Unsqueeze (the mask) becomes two, and a one-element slice of a Shape becomes Gather and Unsqueeze on the
    shape of `input_ids` (all inputs are (batch, sequence)).
    """
    editor = Editor(model)
    inputs = {value.name for value in model.graph.input}

    def replace(node: onnx.NodeProto) -> bool:
        if node.op_type == "Unsqueeze":
            axes = editor.array(node.input[1])
            if axes is None or axes.size != 2:
                return False
            low, high = (editor.constant(np.array([axis]), "axis") for axis in sorted(axes.tolist()))
            (inner,) = editor.emit("Unsqueeze", [node.input[0], low], name=f"{node.name}/first")
            editor.emit("Unsqueeze", [inner, high], name=f"{node.name}/second", outputs=list(node.output))
            return True
        if node.op_type == "Shape" and node.input[0] in inputs:
            bounds = {entry.name: entry.i for entry in node.attribute}
            start = bounds.get("start", 0)
            if bounds.get("end") != start + 1:
                return False
            (shape,) = editor.emit("Shape", [INPUT_NAMES[0]], name=f"{node.name}/all")
            index, axis = editor.constant(np.int64(start), "index"), editor.constant(np.array([0]), "axis")
            (size,) = editor.emit("Gather", [shape, index], name=f"{node.name}/one", axis=0)
            editor.emit("Unsqueeze", [size, axis], name=f"{node.name}/list", outputs=list(node.output))
            return True
        return False

    editor.rewrite(replace)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporters' notices; what matters of them is checked on the graph they wrote."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(module: BertGraph, *, exporter: Exporter, opset: int) -> onnx.ModelProto:
    """Run one of torch's exporters on `module`; return its graph, tidied, with both input dimensions dynamic."""
    module = module.eval()
    longest = module.get_buffer("positions").size(1)
    example = torch.zeros((_EXAMPLE[0], min(_EXAMPLE[1], longest)), dtype=torch.int64)
    mask, types = torch.ones_like(example), torch.zeros_like(example)
    names, outputs = list(INPUT_NAMES), output_dimensions(module.kind)
    dynamic: dict[str, Any]
    if exporter == "dynamo":
        batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=longest)
        dynamic = {"dynamic_shapes": {name: {0: batch, 1: sequence} for name in names}, "external_data": False}
    else:
        axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "sequence"} for name in names}
        axes |= {name: dict(enumerate(dimensions)) for name, dimensions in outputs.items()}
        dynamic = {"dynamic_axes": axes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported.onnx"
        try:
            with _quiet_exporter(), torch.no_grad():
                torch.onnx.export(
                    module,
                    (example, mask, types),
                    str(path),
                    dynamo=exporter == "dynamo",
                    opset_version=opset,
                    input_names=names,
                    output_names=list(outputs),
                    verbose=False,
                    **dynamic,
                )
        except Exception as error:  # both exporters raise many kinds
            raise ExportError(
                f"the {exporter} exporter of torch {torch.__version__} failed "
                f"({str(error).strip().splitlines()[0][:200]}). Set export.exporter to the other one."
            ) from error
        graph = onnx.load_model(path)
    tidy(graph, opset=opset)
    _check_dimensions(graph, head=module.kind, exporter=exporter)
    return graph


def _check_dimensions(model: onnx.ModelProto, *, head: Head, exporter: str) -> None:
    def dimensions(values: Iterable[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
        shapes = ((value.name, value.type.tensor_type.shape.dim) for value in values)
        return {name: [dim.dim_param or dim.dim_value for dim in shape] for name, shape in shapes}

    found, given = dimensions(model.graph.input), dimensions(model.graph.output)
    wanted: dict[str, list[str | int]] = {name: ["batch", "sequence"] for name in INPUT_NAMES}
    outputs = output_dimensions(head)
    leading = {name: shape[: len(outputs.get(name, []))] for name, shape in given.items()}
    if found != wanted or leading != outputs:
        raise ExportError(
            f"the {exporter} exporter wrote inputs {found} and outputs {given}; "
            f"allowed are dynamic dimensions only, {wanted} and {outputs}. Set export.exporter to the other one."
        )


def torch_logits(model: nn.Module, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """Return the torch model's float32 logits of one padded batch: (B, outputs), (B, T, labels) or (B, T, 2)."""
    with torch.inference_mode():
        output = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return np.asarray(output_logits(output).numpy(), dtype=np.float32)


def check_shapes(path: Path, *, model: nn.Module, name: str) -> list[list[int]]:
    """Run a graph at unlike shapes, padding among them, beside the torch model; return the shapes.

    Args:
        path: the graph.
        model: the torch model that it was exported from.
        name: what to call the graph in messages.

    Raises:
        ExportError: a shape does not run, or gives logits more than `PARITY_TOLERANCE` from torch's.
    """
    config: Any = model.config
    longest = int(config.max_position_embeddings)
    shapes = [[1, 1], [1, min(7, longest)], [3, min(64, longest)], [2, longest]]
    session = open_session(path)
    random = np.random.default_rng(0)
    for batch, sequence in shapes:
        lengths = random.integers(1, sequence + 1, size=(batch, 1))
        lengths[0] = sequence
        ids = random.integers(0, config.vocab_size, size=(batch, sequence))
        types = random.integers(0, config.type_vocab_size, size=(batch, sequence))
        mask = (np.arange(sequence) < lengths).astype(np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        expected = torch_logits(model, inputs)
        try:
            found = run_session(session, inputs)
        except Exception as error:  # ONNX Runtime raises plain C++ exceptions of many types
            raise ExportError(
                f"{name}: does not run at batch {batch}, sequence {sequence} "
                f"({str(error).strip().splitlines()[0][:200]}). Set export.exporter to the other one."
            ) from error
        difference = math.inf
        if found.shape == expected.shape:
            real = np.abs(found - expected) if found.ndim == 2 else np.abs(found - expected)[mask.astype(bool)]
            difference = float(real.max())
        if not difference <= PARITY_TOLERANCE:
            raise ExportError(
                f"{name}: at batch {batch}, sequence {sequence} its logits {list(found.shape)} differ from torch's "
                f"{list(expected.shape)} by {difference:.1e} (allowed {PARITY_TOLERANCE:.1e}). "
                "Set export.exporter to the other one."
            )
    return shapes
