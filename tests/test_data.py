from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bertemd_deploy.data import calibration_rows, find_task, load_data, training_batches
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import BertemdError, DataError, RecipeError
from bertemd_deploy.readers import SUFFIXES
from bertemd_deploy.tasks import TASKS

TRAIN = [("a good film", "yes"), ("a bad film", "no"), ("fine", "yes")]
DEV = [("dull", "no"), ("lovely", "yes")]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(raw)
    return folder / name


def tsv(rows: list[tuple[str, ...]], *header: str) -> str:
    return "".join("\t".join(row) + "\n" for row in [header or ("sentence", "label"), *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data", "train.tsv", tsv(TRAIN))
    write(tmp_path / "data", "dev.tsv", tsv(DEV))
    return tmp_path / "data"


def fails(folder: Path, match: str, **options) -> None:
    with pytest.raises(DataError, match=match):
        load_data(str(folder), **options)


# ---- formats


def check(folder: Path) -> None:
    loaded = load_data(str(folder))
    assert loaded.task.name == "classification"
    assert loaded.labels == ("no", "yes")
    assert loaded.outputs == 2
    for split, rows in (("train", TRAIN), ("dev", DEV)):
        assert loaded.splits[split].texts == [text for text, _ in rows]
        assert loaded.splits[split].pairs is None
        assert loaded.splits[split].labels.tolist() == [int(label == "yes") for _, label in rows]
        assert loaded.splits[split].labels.dtype == np.int64
        assert len(loaded.splits[split]) == len(rows)


def test_tsv(folder: Path):
    check(folder)


def test_csv(folder: Path):
    write(folder, "train.csv", 'label,sentence\r\nyes,"a good film"\r\nno,a bad film\r\n\r\nyes,fine\r\n')
    (folder / "train.tsv").unlink()
    check(folder)


def test_jsonl(folder: Path):
    lines = [json.dumps({"label": label, "sentence": text, "extra": 1}) for text, label in DEV]
    write(folder, "dev.jsonl", "\n\n".join(lines))
    (folder / "dev.tsv").unlink()
    check(folder)


def test_parquet(folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"sentence": [text for text, _ in TRAIN], "label": [label for _, label in TRAIN]})
    parquet.write_table(table, folder / "train.parquet")
    (folder / "train.tsv").unlink()
    check(folder)


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("sentence", "\ufeffsentence"), ("\n", "\n\n")])
def test_tsv_of_other_systems(folder: Path, change):
    write(folder, "train.tsv", tsv(TRAIN).replace(*change))
    check(folder)


def test_quotes_in_tsv_are_text(folder: Path):
    rows = [('he said "no', "yes"), ('"quoted"', "no"), ('""', "no")]
    write(folder, "train.tsv", tsv(rows))
    assert load_data(str(folder)).splits["train"].texts == [text for text, _ in rows]


def test_line_separators_of_unicode_are_text(folder: Path):
    rows = [("one\u2028two\x0bthree\x85", "yes"), ("b", "no")]
    write(folder, "train.tsv", tsv(rows))
    assert load_data(str(folder)).splits["train"].texts[0] == rows[0][0]


def test_csv_fields_may_hold_commas_quotes_and_lines(folder: Path):
    write(folder, "dev.csv", 'sentence,label\n"a, ""b""\nc",yes\n')
    (folder / "dev.tsv").unlink()
    assert load_data(str(folder)).splits["dev"].texts == ['a, "b"\nc']


def test_pairs_and_empty_texts(folder: Path):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", "b", "1"), ("c", "", "0")], "sentence1", "sentence2", "label"))
    loaded = load_data(str(folder))
    assert (loaded.splits["dev"].texts, loaded.splits["dev"].pairs) == (["a", "c"], ["b", ""])
    assert loaded.labels == ("0", "1")


@pytest.mark.parametrize(("task", "columns"), [("qnli", ("question", "sentence")), ("mnli", ("premise", "hypothesis"))])
def test_a_tasks_other_column_names(folder: Path, task, columns):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", "b", "entailment")], *columns, "label"))
    loaded = load_data(str(folder), task=task)
    assert loaded.splits["train"].pairs == ["b"]
    assert loaded.labels == TASKS[task].labels


