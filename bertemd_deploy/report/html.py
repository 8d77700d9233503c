"""The page: one HTML file with its style, figures and script inside, in the order a reader asks.

Nothing is loaded. The script only adds to what is there (see page.js): every number can be read without it. The page stays
below `MOST_BYTES`; where it would not, what is longest and least asked for is left out and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bertemd_deploy.report.artifact_tables import invariance_table, parity_table, settings_table, trials_table
from bertemd_deploy.report.changes import change_list, change_sentences, change_table
from bertemd_deploy.report.figures import device_figures
from bertemd_deploy.report.gates import baseline_table, budget_table, stands
from bertemd_deploy.report.kinds import BADGES, noise_sentence
from bertemd_deploy.report.mapping import distillation_figures
from bertemd_deploy.report.markup import (
    details,
    figures_of,
    section,
    share_styles,
    switches,
    table_of,
    text_of,
    tiles_of,
    titled,
)
from bertemd_deploy.report.method import method
from bertemd_deploy.report.overview import overview_tables
from bertemd_deploy.report.pareto import students_figures
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import Comparison, head
from bertemd_deploy.report.tables import comparison_table, measurement_table
from bertemd_deploy.report.text import between, joined, megabytes, milliseconds, percent, ratio, sentence, words
from bertemd_deploy.report.usage import usage_table
from bertemd_deploy.report.verdict import excess_drop, remarks, verdict

MOST_BYTES = 1_000_000
EXAMPLES, CELLS, FIGURES = "the examples decided otherwise", "every measured cell", "the figures of each device"
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")


def to_html(comparisons: Sequence[Comparison]) -> str:
    """Return the whole page for one comparison per record, all of one task and teacher."""
    drawn = [figures_of(device_figures(comparison, name=str(place))) for place, comparison in enumerate(comparisons)]
    taught = _distillation([comparison.record for comparison in comparisons])
    students = figures_of(students_figures(comparisons))
    page = ""
    for left_out in ((), (EXAMPLES,), (EXAMPLES, CELLS), (EXAMPLES, CELLS, FIGURES)):
        page = _page(comparisons, drawn=drawn, taught=taught, students=students, left_out=left_out)
        if len(page.encode()) < MOST_BYTES:
            break
    return page


def _page(
    comparisons: Sequence[Comparison],
    *,
    drawn: Sequence[str],
    taught: Sequence[str],
    students: str,
    left_out: Sequence[str],
) -> str:
    records = [comparison.record for comparison in comparisons]
    top = head(records)
    measured = "" if CELLS in left_out else "".join(_per_device(comparisons, _measurements))
    figures = [] if FIGURES in left_out else _per_device(comparisons, lambda _, place: drawn[place])
    sections = [
        section("overview", "At a glance", _overview(comparisons)),
        section("students", "Students side by side", [students]),
        section("verdict", "Verdict", [_verdict(*pair, alone=len(records) == 1) for pair in enumerate(comparisons)]),
        section("comparison", "Side by side", _per_device(comparisons, _comparison)),
        section("usage", "In use", _per_device(comparisons, _usage)),
        section("changes", "What changed", _changes(comparisons, examples=EXAMPLES not in left_out)),
        section("figures", "Speed, score and memory", figures),
        section("mapping", "Which teacher layer taught which", taught),
        section("quantization", "Quantization and parity", _quantization(records)),
        section(
            "measurements", "All measurements", [details("Show every measured cell", measured)] if measured else []
        ),
        section("method", "Machine, versions, and how the numbers were got", method(records)),
    ]
    styles, body = share_styles("\n".join(filter(None, sections)))
    cut = f" Left out to keep the page small: {joined(left_out)}." if left_out else ""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text_of(top.title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}{styles}</style>",
            "</head>",
            "<body>",
            f'<header>\n<h1>{text_of(top.title)}</h1>\n<p class="kicker">{text_of(top.subtitle)}</p>\n</header>',
            switches(_models(records), [(_key(place), record.title) for place, record in enumerate(records)]),
            "<main>",
            body,
            "</main>",
            "<footer>Everything here comes from the bench records, kept whole in report.json beside this page; "
            f"report.md is the summary for a pull request.{text_of(cut)}</footer>",
            f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _key(place: int) -> str:
    """Return what a record's parts of the page are marked with."""
    return f"device-{place}"


