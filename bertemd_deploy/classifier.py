"""`Classifier`: texts in, labels and probabilities out, with numpy, onnxruntime and tokenizers only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.config import DataSettings
from bertemd_deploy.data import load_data
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ArtifactError, DataError
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.runtime import open_session, predict_logits

if TYPE_CHECKING:
    import onnxruntime

_WINDOW = 1024  # texts held at once: enough to batch by length, small enough for any device


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        label: name of the most probable class; None for regression.
        score: its probability in [0, 1]; for regression the predicted value.
        scores: probability by label name; empty for regression.
    """

    label: str | None
    score: float
    scores: dict[str, float]


class Classifier:
    """A loaded artifact, ready to predict."""

    def __init__(
        self, session: onnxruntime.InferenceSession, encoder: TextEncoder, *, labels: Sequence[str], graph: str
    ) -> None:
        """Take an open session with its tokenizer and label names (empty for regression); see `load`."""
        self._session = session
        self._encoder = encoder
        self.labels = list(labels)
        self.graph = graph

    @classmethod
    def load(cls, artifact: str | Path, graph: str = "auto", threads: int | None = None) -> Classifier:
        """Open an artifact folder.

        Args:
            artifact: the folder `bertemd export` wrote.
            graph: "fp32", "int8", "fused", "fused-int8", or "auto" for the fastest kind present.
            threads: of ONNX Runtime; None takes what this process may use.

        Raises:
            ArtifactError: the folder, its manifest or a file is missing, damaged or changed.
        """
        loaded = Artifact.load(Path(artifact))
        name, path = loaded.graph(graph)
        loaded.file("tokenizer.json")
        encoder = TextEncoder.load(loaded.folder, max_length=loaded.max_length)
        return cls(open_session(path, threads=threads), encoder, labels=loaded.labels, graph=name)

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Return one prediction per text, in order.

        Args:
            texts: first (or only) texts.
            pairs: second texts, for models of text pairs.

        Raises:
            ValueError: `pairs` has another length than `texts`.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} pairs")
        rows = [(text,) for text in texts] if pairs is None else list(zip(texts, pairs, strict=True))
        return list(self.stream(rows))

    def stream(self, rows: Iterable[tuple[str] | tuple[str, str]]) -> Iterator[Prediction]:
        """Yield one prediction per row, in order, holding at most 1,024 rows at a time.

        Args:
            rows: (text,) or (text, pair) tuples, all of one kind.

        Raises:
            ArtifactError: the graph answers with values that are not finite.
        """
        iterator = iter(rows)
        while window := list(itertools.islice(iterator, _WINDOW)):
            firsts = [row[0] for row in window]
            seconds = [row[1] for row in window if len(row) == 2] or None
            yield from self._decide(self.logits(firsts, seconds))

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Return (n, outputs) float32 logits, in order; batches of 32 texts of like length are run together."""
        return predict_logits(self._session, self._encoder.encode(texts, pairs), pad_id=self._encoder.pad_id)

    def _decide(self, logits: NDArray[np.float32]) -> Iterator[Prediction]:
        if not np.isfinite(logits).all():
            raise ArtifactError(
                f"graph {self.graph}: it answered with values that are not finite. Export the student again."
            )
        if logits.shape[-1] != (len(self.labels) or 1):
            raise ArtifactError(
                f"graph {self.graph}: it has {logits.shape[-1]} outputs, the manifest names {len(self.labels)} labels "
                f"({', '.join(self.labels) or 'regression'}). Export the student again."
            )
        if not self.labels:
            yield from (Prediction(None, float(row[0]), {}) for row in logits)
            return
        shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        for row in shifted / shifted.sum(axis=-1, keepdims=True):
            best = int(row.argmax())
            yield Prediction(self.labels[best], float(row[best]), dict(zip(self.labels, row.tolist(), strict=True)))


def evaluate_artifact(artifact: Path, *, settings: DataSettings, graph: str = "auto") -> dict[str, Any]:
    """Return the dev metrics of an artifact on a data set whose labels are named as the artifact's.

    Raises:
        ArtifactError: the artifact is damaged, or its graph answers with values that are not finite.
        DataError: the data is malformed, or is of another kind of task.
    """
    loaded = Artifact.load(artifact)
    data = load_data(
        settings.path,
        task=settings.task or (None if settings.path.startswith("glue/") else str(loaded.manifest["task"]["name"])),
        sentence1=settings.sentence1,
        sentence2=settings.sentence2,
        label=settings.label,
        splits=("dev",),
        label_names=loaded.labels,
    )
    if data.task.kind != loaded.manifest["task"]["kind"]:
        raise DataError(
            f"{settings.path}: the data is for {data.task.kind}, the artifact for {loaded.manifest['task']['kind']}."
        )
    classifier = Classifier.load(artifact, graph=graph)
    dev = data.splits["dev"]
    try:
        metrics = evaluate_metrics(data.task.metrics, logits=classifier.logits(dev.texts, dev.pairs), labels=dev.labels)
    except ValueError as error:
        raise ArtifactError(f"{artifact}: {error}. Export the student again.") from error
    return {"metrics": metrics, "rows": len(dev), "backend": f"onnxruntime {classifier.graph}", "task": data.task.name}