def test_named_columns(folder: Path):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("x", "a", "b", "1"), ("x", "c", "d", "2")], "id", "q", "r", "gold"))
    loaded = load_data(str(folder), sentence1="q", sentence2="r", label="gold")
    assert (loaded.splits["train"].texts, loaded.splits["train"].pairs) == (["a", "c"], ["b", "d"])
    assert load_data(str(folder), sentence1="r", label="gold").splits["train"].pairs is None


def test_regression(folder: Path):
    write(folder, "train.tsv", tsv([("a", "0.5"), ("b", "3"), ("c", "-1e-3")]))
    write(folder, "dev.tsv", tsv([("a", "5")]))
    loaded = load_data(str(folder), task="regression")
    assert (loaded.labels, loaded.outputs) == ((), 1)
    np.testing.assert_allclose(loaded.splits["train"].labels, np.array([0.5, 3, -1e-3], dtype=np.float32), strict=True)


def test_demo():
    loaded = load_data("demo", splits=("dev",))
    assert loaded.task.name == "demo"
    assert loaded.outputs == 16
    assert list(loaded.splits) == ["dev"]
    assert set(loaded.splits["dev"].labels.tolist()) == set(range(16))


@pytest.mark.glue
@pytest.mark.parametrize(
    ("name", "task", "train", "dev"),
    [
        ("RTE", "rte", 2490, 277),
        ("CoLA", "cola", 8551, 1043),
        ("SST-2", "sst2", 67349, 872),
        ("MRPC", "mrpc", 3668, 408),
    ],
)
def test_real_glue_files(shared: Path, name, task, train, dev):
    loaded = load_data(str(shared / "data" / "glue" / name), task=task)
    assert (len(loaded.splits["train"]), len(loaded.splits["dev"])) == (train, dev)
    assert loaded.labels == TASKS[task].labels
    assert set(loaded.splits["dev"].labels.tolist()) == {0, 1}
    for split, part in loaded.splits.items():
        raw = (shared / "data" / "glue" / name / f"{split}.tsv").read_text(encoding="utf-8")
        assert sum(text.count('"') for text in [*part.texts, *(part.pairs or [])]) == raw.count('"')


# ---- labels


@pytest.mark.parametrize("labels", [("negative", "positive"), ("0", "1")])
def test_label_given_as_name_or_number(folder: Path, labels):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", labels[0]), ("b", labels[1])]))
    loaded = load_data(str(folder), task="sst2")
    assert loaded.labels == ("negative", "positive")
    assert loaded.splits["dev"].labels.tolist() == [0, 1]


def test_names_of_a_model_fix_the_order(folder: Path):
    loaded = load_data(str(folder), label_names=["yes", "no"], splits=("dev",))
    assert loaded.labels == ("yes", "no")
    assert loaded.splits["dev"].labels.tolist() == [1, 0]


def test_names_that_are_numbers_are_never_taken_as_positions(folder: Path):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", "1"), ("b", "2"), ("c", "10")]))
    loaded = load_data(str(folder))
    assert loaded.labels == ("1", "2", "10")
    assert loaded.splits["dev"].labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("odd", ["--1", "²", "1.5 stars"])
def test_names_that_only_look_like_numbers_are_sorted_as_text(folder: Path, odd):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", odd), ("b", "3")]))
    assert set(load_data(str(folder)).labels) == {odd, "3"}


def test_dev_label_that_train_lacks(folder: Path):
    write(folder, "dev.tsv", tsv([("a", "yes"), ("b", "maybe")]))
    fails(folder, r"dev\.tsv line 3: unknown label 'maybe'; known from the train split or the task: no, yes\.")


def test_unknown_label_lists_twenty_names_at_most(folder: Path):
    write(folder, "train.tsv", tsv([("a", f"label{number:02}") for number in range(30)]))
    write(folder, "dev.tsv", tsv([("a", "other")]))
    fails(folder, r"unknown label 'other'; .*label19, …\.")


def test_single_label(folder: Path):
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", "yes")]))
    fails(folder, "every train row has the label 'yes'; a classifier needs at least two classes")


@pytest.mark.parametrize("label", ["", "  "])
def test_empty_label_is_no_class(folder: Path, label):
    write(folder, "train.tsv", tsv([*TRAIN, ("a", label)]))
    fails(folder, r"train\.tsv line 5: nothing in column 'label'\.")


