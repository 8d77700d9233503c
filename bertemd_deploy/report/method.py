"""The end of the page: how the numbers were got, on which machines, with which versions."""

from __future__ import annotations

from collections.abc import Sequence

from bertemd_deploy.report.artifact_tables import machine_table, sources, versions_table
from bertemd_deploy.report.kinds import how
from bertemd_deploy.report.markup import details, listed, table_of
from bertemd_deploy.report.records import Record, count
from bertemd_deploy.report.text import dig, number, sentence


def method(records: Sequence[Record]) -> list[str]:
    """Return the parts of the last section."""
    measured = [record for record in records if not record.estimated]
    said = [line for record in records for line in how(record)]
    if measured:
        said += [
            "Every model and graph runs in a fresh process of its own; the models take turns in interleaved rounds"
            f"{_rounds(measured)}, so that drift of the machine touches all of them.",
            "Warm-up calls come before the clock starts and are not counted. Latency and memory are taken in separate "
            "passes.",
            "p50 is the median of single calls. The speed-up is the ratio of the two medians; its 95% interval comes from "
            "resampling rounds and calls, and where it covers 1 no speed-up is claimed.",
            "The replay runs the development set's examples at their real lengths; the other cells hold the length fixed.",
        ]
    said.append("A value that was not measured is called so; it is never shown as 0.")
    for record in records:
        said += _amounts(record, several=len(records) > 1)
    versions = versions_table(records)
    facts = sources(records)
    return [
        listed([sentence(line) for line in said]),
        f'<div class="pair">\n{table_of(machine_table(records))}\n{table_of(versions)}\n</div>',
        details("Show where the devices' facts come from", listed(facts)) if facts else "",
    ]


def _amounts(record: Record, *, several: bool) -> list[str]:
    """Return how much was measured, and the record's notes."""
    said = []
    amounts = [number(dig(entry, "n") or dig(entry, "latency_ms", "n")) for entry in record.cells.values()]
    known = sorted(int(amount) for amount in amounts if amount)
    where = f"On {record.title}: " if several else ""
    if known:
        spread = f"{known[0]}" if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
        said.append(f"{where}{count(len(known), 'measurement')} of {spread} timed calls each.")
    examples = number(record.fact(record.variants[0], "evaluated_examples")) if record.variants else None
    if examples and not record.estimated:
        said.append(f"{where}scores are over {int(examples)} examples, evaluated on that machine.")
    if record.estimated:
        said.append(f"{where}scores are those that the artifact states.")
    notes = record.raw.get("notes")
    return said + ([f"{where}{note}." for note in notes if isinstance(note, str)] if isinstance(notes, list) else [])


def _rounds(records: Sequence[Record]) -> str:
    rounds = {number(dig(record.raw, "settings", "rounds")) for record in records}
    (only,) = rounds if len(rounds) == 1 else (None,)
    return f" ({int(only)} of them)" if only else ""
