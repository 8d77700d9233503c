"""Tables on what an artifact was made with and where it ran: parity, invariance, quantization, machines, versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bertemd_deploy.report.records import Record
from bertemd_deploy.report.tables import Line, Table
from bertemd_deploy.report.text import NOT_MEASURED, dig, number, percent, plain, sentence, words

_SAID_ELSEWHERE = ("sources", "confinement", "limited_to", "row")  # of a device

_DECISIONS = {  # what "the same decision" means, by kind of task
    "classification": ", and the share of inputs with the same decision",
    "regression": "",
    "multilabel": ", and the share of inputs with the same labels",
    "token-classification": ", and the share of tokens with the same tag",
    "question-answering": ", and the share of windows with the same best span",
}


def parity_table(record: Record) -> Table | None:
    """Return how far each graph's answers lie from the torch student's, or None where that is not recorded."""
    caption = "Each graph against the torch student on the same inputs: the largest absolute difference of a logit"
    caption += _DECISIONS.get(str(dig(record.artifact, "task", "kind")), _DECISIONS["classification"]) + "."
    allowed = number(dig(record.artifact, "parity", "max_abs_logit_difference_allowed"))
    if allowed is not None:
        caption += f" An fp32 graph that differs by more than {plain('', allowed)} is not handed out."
    return _named_table(dig(record.artifact, "parity", "graphs"), caption, first="Graph")


def invariance_table(record: Record) -> Table | None:
    """Return how far padding and batch mates change each graph's answers, or None where that is not recorded."""
    graphs = dig(record.artifact, "invariance")
    found = {str(name): entry for name, entry in graphs.items()} if isinstance(graphs, Mapping) else {}
    found = {name: entry for name, entry in found.items() if isinstance(entry, Mapping)}
    if not found:
        return None
    columns = {
        "Activation scales": [str(entry.get("activation_scales") or NOT_MEASURED) for entry in found.values()],
        "Examples": [plain("", entry.get("examples")) for entry in found.values()],
        "Changed decisions": [percent(number(entry.get("changed_decision_share"))) for entry in found.values()],
        "Allowed": [percent(number(entry.get("changed_decision_share_allowed"))) for entry in found.values()],
        "Largest logit difference": [plain("", entry.get("max_abs_logit_difference")) for entry in found.values()],
        "Most changed": [_most_changed(entry) for entry in found.values()],
    }
    caption = (
        "Each graph's answers to examples that are padded further, in batches that mix lengths or with other mates, against "
        "its answers to each alone and unpadded: the largest share of changed decisions, and what is allowed."
    )
    lines = [Line([name, *(cells[at] for cells in columns.values())]) for at, name in enumerate(found)]
    return Table(caption, ["Graph", *columns], lines, frozenset({0, 1, 6}))


def _most_changed(entry: Mapping[str, Any]) -> str:
    arrangements = entry.get("arrangements")
    shares = {
        str(name): number(dig(arrangement, "changed_decision_share")) or 0.0
        for name, arrangement in (arrangements.items() if isinstance(arrangements, Mapping) else ())
    }
    return max(shares, key=lambda name: shares[name]) if any(shares.values()) else "–"


def trials_table(record: Record) -> Table | None:
    """Return what quantization tried, in order, or None where nothing is recorded."""
    trials = dig(record.artifact, "quantization", "trials")
    if not isinstance(trials, list):
        return None
    numbered = {str(place): trial for place, trial in enumerate(trials, start=1) if isinstance(trial, Mapping)}
    return _named_table(numbered, "Quantization settings in the order they were tried.", first="Trial")


def settings_table(record: Record) -> Table | None:
    """Return the quantization settings that were kept, or None."""
    quantization = dig(record.artifact, "quantization")
    if not isinstance(quantization, Mapping):
        return None
    kept = {str(key): value for key, value in quantization.items() if key != "trials" and value is not None}
    if not kept:
        return None
    lines = [Line([sentence(words(key)), plain(key, value)]) for key, value in kept.items()]
    return Table("The quantization settings in the artifact.", ["Setting", "Value"], lines, frozenset({0, 1}))


def _named_table(entries: Any, caption: str, *, first: str) -> Table | None:
    """Return a table of like objects by name, with one column per key any of them has."""
    if not isinstance(entries, Mapping):
        return None
    rows = {str(name): entry for name, entry in entries.items() if isinstance(entry, Mapping)}
    keys = list(dict.fromkeys(str(key) for entry in rows.values() for key in entry))
    if not rows or not keys:
        return None
    lines = [Line([name, *(plain(key, entry.get(key)) for key in keys)]) for name, entry in rows.items()]
    wordy = {
        place
        for place, key in enumerate(keys, start=1)
        if any(number(entry.get(key)) is None for entry in rows.values())
    }
    return Table(caption, [first, *(sentence(words(key)) for key in keys)], lines, frozenset({0} | wordy))


def machine_table(records: Sequence[Record]) -> Table:
    """Return the facts of every device, one column each."""
    keys = ("started", "duration_seconds", "conditions")
    facts = []
    for record in records:
        own = {key: value for key, value in record.device.items() if key not in _SAID_ELSEWHERE}
        own |= {key: record.raw.get(key) for key in keys}
        facts.append({sentence(name): text for name, text in _flat(own)})
    caption = "The machines, as they described themselves"
    caption += "; a device of an estimate as its table describes it." if any(r.estimated for r in records) else "."
    return _side_by_side(caption, facts, records)


def sources(records: Sequence[Record]) -> list[str]:
    """Return where the facts of the devices come from, a line each: "raspberry-pi-5, cores: https://…"."""
    said = []
    for record in records:
        found = record.device.get("sources") or dig(record.device, "row", "sources")
        for source in found if isinstance(found, list) else ():
            said.append(f"{record.device.get('name')}, {dig(source, 'fact')}: {dig(source, 'url')}")
    return list(dict.fromkeys(said))


def versions_table(records: Sequence[Record]) -> Table | None:
    """Return the versions that ran on every device, one column each, or None where none are recorded."""
    facts = [dict(_versions(record)) for record in records]
    return _side_by_side("Software versions.", facts, records) if any(facts) else None


def _versions(record: Record) -> Iterable[tuple[str, str]]:
    versions = record.raw.get("versions")
    for package, version in versions.items() if isinstance(versions, Mapping) else ():
        yield str(package), "not installed" if version is None else plain("", version)


def _side_by_side(caption: str, facts: Sequence[dict[str, str]], records: Sequence[Record]) -> Table:
    keys = list(dict.fromkeys(key for column in facts for key in column))
    lines = [Line([key, *(column.get(key, "not stated") for column in facts)]) for key in keys]
    return Table(caption, ["Fact", *(record.title for record in records)], lines, frozenset(range(len(facts) + 1)))


def _flat(value: Any, prefix: str = "", key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            label = f"{prefix} {words(str(name))}".strip()
            yield from _flat(inner, label, str(name))
    elif prefix and value is not None:
        yield prefix, plain(key, value)
