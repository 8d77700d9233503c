"""Latency of a student's graphs beside PyTorch, and beside what ONNX Runtime's own tools make of the same student.

    python benchmarks/latency.py --teacher bert-base --student 4L-312 --out benchmarks/latency-4l.json

Weights are random: but for activations that trained students have smoothed (`smoothing.py`), latency does not depend on
them. Every engine runs in a process of its own, started before the first
round; only one computes at a time, and the engines take turns in every round, so that drift of the machine hits all alike.
A ratio is the median over rounds of teacher time / engine time in the same round, with a bootstrap interval over rounds.
The peer is built from the graph ONNX Runtime's optimizer fuses completely, which is its best case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "bert-base": {"num_hidden_layers": 12},
    "6L-768": {"num_hidden_layers": 6},
    "4L-312": {
        "num_hidden_layers": 4,
        "hidden_size": 312,
        "num_attention_heads": 12,
        "intermediate_size": 1200,
    },
}
WARM_UP = 5
SECONDS_PER_TURN = 0.2
BOOTSTRAP = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SHAPES, default="bert-base")
    parser.add_argument("--student", choices=SHAPES, default="4L-312")
    parser.add_argument("--sequence", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write raw samples and machine facts here, as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options=options)
        return
    logging.disable(logging.WARNING)  # the peer's quantizer advises a step that its fused graphs have already had
    with tempfile.TemporaryDirectory() as folder:
        engines = build(Path(folder), options=options)
        record = measure(engines, options=options)
    print_table(record)
    if options.out:
        from bertemd_deploy.files import write_json

        write_json(options.out, record)


def model_of(shape: str) -> Any:
    """Return a random classifier of a named shape, in eval mode with `sdpa` attention."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape], attn_implementation="sdpa")).eval()


def build(folder: Path, *, options: argparse.Namespace) -> dict[str, list[str]]:
    """Write every graph; return engines by name, each what its worker runs: kind and path or shape."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from bertemd_deploy.bert_graph import fusable_graph, portable_graph
    from bertemd_deploy.console import note
    from bertemd_deploy.fuse import fuse, optimize
    from bertemd_deploy.onnx_edit import save
    from bertemd_deploy.quantization.dynamic import quantize

    note(f"building the graphs of {options.teacher} and {options.student}")
    save(portable_graph(model_of(options.teacher), exporter="torchscript", opset=17), folder / "teacher.onnx")
    model = model_of(options.student)
    sizes = {"heads": model.config.num_attention_heads, "hidden": model.config.hidden_size}
    portable = portable_graph(model, exporter="torchscript", opset=17)
    fusable = fusable_graph(model, exporter="torchscript", opset=17)
    fused, _ = fuse(fusable, layers=model.config.num_hidden_layers, opset=17, **sizes)
    graphs = {
        "student fp32": portable,
        "student fused": fused,
        "student int8": quantize(portable, fused=False),
        "student int8 per channel": quantize(portable, fused=False, per_channel=True),
        "student fused-int8": quantize(fused, fused=True),
        "student fused-int8 per channel": quantize(fused, fused=True, per_channel=True),
        "peer: plain export": fusable,
        "peer: optimize_model": optimize(fusable, **sizes),
    }
    engines = {
        f"PyTorch fp32 {options.teacher}": ["torch", options.teacher],
        f"PyTorch fp32 {options.student}": ["torch", options.student],
        f"ONNX Runtime fp32 {options.teacher}": ["onnx", str(folder / "teacher.onnx")],
    }
    for name, graph in graphs.items():
        path = folder / f"{len(engines)}.onnx"
        save(graph, path)
        engines[name] = ["onnx", str(path)]
    for source in ("plain export", "optimize_model"):
        for per_channel in (False, True):
            path = folder / f"{len(engines)}.onnx"
            quantize_dynamic(
                engines[f"peer: {source}"][1],
                path,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                extra_options={"DefaultTensorType": 1},  # float, where shape inference does not know a fused operator
            )
            engines[f"peer: {source} + quantize_dynamic{' per channel' if per_channel else ''}"] = ["onnx", str(path)]
    return engines


def work(kind: str, source: str, *, options: argparse.Namespace) -> None:
    """Be one engine: warm up, say so, then answer each line on stdin with the milliseconds of one turn."""
    random = np.random.default_rng(0)
    ids = random.integers(1000, 30000, size=(options.batch, options.sequence))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    if kind == "torch":
        import torch

        torch.set_num_threads(options.threads)
        model = model_of(source)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

        def run() -> None:
            with torch.inference_mode():
                model(**tensors)
    else:
        from bertemd_deploy.runtime import open_session, run_session

        session = open_session(Path(source), threads=options.threads)

        def run() -> None:
            run_session(session, inputs)

    for _ in range(WARM_UP):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        run()  # the caches were another engine's
        samples: list[float] = []
        started = time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - started < SECONDS_PER_TURN:
            before = time.perf_counter()
            run()
            samples.append((time.perf_counter() - before) * 1e3)
        print(json.dumps(samples), flush=True)


def measure(engines: dict[str, list[str]], *, options: argparse.Namespace) -> dict[str, Any]:
    """Start the workers, let them take turns, and return the record."""
    from bertemd_deploy.bench.environment import conditions, device, versions
    from bertemd_deploy.console import progress

    settings = [f"--{key}={getattr(options, key)}" for key in ("sequence", "batch", "threads")]
    before = conditions()
    processes: dict[str, subprocess.Popen[str]] = {}
    turns: dict[str, list[list[float]]] = {name: [] for name in engines}
    try:
        with progress("starting", len(engines)) as bar:
            for name, engine in engines.items():
                command = [sys.executable, __file__, *settings, "--worker", *engine]
                processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                answer(processes[name], name)
                bar.advance()
        with progress("rounds", options.rounds) as bar:
            for _ in range(options.rounds):
                for name, process in processes.items():
                    assert process.stdin is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
                    turns[name].append(json.loads(answer(process, name)))
                bar.advance()
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {
            key: getattr(options, key) for key in ("teacher", "student", "sequence", "batch", "threads", "rounds")
        },
        "device": device(),
        "conditions": {"before": before, "after": conditions()},
        "versions": versions(("numpy", "onnxruntime", "torch", "transformers", "onnx")),
        "model_bytes": {name: Path(path).stat().st_size for name, (kind, path) in engines.items() if kind == "onnx"},
        "latency_ms": turns,
    }


def answer(process: subprocess.Popen[str], name: str) -> str:
    """Return a worker's next line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name}: the worker died (exit {process.wait()}); its message is above.")
    return line


