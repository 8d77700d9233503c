"""What `export_peers.py` measures, made from one Hugging Face folder: our artifact, each peer's models, and the floor.

Runs in `peer_engines.py`'s processes, with the interpreter that has the peer's libraries. At import only the standard library
and numpy are needed, because other tools live in environments of their own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

Inputs = dict[str, NDArray[np.int64]]

PLAIN = "plain.onnx"  # the exported fp32 graph, beside the weights
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FIRST_TOKEN = len(SPECIAL)
EVALUATION_ROWS = 24
CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 64
PERCENTILE = 99.99


@dataclass(frozen=True)
class Peer:
    """One way to run the student elsewhere.

    Attributes:
        precision: of its matrix products: "fp32", "bf16" or "int8".
        how: the setting, as the peer's own documentation names it.
        options: what its builder and its engine are told.
    """

    precision: str
    how: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS: dict[str, dict[str, Peer]] = {
    "optimum": {
        "O3": Peer("fp32", "ORTOptimizer O3", {"optimize": True}),
        "avx512_vnni": Peer("int8", "ORTQuantizer avx512_vnni, dynamic", {"quantize": True}),
        "O3 avx512_vnni": Peer(
            "int8",
            "ORTOptimizer O3, quant_pre_process, ORTQuantizer avx512_vnni, dynamic",
            {"optimize": True, "quantize": True},
        ),
    },
    "onnxruntime": {
        "plain": Peer("fp32", "the exported graph"),
        "optimized": Peer("fp32", "optimize_model", {"optimize": True}),
        "dynamic": Peer("int8", "quant_pre_process, quantize_dynamic", {"quantize": "dynamic"}),
        "optimized dynamic": Peer(
            "int8", "optimize_model, quantize_dynamic", {"optimize": True, "quantize": "dynamic"}
        ),
        "fast optimized dynamic": Peer(
            "int8",
            "optimize_model with enable_gelu_approximation, quantize_dynamic",
            {"optimize": True, "fast_gelu": True, "quantize": "dynamic"},
        ),
        "static minmax": Peer(
            "int8", "quant_pre_process, quantize_static: QDQ, U8S8, MinMax", {"quantize": "static", "method": "MinMax"}
        ),
        "static percentile": Peer(
            "int8",
            f"quant_pre_process, quantize_static: QDQ, U8S8, Percentile {PERCENTILE}",
            {"quantize": "static", "method": "Percentile"},
        ),
        "static products": Peer(
            "int8",
            "quant_pre_process, quantize_static of products with weights only: QDQ, U8S8, MinMax",
            {"quantize": "static", "method": "MinMax", "products": True},
        ),
    },
    "openvino": {
        f"{precision} {shapes}": Peer(
            "int8" if precision.startswith("int8") else precision,
            f"{'NNCF quantize (TRANSFORMER), ' * precision.startswith('int8')}INFERENCE_PRECISION_HINT "
            f"{'bf16' if precision.endswith('bf16') else 'f32'}, {shapes} shapes",
            {
                "int8": precision.startswith("int8"),
                "hint": "bf16" if precision.endswith("bf16") else "f32",
                "static": shapes == "static",
            },
        )
        for precision in ("fp32", "bf16", "int8", "int8+bf16")
        for shapes in ("dynamic", "static")
    },
    "pytorch": {
        "eager": Peer("fp32", "eager, sdpa attention", {"dtype": "float32"}),
        "eager bf16": Peer("bf16", "eager, weights in bfloat16", {"dtype": "bfloat16"}),
        "compile": Peer("fp32", "torch.compile for each shape, freezing", {"dtype": "float32", "compile": True}),
        "compile bf16": Peer(
            "bf16",
            "torch.compile for each shape, freezing, weights in bfloat16",
            {"dtype": "bfloat16", "compile": True},
        ),
    },
}
PACKAGES = {
    "ours": ("onnxruntime", "numpy"),
    "optimum": ("optimum-onnx", "onnxruntime", "onnx", "torch", "transformers"),
    "onnxruntime": ("onnxruntime", "onnx", "torch"),
    "openvino": ("openvino", "nncf"),
    "pytorch": ("torch", "transformers"),
}


def cell_inputs(*, batch: int, sequence: int, vocabulary: int) -> Inputs:
    """Return random ordinary token ids without padding, the same in every engine; three (batch, sequence) int64 arrays."""
    ids = np.random.default_rng([0, batch, sequence]).integers(FIRST_TOKEN, vocabulary, size=(batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def calibration_inputs(config: Mapping[str, Any]) -> list[Inputs]:
    """Return random rows of mixed lengths, padded to one width, one row each: three (1, width) int64 arrays."""
    random = np.random.default_rng(1)
    width = min(CALIBRATION_TOKENS, config["max_position_embeddings"])
    rows = []
    for _ in range(CALIBRATION_ROWS):
        ids = random.integers(FIRST_TOKEN, config["vocab_size"], size=(1, width))
        mask = (np.arange(width) < random.integers(width // 4, width + 1)).astype(np.int64)[None]
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return rows


def config_of(source: Path) -> dict[str, Any]:
    """Return a Hugging Face folder's config."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return config


