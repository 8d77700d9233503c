"""The same student through our export and through other tools, each at its best documented setting: latency on a grid.

    python benchmarks/export_peers.py --student 4L-312 --env optimum=PYTHON --env openvino=PYTHON --out RECORD
    python benchmarks/export_peers.py --table RECORD

ONNX Runtime's own tools and PyTorch run in this environment (torch.compile needs a C++ compiler and Python's headers). Optimum
pins an older transformers, so it and OpenVINO get environments of their own, with this project's versions of what both use:

    python3 -m venv peers/optimum
    peers/optimum/bin/pip install torch==2.13.0 "optimum-onnx[onnxruntime]==0.1.0" onnxruntime==1.31.1 onnx==1.23.2
    python3 -m venv peers/openvino
    peers/openvino/bin/pip install openvino==2026.4.1 nncf==3.4.0

with a CPU build of torch, or gigabytes of CUDA come along; PYTHON is then peers/optimum/bin/python, and so on.
A peer that has no environment, cannot be built or does not run is in the record under "not_measured", with the reason.

- Weights are random and seeded: latency does not depend on them. They are written once, as a Hugging Face folder that
  everything starts from. Every engine's logits are compared with PyTorch's in every cell; the largest difference is recorded,
  and an fp32 engine beyond 1e-2 is not measured. An --artifact has weights of its own, so its logits are not compared.
- One process per engine and thread count. All but the one whose turn it is are suspended, so that threads that spin after
  a call take nobody's CPU. Engines take turns in every round, each round from another engine on; a few untimed calls
  lead each turn.
- p50 is over all samples of a cell. A ratio is the median over rounds of (ours / other in the same round), with a 95%
  bootstrap interval over rounds. "Ours" is the graph that `graph="auto"` picks; the best peer is the one with the lowest
  p50 in the cell, whatever its precision.
- The floor is the sum of the matrix products that a BERT classifier cannot do without (`peer_models.floor_products`: those
  of every layer, attention's two included, the last layer for the first token only where that suffices, the pooler; not
  the head), all in int8: one ONNX Runtime session that holds a MatMulInteger for each, uint8 by int8 giving int32, weights
  packed beforehand, results into buffers that are there already, and nothing else: no quantizing, rescaling, softmax,
  GELU, LayerNorm, lookup or copy.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peer_models  # noqa: E402 - found through the line above
from latency import SHAPES  # noqa: E402 - found through the line above
from peer_tables import FLOOR, OURS, summarise, table  # noqa: E402
from train_step import commit  # noqa: E402

from bertemd_deploy.artifact import GRAPH_PRECISION, Artifact  # noqa: E402
from bertemd_deploy.bench.environment import OtherWork, conditions, device, versions  # noqa: E402
from bertemd_deploy.bench.memory import graph_bytes, weight_bytes  # noqa: E402
from bertemd_deploy.bench.passes import DISTURBANCE, OVERRUN, calls_per_round  # noqa: E402
from bertemd_deploy.bench.process import Worker  # noqa: E402
from bertemd_deploy.console import note, progress  # noqa: E402
from bertemd_deploy.errors import ArtifactError, BertemdError, MeasurementError  # noqa: E402
from bertemd_deploy.files import read_json, sha256_file, sha256_json, write_text  # noqa: E402

HERE = ("onnxruntime", "pytorch")  # peers that this interpreter runs unless --env says otherwise
SMOKE = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99}
LONGEST = 512  # tokens of the student's position table
LARGEST_DIFFERENCE = 1e-2  # of an fp32 engine's logits; GELU's approximation is within
WARM_UP_SECONDS = 0.5
LEAD_MS = 10.0  # of untimed calls before a turn
MOST_LEADING_CALLS = 10
MOST_SAMPLES = 24  # of a turn
STOPPING_SECONDS = 2.0  # waited for a suspended process to stand still

Ask = Callable[..., Any]
Start = Callable[..., contextlib.AbstractContextManager[Ask]]


@dataclass(frozen=True)
class Engine:
    """Something to be timed.

    Attributes:
        family: "ours", "floor" or a peer of `peer_models.PEERS`.
        name: within its family.
        precision: of its matrix products.
        how: its setting in words.
        python: interpreter that runs it.
        path: what it opens.
        bytes: size of its model.
        options: what it is told when it opens the path.
    """

    family: str
    name: str
    precision: str
    how: str
    python: str
    path: str
    bytes: int
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """What to call it, such as "onnxruntime dynamic"."""
        return FLOOR if self.family == FLOOR else f"{self.family} {self.name}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options; `env` as interpreters by peer, `peers` as (family, name) pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=("4L-312", "6L-768"), default="4L-312")
    parser.add_argument("--artifact", type=Path, help="time this artifact's graphs instead of exporting; same sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.15, help="of one engine's turn")
    parser.add_argument(
        "--peers", nargs="*", help=f"among {', '.join(peer_models.PEERS)}, or single engines; default all"
    )
    parser.add_argument("--env", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has a peer")
    parser.add_argument("--work", type=Path, help="keep exported models here, and use them again")
    parser.add_argument("--out", type=Path, help="write raw samples and machine facts here, as JSON")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record as Markdown, measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny student: shows that everything runs")
    options = parser.parse_args(arguments)
    numbers = (*options.threads, *options.sequences, *options.batches, options.rounds)
    if min(numbers) < 1 or max(options.sequences) > LONGEST or options.seconds <= 0:
        parser.error(f"all numbers are above 0, and the student has positions for {LONGEST} tokens")
    engines = {f"{family} {name}": (family, name) for family, names in peer_models.PEERS.items() for name in names}
    asked = list(peer_models.PEERS) if options.peers is None else options.peers
    if unknown := [name for name in asked if name not in peer_models.PEERS and name not in engines]:
        parser.error(f"--peers: unknown {', '.join(unknown)}; known are {', '.join((*peer_models.PEERS, *engines))}")
    options.peers = [pair for label, pair in engines.items() if label in asked or pair[0] in asked]
    pythons = dict.fromkeys(HERE, sys.executable)
    for given in options.env:
        family, _, python = given.partition("=")
        if family not in peer_models.PEERS or not os.access(python, os.X_OK) or Path(python).is_dir():
            parser.error(
                f"--env {given}: give PEER=PYTHON, a peer of {', '.join(peer_models.PEERS)} and a Python that can be run"
            )
        pythons[family] = python
    options.env = pythons
    return options


def main() -> None:
    options = parse()
    if options.table:
        print(table(read_json(options.table, what="record")))
        return
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertemd-peers-")))
        try:
            record = measure(options, work=work, start=process)
        except BertemdError as error:
            raise SystemExit(str(error)) from error
    if options.out:
        write_text(options.out, json.dumps(record, allow_nan=False) + "\n")
    print(table(record))


@contextlib.contextmanager
def process(name: str, *, python: str, threads: int) -> Iterator[Ask]:
    """Start a process of `peer_engines.py`; yield what asks it. Except while it answers, it is suspended."""
    command = (python, str(ROOT / "benchmarks" / "peer_engines.py"))
    with Worker(name, threads=threads, command=command) as worker:
        handle = psutil.Process(worker.pid)

        def ask(command: str, **arguments: Any) -> Any:
            with contextlib.suppress(psutil.Error):  # it has died; the request says how
                handle.resume()
            try:
                return worker.request(command, **arguments)
            finally:
                with contextlib.suppress(psutil.Error):
                    handle.suspend()
                    until = time.monotonic() + STOPPING_SECONDS
                    while handle.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
                        time.sleep(0.0005)

        try:
            yield ask
        finally:
            with contextlib.suppress(psutil.Error):
                handle.resume()


def measure(options: argparse.Namespace, *, work: Path, start: Start) -> dict[str, Any]:
    """Build every engine, time all of them on the grid, and return the record.

    Raises:
        MeasurementError: our export or the floor failed; a peer that fails is recorded.
        ArtifactError: `options.artifact` is damaged, of other sizes than the student, or too short for the grid.
    """
    started, before = datetime.datetime.now(datetime.UTC), conditions()
    work = work.resolve()
    shapes = list(product(options.batches, options.sequences))
    student = "smoke" if options.smoke else options.student
    sizes = SMOKE if options.smoke else SHAPES[options.student]
    source = work / f"student-{student}"
    note(f"building the student and its exports in {work}")
    with start("student", python=sys.executable, threads=os.cpu_count() or 1) as ask:
        config = ask("student", sizes=sizes, folder=str(source))
        artifact = _artifact(options, config=config, source=source, out=work / f"ours-{student}", ask=ask)
        vocabulary = min(of["vocab_size"] for of in (config, read_json(artifact.folder / "config.json", what="config")))
        logits = ask("logits", source=str(source), vocabulary=vocabulary, cells=shapes)["logits"]
        reference = {shape: np.array(values) for shape, values in zip(shapes, logits, strict=True)}
        floor = work / f"floor-{student}.onnx"
        asked = ask("floor", source=str(source), out=str(floor))["options"]
    int8 = [name for name in artifact.graphs() if GRAPH_PRECISION[name] == "int8"]
    auto, _ = artifact.graph("auto")
    engines = []
    for name in dict.fromkeys([*int8, auto]):
        path = artifact.graph(name)[1]
        size, precision = graph_bytes(path), GRAPH_PRECISION[name]
        engines.append(Engine(OURS, name, precision, "bertemd export", sys.executable, str(path), size, {}))
    how = "the matrix products alone"
    engines.append(Engine(FLOOR, "", "int8", how, sys.executable, str(floor), graph_bytes(floor), asked))
    built, missing, found = build(options, source=source, work=work, start=start)
    cells: list[dict[str, Any]] = []
    for threads in options.threads:
        cells += time_cells(
            [*engines, *built],
            threads=threads,
            reference=reference,
            vocabulary=vocabulary,
            options=options,
            work=work,
            start=start,
        )
    record = {
        "started": started.isoformat(timespec="seconds"),
        "settings": {
            key: getattr(options, key)
            for key in ("student", "threads", "batches", "sequences", "rounds", "seconds", "smoke")
        },
        "weights": "random, seed 0" if options.artifact is None else "random, seed 0; ours: those of the artifact",
        "commit": commit(),
        "device": device(),
        "conditions": {"before": before, "after": conditions()},
        "versions": {OURS: versions(("numpy", "onnxruntime", "onnx", "torch", "transformers"))} | found,
        "ours": f"{OURS} {auto}",
        "engines": {
            engine.label: {key: getattr(engine, key) for key in ("family", "precision", "how", "bytes")}
            for engine in (*engines, *built)
        },
        "not_measured": missing,
        "cells": cells,
    }
    return record | {"summary": [summarise(cell, ours=record["ours"]) for cell in cells]}


def _artifact(options: argparse.Namespace, *, config: Mapping[str, Any], source: Path, out: Path, ask: Ask) -> Artifact:
    """Return the artifact named, once it fits the student's `config` and the grid; without one, a new export."""
    given = options.artifact
    if given is None:
        ask("ours", source=str(source), out=str(out))
        return Artifact.load(out)
    artifact = Artifact.load(given)
    keys = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}
    wanted = {ours: config[theirs] for ours, theirs in (keys | {"intermediate": "intermediate_size"}).items()}
    found = {key: artifact.manifest.get("student", {}).get(key) for key in wanted}
    if found != wanted or artifact.kind not in ("classification", "regression", "multilabel"):
        raise ArtifactError(
            f"{given}: a student for {artifact.kind} of sizes {found}; it is compared with classifiers of sizes {wanted}. "
            "Name the --student it was made as."
        )
    positions = read_json(given / "config.json", what="config")["max_position_embeddings"]
    if max(options.sequences) > positions:
        raise ArtifactError(f"{given}: takes up to {positions} tokens. Give shorter --sequences.")
    return artifact