def ratio(reference: list[list[float]], turns: list[list[float]]) -> tuple[float, float, float]:
    """Return the median ratio of paired rounds and its 95% bootstrap interval."""
    paired = np.array([np.median(left) / np.median(right) for left, right in zip(reference, turns, strict=True)])
    drawn = np.random.default_rng(0).choice(paired, size=(BOOTSTRAP, len(paired)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(paired)), float(low), float(high)


def print_table(record: dict[str, Any]) -> None:
    """Print p50, p95 and the two ratios of every engine: to the teacher in PyTorch, and to the best peer."""
    turns = record["latency_ms"]
    medians = {name: float(np.median(np.concatenate(samples))) for name, samples in turns.items()}
    first = next(iter(turns))
    peer = min((name for name in turns if name.startswith("peer") and "quantize" in name), key=medians.__getitem__)
    settings = record["settings"]
    print(f"batch {settings['batch']}, sequence {settings['sequence']}, {settings['threads']} threads, ms")
    print(f"{'engine':52s} {'MB':>6s} {'p50':>8s} {'p95':>8s} {'n':>6s}   {'x ' + first:28s}   x best peer int8")
    for name, samples in turns.items():
        values = np.concatenate(samples)
        size = record["model_bytes"].get(name)
        columns = f"{size / 1e6:6.1f}" if size else " " * 6
        speedups = ["{:6.2f} [{:.2f}, {:.2f}]".format(*ratio(turns[other], samples)) for other in (first, peer)]
        print(
            f"{name:52s} {columns} {medians[name]:8.3f} {np.percentile(values, 95):8.3f} {len(values):6d}   "
            f"{speedups[0]:28s}   {speedups[1]}"
        )
    print(f"best peer: {peer}")


if __name__ == "__main__":
    main()
