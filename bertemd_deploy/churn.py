"""What changed on the way from teacher to student to int8: which examples, whether by more than chance, and by how much.

In: the logits of up to three models over one slice. Out: a line for every dev example (text, gold, what each model
decided), how many decisions each step turned right or wrong, McNemar's exact test on these, and a paired bootstrap
interval of the difference of each of the task's metrics (see `resampling`).

An example is right where its class, all of its labels, all of its words' tags, or its answer (exact match) is. A
regression's number is neither right nor wrong: there the test does not apply, and a number counts as changed where it
moves by more than `decisions.SPREAD` standard deviations of the labels. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.answers import Answers, answer_scores, best_answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.decisions import SPREAD
from bertemd_deploy.encoding import decoded
from bertemd_deploy.metrics import decisions, evaluate_metrics
from bertemd_deploy.predictions import softmax
from bertemd_deploy.resampling import RESAMPLES, Statistic, bootstrap, interval, mcnemar, metric_of_units

LISTED = 200  # changed examples in the record; the file has all examples
LONGEST_TEXT = 300  # characters, in the record
UNITS = {"token-classification": "sentence", "question-answering": "question"}  # of other kinds "example"

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Judged:
    """What one model decided on every unit: an example, a sentence, a question.

    Attributes:
        decisions: U class names, lists of label names, numbers, lists of tags, or answers ("" for none).
        scores: (U,) how sure it is, in [0, 1]: the probability of its class or answer, of several labels or tags that of the
            least sure one; None for regression.
        right: (U,) bool; None for regression.
    """

    decisions: list[Any]
    scores: NDArray[np.float64] | None
    right: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Churn:
    """The record's entry, and the lines of the list, one per unit in the slice's order."""

    record: dict[str, Any]
    lines: list[dict[str, Any]]


def find_churn(
    models: Mapping[str, Logits],
    *,
    part: DataSlice,
    labels: Sequence[str],
    metrics: Sequence[str],
    tokenizer: Tokenizer,
    resamples: int = RESAMPLES,
) -> Churn:
    """Compare models, each with every later one.

    Args:
        models: logits over the slice by the model's role, such as "teacher", "student" and "int8", in the order in which
            each came from the one before; at least two. Columns are in the order of `labels`.
        part: the evaluation slice.
        labels: label names by number; empty for regression and question answering.
        metrics: the task's, whose differences get an interval.
        tokenizer: reads the texts back from their tokens.
        resamples: of the bootstrap.

    Raises:
        ValueError: fewer than two models, or logits that are not finite.
    """
    if len(models) < 2:
        raise ValueError("one model has nothing to differ from")
    judged = {role: _judge(logits, part, labels) for role, logits in models.items()}
    roles = list(models)
    steps = [
        (before, after) for apart in range(1, len(roles)) for before, after in zip(roles, roles[apart:], strict=False)
    ]
    changed = {(before, after): _changed(judged[before], judged[after], part) for before, after in steps}
    moved = np.logical_or.reduce(list(changed.values()))
    lines = _lines(judged, part=part, labels=labels, tokenizer=tokenizer, moved=moved)
    differences = _differences(models, part=part, labels=labels, metrics=metrics, steps=steps, resamples=resamples)
    record = {
        "unit": UNITS.get(part.kind, "example"),
        "examples": len(lines),
        "changed": int(moved.sum()),
        "metrics": {
            role: evaluate_metrics(metrics, logits=logits, part=part, label_names=labels)
            for role, logits in models.items()
        },
        "right": {role: None if one.right is None else int(one.right.sum()) for role, one in judged.items()},
        "changed_beyond": SPREAD * float(part.labels.std()) if part.kind == "regression" else None,
        "resamples": resamples,
        "steps": [
            {"from": before, "to": after, "changed": int(changed[before, after].sum())}
            | _transitions(judged[before], judged[after], changed[before, after], part)
            | {"metric_differences": differences[before, after]}
            for before, after in steps
        ],
        "listed": [_shortened(lines[at]) for at in _worst_first(judged, changed)[:LISTED]],
    }
    return Churn(record, lines)


def _judge(logits: Logits, part: DataSlice, labels: Sequence[str]) -> Judged:
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=-1).sum())} of {len(logits)} outputs are not finite")
    if part.kind == "regression":
        return Judged(logits[:, 0].tolist(), None, None)
    if part.gold is not None:
        return _judge_answers(logits, part.examples.offsets, part.gold)
    if part.kind == "multilabel":
        sets = [[name for name, logit in zip(labels, row, strict=True) if logit > 0] for row in logits]
        sure = 1 / (1 + np.exp(-np.abs(logits.astype(np.float64))))
        return Judged(sets, sure.min(axis=-1), np.asarray(((logits > 0) == (part.labels > 0)).all(axis=-1)))
    if part.kind == "token-classification":
        return _judge_tags(logits, part, labels)
    best = decisions(logits)
    return Judged([labels[number] for number in best], softmax(logits).max(axis=-1), np.asarray(best == part.labels))


def _judge_answers(logits: Logits, offsets: NDArray[np.int64], gold: Answers) -> Judged:
    """Judge by exact match; an answer is as probable as its first token times its last, over all windows of its context."""
    found = best_answers(logits, offsets=offsets, gold=gold)
    texts = [one.text for one in found]
    right = [
        answer_scores([text], accepted=[accepted])["exact_match"] == 1
        for text, accepted in zip(texts, gold.accepted, strict=True)
    ]
    windows = np.logaddexp.reduceat(logits.astype(np.float64), offsets[:-1], axis=0)
    totals = np.full((len(found), 2), -np.inf)
    np.logaddexp.at(totals, gold.example, windows)
    scores = np.array([one.score if one.start >= 0 else one.null_score for one in found])
    return Judged(texts, np.exp(scores - totals.sum(axis=1)), np.array(right, dtype=bool))


def _judge_tags(logits: Logits, part: DataSlice, labels: Sequence[str]) -> Judged:
    best, sure = decisions(logits), softmax(logits).max(axis=-1)
    tags, least, right = [], [], []
    for at in _scored(part):
        tags.append([labels[number] for number in best[at]])
        least.append(float(sure[at].min(initial=1.0)))
        right.append(bool((best[at] == part.labels[at]).all()))
    return Judged(tags, np.array(least), np.array(right, dtype=bool))


def _scored(part: DataSlice) -> Iterable[NDArray[np.int64]]:
    """Yield the places of every row's scored tokens, the first of each word."""
    for start, stop in itertools.pairwise(part.examples.offsets):
        yield np.flatnonzero(part.labels[start:stop] != NOT_SCORED) + start


