from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_record import build_record, estimated, held, in_use, other_student

from bertemd_deploy.budget import Budget, budget_entry
from bertemd_deploy.errors import ArtifactError, BertemdError, BudgetError
from bertemd_deploy.report import enforce, html, model_card_table, report
from bertemd_deploy.report.artifact_tables import parity_table
from bertemd_deploy.report.records import Record

pytest.importorskip("matplotlib")

LOADING = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("object", "data"),
    ("source", "src"),
}


class Page(HTMLParser):
    """What the tests ask of a page: tags with attributes, text, table rows, and whether tags are balanced."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def page_of(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory, stored_record) -> Path:
    """The report on one full record."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "record.json").write_text(json.dumps(stored_record), encoding="utf-8")
    return report([folder / "record.json"], out=folder / "out")


def test_three_files_and_the_records_unchanged(full, record) -> None:
    assert sorted(item.name for item in full.parent.iterdir()) == ["index.html", "report.json", "report.md"]
    assert full.name == "index.html"
    assert json.loads(full.with_name("report.json").read_text(encoding="utf-8")) == [record]


def test_page_is_one_small_file_that_asks_for_nothing(full) -> None:
    text = full.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    page = Page(text)
    assert page.all("script") == [{}]
    assert not [tag for tag, attributes in page.tags for name in attributes if (tag, name) in LOADING]
    links = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("href", "xlink:href")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_page_stands_in_the_order_a_reader_asks(full) -> None:
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", full.read_text(encoding="utf-8"))
    assert headings == [
        "Verdict",
        "Side by side",
        "What changed",
        "Speed, score and memory",
        "Which teacher layer taught which",
        "Quantization and parity",
        "All measurements",
        "Machine, versions, and how the numbers were got",
    ]


def test_every_figure_has_a_title_a_caption_and_words_for_who_cannot_see_it(full) -> None:
    page = page_of(full)
    titles = re.findall(r"<figure>\n<h3>([^<]*)</h3>", full.read_text(encoding="utf-8"))
    assert titles == [
        "Latency against input length",
        "Accuracy against latency",
        "What threads give and cost",
        "Memory and size",
        "Cold start",
        "EMD flow between attention scores",
        "EMD flow between hidden states",
        "Layer weights during training: attention and hidden states",
        "Losses during training",
    ]
    drawings = page.all("svg")
    assert len(drawings) == len(page.all("figcaption")) == len(titles)
    assert all(drawing["role"] == "img" and len(drawing["aria-label"] or "") > 40 for drawing in drawings)


def test_identifiers_are_unique_and_every_reference_resolves(full) -> None:
    text = full.read_text(encoding="utf-8")
    found = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(found) == len(set(found))
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) | set(re.findall(r'aria-labelledby="([^"]+)"', text))
    assert referred <= set(found)


def test_page_is_readable_on_a_phone_and_by_a_screen_reader(full) -> None:
    page = page_of(full)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption"))
    boxes = [attributes for attributes in page.all("div") if attributes.get("class") == "table"]
    assert len(boxes) == len(page.all("table"))
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)


def test_comparison_holds_the_measured_values(full, record) -> None:
    page = page_of(full)
    (entry,) = (
        entry
        for entry in record["measurements"]
        if (entry["graph"], entry["batch"], entry["sequence"], entry["threads"]) == ("fused-int8", 1, "replay", 2)
    )
    headings = page.row("Model")
    row = dict(zip(headings, page.row("Student int8, fused"), strict=True))
    low, high = entry["speedup_vs_teacher"]["ci95"]
    assert row["accuracy"] == "0.941"
    assert row["f1"] == "0.921"
    assert row["Of teacher"] == "98.7%"
    assert row["p50"] == f"{entry['latency_ms']['p50']:.2f} ms"
    assert row["p95"] == f"{entry['latency_ms']['p95']:.2f} ms"
    assert row["Text to answer, p50"] == f"{entry['end_to_end_ms']['p50']:.2f} ms"
    assert row["Speed-up (95% interval)"] == f"{entry['speedup_vs_teacher']['p50']:.1f}× ({low:.1f}–{high:.1f})"
    assert row["Cold start"] == "201 ms"
    assert (row["Peak memory"], row["Size"], row["Agrees with teacher"]) == ("124 MB", "15 MB", "96.7%")
    teacher = dict(zip(headings, page.row("Teacher, PyTorch"), strict=True))
    assert (teacher["Of teacher"], teacher["Speed-up (95% interval)"]) == ("100.0%", "baseline")


