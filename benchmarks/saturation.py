"""What an int8 graph answers on other CPUs: predicted on this machine, and run there under emulation.

    python benchmarks/saturation.py --artifact ARTIFACT --out benchmarks/results/saturation.json \
        --runner "avx2=qemu-x86_64 -cpu Haswell PYTHON" --runner "sse4=qemu-x86_64 -cpu Nehalem PYTHON" \
        --runner "arm64=ARM64 -cpu cortex-a53 ARM/usr/bin/python3.11" \
        --runner "arm64-dotprod=ARM64 -cpu neoverse-n1 ARM/usr/bin/python3.11" \
        --runner "arm64-i8mm=ARM64 -cpu neoverse-n2 ARM/usr/bin/python3.11" \
        --runner "arm64-sme=ARM64 -cpu max ARM/usr/bin/python3.11" --web WEB

where ARM64 is qemu-aarch64 -L ARM -E PYTHONHOME=ARM/usr -E PYTHONPATH=ARM/site

A runner is a name and the command of a Python with numpy and onnxruntime, here PYTHON for this machine's. Each is first asked
whether its int8 products saturate. Then a student with extreme weights, in every int8 form, and the artifact's int8 graphs
answer the same batches: natively, in every runner, and, where sums saturate, as the graph that emulates that
(`quantization.emulation`), natively and in the runner. On one CPU a graph and its emulation have to agree bit for bit. From
one CPU to another float kernels differ in their last bits, which now and then moves a code by one: there, logits are compared
and decisions counted. The artifact's metric is predicted on its whole evaluation slice.

The emulator is qemu-user 9 or later, of Debian 13 or newer (`apt-get install qemu-user`); 10.0 was used. Older ones multiply
wrongly in SME, and leave ONNX Runtime for Arm without a /proc/cpuinfo that it can read. ARM is a Python for Arm in a folder,
on Debian 12 made so:

    dpkg --add-architecture arm64 && apt-get update
    apt-get download python3.11-minimal:arm64 libpython3.11-minimal:arm64 libpython3.11-stdlib:arm64 libc6:arm64 \
        libstdc++6:arm64 libgcc-s1:arm64 zlib1g:arm64 libexpat1:arm64 libssl3:arm64 libffi8:arm64 libbz2-1.0:arm64 \
        liblzma5:arm64 libuuid1:arm64
    for package in *.deb; do dpkg -x $package ARM; done
    pip download --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_28_aarch64 numpy onnxruntime
    for wheel in *.whl; do python -m zipfile -e $wheel ARM/site; done
    dpkg --remove-architecture arm64 && apt-get update

WEB is a folder in which `npm install onnxruntime-web` was run; node runs its WebAssembly. Emulation is slow: a few short
texts take minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Logits = np.ndarray
EXTREME_EXAMPLES = 12
CLIP_AT = 1.3  # standard deviations; what is beyond becomes the largest weight
PRODUCT = (7, 311, 50)  # rows, inner dimension, columns of the product that runners are asked about


@dataclass(frozen=True)
class Subject:
    """A model to run: its graphs by name, and the batches that they answer."""

    name: str
    graphs: dict[str, Any]
    batches: list[dict[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="run its int8 graphs too")
    parser.add_argument("--examples", type=int, default=64, help="of the artifact: its shortest ones")
    parser.add_argument("--runner", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--web", type=Path, metavar="FOLDER", help="with node_modules/onnxruntime-web")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args()
    worker = Path(__file__).with_name("saturation_worker.py")
    runners = {"native": [sys.executable, str(worker)]}
    for entry in options.runner:
        name, _, command = entry.partition("=")
        runners[name] = [*shlex.split(command), str(worker)]
    if options.web:
        runners["wasm"] = ["node", str(worker.with_suffix(".mjs")), str(options.web)]
    record = measure(runners, options=options)
    print_table(record)
    if options.out:
        from bertemd_deploy.files import write_json

        write_json(options.out, record)


def measure(runners: Mapping[str, list[str]], *, options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    from bertemd_deploy.bench.environment import device, versions
    from bertemd_deploy.console import note

    subjects = [extreme_student()]
    if options.artifact:
        subjects.append(artifact(options.artifact, count=options.examples))
    record: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": versions(("numpy", "onnxruntime", "torch", "transformers", "onnx")),
        "runners": {},
        "models": [],
    }
    for name, command in runners.items():
        note(f"{name}: asking what its int8 products do")
        record["runners"][name] = emulator(command) | ask(command)
    for subject in subjects:
        found: dict[str, dict[str, Logits]] = {}
        for name, command in runners.items():
            saturates = record["runners"][name]["int8_products"] == "saturating"
            note(f"{subject.name} on {name}{', which saturates' if saturates else ''}")
            found[name] = answers(command, subject, emulated=saturates or name == "native")
        record["models"].append(compared(subject, found, runners=record["runners"]))
    if options.artifact:
        record["predicted_metric"] = predicted_metrics(options.artifact)
    return record


def extreme_student() -> Subject:
    """Return a small random student a fifth of whose weights are as large as they get, in all int8 forms."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from bertemd_deploy.bert_graph import fusable_graph, portable_graph
    from bertemd_deploy.encoding import Encoded
    from bertemd_deploy.fuse import fuse
    from bertemd_deploy.quantization.calibration import collect
    from bertemd_deploy.quantization.dynamic import quantize
    from bertemd_deploy.quantization.static import activations, quantize_static

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=2000, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for weight in (value for name, value in layer.named_parameters() if value.ndim == 2):
                weight.clamp_(-CLIP_AT * weight.std(), CLIP_AT * weight.std())
        model.classifier.weight.mul_(20)
    random = np.random.default_rng(0)
    lengths = random.integers(6, 17, size=EXTREME_EXAMPLES)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(1000, 2000, size=offsets[-1]).astype(np.int32)
    part = Encoded(tokens, np.zeros(len(tokens), dtype=np.int8), offsets)
    batch = part.batch(np.arange(len(part)), pad_id=0)
    with torch.no_grad():  # as many rows for one class as for the other
        logits = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
        model.classifier.bias.sub_(torch.tensor([(logits[:, 0] - logits[:, 1]).median(), 0]))
    portable = portable_graph(model, exporter="torchscript", opset=17)
    fusable = fusable_graph(model, exporter="torchscript", opset=17)
    fused, _ = fuse(fusable, layers=2, heads=4, hidden=128, opset=17)
    graphs: dict[str, Any] = {}
    for name, graph, is_fused in (("portable", portable, False), ("fused", fused, True)):
        ranges = collect(graph, activations(graph), examples=part, pad_id=0, count=len(part)).ranges("minmax")
        graphs[f"dynamic {name}"] = quantize(graph, fused=is_fused)
        graphs[f"dynamic {name}, per channel"] = quantize(graph, fused=is_fused, per_channel=True)
        graphs[f"static {name}"] = quantize_static(graph, ranges=ranges, fused=is_fused)
        graphs[f"dynamic {name}, 7 bits"] = quantize(graph, fused=is_fused, reduce_range=True)
        graphs[f"dynamic {name}, unsigned"] = quantize(graph, fused=is_fused, weight_type="uint8")
    return Subject("2 layers x 128, extreme weights", graphs, [batch])


