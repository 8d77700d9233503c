"""Whether padding and batch mates change what a graph decides: measured on real examples, against a stated bound.

The reference is what the graph says of each example alone and unpadded. Against it stand the same examples padded
further, alone and in batches that mix lengths, with other mates, and in large batches of like length. Of fp32 only the
order of additions may differ. A dynamic int8 graph with one activation scale per tensor measures that scale over all rows
of a batch, padding included, so an example's neighbours reach its logits; a graph whose scales are fixed, or measured on
each row by itself, has no such way. How much may change is a `Bound`, by how activations get their scale. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.console import note, progress
from bertemd_deploy.decisions import SPREAD, TIE, same_decisions
from bertemd_deploy.encoding import Encoded, length_batches
from bertemd_deploy.errors import GateError
from bertemd_deploy.gate import keep_rejected
from bertemd_deploy.runtime import BATCH_SIZE, open_session, run_session
from bertemd_deploy.tasks import Kind

Scales = Literal["float", "fixed", "per-row", "per-tensor"]
Logits = NDArray[np.float32]
Run = Callable[[dict[str, NDArray[np.int64]]], Logits]

MOST_EXAMPLES: dict[Scales, int] = {"float": 64, "fixed": 128, "per-row": 128, "per-tensor": 256}  # a share wants many
MOST_TOKENS = 2**15  # of one pass, at the longest padding; bounds the time for long inputs
MIXED = 8  # rows of a batch that mixes lengths
FURTHER = 8  # tokens of padding added to a row that runs alone
_SHOWN = 8  # examples named in a message
_SEED = 20201116  # any fixed number: the same graph and examples give the same batches

_REMEDIES: dict[Scales, str] = {
    "float": "Set export.exporter to the other exporter, or update onnxruntime.",
    "fixed": "Update onnxruntime, or choose another quantize.mode.",
    "per-row": "Update onnxruntime, or choose another quantize.mode.",
    "per-tensor": "Raise quantize.max_changed, or choose a quantize.mode whose scales do not depend on the batch.",
}


@dataclass(frozen=True)
class Bound:
    """What padding and batch mates may change at most.

    Attributes:
        scales: where activations get their scale: "float" has none; "fixed", constants; "per-row", each row of activations
            by itself; "per-tensor", all rows of a call together.
        max_abs_logit_difference: of any logit; None where decisions alone are bounded.
        changed_decision_share: share of the decisions, in [0, 1], in any one arrangement.
    """

    scales: Scales
    max_abs_logit_difference: float | None
    changed_decision_share: float


# In int8, a sum that differs in its last bit may turn the rounding of a code; the 1e-3 leaves room for single codes.
_EXACT: dict[Scales, float] = {"float": 1e-4, "fixed": 1e-3, "per-row": 1e-3}
MAX_CHANGED = 5.0  # percent of the decisions, of a graph with one activation scale per tensor


def bound_of(scales: Scales, *, max_changed: float = MAX_CHANGED) -> Bound:
    """Return the bound of a graph.

    Args:
        scales: where its activations get their scale, as in `Bound`.
        max_changed: percent of the decisions that may change, where that is "per-tensor"; no other may change any.
    """
    allowed = _EXACT.get(scales)
    return Bound(scales, allowed, max_changed / 100 if allowed is None else 0.0)


@dataclass(frozen=True)
class Arrangement:
    """How far one way of running the examples is from running each alone.

    Attributes:
        name: the way, to follow on "changed …".
        max_abs_logit_difference: largest difference; None where a logit is not finite.
        changed_decision_share: share of decisions that differ, in [0, 1].
        changed_examples: numbers of the examples they belong to, ascending.
    """

    name: str
    max_abs_logit_difference: float | None
    changed_decision_share: float
    changed_examples: list[int]


@dataclass(frozen=True)
class Invariance:
    """How far one graph's answers depend on padding and batch mates.

    Attributes:
        kind: of the task.
        examples: how many were run.
        decisions: how many decisions they hold: one each, but of token classification one for every token.
        arrangements: what was measured, in order.
        bound: what is allowed.
    """

    kind: Kind
    examples: int
    decisions: int
    arrangements: tuple[Arrangement, ...]
    bound: Bound

    @property
    def max_abs_logit_difference(self) -> float | None:
        """Largest over the arrangements; None where a logit is not finite."""
        found = [arrangement.max_abs_logit_difference for arrangement in self.arrangements]
        return None if None in found else max(value for value in found if value is not None)

    @property
    def changed_decision_share(self) -> float:
        """Largest over the arrangements."""
        return max(arrangement.changed_decision_share for arrangement in self.arrangements)

    @property
    def changed_examples(self) -> list[int]:
        """Numbers of the examples with a changed decision in any arrangement, ascending."""
        return sorted({number for arrangement in self.arrangements for number in arrangement.changed_examples})

    @property
    def within_bound(self) -> bool:
        """Whether every logit is finite and nothing changed by more than is allowed."""
        largest, allowed = self.max_abs_logit_difference, self.bound.max_abs_logit_difference
        if largest is None or self.changed_decision_share > self.bound.changed_decision_share:
            return False
        return allowed is None or largest <= allowed

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry: what was found, what is allowed, and each arrangement."""
        return {
            "activation_scales": self.bound.scales,
            "examples": self.examples,
            "decisions": self.decisions,
            "max_abs_logit_difference": self.max_abs_logit_difference,
            "max_abs_logit_difference_allowed": self.bound.max_abs_logit_difference,
            "changed_decision_share": self.changed_decision_share,
            "changed_decision_share_allowed": self.bound.changed_decision_share,
            "changed_examples": self.changed_examples,
            "arrangements": {
                found.name: {
                    "max_abs_logit_difference": found.max_abs_logit_difference,
                    "changed_decision_share": found.changed_decision_share,
                    "changed_examples": found.changed_examples,
                }
                for found in self.arrangements
            },
        }

    def sentence(self) -> str:
        """Return one line in words: how much changes at most, and of how many."""
        largest = self.max_abs_logit_difference
        moved = "logits that are not finite" if largest is None else f"logits by at most {largest:.1e}"
        worst = max(self.arrangements, key=lambda found: found.changed_decision_share)
        noun = "number" if self.kind == "regression" else "decision"
        if not worst.changed_decision_share:
            return f"padding and batch mates change no {noun} of {self.decisions:,}, {moved}"
        changed = round(worst.changed_decision_share * self.decisions)
        return (
            f"padding and batch mates change {changed:,} of {self.decisions:,} {noun}s "
            f"({worst.changed_decision_share:.1%}, {worst.name}), {moved}"
        )