def test_all_cells_stand_in_the_folded_table(full, record) -> None:
    text = full.read_text(encoding="utf-8")
    folded = Page(text[text.rindex("<details>") : text.rindex("</details>") + len("</details>")])
    assert len(folded.rows) == 1 + len(record["measurements"])
    assert folded.rows[0][:5] == ["Model", "Batch", "Tokens", "Threads", "n"]
    assert "P99" not in folded.rows[0]  # 60 samples a cell are too few for it


def test_quantization_and_parity_are_listed(full) -> None:
    page = page_of(full)
    assert page.row("fused-int8") == ["fused-int8", "0.201", "98.6%", "264", "0", "8", "1×7, 16×64"]
    alone = [row for row in page.rows if row[:2] == ["fused-int8", "per-tensor"]]
    assert alone == [["fused-int8", "per-tensor", "256", "2.3%", "5.0%", "0.684", "with other batch mates"]]
    assert ["fp32", "float", "256", "0.0%", "0.0%", "4.8e-07", "–"] in page.rows
    assert page.row("1") == ["1", "int8", "no", "none", "0.921", "2.3", "no"]
    assert page.row("Per channel") == ["Per channel", "int8: yes, fused-int8: no"]
    assert page.row("Operators") == ["Operators", "int8: 28, fused-int8: 24"]
    assert page.row("Max drop") == ["Max drop", "1 point"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("classification", "of a logit, and the share of inputs with the same decision."),
        ("regression", "of a logit."),
        ("multilabel", "of a logit, and the share of inputs with the same labels."),
        ("token-classification", "of a logit, and the share of tokens with the same tag."),
        ("question-answering", "of a logit, and the share of windows with the same best span."),
    ],
)
def test_parity_says_what_a_decision_is(record, kind, said) -> None:
    record["artifact"]["task"]["kind"] = kind
    table = parity_table(Record(record, "device"))
    assert table is not None
    assert said in table.caption


def test_machine_and_method(full) -> None:
    page = page_of(full)
    assert page.row("Instruction sets")[1] == "avx, avx2, avx512f, avx512_vnni"
    assert page.row("torch") == ["torch", "not installed"]
    assert "Governor" not in [row[0] for row in page.rows if row]
    assert "interleaved rounds (5 of them)" in page.text
    assert "120 measurements of 60 timed calls each." in page.text
    assert "Scores are over 872 examples" in page.text


def test_equal_input_gives_equal_bytes(full, record, save, tmp_path) -> None:
    again = report([save(record)], out=tmp_path / "out")
    for name in ("index.html", "report.md", "report.json"):
        assert again.with_name(name).read_bytes() == full.with_name(name).read_bytes()


def test_markdown_fits_a_pull_request(full) -> None:
    text = full.with_name("report.md").read_text(encoding="utf-8")
    assert "**On this 2-core AMD EPYC, the 4-layer int8 student keeps 98.7% of the teacher's accuracy" in text
    summary = text[: text.index("**What changed**")]
    table = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1
    assert "[index.html](index.html)" in text
    assert "Quantization: int8 is" in text


def test_student_alone_without_distillation(bare, save, tmp_path) -> None:
    page = page_of(report([save(bare)], out=tmp_path / "out"))
    assert "teacher not measured here, 0.951 by the artifact" in page.text
    assert "Which teacher layer taught which" not in page.text
    assert "Speed-up (95% interval)" not in page.text
    assert len(page.all("svg")) == 5
    assert "beside its teacher" not in page.text


def test_null_values_are_never_0_and_never_a_crash(record, save, tmp_path) -> None:
    for entry in record["measurements"]:
        entry |= dict.fromkeys(("throughput_per_s", "end_to_end_ms", "cpu_seconds_per_inference", "speedup_vs_teacher"))
        if entry["graph"] == "int8":
            entry["latency_ms"] = None
    for entry in record["models"]:
        if entry["graph"] == "int8":
            entry |= dict.fromkeys(("model_bytes", "cold_start_ms", "agreement_with_teacher"))
            entry["metrics"] = {"accuracy": None}
    for entry in record["measurements"]:
        if entry["graph"] == "int8":
            entry |= dict.fromkeys(("model_bytes", "metric"))
    record["artifact"] |= dict.fromkeys(("parity", "invariance", "quantization", "metrics"))
    record["churn"] = None
    record["versions"] = None
    record["distillation"] |= {"first": None, "last": None, "marginals": [], "losses": None}
    page = page_of(report([save(record)], out=tmp_path / "out"))
    row = dict(zip(page.row("Model"), page.row("Student int8"), strict=True))
    assert {row[name] for name in ("accuracy", "f1", "Of teacher", "p50", "p95", "Cold start", "Size")} == {
        "not measured"
    }
    assert "Throughput" not in row
    assert "no interval, no claim" in page.text
    assert "Quantization and parity" not in page.text
    assert "What changed" not in page.text