@pytest.mark.parametrize("label", ["high", "nan", "inf", "1,5"])
def test_regression_label_that_is_no_number(folder: Path, label):
    write(folder, "train.tsv", tsv([("a", "1.0"), ("b", label)]))
    fails(folder, rf"train\.tsv line 3: the label '{label}' is not a finite number", task="regression")


def jsonl(folder: Path, *rows: dict, split: str = "train") -> None:
    (folder / f"{split}.tsv").unlink(missing_ok=True)
    write(folder, f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": ["a"], "label": "no"}, r"line 1: the text should be text, found list \['a'\]\. Write it as one"),
        ({"sentence": {"a": 1}, "label": "no"}, r"line 1: the text should be text, found dict \{'a': 1\}"),
        ({"sentence": 12, "label": "no"}, r"line 1: the text should be text, found int 12"),
        (
            {"sentence": "a", "label": ["no"]},
            r"line 1: the label should be a name or a class number, found list \['no'\]",
        ),
        ({"sentence": "a", "label": {"x": "y"}}, r"the label should be a name or a class number, found dict"),
        (
            {"sentence": "a", "label": 1.5},
            r"line 1: the label 1\.5 is a number with a fraction.* data\.task: regression",
        ),
        (
            {"sentence": "a", "label": "x" * 1001},
            r"line 1: a label of 1,001 characters .* data\.label the right column",
        ),
        ({"sentence": "half \ud83d", "label": "no"}, r"line 1: half a character \(the lone surrogate U\+D83D\) in str"),
        ({"sentence": "a", "label": "n\udc00"}, r"line 1: half a character \(the lone surrogate U\+DC00\)"),
    ],
)
def test_values_of_another_type(folder: Path, row, message):
    jsonl(folder, row, {"sentence": "b", "label": "yes"})
    fails(folder, rf"train\.jsonl {message}" if message.startswith("line") else message)


def test_bytes_are_no_text(folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "train.tsv").unlink()
    parquet.write_table(pyarrow.table({"sentence": [b"a", b"b"], "label": ["no", "yes"]}), folder / "train.parquet")
    fails(folder, r"train\.parquet row 1: the text should be text, found bytes b'a'")
    parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "label": [b"no", b"yes"]}), folder / "train.parquet")
    fails(folder, r"train\.parquet row 1: the label should be a name or a class number, found bytes b'no'")


def test_class_numbers_may_be_whole_numbers_of_any_type(folder: Path):
    jsonl(folder, {"sentence": "a", "label": 1.0}, {"sentence": "b", "label": 2}, {"sentence": "c", "label": " 10 "})
    write(folder, "dev.tsv", tsv([("a", " 2 "), ("b", "10")]))
    loaded = load_data(str(folder))
    assert loaded.labels == ("1", "2", "10")
    assert loaded.splits["train"].labels.tolist() == [0, 1, 2]
    assert loaded.splits["dev"].labels.tolist() == [1, 2]


def test_measured_numbers_are_no_classes(folder: Path):
    write(folder, "train.tsv", tsv([("a", "1"), ("b", "2.5")]))
    fails(folder, r"train\.tsv line 3: the label 2\.5 is a number with a fraction.* set data\.task: regression")