def measure_invariance(
    path: Path, *, examples: Encoded, pad_id: int, kind: Kind, max_length: int, bound: Bound
) -> Invariance:
    """Run examples alone, padded and in different company, and compare.

    Args:
        path: the graph.
        examples: evaluation examples; up to `MOST_EXAMPLES` of them are used, evenly spaced by length, fewer where
            `max_length` is long.
        pad_id: token id of padding.
        kind: of the task; says what a decision is. A regression decides nothing: there a number that moves by more than
            `decisions.SPREAD` standard deviations of the graph's own numbers has changed.
        max_length: longest input of the graph in tokens; what a row that runs alone is padded to.
        bound: what is allowed, for the result to judge by.

    Returns:
        The result; its example numbers are rows of `examples`.

    Raises:
        ArtifactError: the graph cannot be opened.
        ValueError: no examples.
    """
    if not len(examples):
        raise ValueError("no examples")
    numbers = _sample(examples.lengths, most=min(MOST_EXAMPLES[bound.scales], MOST_TOKENS // max_length))
    chosen = examples.select(numbers)
    run = partial(run_session, open_session(path))
    ways = list(_ways(chosen.lengths, max_length=max_length))
    with progress("invariance", (1 + len(ways)) * len(chosen)) as bar:
        alone = _logits(run, chosen, _each(chosen.lengths), pad_id=pad_id, done=bar.advance)
        found = [
            _compared(name, alone, _logits(run, chosen, groups, pad_id=pad_id, done=bar.advance), chosen, numbers, kind)
            for name, groups in ways
        ]
    decisions = len(alone) if kind == "token-classification" else len(chosen)
    return Invariance(kind, len(chosen), decisions, tuple(found), bound)


def check_invariance(found: Invariance, path: Path, *, out: Path) -> None:
    """Say what was found, and let a graph pass or keep it as rejected.

    Args:
        found: what was measured.
        path: the graph.
        out: the artifact folder that the user asked for.

    Raises:
        GateError: more changed than the bound allows, or a logit is not finite.
    """
    allowed = _allowed(found.bound)
    if found.within_bound:
        note(f"{path.parent.name}/{path.name}: {found.sentence()} (allowed {allowed})")
        return
    kept = keep_rejected(path, out=out)
    shown = ", ".join(map(str, found.changed_examples[:_SHOWN]))
    which = f" Evaluation examples {shown}{', …' if len(found.changed_examples) > _SHOWN else ''}." if shown else ""
    raise GateError(
        f"{path.name}: {found.sentence()}; allowed {allowed}.{which} Kept as {kept.name}. {_REMEDIES[found.bound.scales]}"
    )


def _allowed(bound: Bound) -> str:
    share = f"{bound.changed_decision_share:.1%} of decisions" if bound.changed_decision_share else "no decision"
    return share + (
        "" if bound.max_abs_logit_difference is None else f", logits by {bound.max_abs_logit_difference:.0e}"
    )


def _sample(lengths: NDArray[np.int64], *, most: int) -> NDArray[np.int64]:
    """Return the numbers of the examples to run, evenly spaced by length, ascending."""
    order = np.argsort(lengths, kind="stable")
    count = min(len(order), max(1, most))
    return np.sort(order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(np.int64))])