def build(
    options: argparse.Namespace, *, source: Path, work: Path, start: Start
) -> tuple[list[Engine], dict[str, str], dict[str, Any]]:
    """Build the peers asked for; return their engines, why each of the others is missing, and the peers' versions."""
    engines: list[Engine] = []
    missing: dict[str, str] = {}
    found: dict[str, Any] = {}
    files = (source / "model.safetensors", source / peer_models.PLAIN, Path(peer_models.__file__))
    origin = [sha256_file(path) for path in files]
    for family in dict.fromkeys(family for family, _ in options.peers):
        names = [name for of, name in options.peers if of == family]
        python = options.env.get(family)
        if python is None:
            missing |= {f"{family} {name}": f"no --env {family}=PYTHON was given" for name in names}
            continue
        with start(family, python=python, threads=os.cpu_count() or 1) as ask:
            for name in names:
                try:
                    found[family] = found.get(family) or ask("versions", family=family)
                    folder = work / f"{family}-{sha256_json([origin, found[family]])[:12]}"
                    path = Path(ask("build", family=family, name=name, source=str(source), folder=str(folder))["path"])
                except MeasurementError as error:
                    missing[f"{family} {name}"] = _reason(error, label=family, work=work)
                    continue
                peer = peer_models.PEERS[family][name]
                size = model_bytes(path)
                engines.append(
                    Engine(family, name, peer.precision, peer.how, python, str(path), size, dict(peer.options))
                )
    for label, reason in missing.items():
        note(f"not measured: {label}: {reason}")
    return engines, missing, found


