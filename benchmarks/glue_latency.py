"""Latency of a GLUE grid's deployed students beside their teachers, from what `glue.py` left in its work folder.

    python benchmarks/glue_latency.py --grid minilm-4l --work runs/glue

For each task the first seed's artifact of mapping `emd` is timed by `bertemd bench`, and its fine-tuned teacher with it, over
the dev set's own lengths and at the longest, one row at a time, on all CPUs. Raw samples, device and conditions go into
`results/glue-latency.json`, where `glue.py --table` finds them; other grids and tasks that the file holds stay. What the bench
calls noisy is not kept: exit 3.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT), str(HERE)]

from glue_plan import Cell, cells, read_plan  # noqa: E402

VARIANT = "emd"  # latency depends on a model's sizes, not on its weights: one stands for all mappings
FEWEST_ROUNDS = 5


def main() -> None:
    """Read the command line, measure the tasks that have an artifact, and write the record."""
    from bertemd_deploy.errors import BertemdError

    plan = read_plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=plan["grids"], required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "glue", help="folder that glue.py worked in")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "glue-latency.json")
    parser.add_argument("--rounds", type=int, default=9, help="how often the models take turns")
    options = parser.parse_args()
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {options.rounds}: an interval needs {FEWEST_ROUNDS}")
    firsts = [cell for cell in cells(plan, options.grid, tuning=False) if cell.first and cell.variant == VARIANT]
    made = [cell for cell in firsts if cell.artifact_folder(options.work).is_dir()]
    if not made:
        parser.error(f"{options.work}: holds no artifact of {options.grid}; run glue.py first")
    noisy: list[str] = []
    failed: list[str] = []
    for cell in made:
        try:
            if not measured(cell, options):
                noisy.append(cell.task)
        except BertemdError as error:
            print(f"error: {cell.name}: {error}", file=sys.stderr)
            failed.append(cell.task)
    left = [cell.task for cell in firsts if cell not in made]
    for tasks, words in ((noisy, "too noisy, not kept"), (left, "no artifact yet")):
        if tasks:
            print(f"{options.grid}: {', '.join(tasks)}: {words}", file=sys.stderr)
    sys.exit(3 if noisy or failed or left else 0)


def measured(cell: Cell, options: argparse.Namespace) -> bool:
    """Measure a task's artifact and keep it in the record; False where other work disturbed it."""
    from bertemd_deploy.bench.compare import bench
    from bertemd_deploy.files import write_json
    from bertemd_deploy.settings import BenchSettings

    settings = BenchSettings(
        sequence_lengths=("max",), batch_sizes=(1,), threads=("all",), rounds=options.rounds, seconds_per_cell=2.0,
        end_to_end=False, paced_interval_ms=0.0, idle_seconds=0.0, arena=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        record = bench(
            cell.artifact_folder(options.work),
            teacher=cell.teacher_folder(options.work),
            out=Path(folder) / "bench",
            settings=settings,
        )
    if record["noise"]["noisy"]:
        return False
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"grids": {}}
    known["grids"].setdefault(cell.grid, {})[cell.task] = entry(record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, known)
    return True


def entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a bench's record: when, where and how it was measured, and each model's times and samples."""
    kept = {name: record[name] for name in ("started", "device", "versions", "conditions", "settings", "baseline")}
    models = []
    for one in record["measurements"]:
        times = {name: one["latency_ms"][name] for name in ("p50", "p95", "n", "samples", "samples_per_round")}
        faster = one["speedup_vs_teacher"]
        models.append(
            {
                "model": one["graph"] if one["model"] == "student" else f"{one['model']}-{one['backend']}",
                "name": f"{one['model']} {one['backend']} {one['graph'] or one['precision']}",
                "lengths": one["sequence"],
                "threads": one["threads"],
                "bytes": one["model_bytes"],
                "peak_rss_bytes": one["peak_rss_bytes"],
                "latency_ms": times,
                "speedup": None if faster is None else [faster["p50"], *faster["ci95"]],
            }
        )
    return {**kept, "models": models}


if __name__ == "__main__":
    main()
