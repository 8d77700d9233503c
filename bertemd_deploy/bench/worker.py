"""The measured process: one model, one backend, one thread count, obeying commands line by line.

`python -m bertemd_deploy.bench.worker` reads one JSON object per line on stdin and answers each with one on stdout;
whatever libraries print on stdout goes to stderr. It ends when stdin does. Only the standard library is imported before
the "open" command, which times the imports. A known failure is answered as {"error": message}; anything else ends the process
with its traceback on stderr, and `process.Worker` turns that into a sentence.

Commands: "open" and "cold" (a model, see `_load`), "warm", "turn" and "paced" (a cell, see `_calls`), "memory" (batches),
"evaluate" (out), "export" (teacher, path, exporter, opset, kind).
"""

from __future__ import annotations

import dataclasses
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
    from bertemd_deploy.bench.energy import Meter
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

    def __init__(
        self, path: Path, *, artifact: Artifact, threads: int, spinning: bool = False, arena: bool = True
    ) -> None:
        """Open the graph at `path`; the options are those of `runtime.open_session`."""
        from bertemd_deploy.runtime import open_session, run_session

        self._run = partial(run_session, open_session(path, threads=threads, spinning=spinning, arena=arena))

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
    _meter: Meter | None = None

    def _load(
        self,
        *,
        backend: str,
        path: str,
        threads: int,
        artifact: str,
        token_ids: Sequence[int] | None = None,
        options: dict[str, bool] | None = None,
    ) -> dict[str, Any]:
        """Import the backend and open the model: import_ms, load_ms, rss_after_import_bytes, parameters.

        `token_ids` are the model's for each of the artifact's, where these differ; `options` are those of the backend.
        """
        started = time.perf_counter()
        for module in IMPORTS[backend]:
            importlib.import_module(module)
        imported = time.perf_counter()

        from bertemd_deploy.artifact import Artifact
        from bertemd_deploy.bench.memory import rss_bytes

        self._artifact = Artifact.load(Path(artifact))
        rss = rss_bytes()
        loading = time.perf_counter()
        self._model = MODELS[backend](Path(path), artifact=self._artifact, threads=threads, **(options or {}))
        loaded = time.perf_counter()
        if token_ids is not None:
            self._model = Translated(self._model, token_ids)
        return {
            "import_ms": 1000 * (imported - started),
            "load_ms": 1000 * (loaded - loading),
            "rss_after_import_bytes": rss,
            "parameters": self._model.parameters,
        }

    def open(self, *, seed: int, **model: Any) -> dict[str, Any]:
        """Open the model and make its work ready; as `_load`, and energy_source and least_joules of the machine's meter."""
        opened = self._load(**model)

        from bertemd_deploy.bench.energy import find_meter
        from bertemd_deploy.bench.workload import Workload

        self._workload = Workload.load(self._artifact, seed=seed)
        self._meter = find_meter()
        source, least = (None, None) if self._meter is None else (self._meter.source, self._meter.least_joules)
        return opened | {"energy_source": source, "least_joules": least}

    def cold(self, *, input_ids: list[list[int]], **model: Any) -> dict[str, Any]:
        """Open the model and answer once, as a service does on its start, and nothing else; as `_load`, and first_ms."""
        opened = self._load(**model)

        import numpy as np

        ids = np.array(input_ids, dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        started = time.perf_counter()
        self._model.run(inputs)
        return opened | {"first_ms": 1000 * (time.perf_counter() - started)}

    def warm(self, *, seconds: float, **cell: Any) -> dict[str, Any]:
        """Warm up on a cell: calls, steady, median_ms, settled_after."""
        from bertemd_deploy.bench.latency import warm_up

        return dataclasses.asdict(warm_up(self._calls(**cell), seconds=seconds))

    def turn(self, *, lead: bool, most_seconds: float | None, **cell: Any) -> dict[str, Any]:
        """Time the calls of a cell: samples_ms, cpu_seconds, energy_joules."""
        from bertemd_deploy.bench.latency import no_counter, timed_turn

        joules = no_counter if self._meter is None else self._meter.joules
        calls = self._calls(**cell)
        return dataclasses.asdict(timed_turn(calls, lead=lead, most_seconds=most_seconds, joules=joules))

    def paced(self, *, interval_seconds: float, **cell: Any) -> dict[str, Any]:
        """Time the calls of a cell, one per interval: samples_ms, idle_seconds, idle_cpu_seconds."""
        from bertemd_deploy.bench.latency import paced_turn

        return dataclasses.asdict(paced_turn(self._calls(**cell), interval_seconds=interval_seconds))

    def memory(self, *, batches: list[int]) -> dict[str, Any]:
        """Run rows of mixed lengths at every batch size: peak_rss_bytes since the start, final_rss_bytes, requests."""
        from bertemd_deploy.bench.memory import peak_rss_bytes, rss_bytes

        requests = 0
        for batch in batches:
            for inputs in self._workload.memory_requests(batch=batch):
                self._model.run(inputs)
                requests += 1
        return {"peak_rss_bytes": peak_rss_bytes(), "final_rss_bytes": rss_bytes(), "requests": requests}

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
    serve(Session())


def serve(session: object) -> None:
    """Answer commands until stdin ends; each is a public method of `session`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our stdin
    channel = take_stdout()
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