def _changed(before: Judged, after: Judged, part: DataSlice) -> NDArray[np.bool_]:
    if part.kind == "regression":
        moves = np.abs(np.array(after.decisions) - np.array(before.decisions))
        return np.asarray(moves > SPREAD * float(part.labels.std()))
    return np.array([one != other for one, other in zip(before.decisions, after.decisions, strict=True)], dtype=bool)


def _transitions(before: Judged, after: Judged, changed: NDArray[np.bool_], part: DataSlice) -> dict[str, Any]:
    """Return the counts of a step and its test; for a regression how far the numbers moved, and whereto."""
    if before.right is None or after.right is None:
        found, other = np.array(after.decisions), np.array(before.decisions)
        nearer = np.abs(found - part.labels) < np.abs(other - part.labels)
        return {
            "mean_abs_move": float(np.abs(found - other).mean()),
            "max_abs_move": float(np.abs(found - other).max()),
            "changed_towards_gold": int((changed & nearer).sum()),
            "changed_away_from_gold": int((changed & ~nearer).sum()),
            "mcnemar_p": None,
        }
    lost, gained = before.right & ~after.right, ~before.right & after.right
    wrong = ~before.right & ~after.right
    return {
        "right_to_right": int((before.right & after.right).sum()),
        "right_to_wrong": int(lost.sum()),
        "wrong_to_right": int(gained.sum()),
        "wrong_to_same_wrong": int((wrong & ~changed).sum()),
        "wrong_to_other_wrong": int((wrong & changed).sum()),
        "mcnemar_p": mcnemar(int(lost.sum()), int(gained.sum())),
    }