def test_almost_empty_record(empty, save, tmp_path) -> None:
    page = page_of(report([save(empty)], out=tmp_path / "out"))
    assert "On this unnamed device, no student was measured." in page.text
    assert page.all("svg") == []


def test_text_from_records_is_escaped(record, save, tmp_path) -> None:
    evil = '<script>alert("1")</script>&$x$|`'
    record["device"] |= {"name": evil, "cpu": evil}
    record["artifact"]["labels"] = [evil, "b"]
    record["artifact"]["task"] |= {"name": evil, "metrics": [evil]}
    record["artifact"]["teacher"]["name"] = evil
    record["artifact"]["quantization"]["trials"][0] |= {evil: evil}
    record["artifact"]["parity"]["graphs"] = {evil: {evil: evil}}
    record["versions"][evil] = evil
    record["notes"] = [evil]
    record["artifact"]["invariance"] = {evil: {"activation_scales": evil, "arrangements": {evil: {}}}}
    record["churn"]["listed"][0] |= {"text": evil, "gold": [evil], "decisions": {"teacher": evil}, "words": [evil]}
    record["churn"] |= {"unit": evil, "file": evil, "models": {evil: evil, "teacher": evil}}
    record["churn"]["steps"][0] |= {"from": evil, "metric_differences": {evil: {"difference": 0.1, "ci95": [0, 1]}}}
    record["distillation"]["mapping"] = evil
    for entry in record["models"]:
        entry["metrics"] = {evil: 0.9}
    path = report([save(record)], out=tmp_path / "out")
    page = page_of(path)
    assert page.all("script") == [{}]
    assert evil in page.text
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert "<script" not in path.with_name("report.md").read_text(encoding="utf-8")


def test_several_devices_on_one_page(record, build, save, tmp_path) -> None:
    other = build(seed=1, factor=7.0)
    other["device"] |= {"name": "Raspberry Pi 5", "cpu": "Cortex-A76", "cores": 4, "isa": ["asimd", "asimddp"]}
    path = report([save(record, "a.json"), save(other, "b.json")], out=tmp_path / "out")
    page = page_of(path)
    assert "On this 2-core AMD EPYC, " in page.text
    assert "On this 4-core Cortex-A76, " in page.text
    assert page.row("Device")[-1] == "Size"
    assert "measured 2026-03-04, on 2 devices." in page.text
    assert page.row("CPU") == ["CPU", "AMD EPYC", "Cortex-A76"]
    assert len(page.all("svg")) == 2 * 5 + 2 * 4  # the two distillations differ
    assert len(json.loads(path.with_name("report.json").read_text(encoding="utf-8"))) == 2
    assert "### Raspberry Pi 5" in path.with_name("report.md").read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000


def test_one_distillation_is_drawn_once_for_several_devices(empty, record, save, tmp_path) -> None:
    empty["distillation"] = record["distillation"]
    paths = [save(empty | {"device": {"name": name}}, f"{name}.json") for name in ("a", "b")]
    assert len(page_of(report(paths, out=tmp_path / "out")).all("svg")) == 4


def test_foreign_folder_is_left_alone_unless_forced(empty, save, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    path = save(empty)
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.txt\) and no report\.json"):
        report([path], out=out)
    assert [item.name for item in out.iterdir()] == ["thesis.txt"]
    report([path], out=out, force=True)
    assert (out / "index.html").is_file()


def test_earlier_report_is_replaced(empty, save, tmp_path) -> None:
    report([save(empty)], out=tmp_path / "out")
    empty["device"]["cpu"] = "Another CPU"
    path = report([save(empty)], out=tmp_path / "out")
    assert "Another CPU" in path.read_text(encoding="utf-8")


