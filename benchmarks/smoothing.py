"""What smoothing the features that stand out gains an int8 student, and what it costs in time.

    python benchmarks/smoothing.py --student mrpc-4l=FOLDER --student cola-6l=FOLDER --out benchmarks/results/smoothing.json

Students are real ones, as `bertemd distill` wrote them: random weights have few features that stand out. Each becomes dynamic
int8 four ways, with a scale per tensor and per row of activations, as it is and smoothed on its calibration rows of train,
as portable and as fused graph. Loss: KL(fp32 || int8) and mean squared error of the logits, and changed decisions, on the
student's evaluation rows, 32 at a time. Time: as `latency.py`, a process for each, turns in every round; a ratio is the median
over rounds of smoothed over plain, with a bootstrap 95% interval.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import latency  # noqa: E402 - found through the line above
from glue_measure import divergences  # noqa: E402

FORMS = ("plain", "smoothed", "plain, per row", "smoothed, per row")


def main() -> None:
    """Read the command line, measure every student and write the record after each."""
    from bertemd_deploy.bench.environment import device
    from bertemd_deploy.files import sha256_file, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 32, 128], help="tokens of a timed row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="the record, as JSON, with raw samples")
    options = parser.parse_args()
    students = dict(entry.partition("=")[::2] for entry in options.student)
    if absent := [name for name, folder in students.items() if not Path(folder, "model.safetensors").is_file()]:
        parser.error(f"--student: no student's folder: {', '.join(absent)}")
    record: dict[str, Any] = {"device": device(), "students": {}}
    for name, folder in students.items():
        found: dict[str, Any] = {"sha256": sha256_file(Path(folder) / "model.safetensors"), "graphs": {}}
        record["students"][name] = found
        for fused in (False, True):
            with tempfile.TemporaryDirectory() as made:
                graphs, count = build(Path(folder), Path(made), fused=fused)
                found["graphs"]["fused" if fused else "portable"] = {
                    "smoothed_activations": count,
                    "loss": losses(Path(folder), graphs),
                    "latency": [timed(name, graphs, sequence, options) for sequence in options.sequences],
                }
            write_json(options.out, record)
    print_table(record)


def build(student: Path, folder: Path, *, fused: bool) -> tuple[dict[str, Path], int]:
    """Write a student's fp32 graph and its forms of int8; return their files and how many activations are smoothed."""
    from bertemd_deploy.bert_graph import fusable_graph, portable_graph
    from bertemd_deploy.checkpoints import checked_encoder
    from bertemd_deploy.facts import read_student
    from bertemd_deploy.fuse import fuse
    from bertemd_deploy.models import load_classifier
    from bertemd_deploy.onnx_edit import save
    from bertemd_deploy.quantization.dynamic import quantize
    from bertemd_deploy.quantization.padding import copy_first_row
    from bertemd_deploy.quantization.rows import quantize_rows
    from bertemd_deploy.quantization.smoothing import smooth

    facts = read_student(student)
    model = load_classifier(student, labels=facts.labels, kind="classification").eval()
    if fused:
        sizes = {"heads": model.config.num_attention_heads, "hidden": model.config.hidden_size}
        graph = fusable_graph(model, exporter="torchscript", opset=17)
        graph, _ = fuse(graph, layers=model.config.num_hidden_layers, opset=17, **sizes)
    else:
        graph = portable_graph(model, exporter="torchscript", opset=17)
    pad_id = checked_encoder(student, max_length=facts.max_length).pad_id
    smoothed, divided = smooth(graph, examples=facts.calibration.examples, pad_id=pad_id)
    made = [copy_first_row(quantize(source, fused=fused, per_channel=True)) for source in (graph, smoothed)]
    made += [quantize_rows(source, fused=fused) for source in (graph, smoothed)]
    files = {}
    for name, result in zip(("fp32", *FORMS), (graph, *made), strict=True):
        files[name] = folder / f"{len(files)}.onnx"
        save(result, files[name])
    return files, len(divided)


def losses(student: Path, graphs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Return by form how far int8 is from the fp32 graph on the student's evaluation rows."""
    from bertemd_deploy.checkpoints import checked_encoder
    from bertemd_deploy.facts import read_student
    from bertemd_deploy.runtime import open_session, predict_logits

    facts = read_student(student)
    part = facts.evaluation.examples
    pad_id = checked_encoder(student, max_length=facts.max_length).pad_id
    logits = {name: predict_logits(open_session(path), part, pad_id=pad_id) for name, path in graphs.items()}
    exact = logits["fp32"]
    return {
        name: {
            "kl": float(divergences(exact, logits[name]).mean()),
            "squared_error": float(np.square(logits[name].astype(np.float64) - exact).mean()),
            "changed_decisions": int((logits[name].argmax(-1) != exact.argmax(-1)).sum()),
            "rows": len(part),
            "bytes": graphs[name].stat().st_size,
        }
        for name in FORMS
    }


def timed(student: str, graphs: Mapping[str, Path], sequence: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of `latency.measure` for the forms of int8, one row of `sequence` tokens at a time."""
    engines = {name: ["onnx", str(graphs[name])] for name in FORMS}
    settings = {"teacher": student, "student": student, "batch": 1, "sequence": sequence}
    chosen = argparse.Namespace(**settings, threads=options.threads, rounds=options.rounds)
    found = latency.measure(engines, options=chosen)
    turns = {name: [[round(ms, 3) for ms in turn] for turn in taken] for name, taken in found["latency_ms"].items()}
    return found | {"latency_ms": turns}


def print_table(record: Mapping[str, Any]) -> None:
    """Print each form's loss, and its time over that of plain int8 with its 95% interval."""
    print(f"{'student, graph, form':44s} {'KL':>9s} {'error':>9s} {'changed':>10s}   time / plain int8's, by tokens")
    for name, found in record["students"].items():
        for graph, entry in found["graphs"].items():
            for form in FORMS:
                loss = entry["loss"][form]
                ratios = []
                for one in entry["latency"]:
                    turns = one["latency_ms"]
                    ratios.append("{}: {:.3f} [{:.3f}, {:.3f}]".format(
                        one["settings"]["sequence"], *latency.ratio(turns[form], turns["plain"])
                    ))  # fmt: skip
                print(
                    f"{f'{name}, {graph}, {form}':44s} {loss['kl']:9.5f} {loss['squared_error']:9.5f} "
                    f"{loss['changed_decisions']:4d} of {loss['rows']:<5d} {'  '.join(ratios)}"
                )
            print(f"  {entry['smoothed_activations']} activations smoothed")


if __name__ == "__main__":
    main()