def versions(family: str) -> dict[str, str | None]:
    """Return the versions of Python and of a family's packages in this interpreter; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES[family]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


# Building: each function returns the path that `OPENERS` opens. What is there already is used again.


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return `path`, made by `make` (given a temporary place) unless it is there already; whole or not at all."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        make(partial)
        partial.replace(path)
    return path


def build_optimum(options: Mapping[str, Any], source: Path, folder: Path) -> Path:
    """Export with Optimum; optimise, quantize as asked for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig

    def export(out: Path) -> None:
        ORTModelForSequenceClassification.from_pretrained(source, export=True).save_pretrained(out)

    def optimize(out: Path) -> None:
        optimizer = ORTOptimizer.from_pretrained(ORTModelForSequenceClassification.from_pretrained(folder / "plain"))
        optimizer.optimize(save_dir=out, optimization_config=AutoOptimizationConfig.O3(), file_suffix="")

    def add_types(out: Path) -> None:  # of fused operators' outputs, without which the quantizer stops
        out.mkdir()
        shutil.copyfile(folder / "O3" / "config.json", out / "config.json")
        quant_pre_process(folder / "O3" / "model.onnx", out / "model.onnx", skip_optimization=True, auto_merge=True)

    def quantize(out: Path) -> None:
        setting = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        quantizer = ORTQuantizer.from_pretrained(base, file_name="model.onnx")
        quantizer.quantize(save_dir=out, quantization_config=setting, file_suffix="")

    base = once(folder / "plain", export)
    if options.get("optimize"):
        base = once(folder / "O3", optimize)
    if options.get("optimize") and options.get("quantize"):
        base = once(folder / "O3-typed", add_types)
    if options.get("quantize"):
        base = once(folder / f"{base.name}-avx512_vnni", quantize)
    return base / "model.onnx"


