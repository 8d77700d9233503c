"""The page: one HTML file with its style and figures inside, in the order a reader asks.

Every text that came from a record passes through `_text`; nothing is loaded, and there is no script.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bertemd_deploy.report.changes import change_list, change_sentences, change_table
from bertemd_deploy.report.drawing import Drawing
from bertemd_deploy.report.figures import device_figures
from bertemd_deploy.report.mapping import distillation_figures
from bertemd_deploy.report.records import Record, count
from bertemd_deploy.report.summary import Comparison, head
from bertemd_deploy.report.tables import (
    Line,
    Table,
    comparison_table,
    invariance_table,
    machine_table,
    measurement_table,
    parity_table,
    settings_table,
    trials_table,
    versions_table,
)
from bertemd_deploy.report.text import (
    NOT_MEASURED,
    dig,
    megabytes,
    milliseconds,
    number,
    percent,
    ratio,
    sentence,
    words,
)
from bertemd_deploy.report.verdict import excess_drop, remarks, verdict

_UNIT = re.compile(r"(?<=\d) (?=(?:ms|kB|MB|GB)\b)|(?<=\bp) (?=[=<] \d)|(?<=\bp [=<]) (?=\d)")  # these stay on one line
STYLE = Path(__file__).with_name("page.css")


def to_html(comparisons: Sequence[Comparison]) -> str:
    """Return the whole page for one comparison per device, all of one artifact."""
    records = [comparison.record for comparison in comparisons]
    top = head(records)
    measured = "".join(_per_device(comparisons, _measurements))
    sections = [
        _section("verdict", "Verdict", [_verdict(comparison, alone=len(records) == 1) for comparison in comparisons]),
        _section("comparison", "Side by side", _per_device(comparisons, _comparison)),
        _section("changes", "What changed", _per_device(comparisons, _changes)),
        _section("figures", "Speed, score and memory", _per_device(comparisons, _device_figures)),
        _section("mapping", "Which teacher layer taught which", _distillation(records)),
        _section("quantization", "Quantization and parity", _quantization(records)),
        _section(
            "measurements", "All measurements", [_details("Show every measured cell", measured)] if measured else []
        ),
        _section("method", "Machine, versions, and how the numbers were got", _method(comparisons)),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(top.title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            f'<header>\n<h1>{_text(top.title)}</h1>\n<p class="kicker">{_text(top.subtitle)}</p>\n</header>',
            "<main>",
            *filter(None, sections),
            "</main>",
            "<footer>Everything here comes from the bench records, kept whole in report.json beside this page; "
            "report.md is the summary for a pull request.</footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(value: str) -> str:
    return html.escape(_UNIT.sub("\N{NO-BREAK SPACE}", value), quote=True)


def _section(name: str, title: str, parts: Sequence[str]) -> str:
    content = "\n".join(filter(None, parts))
    if not content:
        return ""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{_text(title)}</h2>\n{content}\n</section>'


def _per_device(comparisons: Sequence[Comparison], content: Callable[[Comparison, int], str]) -> list[str]:
    """Return `content` of every device, under its name where there are several."""
    parts = []
    for place, comparison in enumerate(comparisons):
        text = content(comparison, place)
        if text and len(comparisons) > 1:
            text = f"<h3>{_text(comparison.record.name)}</h3>\n{text}"
        parts.append(text)
    return parts


def _verdict(comparison: Comparison, *, alone: bool) -> str:
    caution = excess_drop(comparison) is not None
    return "\n".join(
        filter(
            None,
            [
                f'<div class="verdict{" caution" if caution else ""}">',
                "" if alone else f"<h3>{_text(comparison.record.name)}</h3>",
                f'<p class="sentence">{_text(verdict(comparison))}</p>',
                *(f'<p class="remark">{_text(remark)}</p>' for remark in remarks(comparison)),
                _tiles(comparison),
                "</div>",
            ],
        )
    )


def _tiles(comparison: Comparison) -> str:
    """Return the key numbers of the student beside the teacher's, those that were measured."""
    student, teacher = comparison.student, comparison.teacher
    if student is None:
        return ""
    tiles: list[tuple[str, str, str]] = []
    if student.retention is not None:
        tiles.append((f"{comparison.record.metric_names[0]} kept", percent(student.retention), "of the teacher's"))
    if student.speedup is not None and student.speedup.outcome != "same":
        gain = student.speedup if student.speedup.outcome == "faster" else student.speedup.inverse
        tiles.append(
            (f"{student.speedup.outcome} than the teacher", ratio(gain.value), f"95% interval {gain.interval}")
        )
    pairs = (
        ("median latency", milliseconds, student.p50_ms, teacher.p50_ms if teacher else None),
        ("model size", megabytes, student.model_bytes, teacher.model_bytes if teacher else None),
        ("peak memory", megabytes, student.peak_rss_bytes, teacher.peak_rss_bytes if teacher else None),
    )
    for name, write, own, other in pairs:
        if own is not None:
            tiles.append((name, write(own), f"teacher {write(other)}" if teacher else ""))
    items = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(detail)}</small></dd></div>"
        for name, value, detail in tiles
    )
    return f'<dl class="tiles">{items}</dl>' if items else ""


def _comparison(comparison: Comparison, place: int) -> str:
    return _table(comparison_table(comparison)) if comparison.rows else ""


def _changes(comparison: Comparison, place: int) -> str:
    record = comparison.record
    steps, listed = change_table(record), change_list(record)
    if steps is None:
        return ""
    said = "".join(
        f"<li><strong>{_text(name)}:</strong> {_text(words)}</li>" for name, words in change_sentences(record).items()
    )
    shown = f'<div class="list">\n{_table(listed)}\n</div>' if listed else ""
    folded = _details("Show the examples decided otherwise", shown) if listed else ""
    return f"<ul>{said}</ul>\n{_table(steps)}\n{folded}"