def artifact(folder: Path, *, count: int) -> Subject:
    """Return an artifact's int8 graphs and its shortest evaluation examples."""
    from bertemd_deploy.artifact import Artifact
    from bertemd_deploy.encoding import length_batches

    loaded = Artifact.load(folder)
    examples = loaded.evaluation().examples
    part = examples.select(np.sort(np.argsort(examples.lengths, kind="stable")[:count]))
    pad_id = padding(folder, loaded.max_length)
    batches = [part.batch(rows, pad_id=pad_id) for rows in length_batches(part.lengths, batch_size=32)]
    graphs: dict[str, Any] = {}
    for source, fused in (("fp32", False), ("fused", True)):
        for name, graph in schemes(loaded, source, fused=fused).items():
            if name == "as exported" or not fused:
                graphs[f"{'fused' if fused else 'portable'}, {name}"] = graph
    return Subject(f"{loaded.manifest['task']['name']} artifact", graphs, batches)


def padding(folder: Path, max_length: int) -> int:
    from bertemd_deploy.encoding import TextEncoder

    return TextEncoder.load(folder, max_length=max_length).pad_id


def schemes(loaded: Any, source: str, *, fused: bool) -> dict[str, Any]:
    """Return an artifact's int8 graph as exported, and made again of its fp32 one with weights that cannot saturate."""
    import onnx

    from bertemd_deploy.quantization.dynamic import quantize
    from bertemd_deploy.quantization.unsigned import unsigned

    graph = "fused-int8" if fused else "int8"
    exported = onnx.load_model(loaded.graph(graph)[1])
    plan = loaded.manifest["quantization"]
    made = quantize(
        onnx.load_model(loaded.graph(source)[1]),
        fused=fused,
        per_channel=plan["per_channel"][graph],
        excluded=plan["excluded"][graph],
        reduce_range=True,
    )
    return {"as exported": exported, "7 bits": made, "unsigned": unsigned(exported)}