def test_refused_record_writes_nothing(empty, save, tmp_path) -> None:
    with pytest.raises(ArtifactError):
        report([save(empty | {"schema_version": 2})], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_names_the_extra(record, save, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BertemdError, match=r"needs the 'report' extra \(matplotlib is not installed\)"):
        report([save(record)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> Path:
    """The report on all kinds of numbers, two students, budgets and a baseline."""
    folder = tmp_path_factory.mktemp("every")
    local = in_use(build_record())
    records = [local, held(local), estimated(local), other_student(local)]
    paths = []
    for place, record in enumerate(records):
        record["budget"] = budget_entry(record, Budget(max_p95_ms=12, max_size_mb=20, min_retention=0.98))
        paths.append(folder / f"{place}.json")
        paths[-1].write_text(json.dumps(record), encoding="utf-8")
    earlier = build_record()
    for entry in earlier["models"]:
        entry["peak_rss_bytes"] *= 0.5
    (folder / "baseline.json").write_text(json.dumps(earlier), encoding="utf-8")
    return report(paths, out=folder / "out", baseline=folder / "baseline.json")


def test_every_kind_of_number_on_one_page(every) -> None:
    text = every.read_text(encoding="utf-8")
    page = page_of(every)
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings[:5] == ["At a glance", "Students side by side", "Verdict", "Side by side", "In use"]
    badges = re.findall(r'<p class="badge (\w+)">', text)
    assert badges == ["measured", "constrained", "estimated", "measured"]
    captions = re.findall(r"<caption><span>(\w+): the graph that is used", text)
    assert captions == ["Measured", "Constrained", "Estimated"]
    assert text.count('<p class="sentence">') == 4
    assert "4 layers, width 312 on raspberry-pi-5 (estimated)" in page.text
    assert "raspberry-pi-5, cores: https://example.org/a76" in page.text
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"""(?:src|href)=["']?(?!["']?(?:#|data:))|@import|url\((?!#)""", text)


def test_budget_lines_and_regressions_are_on_the_page(every) -> None:
    page = page_of(every)
    limits = [row[:2] for row in page.rows if row and row[0] in ("p95 latency", "model size", "score kept")]
    assert len(limits) == 4 * 3
    assert ["model size", "missed"] in limits
    assert ["model size", "kept"] in limits
    assert "Worse than the baseline of 2026-03-04 in 4 numbers." in page.text
    assert {"kept", "missed"} <= {value.get("class") for value in page.all("tr")}
    summary = every.with_name("report.md").read_text(encoding="utf-8")
    assert "| p95 latency | " in summary
    assert "Regressions against the baseline" in summary
    said = r"6 layers, width 768 on AMD EPYC .* \(measured\): model size, 60 MB, allowed 20 MB\."
    with pytest.raises(BudgetError, match=said):
        enforce(every.parent)


def test_a_page_that_keeps_to_everything_is_let_through(full) -> None:
    (record,) = json.loads(full.with_name("report.json").read_text(encoding="utf-8"))
    assert all(line["passed"] for line in record.get("budget", {}).get("lines", []))
    enforce(full.parent)


def test_a_page_that_grows_too_large_leaves_out_what_is_least_asked_for(record, save, tmp_path, monkeypatch) -> None:
    path, out = save(record), tmp_path / "out"
    left = []
    most = 1_000_000
    for _ in range(4):
        monkeypatch.setattr(html, "MOST_BYTES", most)
        text = report([path], out=out).read_text(encoding="utf-8")
        assert len(text.encode()) < most or len(left) == 3
        left += re.findall(r"Left out to keep the page small: ([^<]*)\.<", text) or [""]
        most = len(text.encode())
    assert left == [
        "",
        "the examples decided otherwise",
        "the examples decided otherwise and every measured cell",
        "the examples decided otherwise, every measured cell and the figures of each device",
    ]


def test_records_from_before_devices_are_still_read(tmp_path) -> None:
    """The quickstart's record as it was before there were devices: without what has been added to records since."""
    stored = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart.json").read_text("utf-8"))
    for key in ("noise", "churn"):
        stored.pop(key, None)
    stored["conditions"].pop("during", None)
    for entry in stored["models"]:
        for key in ("idle", "memory", "failed"):
            entry.pop(key, None)
        entry["cold_start_ms"].pop("process", None)
    for entry in stored["measurements"]:
        for key in ("paced_ms", "energy_joules_per_inference", "disturbed"):
            entry.pop(key, None)
        for key in ("p50_ci95", "p95_ci95"):
            entry["latency_ms"].pop(key, None)
    (tmp_path / "record.json").write_text(json.dumps(stored))
    page = page_of(report([tmp_path / "record.json"], out=tmp_path / "out"))
    assert "keeps 97.9% of the teacher's accuracy" in page.text
    assert "In use" not in re.findall(r"<h2[^>]*>([^<]*)</h2>", (tmp_path / "out" / "index.html").read_text("utf-8"))


def test_the_model_card_keeps_kinds_apart(record) -> None:
    card = model_card_table([record, estimated(record)])
    measured, guessed = card.split("**raspberry-pi-5 (estimated)**")
    assert measured.startswith("**AMD EPYC (2 cores, Linux x86\\_64) (measured)**\n\n| Model | accuracy |")
    assert "estimate" not in measured
    assert "| estimate " in guessed
    assert "| Student int8, fused |" in guessed
    assert model_card_table([record | {"models": [], "measurements": []}]) == ""


def test_a_baseline_of_no_device_is_refused(record, save, tmp_path) -> None:
    other = save(estimated(record), "other.json")
    with pytest.raises(
        ArtifactError, match=r"other\.json: is of the device raspberry-pi-5 \(estimated\), the records are of"
    ):
        report([save(record)], out=tmp_path / "out", baseline=other)
    assert not (tmp_path / "out").exists()
