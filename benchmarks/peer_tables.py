"""What a record of `export_peers.py` states: p50 and paired ratios of every cell, whether the bars are met, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from latency import ratio

OURS, FLOOR = "ours", "floor"
MATCHED = (32, 128)  # sequence lengths of the first bar


def is_peer(label: str) -> bool:
    """Say whether an engine is neither ours nor the floor."""
    return label != FLOOR and label.partition(" ")[0] != OURS


def summarise(cell: Mapping[str, Any], *, ours: str) -> dict[str, Any]:
    """Return what a cell's raw samples state.

    Args:
        cell: as `export_peers.time_cells` gives it.
        ours: label of the graph that "auto" picks.

    Returns:
        threads, batch, sequence; p50_ms by engine; best_peer, the peer of the lowest p50 (None without peers);
        ours_over: [median, low, high] by other engine, ours / other in the same round with a 95% interval.
    """
    samples = cell["samples_ms"]
    p50 = {label: float(np.median(np.concatenate(rounds))) for label, rounds in samples.items()}
    peers = [label for label in p50 if is_peer(label)]
    return {
        **{key: cell[key] for key in ("threads", "batch", "sequence")},
        "p50_ms": p50,
        "best_peer": min(peers, key=p50.__getitem__, default=None),
        "ours_over": {label: list(ratio(samples[ours], rounds)) for label, rounds in samples.items() if label != ours},
    }


def verdicts(summary: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, int, list[str]]]:
    """Yield each bar, what it allows, how many cells it covers, and those that miss it with what was measured."""
    everywhere = list(summary)
    matched = [cell for cell in summary if cell["batch"] == 1 and cell["sequence"] in MATCHED]
    for name, of_peer, allowed, covered in (
        ("ours / best peer, batch 1, 32 and 128 tokens", True, 0.65, matched),
        ("ours / best peer, anywhere", True, 0.9, everywhere),
        ("ours / floor, anywhere", False, 1.5, everywhere),
    ):
        others = [(cell, cell["best_peer"] if of_peer else FLOOR) for cell in covered]
        measured = [(cell, cell["ours_over"][other][0]) for cell, other in others if other is not None]
        missed = [
            f"{found:.2f} at {cell['threads']} threads, batch {cell['batch']}, {cell['sequence']} tokens"
            for cell, found in measured
            if found > allowed
        ]
        yield name, allowed, len(measured), missed


def table(record: Mapping[str, Any]) -> str:
    """Return a record as Markdown: ours beside the best peer and the floor, the bars, every engine, what is missing."""
    settings, summary = record["settings"], record["summary"]
    lines = [
        f"Student {settings['student']}{', SMOKE TEST' if settings['smoke'] else ''}, {record['device']['name']}, "
        f"{settings['rounds']} rounds; ours: `{record['ours'].partition(' ')[2]}`; p50 in ms, ratios with a 95% interval.",
    ]
    if disturbed := sum(cell["disturbed"] for cell in record["cells"]):
        lines += ["", f"Other programs took CPU time in {disturbed} of {len(summary)} cells: measure again."]
    for (threads, batch), cells in groupby(summary, key=lambda cell: (cell["threads"], cell["batch"])):
        part = list(cells)
        lines += ["", f"Threads: {threads}, batch: {batch}", "", *_beside(part, ours=record["ours"])]
        lines += ["", *_all_engines(part, labels=list(record["engines"]))]
    lines += ["", "| bar | at most | met |", "|---|---|---|"]
    for name, allowed, covered, missed in verdicts(summary):
        met = (
            f"no, {len(missed)} of {covered} cells miss it: {'; '.join(missed)}" if missed else f"yes, {covered} cells"
        )
        lines.append(f"| {name} | {allowed:g}x | {met if covered else 'not measured'} |")
    lines += ["", *_settings(record)]
    return "\n".join(lines)


def _beside(cells: Sequence[Mapping[str, Any]], *, ours: str) -> list[str]:
    rows = [
        "| tokens | ours | best peer | which | ours / best peer | floor | ours / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        p50, best = cell["p50_ms"], cell["best_peer"]
        peer = [f"{p50[best]:.2f}", best, _ratio(cell, best)] if best else ["", "none measured", ""]
        values = [str(cell["sequence"]), f"{p50[ours]:.2f}", *peer, f"{p50[FLOOR]:.2f}", _ratio(cell, FLOOR)]
        rows.append(f"| {' | '.join(values)} |")
    return rows


def _ratio(cell: Mapping[str, Any], other: str) -> str:
    return "{:.2f}x ({:.2f} to {:.2f})".format(*cell["ours_over"][other])


def _all_engines(cells: Sequence[Mapping[str, Any]], *, labels: Sequence[str]) -> list[str]:
    head = ["p50 in ms", *(f"{cell['sequence']} tokens" for cell in cells)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label in labels:
        times = [f"{cell['p50_ms'][label]:.2f}" if label in cell["p50_ms"] else "not measured" for cell in cells]
        rows.append(f"| {' | '.join([label, *times])} |")
    return rows


def _settings(record: Mapping[str, Any]) -> list[str]:
    rows = ["| engine | precision | setting | MB | logits differ from PyTorch's by |", "|---|---|---|---|---|"]
    for label, engine in record["engines"].items():
        found = [cell["difference"][label] for cell in record["cells"] if label in cell["difference"]]
        values = [label, engine["precision"], engine["how"], f"{engine['bytes'] / 1e6:.1f}"]
        rows.append(f"| {' | '.join([*values, f'{max(found):.1e}' if found else ''])} |")
    packages = {
        family: ", ".join(
            f"{name} {version}" for name, version in of.items() if version and name not in ("system", "bertemd")
        )
        for family, of in record["versions"].items()
    }
    rows += ["", *(f"- {family}: {versions}" for family, versions in packages.items())]
    reasons: dict[str, str] = dict(record["not_measured"])
    for cell in record["cells"]:
        for label, reason in cell["not_measured"].items():
            reasons.setdefault(label, f"{reason} (batch {cell['batch']}, {cell['sequence']} tokens)")
    if reasons:
        rows += ["", "Not measured:", "", *(f"- {label}: {reason}" for label, reason in reasons.items())]
    return rows
