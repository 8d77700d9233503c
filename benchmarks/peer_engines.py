"""The processes that `export_peers.py` starts: each builds models, or is one engine that answers commands on stdin.

    python benchmarks/peer_engines.py    (started by export_peers.py, with the interpreter that has the engine's libraries)

A JSON object a line on stdin, one on stdout for each. "student", "ours", "floor" and "build" write files, "logits" is what
every engine should answer; "open", "shape" and "turn" are the measured engine's. A failure is answered as {"error": text}, so
that a peer that does not work is recorded with its reason.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peer_models  # noqa: E402 - found through the line above
from peer_models import Inputs, cell_inputs, config_of, floor_sizes  # noqa: E402

from bertemd_deploy.files import new_folder  # noqa: E402

Call = Callable[[], Any]
Prepare = Callable[[Inputs], Call]  # what an opened engine is: inputs of one shape in, the call to time out

# Running: each function opens what was built and returns what makes a call for inputs of one shape.


def open_ours(path: Path, *, threads: int, options: Mapping[str, Any]) -> Prepare:
    """Open a graph of ours as `Classifier` does."""
    from bertemd_deploy.runtime import open_session, run_session

    session = open_session(path, threads=threads)
    return lambda inputs: functools.partial(run_session, session, inputs)


def open_onnxruntime(path: Path, *, threads: int, options: Mapping[str, Any]) -> Prepare:
    """Open a graph with ONNX Runtime's defaults: every optimisation, threads that spin while they wait."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def prepare(inputs: Inputs) -> Call:
        feed = {name: inputs[name] for name in names}
        return lambda: session.run(None, feed)[0]

    return prepare


def open_openvino(path: Path, *, threads: int, options: Mapping[str, Any]) -> Prepare:
    """Compile for latency: once for every shape, or anew for each where shapes are static."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": options["hint"],
    }
    compiled = None if options["static"] else core.compile_model(model, "CPU", settings)

    def prepare(inputs: Inputs) -> Call:
        program = compiled
        if program is None:
            model.reshape({port: list(inputs[port.get_any_name()].shape) for port in model.inputs})
            program = core.compile_model(model, "CPU", settings)
        request = program.create_infer_request()
        feed = {port.get_any_name(): inputs[port.get_any_name()] for port in program.inputs}
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]

    return prepare


def open_pytorch(path: Path, *, threads: int, options: Mapping[str, Any]) -> Prepare:
    """Load the model; compile it for each shape as asked for."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()

    def prepare(inputs: Inputs) -> Call:
        run = model
        if options.get("compile"):
            from torch._inductor import config

            config.freezing = True
            torch.compiler.reset()  # shapes of earlier cells would make this one dynamic
            run = torch.compile(model, dynamic=False)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

        def call() -> Any:
            with torch.inference_mode():
                return run(**tensors).logits.float().numpy()

        return call

    return prepare


