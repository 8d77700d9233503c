"""What a device in use sees beyond latency in a loop: requests that come one by one, waiting threads, memory over time."""

from __future__ import annotations

from bertemd_deploy.report.records import Cell, Record, Variant
from bertemd_deploy.report.summary import Comparison
from bertemd_deploy.report.tables import Line, Table, kind_of
from bertemd_deploy.report.text import NOT_MEASURED, dig, megabytes, milliseconds, number, percent, sentence


def paced_cell(record: Record) -> Cell | None:
    """Return the cell in which requests were also sent one by one: the replay, else a fixed length; most threads first."""
    cells = {cell for (_, cell), entry in record.cells.items() if number(dig(entry, "paced_ms", "p50")) is not None}

    def preference(cell: Cell) -> tuple[bool, int, int]:
        replay = isinstance(cell.sequence, str)
        return not replay, -cell.threads, 0 if isinstance(cell.sequence, str) else cell.sequence

    return min(cells, key=preference, default=None)


def paced(record: Record, variant: Variant, statistic: str) -> float | None:
    """Return a statistic of the latency of requests that came one by one, in ms, or None."""
    cell = paced_cell(record)
    return None if cell is None else number(dig(record.cells.get((variant, cell)), "paced_ms", statistic))


def arena_bytes(record: Record, variant: Variant, which: str, what: str) -> float | None:
    """Return memory over a trace of mixed lengths; `which` is "arena" or "no_arena", `what` peak or final."""
    return number(record.fact(variant, "memory", which, f"{what}_rss_bytes"))


def usage_table(comparison: Comparison) -> Table | None:
    """Return what each model costs in use, one row per model, or None where none of it was measured."""
    record, rows = comparison.record, comparison.rows
    if record.estimated:
        return None
    variants = [row.variant for row in rows]
    cell = paced_cell(record)
    columns: dict[str, list[str]] = {}
    for name in ("p50", "p95"):
        columns[f"In a loop, {name}"] = [milliseconds(record.latency(variant, cell, name)) for variant in variants]
        columns[f"One by one, {name}"] = [milliseconds(paced(record, variant, name)) for variant in variants]
    columns["CPU time per call"] = [_cpu(record, variant, comparison.cell) for variant in variants]
    for name, title in (("spinning", "Waiting, spinning"), ("stopped", "Waiting, stopped")):
        columns[title] = [
            percent(number(record.fact(variant, "idle", name, "cpu_seconds_per_second"))) for variant in variants
        ]
    for which, title in (("arena", "with arena"), ("no_arena", "without arena")):
        for what in ("peak", "final"):
            columns[f"{sentence(what)} memory, {title}"] = [
                megabytes(arena_bytes(record, variant, which, what)) for variant in variants
            ]
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED}}
    if not set(shown) - {"In a loop, p50", "In a loop, p95", "CPU time per call"}:
        return None
    lines = [
        Line(
            [row.variant.label, *(cells[at] for cells in shown.values())],
            kind_of(row.variant) + (" default" if comparison.student is row else ""),
            row.variant.key,
        )
        for at, row in enumerate(rows)
    ]
    return Table(_caption(record, shown, cell, comparison.cell), ["Model", *shown], lines)


def _cpu(record: Record, variant: Variant, cell: Cell | None) -> str:
    seconds = number(dig(record.cells.get((variant, cell)) if cell else None, "cpu_seconds_per_inference"))
    return milliseconds(None if seconds is None else 1000 * seconds)


def _caption(record: Record, shown: dict[str, list[str]], cell: Cell | None, compared: Cell | None) -> str:
    said = [f"{sentence(record.kind)}."]
    if any(title.startswith("One by one") for title in shown) and cell is not None:
        intervals = [
            number(dig(entry, "paced_ms", "interval_ms")) for (_, at), entry in record.cells.items() if at == cell
        ]
        interval = next((value for value in intervals if value is not None), None)
        pace = f", one every {milliseconds(interval)}" if interval else ""
        said.append(
            f"In a loop, one call follows the other; one by one, requests come with pauses{pace} ({cell.label})."
        )
    if "CPU time per call" in shown and compared is not None:
        said.append(f"CPU time is over all threads ({compared.label}).")
    if any(title.startswith("Waiting") for title in shown):
        said.append(
            "Waiting is the CPU time between requests, in percent of one core, with threads that spin or are stopped."
        )
    if any("arena" in title for title in shown):
        said.append(
            "Memory is the process's, over requests of mixed lengths, with and without ONNX Runtime's memory arena."
        )
    return " ".join(said)
