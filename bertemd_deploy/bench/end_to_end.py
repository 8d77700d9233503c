"""From text to decision, as a served request goes: tokenise, pad, run, softmax, label."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.encoding import Encoded, TextEncoder
from bertemd_deploy.metrics import decisions

if TYPE_CHECKING:
    from bertemd_deploy.bench.workload import Inputs


class Answerer:
    """Answers texts with a model; also makes the texts, since an artifact carries tokens only."""

    def __init__(self, artifact: Artifact, *, run: Callable[[Inputs], NDArray[np.float32]]) -> None:
        """Load the tokenizer of `artifact`; `run` maps a batch of inputs to its (batch, outputs) logits."""
        self._encoder = TextEncoder.load(artifact.folder, max_length=artifact.max_length)
        self._decoder = Tokenizer.from_file(str(artifact.folder / "tokenizer.json"))
        self._labels = artifact.labels
        self._run = run

    def texts(self, examples: Encoded) -> tuple[list[str], list[str] | None]:
        """Return the rows as texts, special tokens left out; second segments too where a row has one, else None."""
        segments: tuple[list[str], list[str]] = ([], [])
        for row in range(len(examples)):
            piece = slice(examples.offsets[row], examples.offsets[row + 1])
            tokens, types = examples.tokens[piece], examples.types[piece]
            for kind, texts in enumerate(segments):
                texts.append(self._decoder.decode(tokens[types == kind].tolist(), skip_special_tokens=True))
        first, second = segments
        return first, second if examples.types.any() else None

    def answer(self, texts: list[str], pairs: list[str] | None) -> list[tuple[str | None, float]]:
        """Return one (label, probability) per text, or (None, value) for regression."""
        examples = self._encoder.encode(texts, pairs)
        logits = self._run(examples.batch(range(len(examples)), pad_id=self._encoder.pad_id))
        if not self._labels:
            return [(None, float(value)) for value in logits[:, 0]]
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return [(self._labels[at], float(scores[row, at])) for row, at in enumerate(decisions(logits))]