def _each(lengths: NDArray[np.int64], *, further: int = 0, longest: int = 0) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield every row by itself with its padded length."""
    for row, length in enumerate(lengths.tolist()):
        yield np.array([row]), max(length, min(length + further, longest))


def _ways(
    lengths: NDArray[np.int64], *, max_length: int
) -> Iterator[tuple[str, Iterable[tuple[NDArray[np.int64], int]]]]:
    """Yield every arrangement: its name, and batches of row numbers with the length they are padded to."""

    def together(groups: Iterable[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], int]]:
        return ((group, int(lengths[group].max())) for group in groups)

    order = np.argsort(lengths, kind="stable")
    count = max(1, len(order) // MIXED)
    strangers = np.random.default_rng(_SEED).permutation(len(order))
    yield f"padded by {FURTHER} tokens", _each(lengths, further=FURTHER, longest=max_length)
    yield f"padded to {max_length} tokens", _each(lengths, further=max_length, longest=max_length)
    yield f"in batches of {MIXED} of mixed length", together(order[start::count] for start in range(count))
    yield "with other batch mates", together(np.array_split(strangers, count))
    yield f"in batches of {BATCH_SIZE} of like length", together(length_batches(lengths, batch_size=BATCH_SIZE))


def _logits(
    run: Run,
    examples: Encoded,
    groups: Iterable[tuple[NDArray[np.int64], int]],
    *,
    pad_id: int,
    done: Callable[[int], None],
) -> Logits:
    """Return the logits of all examples in their order, ragged where each token has its own, as the groups run them."""
    pieces: list[Logits] = [np.empty((0, 0), dtype=np.float32)] * len(examples)
    for group, length in groups:
        found = run(examples.batch(group, pad_id=pad_id, length=length))
        for row, logits in zip(group, found, strict=True):
            pieces[row] = logits[None] if found.ndim == 2 else logits[: examples.lengths[row]]
        done(len(group))
    return np.concatenate(pieces)


def _compared(
    name: str, alone: Logits, found: Logits, examples: Encoded, numbers: NDArray[np.int64], kind: Kind
) -> Arrangement:
    differences = np.abs(found - alone).max(axis=-1)
    largest = float(differences.max()) if np.isfinite(differences).all() else None
    if kind == "regression":
        changed = ~(differences <= max(SPREAD * float(alone.std()), TIE))
    else:
        changed = ~same_decisions(kind, expected=alone, found=found, offsets=examples.offsets)
    rows = np.flatnonzero(changed)
    if kind == "token-classification":
        rows = np.unique(np.repeat(np.arange(len(examples)), examples.lengths)[changed])
    return Arrangement(name, largest, float(changed.mean()), numbers[rows].tolist())
