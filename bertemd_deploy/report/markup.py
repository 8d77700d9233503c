"""The pieces the page is made of, as HTML: escaped text, sections, folded parts, tables, figures, tiles.

Every text that came from a record passes through `text_of`.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence

from bertemd_deploy.report.drawing import Drawing
from bertemd_deploy.report.tables import DID_NOT_FIT, Line, Table
from bertemd_deploy.report.text import NOT_MEASURED

_UNIT = re.compile(r"(?<=\d) (?=(?:ms|kB|MB|GB|mJ|µJ|J)\b)|(?<=\bp) (?=[=<] \d)|(?<=\bp [=<]) (?=\d)")  # on one line


def text_of(value: str) -> str:
    """Return any text as HTML."""
    return html.escape(_UNIT.sub("\N{NO-BREAK SPACE}", value), quote=True)


def section(name: str, title: str, parts: Sequence[str]) -> str:
    """Return a section of the page under its heading, or nothing where it has no content."""
    content = "\n".join(filter(None, parts))
    if not content:
        return ""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{text_of(title)}</h2>\n{content}\n</section>'


def titled(title: str, content: str) -> str:
    """Return content under a small heading, or nothing without content."""
    return f"<div>\n<h3>{text_of(title)}</h3>\n{content}\n</div>" if content else ""


def details(summary: str, content: str) -> str:
    """Return content that is folded away under a line."""
    return f"<details>\n<summary>{text_of(summary)}</summary>\n{content}\n</details>"


def listed(sentences: Sequence[str]) -> str:
    """Return a list of sentences, or nothing for none."""
    return "<ul>" + "".join(f"<li>{text_of(said)}</li>" for said in sentences) + "</ul>" if sentences else ""


def table_of(table: Table | None) -> str:
    """Return a table in a box of its own that scrolls sideways where the page is narrow, also by keyboard."""
    if table is None:
        return ""
    headings = "".join(
        f'<th scope="col"{_words(table, place)}>{text_of(title)}</th>' for place, title in enumerate(table.headings)
    )
    lines = "\n".join(_line(table, line) for line in table.lines)
    return (
        f'<div class="table" role="region" aria-label="{text_of(table.caption)}" tabindex="0">\n<table>\n'
        f"<caption><span>{text_of(table.caption)}</span></caption>\n<thead><tr>{headings}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def _line(table: Table, line: Line) -> str:
    cells = []
    for place, text in enumerate(line.cells):
        content = f'<span class="none">{text}</span>' if text in (NOT_MEASURED, DID_NOT_FIT) else text_of(text)
        if place == 0:
            cells.append(f'<th scope="row"{_words(table, place)}>{content}</th>')
        else:
            cells.append(f"<td{_words(table, place)}>{content}</td>")
    attributes = (f' class="{text_of(line.kind)}"' if line.kind else "") + (
        f' data-model="{text_of(line.model)}"' if line.model else ""
    )
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def _words(table: Table, place: int) -> str:
    return ' class="words"' if place in table.prose else ""


def figures_of(drawings: Sequence[Drawing]) -> str:
    """Return figures side by side, as many as the page is wide."""
    if not drawings:
        return ""
    items = "\n".join(
        f"<figure>\n<h3>{text_of(drawing.title)}</h3>\n{drawing.svg}\n<figcaption>{text_of(drawing.caption)}</figcaption>\n"
        "</figure>"
        for drawing in drawings
    )
    return f'<div class="figures">\n{items}\n</div>'


def tiles_of(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Return key numbers, each a name, a value and a detail below it."""
    items = "".join(
        f"<div><dt>{text_of(name)}</dt><dd>{text_of(value)}<small>{text_of(detail)}</small></dd></div>"
        for name, value, detail in tiles
    )
    return f'<dl class="tiles">{items}</dl>' if items else ""


_STYLED = re.compile(r' style="([^"]*)"(?: class="([^"]*)")?')


def share_styles(body: str) -> tuple[str, str]:
    """Return a style sheet, and the body with a class in place of each style that stands there more than twice.

    Figures repeat a few styles thousands of times. Text of records cannot be taken for one: its quotes are escaped.
    """
    often = [style for style, times in Counter(found[0] for found in _STYLED.findall(body)).items() if times > 2]
    names = {style: f"s{number}" for number, style in enumerate(often)}

    def shared(found: re.Match[str]) -> str:
        name = names.get(found[1])
        return f' class="{found[2]} {name}"' if name and found[2] else f' class="{name}"' if name else found[0]

    return "".join(f".{name} {{ {style} }}\n" for style, name in names.items()), _STYLED.sub(shared, body)


def switches(models: Sequence[tuple[str, str]], devices: Sequence[tuple[str, str]]) -> str:
    """Return the switches that hide models and devices; the script shows them, for without it they do nothing.

    Args:
        models: key and label of every model on the page.
        devices: key and label of every record on the page.
    """
    groups = [
        f"<fieldset><legend>{title}</legend>{''.join(_switch(name, key, label) for key, label in found)}</fieldset>"
        for title, name, found in (("Models", "model", models), ("Devices", "device", devices))
        if len(found) > 1
    ]
    if not groups:
        return ""
    hint = "Numbers of a figure: point at its marks, or move to it with the Tab key and press the arrow keys."
    content = "".join(groups) + f"<p>{hint}</p>"
    return f'<form class="switches" hidden autocomplete="off" aria-label="What the page shows">{content}</form>'


def _switch(name: str, key: str, label: str) -> str:
    return f'<label><input type="checkbox" checked data-hides="{name}" value="{text_of(key)}"> {text_of(label)}</label>'
