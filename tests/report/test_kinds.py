from __future__ import annotations

from tiny_record import estimated, held, in_use

from bertemd_deploy.report.kinds import how, noise_sentence, place
from bertemd_deploy.report.overview import overview_tables
from bertemd_deploy.report.reading import named
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import compare, head
from bertemd_deploy.report.tables import comparison_table, measurement_table
from bertemd_deploy.report.usage import usage_table


def test_limits_are_said_with_what_keeps_them(record) -> None:
    said = how(Record(held(record), "box"))
    assert "under limits of the device; the speed of a core is that of this machine" in said[0]
    assert said[1] == (
        "box: cores limited by affinity, the share of CPU time not limited, for want of a way to and memory limited by a "
        "control group."
    )


def test_a_stand_in_says_what_it_is_held_to(record) -> None:
    assert (
        place(Record(held(record), "box"))
        == "On this AMD EPYC, held to the 1 core and 512 MB of small-container (constrained)"
    )


def test_a_release_known_not_to_work_there_is_said(record) -> None:
    record["device"]["row"] = {"onnxruntime": {"bad": [{"version": "1.23.0", "reason": "illegal instruction"}]}}
    said = "pi: ONNX Runtime 1.23.0 is known not to work there: illegal instruction."
    assert said in how(Record(record, "pi"))
    record["versions"]["onnxruntime"] = "1.22.0"
    assert said not in how(Record(record, "pi"))


def test_an_estimate_states_its_errors(record) -> None:
    said = how(Record(estimated(record), "pi"))
    assert "Nothing ran there." in said[0]
    assert "pi: rates of another machine, scaled by clock and width." in said
    assert any("over 160 comparisons, the median error was 9.0% and the worst 31.0%." in line for line in said)


def test_noise_is_said_only_where_it_is(record) -> None:
    assert noise_sentence(Record(record, "x")) is None
    assert noise_sentence(Record(in_use(record), "x")) is None


def test_kinds_never_share_a_table(record) -> None:
    comparisons = [
        compare(found) for found in named([record, estimated(record), held(record), estimated(record, name="b")])
    ]
    tables = overview_tables(comparisons)
    assert [table.caption.split(":")[0] for table in tables] == ["Measured", "Estimated", "Constrained"]
    assert [len(table.lines) for table in tables] == [1, 2, 1]
    cells = dict(zip(tables[1].headings, tables[1].lines[0].cells, strict=True))
    assert cells["p50"].startswith("estimate ")
    assert cells["Peak memory"] == "estimate 124 MB (112–149 MB)"
    assert "p95" not in cells
    assert cells["Estimated at"] == "batch 1, replay of real lengths, 2 threads"
    assert head([one.record for one in comparisons]).subtitle.endswith(
        "on 4 devices (1 measured, 1 constrained and 2 estimated)."
    )


def test_a_device_without_a_student_says_why(record) -> None:
    nothing = held(record)
    nothing["measurements"] = []
    for entry in nothing["models"]:
        entry["failed"] = {"reason": "out of memory"}
    (table, other) = overview_tables(
        [compare(found) for found in named([nothing, record | {"models": [], "measurements": []}])]
    )
    assert table.lines[0].cells == ["small-container", "none (out of memory)"]
    assert other.lines[0].cells[1] == "none (not measured)"


def test_an_estimate_is_called_one_in_every_cell(record) -> None:
    comparison = compare(Record(estimated(in_use(record)), "pi"))
    assert usage_table(comparison) is None
    for table in (comparison_table(comparison), measurement_table(comparison.record)):
        assert table.caption.startswith("Estimated.")
        columns = dict(zip(table.headings, zip(*(line.cells for line in table.lines), strict=True), strict=True))
        times = columns.get("p50") or columns["P50"]
        assert all(cell.startswith("estimate ") and "–" in cell for cell in times)
        gains = columns["Speed-up (estimate, its interval)"]
        assert all(cell.startswith("estimate ") or cell == "baseline" for cell in gains)
        assert not {"p95", "P95", "Throughput", "Cold start", "n", "CPU per call", "Energy per call"} & set(columns)


def test_what_did_not_fit_is_in_its_row(record) -> None:
    table = comparison_table(compare(Record(held(record), "box")))
    row = dict(zip(table.headings, table.lines[0].cells, strict=True))
    assert (row["Model"], row["p50"], row["Peak memory"], row["Size"]) == (
        "Teacher, PyTorch", "did not fit", "did not fit", "438 MB",
    )  # fmt: skip


def test_use_beyond_the_loop(record) -> None:
    assert usage_table(compare(Record(record, "x"))) is None
    table = usage_table(compare(Record(in_use(record), "x")))
    assert table is not None
    row = dict(zip(table.headings, table.lines[-1].cells, strict=True))
    assert (row["Waiting, spinning"], row["Waiting, stopped"]) == ("94.0%", "0.2%")
    assert (row["Peak memory, with arena"], row["Peak memory, without arena"]) == ("124 MB", "87 MB")
    assert table.lines[0].cells[table.headings.index("Peak memory, with arena")] == "not measured"
    assert "one every 100 ms (batch 1, replay of real lengths, 2 threads)" in table.caption


def test_energy_and_whole_cold_start_are_in_the_comparison(record) -> None:
    table = comparison_table(compare(Record(in_use(record), "x")))
    row = dict(zip(table.headings, table.lines[-1].cells, strict=True))
    assert row["Energy per call"].endswith((" mJ", " µJ"))
    assert row["Cold start"] == "261 ms"
    assert "from the start of a process to its first answer" in table.caption
    assert "Energy by rapl:package-0." in table.caption
