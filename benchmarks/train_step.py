"""One distillation step beside the released one: seconds, memory, where the time goes, and how near the machine's peak.

    python benchmarks/train_step.py --student 4L-312 --glue FOLDER --tokenizer FOLDER --out train-step-4l-312.json

The teacher is BERT-base, weights are random. Workloads: "equal", rows of one length without padding; and a task's train rows,
which the released step takes in random order padded to --pad, ours as `training_batches` gives them, padded to their own
longest row. A round takes a few batches, each from another range of lengths, and both steps see the same rows. Without
--glue and --tokenizer, rows of random tokens follow the tasks' length histograms in `train_engines.py`.

Every engine runs in a process of its own; only one computes at a time, and engines take turns in every round, in reversed
order every other round. A ratio is the median over rounds of released time / engine time, with a bootstrap interval over
rounds. Before anything is timed, both steps have to agree in losses and layer weights. `released_step.py` says what the
released step is and where it is better than the original.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from latency import answer, ratio  # noqa: E402 - found through the line above

# Rows of `train_engines.ENGINES`.
ENGINES = ("released", "released, masked once", "ours, float32, padded", "ours, float32", "ours")
ABLATION = ENGINES[1:4]
EQUAL = "equal"
AGREEMENT = 1e-3  # largest relative difference of a loss or a layer weight
COSTS = ("losses", "flow", "losses backward")
PROJECTION = ("projection", "projection backward")
PHASES = ("teacher", "student", *PROJECTION, *COSTS, "student backward", "optimizer", "other")
BARS = {"memory": 0.5, "costs and flow": 0.08, "emd over uniform": 0.05}

Ask = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--student", choices=("4L-312", "6L-768"), default="4L-312")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row of the equal workload")
    parser.add_argument(
        "--pad", type=int, default=128, help="longest row, and what the released step pads tasks' rows to"
    )
    parser.add_argument("--tasks", nargs="*", choices=("rte", "mrpc", "cola"), default=["rte", "mrpc", "cola"])
    parser.add_argument("--glue", help="folder with RTE, MRPC and CoLA, each with train.tsv")
    parser.add_argument("--tokenizer", help="model folder with BERT's tokenizer.json")
    parser.add_argument("--batches", type=int, default=2, help="batches of a task in one turn")
    parser.add_argument("--rounds", type=int, default=8, help="of about 4 minutes on 2 cores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ablation", action=boolean, default=True, help="measure ours in float32 too, also padded")
    parser.add_argument("--breakdown", action=boolean, default=True, help="time phases and mappings of our step")
    parser.add_argument("--memory", action=boolean, default=True, help="measure the peak memory of a step")
    parser.add_argument("--memory-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--memory-batch", type=int, default=8, help="rows of a step")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models: shows that everything runs, measures nothing"
    )
    parser.add_argument("--out", type=Path, help="write raw samples and machine facts here, as JSON")
    options = parser.parse_args()
    if bool(options.glue) != bool(options.tokenizer):
        parser.error("--glue and --tokenizer go together")
    record = measure(options, start=process)
    print_table(record)
    if options.out:
        from bertemd_deploy.files import write_json

        write_json(options.out, record)


@contextlib.contextmanager
def process(name: str, settings: Mapping[str, Any]) -> Iterator[Ask]:
    """Start an engine in a process of its own; yield what asks it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_engines.py"), name, json.dumps(settings)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(command: str, **arguments: Any) -> Any:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps({"command": command} | arguments) + "\n")
        worker.stdin.flush()
        return json.loads(answer(worker, name))

    try:
        yield ask
    finally:
        worker.kill()
        worker.communicate()