def build_onnxruntime(options: Mapping[str, Any], source: Path, folder: Path) -> Path:
    """Optimise, pre-process, quantize the plain export as asked for."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    from bertemd_deploy.fuse import check_counts, fused_counts, optimize
    from bertemd_deploy.onnx_edit import save

    config = config_of(source)

    def fuse(out: Path) -> None:
        fused = optimize(
            onnx.load_model(source / PLAIN), heads=config["num_attention_heads"], hidden=config["hidden_size"]
        )
        check_counts(fused_counts(fused), layers=config["num_hidden_layers"])
        if options.get("fast_gelu"):
            BertOnnxModel(fused, config["num_attention_heads"], config["hidden_size"]).gelu_approximation()
        save(fused, out)

    def pre_process(out: Path) -> None:
        quant_pre_process(source / PLAIN, out, auto_merge=True)

    def quantize(out: Path) -> None:
        if options["quantize"] == "dynamic":
            float_type = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of fused operators' outputs
            quantize_dynamic(base, out, weight_type=QuantType.QInt8, extra_options=float_type)
            return
        only_products: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"]} if options.get("products") else {}
        quantize_static(
            base,
            out,
            _Reader(calibration_inputs(config)),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[options["method"]],
            extra_options={"CalibPercentile": PERCENTILE, "MatMulConstBOnly": bool(only_products)},
            **only_products,
        )

    base = source / PLAIN
    if options.get("optimize"):
        base = once(folder / ("fast-optimized.onnx" if options.get("fast_gelu") else "optimized.onnx"), fuse)
    elif options.get("quantize"):
        base = once(folder / "pre_processed.onnx", pre_process)
    if options.get("quantize"):
        setting = (options["quantize"], options.get("method"), "products" if options.get("products") else None)
        base = once(folder / f"{'-'.join(filter(None, (base.stem, *setting)))}.onnx", quantize)
    return base


class _Reader:
    """Calibration inputs in the form ONNX Runtime asks for them."""

    def __init__(self, rows: Iterable[Inputs]) -> None:
        """Hand out `rows` in order."""
        self._rows = iter(rows)

    def get_next(self) -> Inputs | None:
        """Return the next inputs, or None after the last."""
        return next(self._rows, None)


def build_openvino(options: Mapping[str, Any], source: Path, folder: Path) -> Path:
    """Convert the plain export; quantize with NNCF as asked for."""
    import openvino

    def write(model: Any, out: Path) -> None:
        out.mkdir()
        openvino.save_model(model, out / "model.xml", compress_to_fp16=False)

    def quantize(out: Path) -> None:
        import nncf

        rows = calibration_inputs(config_of(source))
        model = openvino.Core().read_model(base / "model.xml")
        kind = nncf.ModelType.TRANSFORMER
        write(nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows)), out)

    base = once(folder / "converted", lambda out: write(openvino.convert_model(source / PLAIN), out))
    if options["int8"]:
        base = once(folder / "int8", quantize)
    return base / "model.xml"


def build_pytorch(options: Mapping[str, Any], source: Path, folder: Path) -> Path:
    """Return the Hugging Face folder itself, once what compiles it is there."""
    compiler = os.environ.get("CXX", "g++")
    if options.get("compile") and shutil.which(compiler) is None:
        raise RuntimeError(f"torch.compile needs a C++ compiler, and {compiler} is not installed")
    return source


BUILDERS: dict[str, Callable[[Mapping[str, Any], Path, Path], Path]] = {
    "optimum": build_optimum,
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
    "pytorch": build_pytorch,
}


# The student, our artifact and the floor.


def write_student(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write a random BERT classifier as a Hugging Face folder, with a tokenizer and the plain export of its graph.

    The plain graph is the one that ONNX Runtime's optimizer fuses completely: its best case.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertForSequenceClassification

    from bertemd_deploy.bert_graph import fusable_graph
    from bertemd_deploy.onnx_edit import save

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, attn_implementation="sdpa")).eval()
    model.save_pretrained(folder)
    words = (*SPECIAL, *(f"word{number}" for number in range(FIRST_TOKEN, model.config.vocab_size)))
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    save(fusable_graph(model, exporter="torchscript", opset=17), folder / PLAIN)


def export_ours(source: Path, out: Path) -> None:
    """Write our artifact as `bertemd export` does, on random rows; the accuracy of random weights gates nothing."""
    from bertemd_deploy.artifact import DataSlice
    from bertemd_deploy.bert_graph import load_model
    from bertemd_deploy.encoding import Encoded
    from bertemd_deploy.evaluate import torch_logits
    from bertemd_deploy.export import export
    from bertemd_deploy.settings import ExportSettings, QuantizeSettings

    config, model = config_of(source), load_model(source)

    def rows(seed: int) -> DataSlice:
        random = np.random.default_rng(seed)
        lengths = random.integers(3, config["max_position_embeddings"] // 2, size=EVALUATION_ROWS)
        tokens = random.integers(FIRST_TOKEN, config["vocab_size"], size=lengths.sum()).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        examples = Encoded(tokens, np.zeros(len(tokens), dtype=np.int8), offsets)
        return DataSlice(examples, torch_logits(model, examples, pad_id=0).argmax(axis=-1).astype(np.int64))

    export(
        source,
        out=out,
        task={"name": "random rows", "kind": "classification", "metrics": ["accuracy"]},
        labels=["LABEL_0", "LABEL_1"],
        max_length=config["max_position_embeddings"],
        evaluation=rows(2),
        calibration=rows(3),
        teacher=None,
        reference_metrics={},
        distillation=None,
        settings=ExportSettings(),
        quantization=QuantizeSettings(max_drop=100),
    )


Dimension = int | str


@dataclass(frozen=True)
class Product:
    """One matrix product: the dimensions of both sides, names of `floor_sizes` where they depend on the cell."""

    left: tuple[Dimension, ...]
    right: tuple[Dimension, ...]

    @property
    def result(self) -> tuple[Dimension, ...]:
        """The dimensions of the product."""
        return (*self.left[:-1], self.right[-1])


def floor_products(config: Mapping[str, Any]) -> list[Product]:
    """Return the matrix products of a BERT classifier that has to answer from its first token, in order.

    Every layer: query, key and value in one product, scores, context, attention output, both of the feed-forward. The last
    layer: key and value of all tokens, the rest of the first token only. The pooler. The head (2 columns) is left out.
    """
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = hidden // heads
    found = []
    for layer in range(config["num_hidden_layers"]):
        last = layer == config["num_hidden_layers"] - 1
        rows, queries = ("batch", 1) if last else ("tokens", "sequence")
        if last:
            found += [Product(("tokens", hidden), (hidden, 2 * hidden)), Product((rows, hidden), (hidden, hidden))]
        else:
            found.append(Product((rows, hidden), (hidden, 3 * hidden)))
        found += [
            Product(("maps", queries, size), ("maps", size, "sequence")),
            Product(("maps", queries, "sequence"), ("maps", "sequence", size)),
            Product((rows, hidden), (hidden, hidden)),
            Product((rows, hidden), (hidden, inner)),
            Product((rows, inner), (inner, hidden)),
        ]
    return [*found, Product(("batch", hidden), (hidden, hidden))]


def floor_sizes(*, batch: int, sequence: int, heads: int) -> dict[Dimension, int]:
    """Return a cell's sizes by the names that `Product` uses: an attention map for every row and head."""
    return {"batch": batch, "sequence": sequence, "tokens": batch * sequence, "maps": batch * heads}


