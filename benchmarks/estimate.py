"""How far estimates are from measurements: real graphs measured here, beside what small benchmarks say of them.

    python benchmarks/estimate.py --out benchmarks/results/estimate.json

Students of random weights, as fp32, fused, int8 and fused int8 graphs, at several lengths, batch sizes and thread counts.
Estimates come from the calibration's small graphs alone, none of which is part of a student's graph or has its widths.
Measurements and calibration take turns in every round, in one process for each thread count, so that drift of the machine
hits both; a latency, like a calibration's time, is the least over rounds of the median in a round, since what other programs
add is no part of it. The table says |estimate / measurement - 1|.

`--graphs FOLDER` keeps the graphs there, or takes those that are there, so that the measuring run needs no torch.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STUDENTS = {
    "4L-312": {
        "num_hidden_layers": 4,
        "hidden_size": 312,
        "num_attention_heads": 12,
        "intermediate_size": 1200,
    },
    "4L-384": {
        "num_hidden_layers": 4,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "6L-768": {"num_hidden_layers": 6},
}
GRAPHS = ("fp32", "fused", "int8", "fused-int8")
CELLS = [(1, length) for length in (16, 32, 64, 128, 256, 512)] + [(8, length) for length in (16, 64, 128, 512)]
SECONDS = 0.1  # of calls, for each cell in a round
MOST_MEDIAN, MOST_WORST = 0.15, 0.35  # the bars
VOCABULARY = 30_522


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", type=Path, help="folder of the graphs; those missing are written there")
    parser.add_argument("--build", action="store_true", help="write the graphs and end")
    parser.add_argument("--out", type=Path, help="write raw samples and machine facts here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.graphs or Path(scratch)
        paths = build(folder, students=options.students)
        if options.build:
            return
        record = measure(paths, threads=options.threads, rounds=options.rounds)
    print_table(record)
    if options.out:
        from bertemd_deploy.files import write_json

        write_json(options.out, record)
    if not (record["error"]["median"] < MOST_MEDIAN and record["error"]["worst"] < MOST_WORST):
        raise SystemExit(f"missed: the bars are {MOST_MEDIAN:.0%} in the median and {MOST_WORST:.0%} at worst.")


def build(folder: Path, *, students: Sequence[str]) -> dict[tuple[str, str], Path]:
    """Write the graphs that `folder` lacks; return the path of each by student and graph."""
    paths = {(student, graph): folder / f"{student}-{graph}.onnx" for student in students for graph in GRAPHS}
    for student in students:
        if not all(paths[student, graph].is_file() for graph in GRAPHS):
            write_graphs(student, {graph: paths[student, graph] for graph in GRAPHS})
    return paths


def write_graphs(student: str, paths: Mapping[str, Path]) -> None:
    """Write all graphs of a student with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from bertemd_deploy.bert_graph import fusable_graph, portable_graph
    from bertemd_deploy.console import note
    from bertemd_deploy.fuse import fuse
    from bertemd_deploy.onnx_edit import save
    from bertemd_deploy.quantization.dynamic import quantize

    note(f"building the graphs of {student}")
    torch.manual_seed(0)
    config = BertConfig(**STUDENTS[student], attn_implementation="sdpa")
    model = BertForSequenceClassification(config).eval()
    portable = portable_graph(model, exporter="torchscript", opset=17)
    fused, _ = fuse(
        fusable_graph(model, exporter="torchscript", opset=17),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.hidden_size,
        opset=17,
    )
    graphs = {
        "fp32": portable,
        "fused": fused,
        "int8": quantize(portable, fused=False, per_channel=True),
        "fused-int8": quantize(fused, fused=True, per_channel=True),
    }
    for name, graph in graphs.items():
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        save(graph, paths[name])