def measure(
    options: argparse.Namespace, *, start: Callable[[str, Mapping[str, Any]], contextlib.AbstractContextManager[Ask]]
) -> dict[str, Any]:
    """Check agreement, then measure memory, then time all engines in turns; return the record."""
    from bertemd_deploy.bench.environment import OtherWork, conditions, device, versions
    from bertemd_deploy.bench.passes import DISTURBANCE
    from bertemd_deploy.console import note, progress

    keys = ("student", "batch", "length", "pad", "batches", "threads", "glue", "tokenizer", "smoke")
    settings = {key: getattr(options, key) for key in keys}
    names = [name for name in ENGINES if options.ablation or name not in ABLATION]
    workloads = [EQUAL, *options.tasks]
    started, before = datetime.datetime.now(datetime.UTC), conditions()
    note("comparing what the two steps compute")
    with start("ours, float32", settings) as ask:
        agreement = ask("agree")
    if not max(agreement.values()) <= AGREEMENT:
        raise SystemExit(f"the released step and ours differ (allowed {AGREEMENT:g}): {agreement}")
    memory = {}
    for name in names if options.memory else ():
        if name != "ours, float32, padded":  # equal lengths: padding makes no difference
            note(f"memory of {name} at {options.memory_batch} x {options.memory_length}")
            with start(name, settings | {"batch": options.memory_batch, "length": options.memory_length}) as ask:
                memory[name] = ask("memory")
    turns: dict[str, dict[str, list[Any]]] = {workload: {name: [] for name in names} for workload in workloads}
    breakdown: dict[str, list[Any]] = {workload: [] for workload in workloads if options.breakdown}
    flops: dict[str, list[Any]] = {workload: [] for workload in breakdown}
    peaks = []
    with contextlib.ExitStack() as running, progress("rounds", options.rounds) as bar:
        engines = {name: running.enter_context(start(name, settings)) for name in names}
        facts = {name: ask("facts") for name, ask in engines.items()}
        others = OtherWork([of.pop("process") for of in facts.values()])
        for number in range(options.rounds):
            for workload in workloads:
                for name in names if number % 2 == 0 else reversed(names):
                    if name != "ours, float32, padded" or workload != EQUAL:
                        turns[workload][name].append(engines[name]("turn", workload=workload, number=number))
            for workload in breakdown:
                breakdown[workload].append(engines["ours"]("breakdown", workload=workload, number=number))
                flops[workload].append(engines["ours"]("flops", workload=workload, number=number))
            peaks.append(engines["ours"]("peak"))
            latest = {name: per_example(turns[EQUAL][name][-1:])[0] for name in ("released", "ours")}
            note(f"round {number + 1}: " + ", ".join(f"{name} {own:.4f} s/example" for name, own in latest.items()))
            bar.advance()
        busy = others.cpus_busy()
        disturbed = busy > others.cpus - options.threads + DISTURBANCE
    own = {key: value for key, value in vars(options).items() if key not in ("out", "glue", "tokenizer")}
    return {
        "started": started.isoformat(timespec="seconds"),
        "settings": own | {"teacher": "bert-base", "rows": "real" if options.glue else "length histograms"},
        "commit": commit(),
        "device": device(),
        "conditions": {"before": before, "after": conditions(), "other_cpus_busy": busy, "disturbed": disturbed},
        "versions": versions(("numpy", "torch", "transformers", "tokenizers", "pot")),
        "engines": facts,
        "agreement": agreement,
        "memory_bytes": memory,
        "steps": {workload: {name: part for name, part in of.items() if part} for workload, of in turns.items()},
        "breakdown_seconds": breakdown,
        "flops": flops,
        "peak_gflops": peaks,
    }


def commit() -> str | None:
    """Return the checkout's commit, with "+changes" where tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def print_table(record: Mapping[str, Any]) -> None:
    """Print speeds and ratios of every workload, memory, phases with their share of the peak, and the bars."""
    settings = record["settings"]
    print(
        f"{settings['teacher']} teaches {settings['student']}, batch {settings['batch']}, {settings['threads']} threads, "
        f"{settings['rounds']} rounds{', SMOKE TEST' if settings['smoke'] else ''}"
    )
    around = record["conditions"]
    advice = ": measure again on a quiet machine" if around["disturbed"] else ""
    print(f"other programs kept {around['other_cpus_busy']:.2f} CPUs busy{advice}")
    for workload, engines in record["steps"].items():
        print_speeds(workload, engines, record["engines"], settings)
    if record["memory_bytes"]:
        print_memory(record["memory_bytes"], settings)
    peaks = {
        kind: float(np.median([peak[kind] for peak in record["peak_gflops"]])) for kind in record["peak_gflops"][0]
    }
    print("\nmatrix-product peak: " + ", ".join(f"{kind} {peak:,.0f} GFLOP/s" for kind, peak in peaks.items()))
    for workload, rounds in record["breakdown_seconds"].items():
        print_phases(workload, rounds, record["flops"][workload], peaks, record["engines"]["ours"]["precision"])


def print_speeds(
    workload: str, engines: Mapping[str, Any], facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Print seconds for each example, milliseconds for each real token, and the ratios to the released step."""
    kind = f"{settings['length']} tokens each" if workload == EQUAL else f"{settings['rows']}, cut at {settings['pad']}"
    print(f"\n{workload} ({kind})")
    print(f"{'step':24s} {'precision':9s} {'s/example':>10s} {'ms/token':>9s} {'padding':>8s}   x released [95%]")
    totals = {name: total(rounds) for name, rounds in engines.items()}
    reference = per_example(engines["released"])
    for name, rounds in engines.items():
        spent, own = totals[name], per_example(rounds)
        padding = 1 - spent["tokens"] / spent["cells"]
        print(
            f"{name:24s} {facts[name]['precision']:9s} {np.median(own):10.4f} {spent['seconds'] / spent['tokens'] * 1e3:9.3f} "
            f"{padding:8.1%}   {'{:.2f} [{:.2f}, {:.2f}]'.format(*ratio([[x] for x in reference], [[x] for x in own]))}"
            f" (of totals {totals['released']['seconds'] / spent['seconds']:.2f})"
        )