def test_parquet_class_names_are_the_labels(folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {"info": {"features": {"label": {"names": ["pos", "neg", "none"], "_type": "ClassLabel"}}}}
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").unlink()
        table = pyarrow.table({"sentence": ["a", "b"], "label": [0, 1]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, folder / f"{split}.parquet")
    loaded = load_data(str(folder))
    assert loaded.labels == ("pos", "neg", "none")
    assert loaded.splits["dev"].labels.tolist() == [0, 1]
    turned = load_data(str(folder), label_names=["neg", "pos"], splits=("dev",))
    assert turned.splits["dev"].labels.tolist() == [1, 0]


def test_unknown_labels_name_the_next_step(folder: Path):
    write(folder, "dev.tsv", tsv([("a", "maybe")]))
    fails(folder, r"the task: no, yes\. Correct the row, or add one of it to train\.$")
    fails(
        folder,
        r"line 2: unknown label 'maybe'; known from the artifact or model: no, yes\. Correct the row, or use the data that",
        label_names=["no", "yes"],
        splits=("dev",),
    )


def test_a_models_names_may_differ_in_case(folder: Path):
    loaded = load_data(str(folder), label_names=["YES", "No"], splits=("dev",))
    assert loaded.labels == ("yes", "no")
    assert loaded.splits["dev"].labels.tolist() == [1, 0]


def test_regression_labels_that_cannot_be_learnt(folder: Path):
    write(folder, "train.tsv", tsv([("a", "1.0"), ("b", "1e39")]))
    fails(
        folder, r"train\.tsv line 3: the label '1e39' is beyond what 32 bits hold.*Scale the labels", task="regression"
    )
    for split in ("train", "dev"):
        write(folder, f"{split}.tsv", tsv([("a", "2.5"), ("b", "2.5")]))
    fails(folder, r"every train row has the label 2\.5; a regression needs at least two numbers", task="regression")


# ---- names of columns, and the demo


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "rte", "sentence1": "a"},
            "data.sentence1 is given without data.sentence2, but rte reads pairs of texts",
        ),
        (
            {"task": "tagging", "sentence1": "a", "sentence2": "b"},
            "data.sentence2 is given, but tagging reads one column",
        ),
        ({"sentence2": "b"}, "data.sentence2 is given without data.sentence1; name both columns."),
    ],
)
def test_names_that_a_task_has_no_use_for(folder: Path, options, message):
    with pytest.raises(RecipeError, match=message):
        load_data(str(folder), **options)


@pytest.mark.parametrize("task", ["question-answering", "tagging", "multilabel", "regression", "rte"])
def test_the_demo_is_a_classification(task):
    with pytest.raises(RecipeError, match=f"demo: it is a classification of single texts, no data for the task {task}"):
        load_data("demo", task=task)


# ---- files that cannot be read


@pytest.mark.parametrize(("name", "content"), [("train.tsv", "sentence\tlabel\ra\tyes\r"), ("train.jsonl", "{}\r{}\r")])
def test_lines_of_old_macs(folder: Path, name, content):
    (folder / "train.tsv").unlink()
    write(folder, name, content)
    fails(folder, rf"{name}: its lines end in a carriage return alone, as on old Macs.* tr '\\r' '\\n'")


def test_no_folder(tmp_path: Path):
    fails(tmp_path / "none", r"none: there is no such data folder\. data\.path is a folder with train\.\* and dev\.\*")


def test_missing_file(folder: Path):
    (folder / "dev.tsv").unlink()
    fails(folder, r"data: needs exactly one dev file \(dev\.tsv\|csv\|jsonl\|parquet\), found none\.")


def test_two_files_of_one_split(folder: Path):
    write(folder, "train.csv", "sentence,label\n")
    fails(folder, r"needs exactly one train file \(train\.tsv\|csv\|jsonl\|parquet\), found train\.tsv, train\.csv\.")


@pytest.mark.parametrize(
    ("name", "content"), [("train.tsv", ""), ("train.tsv", "\n\n"), ("train.csv", ""), ("train.jsonl", "")]
)
def test_empty_file(folder: Path, name, content):
    (folder / "train.tsv").unlink()
    write(folder, name, content)
    fails(folder, rf"{name}: the file is empty\. ")


@pytest.mark.parametrize(("name", "header"), [("train.tsv", "sentence\tlabel\n"), ("train.csv", "sentence,label\n")])
def test_header_only(folder: Path, name, header):
    (folder / "train.tsv").unlink()
    write(folder, name, header)
    fails(folder, rf"{name}: holds no rows\. Give it a header line and at least one row")


def test_missing_label_column(folder: Path):
    write(folder, "train.tsv", tsv([("a", "yes")], "sentence", "gold"))
    fails(folder, r"train\.tsv: no column 'label'; found: sentence, gold\. Name yours in data\.label")


def test_missing_text_column(folder: Path):
    write(folder, "train.tsv", tsv([("a", "yes")], "text", "label"))
    fails(
        folder,
        r"train\.tsv: needs the column\(s\) sentence or sentence1, sentence2; found: text, label\. "
        r"Name yours in data\.sentence1, data\.sentence2",
    )


@pytest.mark.parametrize("header", [("sentence", "label", "label"), ("sentence", "label", "sentence")])
def test_column_that_is_there_twice(folder: Path, header):
    write(folder, "train.tsv", tsv([("a", "yes", "no")], *header))
    fails(folder, rf"train\.tsv: the column '{header[2]}' is there twice\. Rename or remove one of them")


