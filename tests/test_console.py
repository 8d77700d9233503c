from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from bertemd_deploy import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def make_terminal(monkeypatch) -> Callable[[], Terminal]:
    """Return a function that makes stderr a terminal; to be called in the test, as capturing swaps stderr before it."""

    def make() -> Terminal:
        screen = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(console, "_console", Console(file=screen, force_terminal=True, width=120))
        return screen

    return make


def test_notes_go_to_stderr_one_line_each_as_written(capsys):
    console.note("data: [red] " + "long " * 100 + "end")
    console.warn("odd [bold]choice[/bold]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "data: [red] " + "long " * 100 + "end\n! odd [bold]choice[/bold]\n"


def test_no_bar_where_stderr_is_no_terminal(capsys):
    with console.progress("train", 3) as outer, console.progress("evaluate", 1) as inner:
        outer.advance(tokens=10, detail="loss 1.0")
        inner.advance()
    assert capsys.readouterr().err == ""


def test_bar_shows_name_count_rate_and_detail(make_terminal):
    terminal = make_terminal()
    with console.progress("train", 3) as bar:
        bar.advance(2, tokens=1000, detail="loss 1.25")
    shown = terminal.getvalue()
    for part in ("train", "2/3", "tokens/s loss 1.25"):
        assert part in shown


def test_bar_without_tokens_shows_no_rate(make_terminal):
    terminal = make_terminal()
    with console.progress("measure", 2) as bar:
        bar.advance(detail="student int8")
    assert "student int8" in terminal.getvalue()
    assert "tokens/s" not in terminal.getvalue()


def test_bar_inside_a_bar_is_drawn_and_leaves_the_outer_one(make_terminal):
    terminal = make_terminal()
    with console.progress("train", 3) as outer:
        with console.progress("evaluate", 4) as inner:
            inner.advance(4)
        outer.advance(3)
    assert "evaluate" in terminal.getvalue()
    last = terminal.getvalue().rpartition("train")[2]
    assert "3/3" in last
    assert "evaluate" not in last


def test_bars_end_when_their_block_raises(make_terminal):
    terminal = make_terminal()
    with pytest.raises(RuntimeError, match="stop"), console.progress("one", 1), console.progress("two", 1):
        raise RuntimeError("stop")
    with console.progress("three", 1) as bar:
        bar.advance()
    assert "1/1" in terminal.getvalue()
