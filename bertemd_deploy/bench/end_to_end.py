"""From text to decision, as a served request goes: tokenise, pad, run, decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.classifier import Classifier
from bertemd_deploy.encoding import Encoded, decoded
from bertemd_deploy.predictions import Prediction

if TYPE_CHECKING:
    from bertemd_deploy.bench.workload import Inputs


_WHOLE = 2**31  # rows of a batch: a request is never divided


class Answerer:
    """Answers texts with a model; also makes the texts, since an artifact carries tokens only."""

    def __init__(self, artifact: Artifact, *, run: Callable[[Inputs], NDArray[np.float32]]) -> None:
        """Load the tokenizer of `artifact`; `run` maps a batch of inputs to its logits."""
        self._decoder = Tokenizer.from_file(str(artifact.folder / "tokenizer.json"))
        self._classifier = Classifier.of(artifact, run, graph="measured", batch_size=_WHOLE)

    def texts(self, examples: Encoded) -> tuple[list[str], list[str] | None]:
        """Return the rows as texts, special tokens left out; second segments too where a row has one, else None."""
        return decoded(self._decoder, examples)

    def answer(self, texts: list[str], pairs: list[str] | None) -> list[Prediction]:
        """Return one prediction per text, all run as one batch; a text too long for the model adds rows to it."""
        return self._classifier.predict(texts, pairs)