def _differences(
    models: Mapping[str, Logits],
    *,
    part: DataSlice,
    labels: Sequence[str],
    metrics: Sequence[str],
    steps: Sequence[tuple[str, str]],
    resamples: int,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return, for every step and metric, how much higher the later model scores, with its 95% interval."""
    units = len(part.gold.contexts) if part.gold is not None else len(part)
    everything = np.arange(units)
    place = {role: at for at, role in enumerate(models)}
    found: dict[tuple[str, str], dict[str, Any]] = {step: {} for step in steps}
    for metric in metrics:
        statistics: list[Statistic] = [
            metric_of_units(metric, logits=logits, part=part, label_names=labels) for logits in models.values()
        ]
        draws = bootstrap([[statistic] for statistic in statistics], units=units, resamples=resamples)
        values = [statistic(everything) for statistic in statistics]
        for before, after in steps:
            low, high = interval(draws[:, place[after]] - draws[:, place[before]])
            difference = values[place[after]] - values[place[before]]
            found[before, after][metric] = {"difference": difference, "ci95": [low, high]}
    return found


def _worst_first(
    judged: Mapping[str, Judged], changed: Mapping[tuple[str, str], NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Return the numbers of the changed units: what the last model has wrong and another right first, then the reverse.

    Of a regression, the furthest moves first.
    """
    moved = np.flatnonzero(np.logical_or.reduce(list(changed.values())))
    last = list(judged.values())[-1]
    if last.right is None:
        numbers = np.array([one.decisions for one in judged.values()])
        rank = -np.ptp(numbers, axis=0)
    else:
        right = np.array([one.right for one in judged.values()])
        rank = np.where(right.any(axis=0) & ~last.right, 0.0, np.where(last.right & ~right.all(axis=0), 1.0, 2.0))
    return np.asarray(moved[np.argsort(rank[moved], kind="stable")], dtype=np.int64)


def _lines(
    judged: Mapping[str, Judged],
    *,
    part: DataSlice,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    moved: NDArray[np.bool_],
) -> list[dict[str, Any]]:
    first, second = _texts(part, tokenizer)
    words = _words(part, tokenizer) if part.kind == "token-classification" else None
    gold = _gold(part, labels)
    lines = []
    for unit in range(len(moved)):
        said = {role: one.decisions[unit] for role, one in judged.items()}
        line: dict[str, Any] = {"index": unit}
        if part.gold is not None:
            line["id"] = part.gold.ids[unit]
        line |= {"text": first[unit], "text_pair": second[unit] if second is not None else None}
        line |= {"gold": gold[unit], "decisions": said}
        if words is not None:
            line |= _where_they_differ(words[unit], gold[unit], said)
        line["scores"] = {role: None if one.scores is None else float(one.scores[unit]) for role, one in judged.items()}
        line["right"] = {role: None if one.right is None else bool(one.right[unit]) for role, one in judged.items()}
        lines.append(line | {"changed": bool(moved[unit])})
    return lines


def _where_they_differ(words: list[str], gold: list[str], said: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the words whose tags are not all alike, and only their tags."""
    at = [place for place in range(len(words)) if len({gold[place], *(tags[place] for tags in said.values())}) > 1]
    return {
        "words": [words[place] for place in at],
        "gold": [gold[place] for place in at],
        "decisions": {role: [tags[place] for place in at] for role, tags in said.items()},
    }


def _texts(part: DataSlice, tokenizer: Tokenizer) -> tuple[list[str], list[str] | None]:
    """Return the texts of every unit, read back from the tokens: of questions the question, with its whole context."""
    if part.gold is None:
        return decoded(tokenizer, part.examples)
    _, window = np.unique(part.gold.example, return_index=True)
    return decoded(tokenizer, part.examples.select(window))[0], list(part.gold.contexts)


def _words(part: DataSlice, tokenizer: Tokenizer) -> list[list[str]]:
    """Return every row's tagged words, each with the pieces up to the next one."""
    found = []
    for at, stop in zip(_scored(part), part.examples.offsets[1:], strict=True):
        edges = [*at.tolist(), int(stop)]
        pieces = (part.examples.tokens[start:end].tolist() for start, end in itertools.pairwise(edges))
        found.append([tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in pieces])
    return found


def _gold(part: DataSlice, labels: Sequence[str]) -> list[Any]:
    if part.gold is not None:
        return [list(dict.fromkeys(accepted)) for accepted in part.gold.accepted]
    if part.kind == "regression":
        return [float(value) for value in part.labels]
    if part.kind == "multilabel":
        return [[name for name, value in zip(labels, row, strict=True) if value > 0] for row in part.labels]
    if part.kind == "token-classification":
        return [[labels[number] for number in part.labels[at]] for at in _scored(part)]
    return [labels[number] for number in part.labels]


def _shortened(line: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        return value[: LONGEST_TEXT - 1] + "…" if isinstance(value, str) and len(value) > LONGEST_TEXT else value

    return {key: short(value) for key, value in line.items()}
