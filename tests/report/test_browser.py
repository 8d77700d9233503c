"""The page in headless Chromium: what its script does, what stays without it, on a wide and on a narrow screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_record import build_record, estimated, held, in_use, other_student

from bertemd_deploy.budget import Budget, budget_entry
from bertemd_deploy.report import report

pytest.importorskip("matplotlib")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=5000",
)
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text
ASK = """
(() => {
  const all = (choice) => [...document.querySelectorAll(choice)];
  const seen = (element) => element.getClientRects().length > 0;
  const found = {requests: performance.getEntriesByType("resource").map((entry) => entry.name)};
  const form = document.querySelector(".switches");
  found.switches = !form.hidden;

  const box = form.querySelector('[value="student-int8-fused"]');
  const rows = all('tr[data-model="student-int8-fused"]').filter(seen).length;
  const lines = all('figure g[data-model="student-int8-fused"]').length;
  box.click();
  found.hidden = {rows, lines, left: all('[data-model="student-int8-fused"]').filter(seen).length};
  box.click();
  found.back = all('tr[data-model="student-int8-fused"]').filter(seen).length;
  const device = form.querySelector('[value="device-1"]');
  device.click();
  found.devices = [all('[data-device="device-1"]').filter(seen).length, all('[data-device="device-0"]').filter(seen).length];
  device.click();

  const figure = document.querySelector("figure svg");
  const tip = document.querySelector(".tip");
  figure.focus();
  found.focusable = document.activeElement === figure;
  const press = (key) => figure.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  press("ArrowRight");
  found.first = tip.textContent;
  press("ArrowRight");
  found.second = tip.textContent;
  press("Escape");
  found.escaped = tip.textContent;
  const place = figure.querySelector(".mark").getBoundingClientRect();
  figure.dispatchEvent(new PointerEvent("pointermove", {clientX: place.x + 2, clientY: place.y + 2, bubbles: true}));
  found.pointed = tip.textContent;
  found.role = tip.getAttribute("role");
  figure.dispatchEvent(new PointerEvent("pointerleave"));

  const light = (color) => {
    const [red, green, blue] = color.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  found.pale = [];
  for (const element of all("body *:not(svg *)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !seen(element) || element.matches("script, style")) continue;
    const [one, other] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(behind(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < LEAST) found.pale.push([contrast, element.textContent.slice(0, 40)]);
  }
  found.wide = document.documentElement.scrollWidth;
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
})();
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"there is no {' or '.join(BROWSERS)} on this machine")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    local = in_use(build_record())
    records = [local, held(local), estimated(local), other_student(local)]
    paths = []
    for place, record in enumerate(records):
        record["budget"] = budget_entry(record, Budget(max_p95_ms=12, max_size_mb=20))
        paths.append(folder / f"{place}.json")
        paths[-1].write_text(json.dumps(record), encoding="utf-8")
    return report(paths, out=folder / "out")


def dumped(chromium: str, page: Path, *, profile: Path, more: tuple[str, ...] = ()) -> str:
    """Return the document as it is once the scripts have run."""
    command = [chromium, *QUIET, f"--user-data-dir={profile}", *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def asked(chromium: str, page: Path, tmp_path: Path, *, width: int) -> dict[str, Any]:
    """Return what `ASK` finds on the page at a width in pixels."""
    text = page.read_text(encoding="utf-8")
    probe = tmp_path / "probe.html"
    ask = ASK.replace("LEAST)", f"{LEAST_CONTRAST})")
    probe.write_text(text.replace("</body>", f"<script>{ask}</script></body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="probe.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "addEventListener('load', () => document.documentElement.setAttribute('data-found', "
        "frames[0].document.documentElement.getAttribute('data-found')));</script></body>",
        encoding="utf-8",
    )
    size = (f"--window-size={max(width, 800)},1000", "--allow-file-access-from-files")
    out = dumped(chromium, frame, profile=tmp_path / "profile", more=size)
    return answer_of(out)


def answer_of(document: str) -> dict[str, Any]:
    """Return what a script left in the document's root element."""
    (found,) = re.findall(r'^<html[^>]* data-found="([^"]*)"', document, flags=re.MULTILINE)
    answer: dict[str, Any] = json.loads(html.unescape(found))
    return answer


@pytest.fixture(scope="module")
def wide(chromium, page, tmp_path_factory) -> dict[str, Any]:
    return asked(chromium, page, tmp_path_factory.mktemp("wide"), width=1280)


def test_nothing_is_asked_for(wide) -> None:
    assert wide["requests"] == []


def test_models_and_devices_can_be_switched_off_and_on(wide) -> None:
    assert wide["switches"]
    hidden = wide["hidden"]
    assert hidden["rows"] > 0
    assert hidden["lines"] > 0
    assert hidden["left"] == 0
    assert wide["back"] == hidden["rows"]
    assert wide["devices"][0] == 0
    assert wide["devices"][1] > 0


def test_points_say_their_numbers_to_pointer_and_keys(wide) -> None:
    assert wide["focusable"]
    assert " ms" in wide["first"]
    assert wide["second"] not in ("", wide["first"])
    assert wide["escaped"] == ""
    assert " ms" in wide["pointed"]
    assert wide["role"] == "status"


def test_text_has_contrast(wide) -> None:
    assert wide["pale"] == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(chromium, page, tmp_path) -> None:
    assert asked(chromium, page, tmp_path, width=390)["wide"] <= 390


def test_all_of_it_is_there_without_the_script(chromium, page, tmp_path) -> None:
    text = re.sub(r"<script>.*</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    look = """<script>document.documentElement.setAttribute("data-found", JSON.stringify({
        switches: document.querySelector(".switches").getClientRects().length,
        unseen: [...document.querySelectorAll("h2, h3, p, svg, table, figcaption")].filter((element) =>
            !element.getClientRects().length && !element.closest(".switches, details:not([open])")).length,
        titles: document.querySelectorAll(".mark > title").length,
        marks: document.querySelectorAll(".mark").length}))</script></body>"""
    bare = tmp_path / "bare.html"
    bare.write_text(text.replace("</body>", look), encoding="utf-8")
    found = answer_of(dumped(chromium, bare, profile=tmp_path / "profile"))
    assert found["switches"] == 0
    assert found["unseen"] == 0
    assert found["titles"] == found["marks"] > 100
