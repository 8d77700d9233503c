"""Entities in tag sequences, and their F1: what `seqeval` counts in its default mode, in plain Python.

A tag is O, or a prefix and a type such as B-PER. Prefixes are those of IOB1, IOB2, IOE and IOBES; they are read leniently:
an I- that follows O or another type begins an entity as B- would.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OUTSIDE = "O"
_TAG = re.compile(r"[BIES]-.+", re.DOTALL)

Entity = tuple[str, int, int]


def is_entity_tag(tag: str) -> bool:
    """Say whether a tag is O, or B-, I-, E- or S- with a type."""
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return (type, first position, last position) of every entity of one sentence, in order.

    Args:
        tags: O, or a prefix (B, I, E, S), a hyphen and a type.
    """
    found: list[Entity] = []
    prefix, kind, first = OUTSIDE, "", 0
    for at, tag in enumerate([*tags, OUTSIDE]):
        next_prefix, _, next_kind = tag.partition("-")
        goes_on = prefix in ("B", "I") and next_prefix in ("I", "E") and kind == next_kind
        if not goes_on:
            if prefix != OUTSIDE:
                found.append((kind, first, at - 1))
            first = at
        prefix, kind = next_prefix, next_kind
    return found


def entity_f1(predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]]) -> float:
    """Return the F1 over all sentences' entities, right where type and both ends are; 0 where neither side has any."""
    shared = total = 0
    for guess, truth in zip(predicted, actual, strict=True):
        found, wanted = set(entities(guess)), set(entities(truth))
        shared += len(found & wanted)
        total += len(found) + len(wanted)
    return 2 * shared / total if total else 0.0