def emulator(command: Sequence[str]) -> dict[str, str]:
    """Return which emulator a runner's command starts, and which CPU it emulates; nothing for one without."""
    program = next((part for part in command if Path(part).name.startswith("qemu-")), None)
    if program is None:
        return {}
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return {"emulator": said.splitlines()[0], "cpu": command[list(command).index("-cpu") + 1]}


def ask(command: Sequence[str]) -> dict[str, Any]:
    """Return what a runner is, and whether its int8 products are exact or saturate as the emulation says."""
    from onnx import TensorProto, helper, numpy_helper

    from bertemd_deploy.quantization.emulation import saturating
    from bertemd_deploy.quantization.unsigned import unsigned

    rows, inner, width = PRODUCT
    random = np.random.default_rng(0)
    weight = random.choice([-127, 127], size=(inner, width)).astype(np.int8)
    codes = random.integers(128, 256, size=(rows, inner)).astype(np.uint8)
    node = helper.make_node("MatMulInteger", ["a", "w", "z"], ["c"], name="product")
    values = [
        helper.make_tensor_value_info("a", TensorProto.UINT8, ["rows", inner]),
        helper.make_tensor_value_info("c", TensorProto.INT32, ["rows", width]),
    ]
    held = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(131, dtype=np.uint8), "z")]
    graph = helper.make_graph([node], "product", values[:1], values[1:], held)
    signed = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graphs = {"signed": signed, "unsigned": unsigned(signed), "emulated": saturating(signed)}
    facts, sums = run(command, [(graph, {"a": codes}) for graph in graphs.values()], dtype=np.int32)
    found = dict(zip(graphs, sums, strict=True))
    exact = (codes.astype(np.int32) - 131) @ weight.astype(np.int32)
    if np.array_equal(found["signed"], exact):
        does = "exact"
    else:
        does = "saturating" if np.array_equal(found["signed"], found["emulated"]) else "neither"
    return facts | {
        "int8_products": does,
        "unsigned_products_exact": bool(np.array_equal(found["unsigned"], exact)),
        "sums": int(exact.size),
        "sums_changed_by_saturation": int((found["emulated"] != exact).sum()),
    }