def test_other_columns_may_share_a_name(folder: Path):
    write(folder, "train.tsv", tsv([(*row, "x", "y") for row in TRAIN], "sentence", "label", "note", "note"))
    check(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("lonely", "too few fields, found 1, the header has 2"),
        ("a\tb\tc", "too many fields, found 3, the header has 2"),
    ],
)
def test_fields_that_do_not_fit_the_header(folder: Path, row, message):
    write(folder, "train.tsv", tsv(TRAIN) + row + "\n")
    fails(folder, rf"train\.tsv line 5: {message}")


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.jsonl"])
def test_file_that_is_not_utf8(folder: Path, name):
    (folder / "train.tsv").unlink()
    write(folder, name, b"sentence\tlabel\ngood\tyes\ncaf\xe9\tno\n")
    fails(folder, rf"{name} line 3: not UTF-8 \(byte 0xe9\)\. Convert the file, e\.g\. with iconv -t UTF-8")


def test_csv_quoting_that_is_broken(folder: Path):
    (folder / "train.tsv").unlink()
    write(folder, "train.csv", 'sentence,label\nok,yes\n"a" b,yes\n')
    fails(folder, r"train\.csv line 3: not valid CSV \(")
    write(folder, "train.csv", 'sentence,label\n"never closed,yes\n')
    fails(folder, r"train\.csv line 2: not valid CSV \(unexpected end of data\)")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "a"', r"not valid JSON \("),
        ('["a", "yes"]', "each line is an object, found list"),
        ('{"sentence": "a"}', "nothing in column 'label'"),
        ('{"sentence": null, "label": "yes"}', "nothing in column 'sentence'"),
        ('{"sentence": "a", "label": NaN}', "nothing in column 'label'"),
        ('{"sentence": "a", "label": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    ],
)
def test_jsonl_line_that_is_broken(folder: Path, line, message):
    (folder / "train.tsv").unlink()
    write(folder, "train.jsonl", f'{{"sentence": "a", "label": "yes"}}\n\n{line}\n')
    fails(folder, rf"train\.jsonl line 3: {message}")


def test_parquet_that_is_broken(folder: Path):
    pytest.importorskip("pyarrow")
    (folder / "train.tsv").unlink()
    write(folder, "train.parquet", b"PAR1 but no more")
    fails(folder, r"train\.parquet: not a readable parquet file \(")


def test_parquet_row_without_label(folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "train.tsv").unlink()
    table = pyarrow.table({"sentence": ["a", "b"], "label": [1.0, None]})
    parquet.write_table(table, folder / "train.parquet")
    fails(folder, r"train\.parquet row 2: nothing in column 'label'")


def test_parquet_without_pyarrow(folder: Path, monkeypatch):
    (folder / "train.tsv").unlink()
    write(folder, "train.parquet", b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        BertemdError, match=r"needs the 'train' extra \(pyarrow is not installed\)\. Install it with: pip"
    ):
        load_data(str(folder))


# ---- tasks and the hub


def test_find_task():
    assert find_task("glue/rte", None).name == "rte"
    assert find_task("demo", None).name == "demo"
    assert find_task("some/folder", None).name == "classification"
    assert find_task("some/folder", "mrpc").name == "mrpc"
    with pytest.raises(RecipeError, match=r"unknown task 'imdb'; known: cola, sst2"):
        find_task("some/folder", "imdb")
    with pytest.raises(RecipeError, match=r"unknown task 'wnli'; known: cola, sst2"):
        find_task("glue/wnli", None)


def test_unknown_glue_task_under_a_known_kind():
    with pytest.raises(RecipeError, match="glue/wnli: unknown GLUE task; known: cola, sst2"):
        load_data("glue/wnli", task="classification")


class Table:
    """As much of a hub table as is read."""

    column_names = ("premise", "hypothesis", "label", "idx")
    features = {"label": SimpleNamespace(int2str=["entailment", "neutral", "contradiction"].__getitem__)}  # noqa: RUF012
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}  # noqa: RUF012

    def __getitem__(self, name: str) -> list:
        return self.columns[name]


def test_glue_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or Table())
    loaded = load_data("glue/mnli")
    assert asked == [(("nyu-mll/glue", "mnli"), {"split": split}) for split in ("train", "validation_matched")]
    assert loaded.labels == ("entailment", "neutral", "contradiction")
    assert loaded.splits["dev"].labels.tolist() == [2, 0]
    assert loaded.splits["dev"].pairs == ["c", "d"]


