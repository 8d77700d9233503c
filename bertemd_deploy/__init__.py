"""bertemd: from a fine-tuned BERT to a small, quantized, measured ONNX student.

The names here belong to the runtime half and import neither torch nor transformers; they are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertemd_deploy.classifier import Answer, Classifier, Entity, Prediction

__version__ = "0.1.0"
__all__ = ["Answer", "Classifier", "Entity", "Prediction", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Classifier` and what it predicts when first asked for, so that the command line starts quickly."""
    if name in {"Answer", "Classifier", "Entity", "Prediction"}:
        from bertemd_deploy import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