def run(
    command: Sequence[str], jobs: Sequence[tuple[Any, Mapping[str, np.ndarray]]], *, dtype: type
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Run graphs on inputs with a worker; return what the worker is, and the graphs' first outputs."""
    from bertemd_deploy.onnx_edit import save

    with tempfile.TemporaryDirectory() as folder:
        listed = []
        for number, (graph, inputs) in enumerate(jobs):
            path = Path(folder) / f"{number}"
            save(graph, path.with_suffix(".onnx"))
            held = {}
            for name, array in inputs.items():
                file = path.with_suffix(f".{name}")
                np.ascontiguousarray(array).tofile(file)
                held[name] = {"file": str(file), "dtype": str(array.dtype), "shape": list(array.shape)}
            listed.append({"graph": f"{path}.onnx", "inputs": held, "output": f"{path}.out"})
        (Path(folder) / "jobs.json").write_text(json.dumps(listed))
        done = subprocess.run(
            [*command, str(Path(folder) / "jobs.json")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{command[0]}: exit {done.returncode}\n{done.stderr[-2000:]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        shapes = facts.pop("shapes")
        outputs = [np.fromfile(job["output"], dtype).reshape(shape) for job, shape in zip(listed, shapes, strict=True)]
    return facts, outputs


def answers(command: Sequence[str], subject: Subject, *, emulated: bool) -> dict[str, Logits]:
    """Return a runner's logits of every graph, by its name; `emulated` adds those of the graphs that emulate them."""
    from bertemd_deploy.quantization.emulation import saturating

    graphs = dict(subject.graphs)
    if emulated:
        graphs |= {
            f"{name}, emulated": saturating(graph) for name, graph in subject.graphs.items() if can_saturate(name)
        }
    jobs = [(graph, batch) for graph in graphs.values() for batch in subject.batches]
    _, outputs = run(command, jobs, dtype=np.float32)
    parts = len(subject.batches)
    return {name: np.concatenate(outputs[at * parts : (at + 1) * parts]) for at, name in enumerate(graphs)}


def can_saturate(name: str) -> bool:
    return not name.endswith(("7 bits", "unsigned"))


def compared(
    subject: Subject, found: Mapping[str, Mapping[str, Logits]], *, runners: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a model's part of the record."""
    from bertemd_deploy.onnx_edit import Editor
    from bertemd_deploy.quantization.emulation import weight_pairs
    from bertemd_deploy.quantization.unsigned import signed_weights

    graphs: dict[str, Any] = {}
    for name, graph in subject.graphs.items():
        editor = Editor(graph)
        weights = [editor.array(node.input[at]) for node, at, _ in signed_weights(editor)]
        entry: dict[str, Any] = {
            "weight_pairs": sum((len(weight) + 1) // 2 * weight.shape[1] for weight in weights if weight is not None),
            "weight_pairs_that_can_saturate": sum(
                len(weight_pairs(weight)[0]) for weight in weights if weight is not None
            ),
            "runners": {},
        }
        native = found["native"]
        for runner, logits in found.items():
            saturates = runners[runner]["int8_products"] == "saturating" and can_saturate(name)
            expected = native[f"{name}, emulated"] if saturates else exact_logits(native, name, runners["native"])
            row = {"expected": "saturating" if saturates else "exact"} | difference(logits[name], expected)
            if saturates:
                row["equals_emulation_on_the_same_cpu"] = bool(
                    np.array_equal(logits[name], logits[f"{name}, emulated"])
                )
                row["from_exact"] = difference(logits[name], exact_logits(native, name, runners["native"]))
            entry["runners"][runner] = row
        graphs[name] = entry
    rows = sum(len(batch["input_ids"]) for batch in subject.batches)
    tokens = int(sum(batch["attention_mask"].sum() for batch in subject.batches))
    return {"name": subject.name, "examples": rows, "tokens": tokens, "graphs": graphs}


def exact_logits(native: Mapping[str, Logits], name: str, runner: Mapping[str, Any]) -> Logits:
    """Return this machine's logits of a graph, which have to be exact."""
    if runner["int8_products"] != "exact":
        raise SystemExit("this machine's own int8 products saturate; run this on one with VNNI, or on Arm")
    return native[name]


def difference(found: Logits, expected: Logits) -> dict[str, Any]:
    """Return how far logits are from others, and on how many rows the decisions agree."""
    return {
        "bit_identical": bool(np.array_equal(found, expected)),
        "max_abs_logit_difference": float(np.abs(found - expected).max()),
        "decision_agreement": float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
    }


def predicted_metrics(folder: Path) -> dict[str, Any]:
    """Return an artifact's metrics on its whole evaluation slice, exact and where sums saturate, for all weights."""
    from bertemd_deploy.artifact import Artifact
    from bertemd_deploy.metrics import evaluate_metrics
    from bertemd_deploy.quantization.saturation import predict_saturation

    loaded = Artifact.load(folder)
    part = loaded.evaluation()
    pad_id = padding(folder, loaded.max_length)
    found = {}
    for name, graph in schemes(loaded, "fp32", fused=False).items():
        report = predict_saturation(graph, examples=part.examples, pad_id=pad_id, kind=part.kind)
        scores = {
            which: evaluate_metrics(loaded.metric_names, logits=logits, part=part, label_names=loaded.labels)
            for which, logits in (("exact", report.exact_logits), ("saturating", report.logits))
        }
        found[name] = {**report.record(), "metrics": scores}
    return {"graph": "int8", "examples": len(part), "weights": found, "fp32": loaded.manifest["metrics"]["fp32"]}


def print_table(record: Mapping[str, Any]) -> None:
    """Print what every runner's products do, and how its logits agree with what was predicted."""
    for name, facts in record["runners"].items():
        print(f"{name:16s} {facts['machine']:8s} int8 products {facts['int8_products']}")
    for model in record["models"]:
        print(f"\n{model['name']}: {model['examples']} examples, {model['tokens']} tokens")
        for graph, entry in model["graphs"].items():
            share = entry["weight_pairs_that_can_saturate"] / max(1, entry["weight_pairs"])
            print(f"  {graph}: {share:.2%} of the weight pairs can saturate")
            for runner, row in entry["runners"].items():
                same = "equal" if row["bit_identical"] else f"{row['max_abs_logit_difference']:.1e}"
                line = f"    {runner:16s} against {row['expected']:10s} {same:8s} decisions {row['decision_agreement']:.1%}"
                if "from_exact" in row:
                    held = "bit for bit" if row["equals_emulation_on_the_same_cpu"] else "NOT EQUAL"
                    away = row["from_exact"]
                    line += f"; its own emulation {held}; exact {away['max_abs_logit_difference']:.1e}, "
                    line += f"decisions {away['decision_agreement']:.1%}"
                print(line)
    if "predicted_metric" in record:
        print(
            f"\npredicted on {record['predicted_metric']['examples']} examples; fp32 {record['predicted_metric']['fp32']}"
        )
        for weights, entry in record["predicted_metric"]["weights"].items():
            print(f"  {weights:12s} {entry['metrics']}, decisions {entry['decision_agreement']:.1%}")


if __name__ == "__main__":
    main()
