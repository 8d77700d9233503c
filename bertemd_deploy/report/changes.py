"""What changed from teacher to student to int8, for people to read: sentences, a table of the steps, the list.

Built from a record's `churn` (see `bertemd_deploy.churn`); as everywhere on the page, a value that is absent is called not
measured, and a difference is called one where the test or the interval shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.report.records import Record, count
from bertemd_deploy.report.tables import Line, Table
from bertemd_deploy.report.text import NOT_MEASURED, dig, digits, number, percent, points, sentence

LIST_SHOWN = 100  # examples on the page
SIGNIFICANCE = 0.05
RIGHT, WRONG = "✓", "✗"
_NAMES = {"int8": "int8"}  # of the other roles "the …"
_TOKENS = "token-classification"


@dataclass(frozen=True)
class Step:
    """One model and one that came from it; None for what was not measured, or does not apply."""

    before: str
    after: str
    changed: int | None
    lost: int | None
    gained: int | None
    other_wrong: int | None
    p: float | None
    towards_gold: int | None
    differences: dict[str, tuple[float, float, float]]

    @property
    def name(self) -> str:
        """What to call it."""
        return sentence(f"{self.before} → {self.after}")


def steps(record: Record) -> list[Step]:
    """Return the steps of a record, in order; none where it holds no churn."""
    found = dig(record.raw, "churn", "steps")
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    return [
        Step(
            str(entry.get("from")),
            str(entry.get("to")),
            _whole(entry.get("changed")),
            _whole(entry.get("right_to_wrong")),
            _whole(entry.get("wrong_to_right")),
            _whole(entry.get("wrong_to_other_wrong")),
            number(entry.get("mcnemar_p")),
            _whole(entry.get("changed_towards_gold")),
            dict(_differences(entry.get("metric_differences"))),
        )
        for entry in entries
    ]


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _differences(value: Any) -> Iterator[tuple[str, tuple[float, float, float]]]:
    for name, entry in value.items() if isinstance(value, Mapping) else ():
        bounds = dig(entry, "ci95")
        low, high = map(number, bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
        difference = number(dig(entry, "difference"))
        if difference is not None and low is not None and high is not None:
            yield str(name), (difference, low, high)


def change_sentences(record: Record) -> dict[str, str]:
    """Return a few words on every step, by its name: what is decided otherwise, the test, the first metric's interval."""
    return {
        step.name: " ".join(filter(None, (_decided(step, record), _tested(step), _scored(step))))
        for step in steps(record)
    }


def _decided(step: Step, record: Record) -> str:
    examples = _whole(dig(record.raw, "churn", "examples"))
    if step.changed is None or not examples:
        return f"What is decided otherwise was {NOT_MEASURED}."
    unit = str(dig(record.raw, "churn", "unit") or "example")
    share = f"{step.changed:,} of {count(examples, unit)} ({percent(step.changed / examples)})"
    if step.towards_gold is None:
        return sentence(f"{_the(step.after)} decides {share} otherwise.")
    beyond = number(dig(record.raw, "churn", "changed_beyond"))
    far = f" by more than {digits(beyond)} (a quarter of the labels' standard deviation)" if beyond is not None else ""
    return f"On {share} the number moves{far}, on {step.towards_gold:,} of them towards the label."


def _tested(step: Step) -> str:
    if step.towards_gold is not None:
        return "A number is neither right nor wrong, so McNemar's test does not apply."
    if step.lost is None or step.gained is None or step.p is None:
        return ""
    if step.lost == step.gained == 0:
        return "What was right stays right, what was wrong stays wrong."
    shown = "a difference is shown" if step.p < SIGNIFICANCE else "no difference is shown"
    return (
        f"It is right on {step.gained:,} that {_the(step.before)} misses and wrong on {step.lost:,} that "
        f"{_the(step.before)} had: {probability(step.p)} by McNemar's exact test, {shown}."
    )


def _scored(step: Step) -> str:
    for name, (difference, low, high) in step.differences.items():
        covers = ", which covers 0" if low <= 0 <= high else ""
        return (
            f"It changes {name} by {points(difference)} points (95% interval {points(low)} to {points(high)}{covers})."
        )
    return ""


def _the(role: str) -> str:
    return _NAMES.get(role, f"the {role}")