def per_example(rounds: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """Return each round's seconds for one example."""
    return [sum(step["seconds"] for step in steps) / sum(step["rows"] for step in steps) for steps in rounds]


def total(rounds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Return seconds, rows, tokens and cells (tokens with padding) of all steps."""
    steps = [step for part in rounds for step in part]
    sums = {key: float(sum(step[key] for step in steps)) for key in ("seconds", "rows", "tokens")}
    return sums | {"cells": float(sum(step["rows"] * step["width"] for step in steps))}


def print_memory(memory: Mapping[str, Mapping[str, int | None]], settings: Mapping[str, Any]) -> None:
    """Print what a step took beyond the models, and the bar."""
    print(f"\nmemory of a step beyond the models, {settings['memory_batch']} x {settings['memory_length']} tokens")
    taken = {name: (peak := of["peak"]) and peak - of["before"] for name, of in memory.items()}
    for name, size in taken.items():
        if not size or not taken["released"]:
            print(f"{name:24s} unknown on this system")
            continue
        share = size / taken["released"]
        bar = f" (bar {BARS['memory']:.0%})" if name == "ours" else ""
        print(f"{name:24s} {size / 1e6:9,.0f} MB   {share:6.1%} of released{bar}")


def print_phases(
    workload: str, rounds: Sequence[Any], flops: Sequence[Any], peaks: Mapping[str, float], precision: str
) -> None:
    """Print the phases of our step and their arithmetic, and what the layer loss and the flow cost."""
    steps = [step for part in rounds for step in part["emd"]]
    counted = [step for part in flops for step in part]
    whole = sum(sum(step.values()) for step in steps)
    print(f"\n{workload}: our step, {whole / len(steps) * 1e3:,.1f} ms")
    print(f"{'phase':24s} {'ms':>9s} {'share':>7s} {'GFLOP/s':>9s} {'of peak':>8s}")
    for phase in PHASES:
        seconds = sum(step.get(phase, 0.0) for step in steps)
        columns = ""
        if (operations := sum(step.get(phase, 0.0) for step in counted)) and seconds:
            peak = peaks["float32" if phase in COSTS else precision]  # costs are float32 products also under autocast
            columns = f" {operations / seconds / 1e9:9,.1f} {operations / seconds / 1e9 / peak:8.1%}"
        print(f"{phase:24s} {seconds / len(steps) * 1e3:9.2f} {seconds / whole:7.1%}{columns}")
    share = sum(step.get(phase, 0.0) for step in steps for phase in COSTS) / whole
    print(f"costs and flow (losses, flow, losses backward): {share:.1%} of the step (bar {BARS['costs and flow']:.0%})")
    projected = sum(step.get(phase, 0.0) for step in steps for phase in PROJECTION) / whole
    if projected:
        print(f"with the projection to the teacher's width: {share + projected:.1%}")
    for other in ("uniform", "none"):
        times = {kind: [[sum(sum(step.values()) for step in part[kind])] for part in rounds] for kind in ("emd", other)}
        middle, low, high = (value - 1 for value in ratio(times["emd"], times[other]))
        bar = f" (bar {BARS['emd over uniform']:.0%})" if other == "uniform" else ""
        print(f"emd takes {middle:+.1%} [{low:+.1%}, {high:+.1%}] over mapping {other}{bar}")


if __name__ == "__main__":
    main()
