"""`Classifier`: texts in, labels, entities or answers out, with numpy, onnxruntime and tokenizers only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.data import load_data
from bertemd_deploy.encoding import Encoded, TextEncoder, check_unicode
from bertemd_deploy.errors import ArtifactError, DataError
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.predictions import (
    Answer,
    Entity,
    Prediction,
    Word,
    answered,
    any_of,
    joined,
    one_of,
    tagged,
    values,
    words_of,
)
from bertemd_deploy.runtime import BATCH_SIZE, check_session, collect_logits, logit_rank, open_session, run_session
from bertemd_deploy.settings import DataSettings
from bertemd_deploy.splits import Split
from bertemd_deploy.tasks import Kind

__all__ = ["Answer", "Classifier", "Entity", "Prediction", "evaluate_artifact"]

_WINDOW = 1024  # texts held at once: enough to batch by length, small enough for any device
_SHARED_WORDS = 4  # neighbouring windows of a text that is too long share a quarter of their words

Run = Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]
Text = str | Sequence[str]


class Classifier:
    """A loaded artifact, ready to predict."""

    def __init__(
        self,
        run: Run,
        encoder: TextEncoder,
        *,
        kind: Kind,
        labels: Sequence[str],
        graph: str,
        overlap: int = 0,
        no_answer: bool = False,
        pairs: bool | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Take a model with its tokenizer; see `load`.

        Args:
            run: logits of one padded batch.
            encoder: the model's tokenizer.
            kind: of the task.
            labels: label names by number; empty for regression and question answering.
            graph: what to call the model in messages.
            overlap: tokens that neighbouring windows of a long context share.
            no_answer: a context may hold no answer.
            pairs: the model was trained on pairs of texts; None takes either.
            batch_size: rows run together.
        """
        self._run = run
        self._overlap = overlap
        self._no_answer = no_answer
        self._pairs = {"question-answering": True, "token-classification": False}.get(kind, pairs)
        self._batch_size = batch_size
        self.encoder = encoder
        self.kind: Kind = kind
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
            ArtifactError: the folder, its manifest or a file is missing, damaged or changed, or the graph is for another
                kind of task than the manifest says.
        """
        loaded = Artifact.load(Path(artifact))
        name, path = loaded.graph(graph)
        session = open_session(path, threads=threads)
        check_session(session, kind=loaded.kind, path=path)
        return cls.of(loaded, partial(run_session, session), graph=name)

    @classmethod
    def of(cls, artifact: Artifact, run: Run, *, graph: str, batch_size: int = BATCH_SIZE) -> Classifier:
        """Return an artifact's classifier with `run` as its model.

        Raises:
            ArtifactError: the tokenizer is missing, damaged or changed.
        """
        artifact.file("tokenizer.json")
        return cls(
            run,
            TextEncoder.load(artifact.folder, max_length=artifact.max_length),
            kind=artifact.kind,
            labels=artifact.labels,
            graph=graph,
            overlap=artifact.doc_stride,
            no_answer=artifact.no_answer,
            pairs=artifact.pairs,
            batch_size=batch_size,
        )

    def predict(self, texts: Sequence[Text], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Return one prediction per text, in order.

        Args:
            texts: first (or only) texts; the questions, for question answering. For token classification a text may be a
                list of its words, which are then taken as they are; else it is split at blanks, with punctuation at either
                end of a word, a possessive 's and each Chinese character as words of their own (`predictions.words_of`).
            pairs: second texts, for models of text pairs; the contexts, for question answering. A context or, for token
                classification, a text that is longer than the model's input is read in overlapping windows; others are
                cut.

        Raises:
            TypeError: a text is something else, or `texts` or `pairs` is one text.
            ValueError: `pairs` has another length than `texts`.
            DataError: pairs are missing for question answering or a model trained on pairs, or given for token
                classification or a model trained on single texts; a text is not valid Unicode; or a question fills the
                whole input.
            ArtifactError: the graph answers with values that are not finite.
        """
        for given, what in ((texts, "texts"), (pairs, "pairs")):
            if isinstance(given, str | bytes):
                raise TypeError(f"{what} should be a list of texts, found a single one. Write [text].")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} pairs")
        rows = [(text,) for text in texts] if pairs is None else list(zip(texts, pairs, strict=True))
        return list(self.stream(rows))

    def stream(self, rows: Iterable[tuple[Text] | tuple[Text, str]]) -> Iterator[Prediction]:
        """Yield one prediction per row, in order, holding at most 1,024 rows at a time.

        Args:
            rows: (text,) or (text, pair) tuples, all of one kind.

        Raises:
            TypeError: a row is something else.
            DataError: as for `predict`; messages number the rows from 1.
            ArtifactError: the graph answers with values that are not finite.
        """
        iterator = iter(rows)
        done = 0
        while window := list(itertools.islice(iterator, _WINDOW)):
            firsts, seconds = self._checked(window, first=done + 1)
            if self.kind == "token-classification":
                yield from self._entities(firsts)
            elif self.kind == "question-answering":
                yield from self._answers(firsts, seconds, first=done + 1)
            else:
                yield from self._decide(self.logits(firsts, seconds or None))
            done += len(window)

    def _checked(self, rows: Sequence[Any], *, first: int) -> tuple[list[Any], list[str]]:
        """Return first and second texts of rows that are what the model takes; `first` is the number of the first row."""
        words = self.kind == "token-classification"
        for number, row in enumerate(rows, first):
            if not isinstance(row, tuple) or len(row) not in (1, 2):
                raise TypeError(f"row {number} should be (text,) or (text, pair), found {type(row).__name__}.")
            split = words and isinstance(row[0], list | tuple)
            for value in (*(row[0] if split else row[:1]), *row[1:]):
                if not isinstance(value, str):
                    listed = isinstance(value, list | tuple) and not words
                    raise TypeError(
                        f"text {number} should be {'text or a list of words' if words else 'text'}, found "
                        f"{type(value).__name__}{' among its words' if split else ''}."
                        f"{' Second texts are an argument of their own: pairs.' if listed else ''}"
                    )
                check_unicode([value], first=number)
            self._check_pair(len(row) == 2)
        return [row[0] for row in rows], [row[1] for row in rows if len(row) == 2]

    def _check_pair(self, paired: bool) -> None:
        if self._pairs is None or paired == self._pairs:
            return
        if self.kind == "question-answering":
            raise DataError(
                "question answering needs a context beside every question: predict(questions, contexts), or "
                "`bertemd predict --pair` with a tab between the two."
            )
        if self.kind == "token-classification":
            raise DataError("token classification takes one text at a time, not pairs. Leave out the second texts.")
        if self._pairs:
            raise DataError(
                "this model was trained on pairs of texts, and needs two: predict(texts, pairs), or `bertemd predict --pair` "
                "with a tab between the two."
            )
        raise DataError(
            "this model was trained on single texts, not on pairs. Leave out the second texts (`bertemd predict` without "
            "--pair)."
        )

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Return the float32 logits of texts, each a row cut to the model's input; otherwise as `run`."""
        return self.run(self.encoder.encode(texts, pairs))

    def run(self, examples: Encoded) -> NDArray[np.float32]:
        """Return the float32 logits of tokenised rows, in order; rows of like length are run together.

        Returns:
            (n, outputs); ragged as the tokens, (sum of lengths, outputs), where each token has its own.

        Raises:
            ArtifactError: the outputs have other dimensions than the kind of task, or there is another number of them than
                the manifest has labels.
        """
        logits = collect_logits(self._ranked, examples, pad_id=self.encoder.pad_id, batch_size=self._batch_size)
        wanted = 2 if self.kind == "question-answering" else len(self.labels) or 1
        if logits.shape[-1] != wanted:
            raise ArtifactError(
                f"graph {self.graph}: it has {logits.shape[-1]} outputs, the manifest names {len(self.labels)} labels "
                f"({', '.join(self.labels) or self.kind}). Export the student again."
            )
        return logits

    def record(self, prediction: Prediction) -> dict[str, Any]:
        """Return a prediction as plain values, without what other kinds of task say."""
        shown = {
            "multilabel": ("label", "labels", "score", "scores"),
            "token-classification": ("entities", "score"),
            "question-answering": ("answer", "score"),
        }.get(self.kind, ("label", "score", "scores"))
        stored = asdict(prediction)
        return {name: stored[name] for name in shown}

    def _ranked(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        logits = self._run(inputs)
        if logits.ndim != logit_rank(self.kind):
            raise ArtifactError(
                f"graph {self.graph}: its logits have {logits.ndim} dimensions, those of {self.kind} have "
                f"{logit_rank(self.kind)}. Export the student again."
            )
        return logits

    def _finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(logits).all():
            raise ArtifactError(
                f"graph {self.graph}: it answered with values that are not finite. Export the student again."
            )
        return logits

    def _decide(self, logits: NDArray[np.float32]) -> Iterator[Prediction]:
        self._finite(logits)
        if self.kind == "regression":
            return values(logits)
        return any_of(logits, self.labels) if self.kind == "multilabel" else one_of(logits, self.labels)

    def _answers(self, questions: list[str], contexts: list[str], *, first: int) -> Iterator[Prediction]:
        names = [str(number) for number in range(first, first + len(questions))]
        examples, example, spans = self.encoder.encode_windows(
            questions, contexts, overlap=self._overlap, names=names, remedy="Shorten it."
        )
        logits = self._finite(self.run(examples))
        windows: dict[str, Any] = {"example": example, "spans": spans, "contexts": contexts}
        return answered(logits, examples, no_answer=self._no_answer, **windows)

    def _entities(self, given: list[Text]) -> Iterator[Prediction]:
        both = [(text, words_of(text)) if isinstance(text, str) else joined(text) for text in given]
        texts, places = [text for text, _ in both], [words for _, words in both]
        tags: list[dict[int, NDArray[np.float32]]] = [{} for _ in texts]  # logits by word
        pending = [(at, 0) for at, words in enumerate(places) if words]
        while pending:
            pending = list(self._tag(texts, places, pending, tags))
        for text, words, found in zip(texts, places, tags, strict=True):
            kept = sorted(found)
            rows = np.stack([found[at] for at in kept]) if kept else np.zeros((0, len(self.labels)), np.float32)
            yield tagged(text, [words[at] for at in kept], rows, self.labels)

    def _tag(
        self,
        texts: Sequence[str],
        places: Sequence[Sequence[Word]],
        pending: Sequence[tuple[int, int]],
        tags: list[dict[int, NDArray[np.float32]]],
    ) -> Iterator[tuple[int, int]]:
        """Tag one window of each pending (text, first word); yield the next window of those that are not done."""
        limit = self.encoder.max_length  # a word is at least a token
        parts = [[texts[at][start:end] for start, end in places[at][first : first + limit]] for at, first in pending]
        examples, numbers = self.encoder.encode_words(parts)
        logits = self._finite(self.run(examples))
        for row, ((at, first), part) in enumerate(zip(pending, parts, strict=True)):
            piece = slice(examples.offsets[row], examples.offsets[row + 1])
            chosen = np.flatnonzero(numbers[piece] >= 0)
            found = first + numbers[piece][chosen]
            shared = sum(word >= first for word in tags[at])  # the window before knows more of what precedes them
            kept = found >= first + shared // 2
            tags[at].update(zip(found[kept].tolist(), logits[piece][chosen][kept], strict=True))
            cut = piece.stop - piece.start == limit
            end = int(found[-1]) + 1 if cut and len(found) else first + len(part)
            if end < len(places[at]):
                yield at, max(first + 1, end - (end - first) // _SHARED_WORDS)


def evaluate_artifact(artifact: Path, *, settings: DataSettings, graph: str = "auto") -> dict[str, Any]:
    """Return the dev metrics of an artifact on a data set whose labels are named as the artifact's.

    Raises:
        ArtifactError: the artifact is damaged, or its graph answers with values that are not finite.
        DataError: the data is malformed, or is of another kind of task, or of pairs where the model was trained on single
            texts, or the other way round.
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
        doc_stride=loaded.doc_stride,
    )
    if data.task.kind != loaded.kind:
        raise DataError(f"{settings.path}: the data is for {data.task.kind}, the artifact for {loaded.kind}.")
    dev = data.splits["dev"]
    if isinstance(dev, Split) and loaded.pairs not in (None, dev.pairs is not None):
        found, wanted = ("single texts", "pairs of texts") if loaded.pairs else ("pairs of texts", "single texts")
        raise DataError(
            f"{settings.path}: the data is {found}, the model was trained on {wanted}. Name its columns in data.sentence1, "
            "data.sentence2."
        )
    classifier = Classifier.load(artifact, graph=graph)
    part = dev.encode(classifier.encoder)
    if part.gold is not None:  # what is measured is what the artifact predicts
        part = replace(part, gold=replace(part.gold, no_answer=loaded.no_answer))
    logits = classifier.run(part.examples)
    try:
        metrics = evaluate_metrics(data.task.metrics, logits=logits, part=part, label_names=data.labels)
    except ValueError as error:
        raise ArtifactError(f"{artifact}: {error}. Export the student again.") from error
    return {"metrics": metrics, "rows": len(dev), "backend": f"onnxruntime {classifier.graph}", "task": data.task.name}