def measure(paths: Mapping[tuple[str, str], Path], *, threads: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure the graphs and calibrate in turns; return the record."""
    from bertemd_deploy.bench.environment import conditions, device, versions
    from bertemd_deploy.console import progress
    from bertemd_deploy.estimate.calibration import Prober
    from bertemd_deploy.estimate.tracing import trace

    before = conditions()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    traces = {key: trace(path) for key, path in paths.items()}
    samples: dict[tuple[str, str, int, int, int], list[list[float]]] = {}
    random = np.random.default_rng(0)
    with Prober([1, *threads]) as prober, progress("rounds", rounds * (len(prober.cases) + len(paths))) as bar:
        for _ in range(rounds):
            prober.round(done=bar.advance)
            for at in random.permutation(len(paths)):
                key = list(paths)[int(at)]
                time_graph(prober, key, paths[key], samples)
                bar.advance(detail=" ".join(key))
        calibration = prober.calibration()
    cells = [
        {
            "student": student,
            "graph": graph,
            "batch": batch,
            "sequence": sequence,
            "threads": count,
            **compare(traces[student, graph], calibration, turns, batch=batch, sequence=sequence, threads=count),
            "samples_ms": [[round(value, 4) for value in turn] for turn in turns],
        }
        for (student, graph, batch, sequence, count), turns in sorted(samples.items())
    ]
    return {
        "started": started,
        "settings": {"rounds": rounds, "threads": list(calibration.speeds), "seconds": SECONDS},
        "device": device(),
        "conditions": {"before": before, "after": conditions()},
        "versions": versions(("numpy", "onnxruntime", "onnx", "torch", "transformers")),
        "error": summary(cells),
        "cells": cells,
        "calibration": calibration.record(samples=True),
    }


def time_graph(
    prober: Any, key: tuple[str, str], path: Path, samples: dict[tuple[str, str, int, int, int], list[list[float]]]
) -> None:
    """Time every cell of a graph once with every thread count, adding to `samples`."""
    for count in prober.threads:
        worker = prober.worker(count)
        worker.request("open", name="graph", path=str(path), threads=count, optimize=True)
        for batch, sequence in CELLS:
            shape = [batch, sequence]
            feeds = {
                "input_ids": {"dtype": "int64", "shape": shape, "low": 0, "high": VOCABULARY},
                "attention_mask": {"dtype": "int64", "shape": shape, "low": 1, "high": 2},
                "token_type_ids": {"dtype": "int64", "shape": shape, "low": 0, "high": 1},
            }
            turn = worker.request("time", name="graph", feeds=feeds, seconds=SECONDS)["samples_ms"]
            samples.setdefault((*key, batch, sequence, count), []).append(turn)
        worker.request("close", name="graph")


def compare(
    traced: Any, calibration: Any, turns: Sequence[Sequence[float]], *, batch: int, sequence: int, threads: int
) -> dict[str, Any]:
    """Return a cell's measured and estimated milliseconds, what the estimate is made of, and how far off it is."""
    from bertemd_deploy.estimate.model import breakdown
    from bertemd_deploy.estimate.operators import costs

    parts = breakdown(costs(traced, batch=batch, sequence=sequence), calibration.at(threads))
    measured = float(min(np.median(turn) for turn in turns))
    estimated = sum(parts.values())
    return {
        "measured_ms": measured,
        "estimated_ms": estimated,
        "error": estimated / measured - 1,
        "parts_ms": {limit: round(value, 4) for limit, value in parts.items()},
    }


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return median and worst error, the ratio either way that 19 of 20 keep to, and their number."""
    errors = np.array([abs(cell["error"]) for cell in cells])
    ratios = np.array([abs(math.log1p(cell["error"])) for cell in cells])
    return {
        "median": float(np.median(errors)),
        "worst": float(errors.max()),
        "p95_ratio": float(np.exp(np.quantile(ratios, 0.95))),
        "n": len(cells),
    }


def print_table(record: Mapping[str, Any]) -> None:
    """Print the errors of all cells, by group, and the worst ones."""
    cells = record["cells"]
    groups: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "student": lambda cell: cell["student"],
        "graph": lambda cell: cell["graph"],
        "threads": lambda cell: str(cell["threads"]),
        "batch": lambda cell: str(cell["batch"]),
        "tokens": lambda cell: f"{cell['sequence']:3d}",
    }
    print(f"{'':24s} {'median':>8s} {'worst':>8s} {'bias':>8s} {'n':>5s}")
    print_line("all", cells)
    for name, group in groups.items():
        for value in sorted({group(cell) for cell in cells}):
            print_line(f"{name} {value}", [cell for cell in cells if group(cell) == value])
    print("\nworst cells: measured, estimated, ms")
    for cell in sorted(cells, key=lambda cell: -abs(cell["error"]))[:10]:
        where = (
            f"{cell['student']} {cell['graph']}, batch {cell['batch']}, {cell['sequence']} tokens, "
            f"{cell['threads']} threads"
        )
        print(f"{where:60s} {cell['measured_ms']:9.3f} {cell['estimated_ms']:9.3f} {cell['error']:+8.1%}")


def print_line(name: str, cells: Sequence[Mapping[str, Any]]) -> None:
    found, bias = summary(cells), float(np.median([cell["error"] for cell in cells]))
    print(f"{name:24s} {found['median']:8.1%} {found['worst']:8.1%} {bias:+8.1%} {found['n']:5d}")


if __name__ == "__main__":
    main()