def _models(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return key and label of every model on the page, once."""
    return list({variant.key: variant.label for record in records for variant in record.variants}.items())


def _per_device(comparisons: Sequence[Comparison], content: Callable[[Comparison, int], str]) -> list[str]:
    """Return `content` of every record, under its name where there are several."""
    parts = []
    for place, comparison in enumerate(comparisons):
        text = content(comparison, place)
        if text and len(comparisons) > 1:
            text = f'<div data-device="{_key(place)}">\n<h3>{text_of(comparison.record.title)}</h3>\n{text}\n</div>'
        parts.append(text)
    return parts


def _overview(comparisons: Sequence[Comparison]) -> list[str]:
    return [table_of(table) for table in overview_tables(comparisons)] if len(comparisons) > 1 else []


def _verdict(place: int, comparison: Comparison, *, alone: bool) -> str:
    record = comparison.record
    careful = comparison.student is None or excess_drop(comparison) is not None
    careful = careful or not stands(record) or noise_sentence(record) is not None
    return "\n".join(
        filter(
            None,
            [
                f'<div class="verdict{" caution" if careful else ""}" data-device="{_key(place)}">',
                "" if alone else f"<h3>{text_of(record.name)}</h3>",
                f'<p class="badge {text_of(record.kind)}">{text_of(BADGES.get(record.kind, record.kind))}</p>',
                f'<p class="sentence">{text_of(verdict(comparison))}</p>',
                tiles_of(_tiles(comparison)),
                *(f'<p class="remark">{text_of(remark)}</p>' for remark in remarks(comparison)),
                table_of(budget_table(record)),
                table_of(baseline_table(record)),
                "</div>",
            ],
        )
    )


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return the key numbers of the student beside the teacher's, those that are known."""
    record, student, teacher = comparison.record, comparison.student, comparison.teacher
    if student is None:
        return []
    tiles: list[tuple[str, str, str]] = []
    if student.retention is not None:
        tiles.append((f"{record.metric_names[0]} kept", percent(student.retention), "of the teacher's"))
    if student.speedup is not None and student.speedup.outcome != "same" and not record.estimated:
        gain = student.speedup if student.speedup.outcome == "faster" else student.speedup.inverse
        tiles.append(
            (f"{student.speedup.outcome} than the teacher", ratio(gain.value), f"95% interval {gain.interval}")
        )
    triples = (
        ("median latency", milliseconds, student.p50_ms, student.p50_interval, teacher.p50_ms if teacher else None),
        (
            "peak memory",
            megabytes,
            student.peak_rss_bytes,
            student.peak_rss_interval,
            teacher.peak_rss_bytes if teacher else None,
        ),
    )
    for name, write, own, interval, other in triples:
        if own is None:
            continue
        around = between(*interval, write=write) if interval else ""
        if record.estimated:
            tiles.append((f"{name}, estimate", write(own), f"interval {around}"))
        else:
            against = f"teacher {write(other)}" if teacher else ""
            tiles.append((name, write(own), "; ".join(filter(None, [around and f"95%: {around}", against]))))
    if student.model_bytes is not None:
        against = f"teacher {megabytes(teacher.model_bytes)}" if teacher else ""
        tiles.append(("model size", megabytes(student.model_bytes), against))
    return tiles


def _comparison(comparison: Comparison, place: int) -> str:
    return table_of(comparison_table(comparison)) if comparison.rows else ""


def _usage(comparison: Comparison, place: int) -> str:
    return table_of(usage_table(comparison))


def _measurements(comparison: Comparison, place: int) -> str:
    return table_of(measurement_table(comparison.record)) if comparison.record.cells else ""


def _changes(comparisons: Sequence[Comparison], *, examples: bool) -> list[str]:
    """Return what changed from model to model, once where several records say the same."""
    records = [comparison.record for comparison in comparisons]
    parts = []
    for record in _distinct(records, "churn"):
        steps = change_table(record)
        if steps is None:
            continue
        shown = change_list(record) if examples else None
        sentences = change_sentences(record)
        said = "".join(
            f"<li><strong>{text_of(name)}:</strong> {text_of(text)}</li>" for name, text in sentences.items()
        )
        folded = f'<div class="list">\n{table_of(shown)}\n</div>' if shown else ""
        content = f"<ul>{said}</ul>\n{table_of(steps)}\n"
        content += details("Show the examples decided otherwise", folded) if folded else ""
        parts.append(titled(_sharing(records, record, "churn"), content) if len(records) > 1 else content)
    return parts


def _distillation(records: Sequence[Record]) -> list[str]:
    """Return the figures of each distinct distillation: records of one student usually carry the same one."""
    parts: list[str] = []
    found = _distinct(records, "distillation")
    for record in found:
        distillation = record.raw["distillation"]
        figures = figures_of(distillation_figures(distillation, name=str(len(parts))))
        facts = [
            f"{words(key)} {distillation[key]}"
            for key in ("mapping", "teacher_layers", "student_layers", "epochs", "steps", "seed")
            if isinstance(distillation.get(key), str | int | float)
        ]
        said = f"<p>{text_of(sentence(' · '.join(facts)))}</p>\n" if facts else ""
        content = said + figures
        several = len(found) > 1 and content
        parts.append(
            titled(record.student or _sharing(records, record, "distillation"), content) if several else content
        )
    return parts


def _quantization(records: Sequence[Record]) -> list[str]:
    parts: list[str] = []
    found = _distinct(records, "artifact")
    for record in found:
        tables = {
            "Settings": settings_table(record),
            "Parity": parity_table(record),
            "Padding and batch mates": invariance_table(record),
            "Quantization trials": trials_table(record),
        }
        whose = f"{record.student or _sharing(records, record, 'artifact')}: " if len(found) > 1 else ""
        parts += [titled(f"{whose}{title}", table_of(table)) for title, table in tables.items()]
    return parts


def _distinct(records: Sequence[Record], key: str) -> list[Record]:
    """Return the records whose object under `key` differs from those before."""
    found: list[Record] = []
    for record in records:
        value = record.raw.get(key)
        if isinstance(value, dict) and all(value != other.raw.get(key) for other in found):
            found.append(record)
    return found


def _sharing(records: Sequence[Record], one: Record, key: str) -> str:
    """Return the names of all records with the same object under `key`."""
    return joined([record.title for record in records if record.raw.get(key) == one.raw.get(key)])
