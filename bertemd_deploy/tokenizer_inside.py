"""The export step that writes a graph with the tokenizer inside: the tokenizer's graph is checked first, the whole one last.

Which nodes make a tokenizer is in `tokenizer_graph`. What runs is ONNX Runtime with onnxruntime-extensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.artifact import GRAPHS, DataSlice
from bertemd_deploy.console import note
from bertemd_deploy.encoding import TextEncoder, decoded
from bertemd_deploy.errors import ExportError, RecipeError, missing_extra
from bertemd_deploy.gate import PARITY_TOLERANCE
from bertemd_deploy.manifest import WITH_TOKENIZER, Build
from bertemd_deploy.runtime import INPUT_NAMES, OUTPUT_NAME, open_session, run_session
from bertemd_deploy.tasks import Kind
from bertemd_deploy.tokenizer_graph import TEXT_INPUTS, tokenizer_graph, with_tokenizer

_JOINED_BATCH = 8  # texts


@dataclass(frozen=True)
class Front:
    """A tokenizer as a graph, and what it was checked on.

    Attributes:
        graph: from `tokenizer_graph`.
        texts, pairs: the evaluation slice's, as read back from their tokens; pairs is None where a row has one text.
        max_length: longest output in tokens.
    """

    graph: onnx.ModelProto
    texts: list[str]
    pairs: list[str] | None
    max_length: int


def check_takes_texts(kind: Kind) -> None:
    """Refuse kinds of task that a graph of texts has no answer for.

    Raises:
        RecipeError: what the task says belongs to tokens.
    """
    if kind not in ("classification", "regression", "multilabel"):
        raise RecipeError(
            f"export.tokenizer_inside: what {kind} says belongs to tokens, which a graph that takes texts does not hand out. "
            "Set it to false."
        )


def read_front(build: Build, part: DataSlice, *, max_length: int) -> Front:
    """Return the tokenizer of an artifact in the making as a graph: before anything that takes minutes.

    Args:
        build: its folder holds the tokenizer.
        part: evaluation slice.
        max_length: longest output in tokens.

    Raises:
        BertemdError: onnxruntime-extensions is not installed.
        ExportError: the tokenizer cannot be written as a graph, or does not read all texts alike.
    """
    texts, pairs = decoded(Tokenizer.from_file(str(build.folder / "tokenizer.json")), part.examples)
    graph = tokenizer_graph(build.folder, max_length=max_length, pairs=pairs is not None, opset=build.opset)
    check_tokenizer(graph, texts, pairs, tokenizer=build.folder, max_length=max_length)
    return Front(graph, texts, pairs, max_length)


def write_with_tokenizer(build: Build, front: Front) -> None:
    """Write the smallest portable graph behind its tokenizer, checked as a whole.

    Raises:
        ExportError: as a whole it answers otherwise.
    """
    graph = "int8" if "int8" in build.graphs else "fp32"
    joined = with_tokenizer(build.graphs[graph], front.graph)
    check_joined(
        joined,
        front.texts,
        front.pairs,
        model=build.path(graph),
        tokenizer=build.folder,
        max_length=front.max_length,
    )
    onnx.save_model(joined, build.folder / WITH_TOKENIZER)
    build.with_tokenizer = (graph, joined)
    note(
        f"{WITH_TOKENIZER}: the tokens of the tokenizer and the logits of {GRAPHS[graph]} on all of {len(front.texts):,} dev "
        "texts, as read back from their tokens"
    )


def check_tokenizer(
    front: onnx.ModelProto,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    tokenizer: Path,
    max_length: int,
) -> None:
    """Run a tokenizer's graph on texts beside the tokenizer itself.

    Args:
        front: from `tokenizer_graph`.
        texts: what to tokenise, all of it in one batch and the first alone.
        pairs: second texts, where the graph takes two a row.
        tokenizer: folder with `tokenizer.json`.
        max_length: longest output in tokens, as the graph was made with.

    Raises:
        BertemdError: onnxruntime-extensions is not installed.
        ExportError: the graph gives other ids, segments or masks.
    """
    session = open_text_session(front.SerializeToString())
    encoder = TextEncoder.load(tokenizer, max_length=max_length)
    for count in (len(texts), 1):
        columns = [list(texts[:count]), *([list(pairs[:count])] if pairs is not None else [])]
        feeds = {name: np.array(column, dtype=object) for name, column in zip(TEXT_INPUTS, columns, strict=False)}
        results = session.run([f"text/{name}" for name in INPUT_NAMES], feeds)
        expected = encoder.encode(*columns).batch(range(count), pad_id=encoder.pad_id)
        for row, text in enumerate(columns[0]):
            found = [result[row] for result in results]
            wanted = [expected[name][row] for name in INPUT_NAMES]
            if not all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)):
                raise ExportError(
                    f"{tokenizer / 'tokenizer.json'}: inside a graph it reads {text[:80]!r} as "
                    f"{_ids(found)}, by itself as {_ids(wanted)}. Leave the tokenizer out of the graph."
                )


def check_joined(
    joined: onnx.ModelProto,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    model: Path,
    tokenizer: Path,
    max_length: int,
) -> None:
    """Run a graph that takes texts beside the graph it was made of, on the tokens of the same texts.

    Args:
        joined: from `with_tokenizer`.
        texts: what to run, `_JOINED_BATCH` a call.
        pairs: second texts, where the graph takes two a row.
        model: file of the graph behind the tokenizer.
        tokenizer: folder with `tokenizer.json`.
        max_length: longest input in tokens.

    Raises:
        BertemdError: onnxruntime-extensions is not installed.
        ExportError: the logits differ by more than `gate.PARITY_TOLERANCE`, or are not finite.
    """
    whole, plain = open_text_session(joined.SerializeToString()), open_session(model)
    encoder = TextEncoder.load(tokenizer, max_length=max_length)
    for start in range(0, len(texts), _JOINED_BATCH):
        columns = [list(column[start : start + _JOINED_BATCH]) for column in (texts, pairs) if column is not None]
        feeds = {name: np.array(column, dtype=object) for name, column in zip(TEXT_INPUTS, columns, strict=False)}
        (found,) = whole.run([OUTPUT_NAME], feeds)
        wanted = run_session(plain, encoder.encode(*columns).batch(range(len(columns[0])), pad_id=encoder.pad_id))
        difference = float(np.abs(found - wanted).max())
        if not difference <= PARITY_TOLERANCE:
            raise ExportError(
                f"{model.name} behind its tokenizer differs from itself by {difference:.1e} on {columns[0][0][:80]!r} and what "
                f"follows (allowed {PARITY_TOLERANCE:.0e}). Leave the tokenizer out of the graph, or update onnxruntime."
            )


def _ids(row: Sequence[NDArray[np.int64]]) -> list[int]:
    """Return the first few ids of one row of ids, mask and segments."""
    shown: list[int] = row[0][row[1].astype(bool)][:12].tolist()
    return shown


def open_text_session(model: str | bytes) -> Any:
    """Open a graph that takes text, from its path or its bytes.

    Raises:
        BertemdError: onnxruntime-extensions is not installed.
    """
    import onnxruntime

    try:
        from onnxruntime_extensions import get_library_path
    except ImportError as error:
        raise missing_extra("tokenizer-graph", package="onnxruntime-extensions") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(get_library_path())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