def test_glue_regression_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = Table()
    table.column_names = ("sentence1", "sentence2", "label")
    table.features = {"label": "float32"}
    table.columns = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [3.8, 2.0]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert load_data("glue/stsb").splits["train"].labels.tolist() == [np.float32(3.8), 2.0]


def test_hub_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"could not be loaded \(Couldn't reach the Hub\)\. Without a network, set data\.path"
    ):
        load_data("glue/rte")


def test_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(BertemdError, match=r"needs the 'train' extra \(datasets is not installed\)"):
        load_data("glue/rte")


# ---- subsets, hash, batches


def test_train_limit_is_a_fixed_draw_of_train_only(tiny_data, capsys):
    folder = tiny_data("pair", train=50, dev=20)
    whole, first, second = (load_data(str(folder), train_limit=limit) for limit in (None, 10, 10))
    assert "data: using 10 of 50 train rows (data.train_limit)" in capsys.readouterr().err
    assert len(first.splits["train"]) == 10
    assert len(first.splits["dev"]) == 20
    assert first.splits["train"].texts == second.splits["train"].texts
    rows = [whole.splits["train"].texts.index(text) for text in first.splits["train"].texts]
    assert rows == sorted(rows)
    assert first.splits["train"].pairs == [whole.splits["train"].pairs[row] for row in rows]
    assert first.splits["train"].labels.tolist() == whole.splits["train"].labels[rows].tolist()
    assert first.sha256 == second.sha256 != whole.sha256


def test_train_limit_above_the_rows_takes_all(tiny_data, capsys):
    assert len(load_data(str(tiny_data(train=8)), train_limit=9).splits["train"]) == 8
    assert capsys.readouterr().err == ""


def test_hash_follows_the_content(folder: Path):
    before = load_data(str(folder)).sha256
    assert load_data(str(folder)).sha256 == before
    write(folder, "dev.tsv", tsv([("dull", "yes"), DEV[1]]))
    assert load_data(str(folder)).sha256 != before


def test_calibration_rows(tiny_data):
    split = load_data(str(tiny_data(train=40))).splits["train"]
    assert calibration_rows(split, rows=40) is split
    chosen = calibration_rows(split, rows=5)
    assert len(chosen) == 5
    assert chosen.texts == calibration_rows(split, rows=5).texts


def test_split_encodes_with_its_labels(tiny_data, tiny_tokenizer, tmp_path: Path):
    tiny_tokenizer(tmp_path / "model")
    split = load_data(str(tiny_data("pair", train=6))).splits["train"]
    part = split.encode(TextEncoder.load(tmp_path / "model", max_length=16))
    assert len(part.examples) == 6
    assert part.labels is split.labels
    assert part.examples.types.max() == 1


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_training_batches_cover_every_row_once(rows):
    lengths = np.random.default_rng(0).integers(3, 60, rows)
    batches = training_batches(lengths, batch_size=8, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert sorted(len(batch) for batch in batches) == sorted([8] * (rows // 8) + [rows % 8] * (rows % 8 > 0))


def test_training_batches_depend_on_seed_and_epoch_only():
    lengths = np.random.default_rng(0).integers(3, 60, 100)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(training_batches(lengths, batch_size=8, seed=seed, epoch=epoch)).tolist()

    np.random.seed(5)  # the global state must not matter
    first = order(1, 0)
    assert first == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1))}) == 4


def test_training_batches_are_of_like_length_and_in_mixed_order():
    lengths = np.random.default_rng(0).integers(3, 60, 400)
    batches = training_batches(lengths, batch_size=8, seed=1, epoch=0)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 5
    means = np.array([lengths[batch].mean() for batch in batches])
    assert (np.diff(means) < 0).any()
    assert (np.diff(means) > 0).any()


def test_every_suffix_has_a_reader(folder: Path):
    """A suffix in the table that no reader knows would be a KeyError, not a message."""
    for kind, suffixes in SUFFIXES.items():
        for suffix in suffixes:
            place = folder / kind / suffix
            place.mkdir(parents=True)
            write(place, f"train.{suffix}", b"\xff")
            with pytest.raises(DataError):
                load_data(str(place), task=kind)
