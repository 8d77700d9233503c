"""The runner's small modules: what older Pythons lack, the plain console, the stand-ins."""

from __future__ import annotations

import ast
import datetime
import hashlib
import inspect
import json
import os
import time

import psutil
import pytest
import tokenizers
from tiny_artifact import TEXTS, write_tokenizer

from bertemd_deploy import console
from bertemd_deploy.encoding import TextEncoder, decoded
from bertemd_deploy.remote import folder
from bertemd_deploy.remote.runner import console as plain_console
from bertemd_deploy.remote.runner import older
from bertemd_deploy.remote.runner.standins import psutil as own_psutil
from bertemd_deploy.remote.runner.standins import tokenizers as own_tokenizers


def test_zip_equal_is_strict():
    assert list(older.zip_equal("ab", [1, 2])) == [("a", 1), ("b", 2)]
    assert list(older.zip_equal()) == []
    for first, second in (("ab", [1]), ("a", [1, 2]), ("a", [])):
        with pytest.raises(ValueError, match=r"zip\(\) arguments are of unequal length"):
            list(older.zip_equal(first, second))
        with pytest.raises(ValueError, match="zip"):
            list(older.zip_strict(first, second))


def test_the_filled_in_functions_do_what_the_library_does(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 3000)
    with path.open("rb") as handle:
        assert older.file_digest(handle, "sha256").hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(older.pairwise("abc")) == [("a", "b"), ("b", "c")]
    assert list(older.pairwise("a")) == list(older.pairwise("")) == []
    assert {name: value for _, name, value in older.FILLED}["UTC"] is datetime.UTC


def signatures(module):
    """Return the parameters of a module's public functions, and of the public methods of its public classes."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        functions = {name: value}
        if inspect.isclass(value):
            functions = {f"{name}.{method}": part for method, part in vars(value).items() if not method.startswith("_")}
        for called, function in functions.items():
            found[called] = [
                (one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()
            ]
    return found


def test_the_plain_console_has_the_same_functions():
    assert signatures(plain_console) == signatures(console)


def test_the_plain_console_writes_lines(capsys, monkeypatch):
    plain_console.note("one")
    plain_console.warn("two")
    with plain_console.progress("measuring", 3) as bar:
        bar.advance(detail="cell 1")
        bar.advance(detail="cell 2")
        bar.advance(tokens=10)
        bar.remove()
    assert capsys.readouterr().err.splitlines() == ["one", "! two", "measuring 3/3"]
    monkeypatch.setattr(plain_console, "EVERY_SECONDS", 0.0)
    with plain_console.progress("measuring", 3) as bar:
        bar.advance(2, detail="cell 2")
    assert capsys.readouterr().err == "measuring 2/3 cell 2\n"
    monkeypatch.setitem(plain_console._said, "quiet", False)
    plain_console.silence()
    plain_console.warn("unheard")
    assert plain_console.silenced()
    assert capsys.readouterr() == ("", "")


def test_all_that_is_asked_of_psutil_is_there():
    asked = set()
    for module in folder.needed_modules():
        tree = ast.parse(folder._file_of(module).read_text(encoding="utf-8"))
        asked |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "psutil"
        }
    assert {"Process", "cpu_count", "cpu_times", "virtual_memory"} <= asked
    assert [name for name in sorted(asked) if not hasattr(own_psutil, name)] == []


def test_the_psutil_stand_in_reads_what_psutil_does():
    assert own_psutil.cpu_count() == psutil.cpu_count()
    assert own_psutil.cpu_count(logical=False) == psutil.cpu_count(logical=False)
    assert own_psutil.virtual_memory().total == psutil.virtual_memory().total
    real, own = psutil.Process(), own_psutil.Process()
    assert own.memory_info().rss == pytest.approx(real.memory_info().rss, rel=0.2)
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert sum(own.cpu_times()[:2]) == pytest.approx(sum(real.cpu_times()[:2]), abs=0.1)
    assert len(own_psutil.cpu_times(percpu=True)) == len(psutil.cpu_times(percpu=True))
    mine, theirs = own_psutil.cpu_times(), psutil.cpu_times()
    assert mine.idle == pytest.approx(theirs.idle, abs=5)
    assert mine.steal == pytest.approx(theirs.steal, abs=5)
    assert own_psutil.Process(os.getppid()).memory_info().rss > 0


def test_the_psutil_stand_in_says_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"999999999"):
        own_psutil.Process(999999999)
    (tmp_path / "cpu0" / "topology").mkdir(parents=True)
    monkeypatch.setattr(own_psutil, "SYS_CPU", tmp_path)
    assert own_psutil.cpu_count(logical=False) is None
    for name in ("core_id", "physical_package_id"):
        (tmp_path / "cpu0" / "topology" / name).write_text("0\n")
    assert own_psutil.cpu_count(logical=False) == 1


def test_the_tokenizers_stand_in_reads_what_tokenizers_does(tmp_path):
    write_tokenizer(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    real, own = tokenizers.Tokenizer.from_file(path), own_tokenizers.Tokenizer.from_file(path)
    own.no_padding()
    own.enable_truncation(8)
    assert own.get_vocab(with_added_tokens=True) == real.get_vocab(with_added_tokens=True)
    assert own.token_to_id("[PAD]") == real.token_to_id("[PAD]")
    assert own.token_to_id("absent") is None
    assert own.encode("", "").ids == sorted(set(real.encode("", "").ids) | {0, 1})
    examples = TextEncoder.load(tmp_path, max_length=12).encode(TEXTS)
    assert decoded(own, examples) == decoded(real, examples)
    assert own.decode([2, 4], skip_special_tokens=False) == "[CLS] good"
    assert own.decode([99]) == "?"
    with pytest.raises(NotImplementedError, match="the tokenizers package is not installed here"):
        own.encode("good")


def test_the_tokenizers_stand_in_reads_a_unigram(tmp_path):
    model = {"type": "Unigram", "vocab": [["<pad>", 0.0], ["▁good", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": None, "model": model}))
    assert own_tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() == {"<pad>": 0, "▁good": 1}
