"""How much an int8 graph loses on x86 CPUs without VNNI, predicted on any CPU: their logits, and where sums saturate.

The graph is run twice, in the same batches so that dynamic ranges are the same: as those CPUs compute it (`emulation`), and
exactly. What the loss means for the task's metric is scored from the logits by whoever asks. Torch-free.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.emulation import PAIRS, SATURATED, emulate
from bertemd_deploy.quantization.unsigned import unsigned
from bertemd_deploy.runtime import OUTPUT_NAME, SPAN_OUTPUTS, collect_logits, open_session, predict_logits
from bertemd_deploy.tasks import Kind


@dataclass(frozen=True)
class ProductSaturation:
    """One int8 product, over all batches, padding included.

    Attributes:
        name: of its node.
        pairs: sums of two neighbouring products: rows x half the inner dimension x columns.
        saturated: how many of them do not fit into 16 bits.
    """

    name: str
    pairs: int
    saturated: int

    @property
    def share(self) -> float:
        """The part of the pairs that saturate."""
        return self.saturated / self.pairs


@dataclass(frozen=True)
class SaturationReport:
    """What a CPU whose int8 products saturate computes, beside what an exact one does.

    Attributes:
        products: every int8 product, in graph order.
        logits: of the saturating CPU, float32, as `runtime.predict_logits` gives them.
        exact_logits: of an exact one.
        decision_agreement: part of the decisions that are the same; None for regression.
    """

    products: list[ProductSaturation]
    logits: NDArray[np.float32]
    exact_logits: NDArray[np.float32]
    decision_agreement: float | None

    @property
    def saturated(self) -> int:
        """Pairs that saturate, over all products."""
        return sum(product.saturated for product in self.products)

    def record(self) -> dict[str, Any]:
        """Return what a manifest says about it: no logits, their largest difference instead (None: not finite)."""
        largest = float(np.abs(self.logits - self.exact_logits).max())
        return {
            "max_abs_logit_difference": largest if np.isfinite(largest) else None,
            "decision_agreement": self.decision_agreement,
            "saturated_pairs": self.saturated,
            "pairs": sum(product.pairs for product in self.products),
            "products": {product.name: product.share for product in self.products if product.saturated},
        }


def predict_saturation(model: onnx.ModelProto, *, examples: Encoded, pad_id: int, kind: Kind) -> SaturationReport:
    """Run an int8 graph as a CPU with saturating products would, and as an exact one would, on any CPU.

    Args:
        model: int8 graph, dynamic or static, portable or fused; it is left as it is.
        examples: what to run.
        pad_id: token id of padding.
        kind: of the task; says which decisions are compared.

    Raises:
        ExportError: an int8 product of a form that is not known here.
    """
    emulated, names = emulate(model, counted=True)
    pairs = dict.fromkeys(names, 0)
    saturated = dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saturating.onnx"
        save(emulated, path)
        session = open_session(path)

        def run(inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
            feed = {node.name: inputs[node.name] for node in session.get_inputs()}
            wanted = [node.name for node in session.get_outputs()]
            values = dict(zip(wanted, session.run(wanted, feed), strict=True))
            for name in names:
                pairs[name] += int(values[f"{PAIRS}{name}"])
                saturated[name] += int(values[f"{SATURATED}{name}"])
            if OUTPUT_NAME in values:
                return np.asarray(values[OUTPUT_NAME], dtype=np.float32)
            return np.stack([values[name] for name in SPAN_OUTPUTS], axis=-1).astype(np.float32, copy=False)

        logits = collect_logits(run, examples, pad_id=pad_id)
        path = Path(folder) / "exact.onnx"
        save(unsigned(model), path)
        exact = predict_logits(open_session(path), examples, pad_id=pad_id) if any(saturated.values()) else logits
    agreement = None
    if kind != "regression":
        same = same_decisions(kind, expected=exact, found=logits, offsets=examples.offsets)
        agreement = float(same.mean())
    products = [ProductSaturation(name, pairs[name], saturated[name]) for name in names]
    return SaturationReport(products, logits, exact, agreement)
