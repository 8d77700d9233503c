"""How the page of the GLUE grids says numbers: tables, means with deviations, differences and ratios with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glue_stats import Estimate, Lines, mean_sd

NOT_RUN, NOT_MEASURED, NOT_DEFINED = "not run yet", "not measured", "not defined"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table.

    Raises:
        ValueError: a row has another number of cells than the head.
    """
    filled = [[cell.replace("|", "/") for cell in row] for row in rows]
    if any(len(row) != len(head) for row in filled):
        raise ValueError(f"every row has {len(head)} cells")
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *filled)]


def spread(lines: Lines, name: str, *, model: str = "torch") -> str:
    """Return mean ± deviation over seeds of a metric, "agreement" or "kl"."""
    found = mean_sd(lines, name, model=model)
    if found is None:
        return NOT_RUN
    mean, sd = found
    digits = digits_of(name)
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def signed(found: Estimate | None, name: str) -> str:
    """Return a difference with its interval."""
    if found is None:
        return "no pair yet"
    value, low, high = (f"{one:+.{digits_of(name)}f}" for one in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def digits_of(name: str) -> int:
    """Return the decimals a number is shown with."""
    return 5 if name == "kl" else 4  # a good student's divergence is a few thousandths


def ratio_text(found: Estimate | None) -> str:
    """Return a ratio with its interval."""
    return "no pair yet" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def student_words(student: Mapping[str, Any]) -> str:
    """Return the students' shape and start, from their section of the plan."""
    shape = student.get("name") or "{layers}L-{hidden}".format_map(student)
    start = student.get("init", "auto")
    if start in ("auto", "teacher"):
        return str(shape)
    return f"{shape} from {'random weights' if start == 'random' else start}"


def listed(words: Sequence[str]) -> str:
    """Return words as English lists them."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
