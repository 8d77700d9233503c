"""How measured values are written for people: units, digits, and "not measured" where a value is null.

Every function takes None for a value that was not measured and never turns it into a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
_ACRONYMS = {
    "cpu": "CPU",
    "isa": "instruction sets",
    "mhz": "MHz",
    "rss": "RSS",
    "1m": "over 1 minute",
    "celsius": "°C",
    "gb": "GB",
    "s": "per second",
}
_MOST_ITEMS = 8
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def number(value: Any) -> float | None:
    """Return `value` as a float when it is a finite JSON number that a float can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        amount = float(value)
    except OverflowError:
        return None
    return amount if math.isfinite(amount) else None


def dig(value: Any, *keys: str) -> Any:
    """Return the value under nested `keys`, or None as soon as a level is absent or no object."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def digits(value: float) -> str:
    """Return `value` with about three significant digits and no exponent."""
    magnitude = abs(value)
    if magnitude >= 100 or value == 0:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 0.1 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """Return a duration given in milliseconds, with its unit."""
    return NOT_MEASURED if value is None else f"{digits(value)} ms"


def megabytes(value: float | None) -> str:
    """Return a number of bytes in decimal megabytes (10^6 bytes), or kilobytes below a tenth of one, with its unit."""
    if value is None:
        return NOT_MEASURED
    amount = value / 1e6
    if 0 < amount < 0.1:
        return f"{digits(value / 1e3)} kB"
    return f"{amount:,.0f} MB" if amount >= 10 else f"{digits(amount)} MB"


def joules(value: float | None) -> str:
    """Return an energy given in joules, with its unit."""
    if value is None:
        return NOT_MEASURED
    for factor, unit in ((1, "J"), (1e3, "mJ")):
        if value * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} µJ"


def spread(low: float, high: float, *, scale: float = 1.0) -> str:
    """Return the bounds of an interval, each divided by `scale`, without a unit."""
    return f"{digits(low / scale)}–{digits(high / scale)}"


def between(low: float, high: float, *, write: Callable[[float | None], str]) -> str:
    """Return the bounds of an interval as `write` writes them, the unit once where both have the same."""
    first, last = write(low), write(high)
    amount, _, unit = first.rpartition(" ")
    return f"{amount}–{last}" if amount and last.endswith(f" {unit}") else f"{first} to {last}"


def joined(items: Sequence[str]) -> str:
    """Return a list in words: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def per_second(value: float | None) -> str:
    """Return a rate of examples, with its unit."""
    return NOT_MEASURED if value is None else f"{digits(value)}/s"


def ratio(value: float) -> str:
    """Return a factor such as 14.2×; two decimals below 2, where they decide."""
    if value >= 100:
        return f"{value:,.0f}×"
    return f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def score(value: float | None) -> str:
    """Return a task metric with three decimals."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Return a share (1 is the whole) in percent with one decimal."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """Return a difference of two scores in points (0.01 each), signed, with one decimal."""
    value = round(100 * difference, 1)
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"


def plain(key: str, value: Any) -> str:
    """Return any JSON value as short text; the name of its key decides the unit (`_bytes`, `_ms`, `_mhz`)."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        items = ["×".join(map(str, item)) if isinstance(item, list) else plain("", item) for item in value]
        if len(items) > _MOST_ITEMS:
            return f"{len(items)}: {', '.join(items[:3])}, …"
        return ", ".join(items) or "none"
    if isinstance(value, Mapping):
        if set(value) == {"count"}:  # what a bench record keeps of a long list
            return plain("", value["count"])
        return ", ".join(f"{words(str(name))}: {plain(str(name), item)}" for name, item in value.items()) or "none"
    amount = number(value)
    if amount is None:
        return str(value)
    if key.endswith("bytes"):
        return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else megabytes(amount)
    if key.endswith("_ms"):
        return milliseconds(amount)
    if key.endswith("agreement"):
        return percent(amount)
    if key == "max_drop":
        return f"{amount:g} point" + "s" * (amount != 1)
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(amount) < 1e-3 else f"{amount:.4g}"


def words(key: str) -> str:
    """Return a JSON key as words: `peak_rss_bytes` becomes "peak rss"."""
    name = re.sub(r"_(bytes|ms)$", "", key).replace("_", " ").strip()
    return " ".join(_ACRONYMS.get(word, word) for word in name.split())


def sentence(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def markdown(text: str) -> str:
    """Return `text` for a Markdown cell or sentence: no markup, no HTML, no line break survives."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(escaped.split()))