def open_floor(path: Path, *, threads: int, options: Mapping[str, Any]) -> Prepare:
    """Open the floor's products, node by node as written, into buffers that are there before; see `floor_graph`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    # Equal products of several layers would be merged into one.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)

    def prepare(inputs: Inputs) -> Call:
        batch, sequence = inputs["input_ids"].shape
        sizes = floor_sizes(batch=batch, sequence=sequence, heads=options["heads"])

        def shape(node: Any) -> list[int]:
            return [sizes.get(dimension, dimension) for dimension in node.shape]

        binding = session.io_binding()
        for node in session.get_inputs():
            bounds = (0, 256, np.uint8) if node.type == "tensor(uint8)" else (-127, 128, np.int8)
            codes = random.integers(bounds[0], bounds[1], size=shape(node), dtype=bounds[2])
            binding.bind_ortvalue_input(node.name, onnxruntime.OrtValue.ortvalue_from_numpy(codes))
        buffers: dict[tuple[int, ...], Any] = {}
        for node in session.get_outputs():
            key = tuple(shape(node))
            if key not in buffers:
                buffers[key] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(key, dtype=np.int32))
            binding.bind_ortvalue_output(node.name, buffers[key])
        return functools.partial(session.run_with_iobinding, binding)

    return prepare


OPENERS: dict[str, Callable[..., Prepare]] = {
    "ours": open_ours,
    "floor": open_floor,
    "optimum": open_onnxruntime,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "pytorch": open_pytorch,
}


class Worker:
    """What a process does for each command; see the module's docstring."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._prepare: Prepare | None = None
        self._call: Call | None = None

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Do a command of this name."""
        answer: dict[str, Any] = getattr(self, command)(**arguments)
        return answer

    def student(self, *, sizes: dict[str, Any], folder: str) -> dict[str, Any]:
        """Write the student; answer its config."""
        with new_folder(Path(folder)) as partial:
            peer_models.write_student(partial, sizes)
        return config_of(Path(folder))

    def logits(self, *, source: str, vocabulary: int, cells: list[list[int]]) -> dict[str, Any]:
        """Answer the student's logits in PyTorch fp32 for every cell, [batch, sequence]."""
        import torch

        prepare = open_pytorch(Path(source), threads=torch.get_num_threads(), options={"dtype": "float32"})
        inputs = [cell_inputs(batch=batch, sequence=sequence, vocabulary=vocabulary) for batch, sequence in cells]
        return {"logits": [prepare(given)().tolist() for given in inputs]}

    def ours(self, *, source: str, out: str) -> dict[str, Any]:
        """Export our artifact."""
        peer_models.export_ours(Path(source), Path(out))
        return {}

    def floor(self, *, source: str, out: str) -> dict[str, Any]:
        """Write the floor's graph; answer what its engine has to know."""
        import onnx

        config = config_of(Path(source))
        onnx.save_model(peer_models.floor_graph(config), out)
        return {"options": {"heads": config["num_attention_heads"]}}

    def build(self, *, family: str, name: str, source: str, folder: str) -> dict[str, Any]:
        """Build one engine of a peer; answer the path to open."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        options = peer_models.PEERS[family][name].options
        return {"path": str(peer_models.BUILDERS[family](options, Path(source), Path(folder)))}

    def versions(self, *, family: str) -> dict[str, str | None]:
        """Answer the versions of a family's packages."""
        return peer_models.versions(family)

    def open(self, *, family: str, path: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Become an engine; answer the process's number."""
        self._prepare = OPENERS[family](Path(path), threads=threads, options=options)
        return {"process": os.getpid()}

    def shape(self, *, batch: int, sequence: int, vocabulary: int, seconds: float) -> dict[str, Any]:
        """Take inputs of one shape and warm up; answer the median in milliseconds and the logits (None of the floor)."""
        from bertemd_deploy.bench.latency import warm_up

        assert self._prepare is not None
        self._call = self._prepare(cell_inputs(batch=batch, sequence=sequence, vocabulary=vocabulary))
        found = self._call()  # compiles, where the engine does that at the first call
        logits = None if found is None else np.array(found, dtype=np.float64).tolist()
        return {"median_ms": warm_up([self._call], seconds=seconds).median_ms, "logits": logits}

    def turn(self, *, count: int, lead: int, most_seconds: float) -> dict[str, Any]:
        """Time `count` calls, after `lead` untimed ones; answer samples_ms."""
        from bertemd_deploy.bench.latency import timed_turn

        assert self._call is not None
        for _ in range(lead):  # another engine had the caches, and the clock
            self._call()
        done = timed_turn([self._call] * count, lead=False, most_seconds=most_seconds)
        return {"samples_ms": [round(sample, 4) for sample in done.samples_ms]}


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, even while it is suspended."""
    if sys.platform == "linux":
        pdeathsig = 1
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)


def main() -> None:
    """Answer commands until stdin ends."""
    from bertemd_deploy.bench.worker import take_stdout

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
    channel = take_stdout()
    worker = Worker()
    for line in sys.stdin:
        try:
            reply = worker.ask(**json.loads(line))
        except Exception as error:  # engines raise many kinds; the parent decides what a failure means
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