def model_bytes(path: Path) -> int:
    """Return the size of a model on disk: a Hugging Face folder's weights, an ONNX file, or OpenVINO's two files."""
    if path.is_dir():
        return weight_bytes(path)
    return graph_bytes(path) + sum(part.stat().st_size for part in [path.with_suffix(".bin")] if part.is_file())


def _reason(error: MeasurementError, *, label: str, work: Path) -> str:
    """Return an error's first sentence as a record keeps it, without this machine's paths."""
    return str(error).removeprefix(f"bench, {label}: ").partition("\n")[0].replace(str(work), "WORK")


def time_cells(
    engines: Sequence[Engine],
    *,
    threads: int,
    reference: Mapping[tuple[int, int], Any],
    vocabulary: int,
    options: argparse.Namespace,
    work: Path,
    start: Start,
) -> list[dict[str, Any]]:
    """Time all engines in every cell of one thread count, each in a process of its own.

    Args:
        engines: ours, the floor, the peers.
        threads: of every engine.
        reference: PyTorch's logits by (batch, sequence), each (batch, outputs).
        vocabulary: token ids.
        options: rounds and seconds.
        work: folder of the models, for messages.
        start: starts a process.

    Returns:
        For every cell: threads, batch, sequence; samples_ms by engine, a list for each round; difference, the largest of
        logits from PyTorch's, by engine; not_measured, reasons by engine; other_cpus_busy, disturbed.

    Raises:
        MeasurementError: an engine of ours, or the floor, failed or answers wrongly.
    """
    cells: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack, progress(f"threads: {threads}", len(reference)) as bar:
        asks: dict[str, Ask] = {}
        pids: dict[str, int] = {}
        unopened: dict[str, str] = {}
        by_label = {engine.label: engine for engine in engines}

        def failed(label: str, error: MeasurementError, reasons: dict[str, str]) -> None:
            if by_label[label].family in (OURS, FLOOR):
                raise error
            reasons[label] = _reason(error, label=label, work=work)
            note(f"not measured: {label}: {reasons[label]}")

        for label, engine in by_label.items():
            ask = stack.enter_context(start(label, python=engine.python, threads=threads))
            try:
                opened = ask("open", family=engine.family, path=engine.path, threads=threads, options=engine.options)
            except MeasurementError as error:
                failed(label, error, unopened)
                continue
            asks[label], pids[label] = ask, opened["process"]
        for (batch, sequence), expected in reference.items():
            reasons = dict(unopened)
            medians: dict[str, float] = {}
            differences: dict[str, float] = {}
            for label, ask in asks.items():
                try:
                    warm = ask("shape", batch=batch, sequence=sequence, vocabulary=vocabulary, seconds=WARM_UP_SECONDS)
                    if warm["logits"] is not None and not (by_label[label].family == OURS and options.artifact):
                        differences[label] = difference(
                            np.array(warm["logits"]), expected, precision=by_label[label].precision, label=label
                        )
                except MeasurementError as error:
                    failed(label, error, reasons)
                    continue
                medians[label] = warm["median_ms"]
            samples: dict[str, list[list[float]]] = {label: [] for label in medians}
            watch = OtherWork([pids[label] for label in medians])
            for number in range(options.rounds):
                for label in rotated([label for label in medians if label in samples], number, rounds=options.rounds):
                    turn = turn_of(medians[label], seconds=options.seconds)
                    try:
                        samples[label].append(asks[label]("turn", **turn)["samples_ms"])
                    except MeasurementError as error:
                        failed(label, error, reasons)
                        del samples[label]
            busy = (
                None if len(samples) < len(medians) else watch.cpus_busy()
            )  # a process that died took its times along
            disturbed = busy is None or busy > watch.cpus - threads + DISTURBANCE
            cells.append(
                {"threads": threads, "batch": batch, "sequence": sequence}
                | {"samples_ms": samples, "difference": differences, "not_measured": reasons}
                | {"other_cpus_busy": busy, "disturbed": disturbed}
            )
            bar.advance(detail=f"batch {batch}, {sequence} tokens")
    return cells