def floor_graph(config: Mapping[str, Any]) -> Any:
    """Return the floor as an ONNX model: each product a MatMulInteger of uint8 and int8, giving int32, and nothing else.

    Weights are constants, one for each product, so that they are packed beforehand and take the model's place in the
    caches; activations are inputs, shared by products of the same dimensions. No zero points, no scales.
    """
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    nodes, weights, outputs = [], [], []

    def given(side: str, dimensions: tuple[Dimension, ...], kind: int) -> str:
        name = "_".join(map(str, (side, *dimensions)))
        inputs[name] = helper.make_tensor_value_info(name, kind, list(dimensions))
        return name

    for number, product in enumerate(floor_products(config)):
        left = given("left", product.left, TensorProto.UINT8)
        if isinstance(product.right[0], int):
            right = f"weight_{number}"
            codes = random.integers(-127, 128, size=product.right, dtype=np.int8)
            weights.append(numpy_helper.from_array(codes, right))
        else:
            right = given("right", product.right, TensorProto.INT8)
        nodes.append(helper.make_node("MatMulInteger", [left, right], [f"product_{number}"], name=f"product_{number}"))
        outputs.append(helper.make_tensor_value_info(f"product_{number}", TensorProto.INT32, list(product.result)))
    graph = helper.make_graph(nodes, "floor", list(inputs.values()), outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
