"""The measured process: one model, one backend, one thread count, obeying commands line by line.

`python -m bertemd_deploy.bench.worker` reads one JSON object per line on stdin and answers each with one on stdout;
whatever libraries print on stdout goes to stderr. It ends when stdin does. Only the standard library is imported before
the "open" command, which times the imports. A known failure is answered as {"error": message}; anything else ends the process
with its traceback on stderr, and `process.Worker` turns that into a sentence.

Commands: "open" (backend, path, threads, artifact, seed, token_ids), "first" (sequence), "warm" and "turn" (a cell, see
`_calls`), "memory" (batches), "evaluate" (out), "export" (teacher, path, exporter, opset, kind).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from bertemd_deploy.errors import BertemdError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bertemd_deploy.artifact import Artifact
    from bertemd_deploy.bench.end_to_end import Answerer
    from bertemd_deploy.bench.workload import Inputs, Workload
    from bertemd_deploy.tasks import Kind

IMPORTS = {
    "onnxruntime": ("numpy", "onnxruntime", "tokenizers"),
    "pytorch": ("torch", "transformers.models.auto.modeling_auto"),
}


class Model(Protocol):
    """An opened model; `parameters` is None where the backend does not tell."""

    parameters: int | None

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits of one batch, (batch, outputs) or (batch, sequence, outputs)."""


class OnnxModel:
    """A graph in ONNX Runtime."""

    parameters: int | None = None

    def __init__(self, path: Path, *, artifact: Artifact, threads: int) -> None:
        """Open the graph at `path`."""
        from bertemd_deploy.runtime import open_session, run_session

        self._run = partial(run_session, open_session(path, threads=threads))

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits of one batch, (batch, outputs) or (batch, sequence, outputs)."""
        return self._run(inputs)


class TorchModel:
    """A Hugging Face folder with the task's head in PyTorch, fp32, with the family's fastest attention."""

    def __init__(self, path: Path, *, artifact: Artifact, threads: int) -> None:
        """Load the folder at `path` for the artifact's task.

        Raises:
            ModelError: the folder cannot be loaded, or leaves weights at random values.
        """
        import torch

        from bertemd_deploy.models import load_classifier, output_logits

        torch.set_num_threads(threads)
        self._torch = torch
        self._logits = output_logits
        self._model = load_classifier(path, labels=artifact.labels, kind=artifact.kind)
        self.parameters: int | None = sum(weight.numel() for weight in self._model.parameters())

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits of one batch, (batch, outputs) or (batch, sequence, outputs)."""
        torch = self._torch
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        logits: NDArray[np.float32] = self._logits(output).numpy()
        return logits