def _device_figures(comparison: Comparison, place: int) -> str:
    return _figures(device_figures(comparison, name=str(place)))


def _measurements(comparison: Comparison, place: int) -> str:
    return _table(measurement_table(comparison.record)) if comparison.record.cells else ""


def _distillation(records: Sequence[Record]) -> list[str]:
    """Return the figures of each distinct distillation: records of one student usually carry the same one."""
    parts: list[str] = []
    for record in _distinct(records, "distillation"):
        distillation = record.raw["distillation"]
        figures = _figures(distillation_figures(distillation))
        facts = [
            f"{words(key)} {distillation[key]}"
            for key in ("mapping", "teacher_layers", "student_layers", "epochs", "steps", "seed")
            if isinstance(distillation.get(key), str | int | float)
        ]
        if facts:
            parts.append(f"<p>{_text(sentence(' · '.join(facts)))}</p>")
        parts.append(figures)
    return parts


def _quantization(records: Sequence[Record]) -> list[str]:
    parts: list[str] = []
    for record in _distinct(records, "artifact"):
        parts.append(_titled("Settings", settings_table(record)))
        parts.append(_titled("Parity", parity_table(record)))
        parts.append(_titled("Padding and batch mates", invariance_table(record)))
        parts.append(_titled("Quantization trials", trials_table(record)))
    return parts


def _titled(title: str, table: Table | None) -> str:
    return f"<div>\n<h3>{_text(title)}</h3>\n{_table(table)}\n</div>" if table else ""


def _distinct(records: Sequence[Record], key: str) -> list[Record]:
    """Return the records whose object under `key` differs from those before."""
    found: list[Record] = []
    for record in records:
        value = record.raw.get(key)
        if isinstance(value, dict) and all(value != other.raw.get(key) for other in found):
            found.append(record)
    return found


def _method(comparisons: Sequence[Comparison]) -> list[str]:
    records = [comparison.record for comparison in comparisons]
    versions = versions_table(records)
    said = [
        "Every model and graph runs in a fresh process of its own; the models take turns in interleaved rounds"
        f"{_rounds(records)}, so that drift of the machine touches all of them.",
        "Warm-up calls come before the clock starts and are not counted. Latency and memory are taken in separate passes.",
        "p50 is the median of single calls. The speed-up is the ratio of the two medians; its 95% interval comes from "
        "resampling rounds and calls, and where it covers 1 no speed-up is claimed.",
        "The replay runs the development set's examples at their real lengths; the other cells hold the length fixed.",
        "A value that was not measured is called so; it is never shown as 0.",
    ]
    for record in records:
        amounts = [number(dig(entry, "n") or dig(entry, "latency_ms", "n")) for entry in record.cells.values()]
        known = sorted(int(amount) for amount in amounts if amount is not None)
        where = f"On {record.name}: " if len(records) > 1 else ""
        if known:
            spread = f"{known[0]}" if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
            said.append(sentence(f"{where}{count(len(known), 'measurement')} of {spread} timed calls each."))
        examples = number(record.fact(record.variants[0], "evaluated_examples")) if record.variants else None
        if examples:
            said.append(sentence(f"{where}scores are over {int(examples)} examples, evaluated on that machine."))
        notes = record.raw.get("notes")
        said += (
            [sentence(f"{where}{note}.") for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        )
    return [
        "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in said) + "</ul>",
        '<div class="pair">',
        _table(machine_table(records)),
        _table(versions) if versions else "",
        "</div>",
    ]


def _rounds(records: Sequence[Record]) -> str:
    rounds = {number(dig(record.raw, "settings", "rounds")) for record in records}
    (only,) = rounds if len(rounds) == 1 else (None,)
    return f" ({int(only)} of them)" if only else ""


def _details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{_text(summary)}</summary>\n{content}\n</details>"


def _table(table: Table) -> str:
    """Return a table in a box of its own that scrolls sideways where the page is narrow, also by keyboard."""
    headings = "".join(
        f'<th scope="col"{_words(table, place)}>{_text(title)}</th>' for place, title in enumerate(table.headings)
    )
    lines = "\n".join(_line(table, line) for line in table.lines)
    return (
        f'<div class="table" role="region" aria-label="{_text(table.caption)}" tabindex="0">\n<table>\n'
        f"<caption><span>{_text(table.caption)}</span></caption>\n<thead><tr>{headings}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def _line(table: Table, line: Line) -> str:
    cells = []
    for place, text in enumerate(line.cells):
        content = f'<span class="none">{NOT_MEASURED}</span>' if text == NOT_MEASURED else _text(text)
        if place == 0:
            cells.append(f'<th scope="row"{_words(table, place)}>{content}</th>')
        else:
            cells.append(f"<td{_words(table, place)}>{content}</td>")
    return f"<tr{f' class={chr(34)}{line.kind}{chr(34)}' if line.kind else ''}>{''.join(cells)}</tr>"


def _words(table: Table, place: int) -> str:
    return ' class="words"' if place in table.prose else ""


def _figures(drawings: Sequence[Drawing]) -> str:
    if not drawings:
        return ""
    items = "\n".join(
        f"<figure>\n<h3>{_text(drawing.title)}</h3>\n{drawing.svg}\n<figcaption>{_text(drawing.caption)}</figcaption>\n</figure>"
        for drawing in drawings
    )
    return f'<div class="figures">\n{items}\n</div>'
