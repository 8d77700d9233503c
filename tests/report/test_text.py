from __future__ import annotations

import pytest

from bertemd_deploy.report import text


@pytest.mark.parametrize("value", [None, "3", True, float("nan"), float("inf"), 10**309, -(10**309), [1]])
def test_number_takes_only_finite_json_numbers(value: object) -> None:
    assert text.number(value) is None
    assert text.number(3) == 3.0


@pytest.mark.parametrize(
    "write",
    [text.milliseconds, text.megabytes, text.score, text.percent, text.per_second, lambda value: text.plain("", value)],
)
def test_null_is_never_a_number(write) -> None:
    assert write(None) == "not measured"


def test_units_and_digits() -> None:
    assert [text.milliseconds(value) for value in (0.0421, 3.14159, 31.4159, 1314.159)] == [
        "0.0421 ms",
        "3.14 ms",
        "31.4 ms",
        "1,314 ms",
    ]
    assert [text.megabytes(value) for value in (544, 150_000, 1_500_000, 91_400_000)] == [
        "0.54 kB",
        "0.15 MB",
        "1.50 MB",
        "91 MB",
    ]
    assert [text.ratio(value) for value in (0.934, 1.0449, 14.24, 140.2)] == ["0.93×", "1.04×", "14.2×", "140×"]
    assert [text.points(value) for value in (-0.0312, 0.002, -0.00001)] == ["−3.1", "+0.2", "0.0"]


def test_plain_values_follow_the_unit_in_their_key() -> None:
    assert text.plain("memory_bytes", 8_000_000_000) == "8.0 GB"
    assert text.plain("first_ms", 3.14) == "3.14 ms"
    assert text.plain("decision_agreement", 0.988) == "98.8%"
    assert text.plain("max_drop", 1.0) == "1 point"
    assert text.plain("per_channel", False) == "no"
    assert text.plain("difference", 2.13e-6) == "2.1e-06"
    assert text.plain("operators", ["MatMul", "Gather"]) == "MatMul, Gather"
    assert text.plain("excluded", {"count": 20}) == "20"
    assert text.plain("operators", [f"node{at}" for at in range(9)]) == "9: node0, node1, node2, …"
    assert text.plain("per_channel", {"int8": True, "fused-int8": False}) == "int8: yes, fused-int8: no"
    assert text.plain("shapes", [[1, 7], [16, 64]]) == "1×7, 16×64"
    assert text.words("peak_rss_bytes") == "peak RSS"


def test_markdown_is_disarmed() -> None:
    assert text.markdown("a|b\n<img src=x> *c* [d](e) `f`") == r"a\|b &lt;img src=x&gt; \*c\* \[d\](e) \`f\`"


def test_dig_stops_at_the_first_absent_level() -> None:
    assert text.dig({"a": {"b": 1}}, "a", "b") == 1
    assert text.dig({"a": [1]}, "a", "b") is None
    assert text.dig(None, "a") is None


def test_an_interval_names_its_unit_once_where_it_can() -> None:
    assert text.between(1.5, 31, write=text.milliseconds) == "1.50–31.0 ms"
    assert text.between(50_000, 2e6, write=text.megabytes) == "50.0 kB to 2.00 MB"
    assert text.between(0.9, 0.95, write=text.score) == "0.900 to 0.950"


def test_energy_has_the_unit_that_reads_best() -> None:
    assert [text.joules(value) for value in (2.5, 0.0123, 0.00042, None)] == [
        "2.50 J",
        "12.3 mJ",
        "420 µJ",
        "not measured",
    ]


def test_lists_are_joined_as_one_says_them() -> None:
    assert [text.joined(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