def difference(logits: NDArray[np.float64], expected: NDArray[np.float64], *, precision: str, label: str) -> float:
    """Return the largest absolute difference of an engine's logits from PyTorch's, both (batch, outputs).

    Raises:
        MeasurementError: another shape, a value that is not finite, or an fp32 engine beyond `LARGEST_DIFFERENCE`.
    """
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        raise MeasurementError(f"bench, {label}: its logits {logits.shape} are not finite values of {expected.shape}")
    found = float(np.abs(logits - expected).max())
    if precision == "fp32" and found > LARGEST_DIFFERENCE:
        raise MeasurementError(
            f"bench, {label}: its logits differ from PyTorch's by {found:.1e} (allowed {LARGEST_DIFFERENCE:.0e})"
        )
    return found


def turn_of(median_ms: float, *, seconds: float) -> dict[str, Any]:
    """Return what a turn of `seconds` asks of an engine whose calls take `median_ms`.

    None leads calls that fill a turn alone: a cold cache is nothing to them.
    """
    lead = 0 if median_ms > 1000 * seconds else int(np.clip(np.ceil(LEAD_MS / median_ms), 1, MOST_LEADING_CALLS))
    count = min(MOST_SAMPLES, calls_per_round(median_ms, seconds=seconds))
    return {"count": count, "lead": lead, "most_seconds": OVERRUN * seconds}


def rotated(labels: Sequence[str], number: int, *, rounds: int) -> list[str]:
    """Return the order of round `number`: the same circle, begun evenly further on in every round."""
    first = number * len(labels) // rounds
    return [*labels[first:], *labels[:first]]


if __name__ == "__main__":
    main()