class Translated:
    """A model that is given its own ids for the artifact's tokens."""

    def __init__(self, model: Model, token_ids: Sequence[int]) -> None:
        """Wrap `model`; `token_ids` holds its id for each of the artifact's."""
        import numpy as np

        self._model, self.parameters = model, model.parameters
        self._ids = np.asarray(token_ids, dtype=np.int64)

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits of one batch, (batch, outputs) or (batch, sequence, outputs)."""
        return self._model.run(inputs | {"input_ids": self._ids[inputs["input_ids"]]})


MODELS: dict[str, type[OnnxModel] | type[TorchModel]] = {"onnxruntime": OnnxModel, "pytorch": TorchModel}


class Session:
    """What a worker holds between commands; each public method is a command and returns its answer."""

    _model: Model
    _artifact: Artifact
    _workload: Workload
    _answerer: Answerer | None = None

    def open(
        self, *, backend: str, path: str, threads: int, artifact: str, seed: int, token_ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Import the backend and open the model; import_ms, load_ms, rss_after_import_bytes, parameters.

        `token_ids` are the model's for each of the artifact's, where these differ.
        """
        started = time.perf_counter()
        for module in IMPORTS[backend]:
            importlib.import_module(module)
        imported = time.perf_counter()

        from bertemd_deploy.artifact import Artifact
        from bertemd_deploy.bench.memory import rss_bytes
        from bertemd_deploy.bench.workload import Workload

        self._artifact = Artifact.load(Path(artifact))
        rss = rss_bytes()
        loading = time.perf_counter()
        self._model = MODELS[backend](Path(path), artifact=self._artifact, threads=threads)
        loaded = time.perf_counter()
        if token_ids is not None:
            self._model = Translated(self._model, token_ids)
        self._workload = Workload.load(self._artifact, seed=seed)
        return {
            "import_ms": 1000 * (imported - started),
            "load_ms": 1000 * (loaded - loading),
            "rss_after_import_bytes": rss,
            "parameters": self._model.parameters,
        }

    def first(self, *, sequence: int) -> dict[str, Any]:
        """Run one example of `sequence` tokens: first_ms."""
        inputs = self._workload.synthetic(batch=1, sequence=sequence)
        started = time.perf_counter()
        self._model.run(inputs)
        return {"first_ms": 1000 * (time.perf_counter() - started)}

    def warm(self, *, seconds: float, **cell: Any) -> dict[str, Any]:
        """Warm up on a cell: calls, steady, median_ms."""
        from bertemd_deploy.bench.latency import warm_up

        done = warm_up(self._calls(**cell), seconds=seconds)
        return {"calls": done.calls, "steady": done.steady, "median_ms": done.median_ms}

    def turn(self, *, lead: bool, most_seconds: float | None, **cell: Any) -> dict[str, Any]:
        """Time the calls of a cell: samples_ms, cpu_seconds."""
        from bertemd_deploy.bench.latency import timed_turn

        done = timed_turn(self._calls(**cell), lead=lead, most_seconds=most_seconds)
        return {"samples_ms": done.samples_ms, "cpu_seconds": done.cpu_seconds}

    def memory(self, *, batches: list[int]) -> dict[str, Any]:
        """Run rows of mixed lengths at every batch size: peak_rss_bytes of the process since its start."""
        from bertemd_deploy.bench.memory import peak_rss_bytes

        for batch in batches:
            for inputs in self._workload.memory_requests(batch=batch):
                self._model.run(inputs)
        return {"peak_rss_bytes": peak_rss_bytes()}

    def evaluate(self, *, out: str) -> dict[str, Any]:
        """Run the whole evaluation slice and write its logits, shaped by `runtime.collect_logits`, to the npy file `out`."""
        import numpy as np

        from bertemd_deploy.runtime import collect_logits

        examples = self._workload.evaluation.examples
        np.save(out, collect_logits(self._model.run, examples, pad_id=self._workload.pad_id), allow_pickle=False)
        return {}

    def export(
        self, *, teacher: str, path: str, exporter: Literal["torchscript", "dynamo"], opset: int, kind: Kind
    ) -> dict[str, Any]:
        """Write the teacher as an fp32 ONNX graph."""
        from bertemd_deploy.export import export_fp32

        export_fp32(Path(teacher), Path(path), exporter=exporter, opset=opset, kind=kind)
        return {}

    def _calls(
        self, *, batch: int, sequence: int | str, texts: bool = False, start: int = 0, count: int = 1
    ) -> list[Callable[[], object]]:
        """Return `count` calls of a cell: one batch of fixed shape each time, or replayed requests from number `start` on.

        With `texts`, a request starts from texts and ends at decisions; otherwise it is the model alone.
        """
        if isinstance(sequence, int):
            return [partial(self._model.run, self._workload.synthetic(batch=batch, sequence=sequence))] * count
        if not texts:
            inputs = self._workload.requests(batch=batch, start=start, count=count)
            return [partial(self._model.run, one) for one in inputs]

        if self._answerer is None:
            from bertemd_deploy.bench.end_to_end import Answerer

            self._answerer = Answerer(self._artifact, run=self._model.run)
        answerer = self._answerer
        groups = self._workload.request_rows(batch=batch, start=start, count=count)
        rows = [self._workload.evaluation.examples.select(group) for group in groups]
        return [partial(answerer.answer, *answerer.texts(examples)) for examples in rows]


def take_stdout() -> TextIO:
    """Return the original stdout as a text stream and point stdout at stderr for everyone else."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def main() -> None:
    """Answer commands until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our stdin
    channel = take_stdout()
    session = Session()
    for line in sys.stdin:
        message = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(session, message.pop("command"))
        try:
            reply = command(**message)
        except BertemdError as error:
            reply = {"error": str(error)}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