def probability(p: float) -> str:
    """Return a p-value in words and digits."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def change_table(record: Record) -> Table | None:
    """Return the steps' counts, one row each, or None where nothing is recorded."""
    found = steps(record)
    if not found:
        return None
    names = list(dict.fromkeys(name for step in found for name in step.differences))
    columns: dict[str, list[str]] = {
        "Decided otherwise": [_amount(step.changed) for step in found],
        "Right → wrong": [_amount(step.lost) for step in found],
        "Wrong → right": [_amount(step.gained) for step in found],
        "Wrong → other wrong": [_amount(step.other_wrong) for step in found],
        "Towards the label": [_amount(step.towards_gold) for step in found],
        "McNemar": [NOT_MEASURED if step.p is None else probability(step.p) for step in found],
        **{f"{name}, points (95% interval)": [_with_interval(step, name) for step in found] for name in names},
    }
    if not any(step.other_wrong for step in found):  # of two classes there is no other wrong one
        del columns["Wrong → other wrong"]
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED}}
    lines = [Line([step.name, *(cells[at] for cells in shown.values())]) for at, step in enumerate(found)]
    resamples = _whole(dig(record.raw, "churn", "resamples"))
    drawn = f" over {resamples:,} resamples" if resamples else ""
    caption = (
        f"Every step on the same {dig(record.raw, 'churn', 'unit') or 'example'}s; the interval is a paired bootstrap{drawn}."
        f"{_what_is_right(record)}"
    )
    return Table(caption, ["Step", *shown], lines)


def _what_is_right(record: Record) -> str:
    kind = dig(record.artifact, "task", "kind")
    said = {
        "multilabel": "all of its labels are",
        _TOKENS: "all of its words' tags are",
        "question-answering": "its answer is an accepted one",
    }
    unit = dig(record.raw, "churn", "unit") or "example"
    return f" A{'n' if str(unit)[:1] in 'aeiou' else ''} {unit} is right where {said[kind]}." if kind in said else ""


def _amount(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def _with_interval(step: Step, name: str) -> str:
    found = step.differences.get(name)
    return NOT_MEASURED if found is None else f"{points(found[0])} ({points(found[1])} to {points(found[2])})"


def change_list(record: Record, *, most: int = LIST_SHOWN) -> Table | None:
    """Return the first of the examples decided otherwise, in the record's order, or None for none."""
    listed, roles = dig(record.raw, "churn", "listed"), dig(record.raw, "churn", "models")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    if not entries or not isinstance(roles, Mapping):
        return None
    shown = entries[:most]
    changed = _whole(dig(record.raw, "churn", "changed")) or len(entries)
    how_many = "" if changed == len(shown) else f"The first {len(shown):,} of {changed:,}. "
    regression = dig(record.artifact, "task", "kind") == "regression"
    order = "the furthest moves first" if regression else "what the last model lost first, then what it gained"
    marks = "" if regression else f" {RIGHT} is right, {WRONG} wrong; a number is how sure the model is."
    caption = (
        f"{how_many}Examples by their place in the evaluation slice, from 0; {order}.{marks} Texts are read back from their "
        f"tokens. All examples: {dig(record.raw, 'churn', 'file') or 'churn.jsonl'} beside the record."
    )
    headings = ["Example", "Text", "Gold", *(sentence(str(role)) for role in roles)]
    lines = [
        Line(
            [
                str(entry.get("index")),
                _text(entry),
                _written(entry.get("gold"), entry),
                *(_said(entry, str(role)) for role in roles),
            ]
        )
        for entry in shown
    ]
    return Table(caption, headings, lines, frozenset(range(len(headings))))


def _text(entry: Mapping[str, Any]) -> str:
    texts = [text for text in (entry.get("text"), entry.get("text_pair")) if isinstance(text, str) and text]
    return " / ".join(texts) or NOT_MEASURED


def _said(entry: Mapping[str, Any], role: str) -> str:
    """Return one model's decision, whether it is right, and how sure it was."""
    right, sure = dig(entry, "right", role), number(dig(entry, "scores", role))
    mark = {True: f"{RIGHT} ", False: f"{WRONG} "}.get(right, "") if isinstance(right, bool) else ""
    decision = _written(dig(entry, "decisions", role), entry)
    return mark + decision + (f" {sure:.2f}" if sure is not None and decision != NOT_MEASURED else "")


def _written(value: Any, entry: Mapping[str, Any]) -> str:
    """Return a decision or gold in words: of words the tags that are in question, of answers all accepted ones."""
    if value is None:
        return NOT_MEASURED
    words = entry.get("words")
    if isinstance(value, list) and isinstance(words, list) and len(words) == len(value):
        return ", ".join(f"{word} {tag}" for word, tag in zip(words, value, strict=True)) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    amount = number(value)
    return (str(value) or "none") if amount is None else digits(amount)
