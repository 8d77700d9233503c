"""The measurement itself, with the copied modules: the same `bench` as at home, on what travelled.

python3 measure.py RECORD TOLD   where TOLD is {"installed": [...], "stand_ins": [...], "quick": bool} as JSON
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LEFT_OUT = {
    "tokenizers": "tokenizers is not installed: no time is measured from text to decision, and lists show pieces of words",
    "psutil": "psutil is not installed: memory and CPU times are read from /proc",
}


def main(arguments: list[str]) -> int:
    """Measure and write the record; return the exit code."""
    out, told = Path(arguments[0]), json.loads(arguments[1])
    for name in (
        "torch",
        "transformers",
    ):  # the training half stayed at home: what the device has of it is not asked for
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's way to say that there is none

    from bertemd_deploy.bench.compare import CHURN, RECORD, bench
    from bertemd_deploy.errors import BertemdError
    from bertemd_deploy.files import write_json, write_text

    given = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    settings = read_settings(given["settings"], told)
    teacher = FOLDER / "teacher"
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        try:
            bench(
                FOLDER / "artifact",
                teacher=teacher if (teacher / "config.json").is_file() else None,
                out=report,
                settings=settings,
                device=read_device(given["device"]),
            )
        except BertemdError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        if (report / RECORD).is_file():  # also of a measurement that was too noisy for its settings
            record = json.loads((report / RECORD).read_text(encoding="utf-8"))
            write_json(out, remote_record(record, given=given, told=told))
            out.with_name(CHURN).unlink(missing_ok=True)  # of the record that was replaced
            if (report / CHURN).is_file():
                write_text(out.with_name(CHURN), (report / CHURN).read_text(encoding="utf-8"))
            print(f"record: {out}", file=sys.stderr)
    shutil.rmtree(FOLDER / "__pycache__", ignore_errors=True)
    return code


def read_settings(stored: dict[str, Any], told: dict[str, Any]) -> Any:
    """Return the settings to measure with."""
    from bertemd_deploy.settings import BenchSettings

    known = {field.name for field in dataclasses.fields(BenchSettings)}
    taken: dict[str, Any] = {name: _tuples(value) for name, value in stored.items() if name in known}
    settings = BenchSettings(**taken)
    if "tokenizers" in told["stand_ins"]:
        settings = dataclasses.replace(settings, end_to_end=False)
    if told["quick"]:
        settings = dataclasses.replace(
            settings,
            rounds=2,
            seconds_per_cell=min(0.05, settings.seconds_per_cell),
            paced_interval_ms=0.0,
            idle_seconds=0.0,
            arena=False,
        )
    return settings


def read_device(stored: dict[str, Any] | None) -> Any:
    """Return the device that the folder was made for, or None."""
    if stored is None:
        return None
    from bertemd_deploy.devices import Device, Runtimes, Session

    known = {name: _tuples(value) for name, value in stored.items()}
    known["session"] = Session(**stored["session"])
    known["onnxruntime"] = Runtimes(**{name: _tuples(value) for name, value in stored["onnxruntime"].items()})
    return Device(**known)


def _tuples(value: Any) -> Any:
    """Return lists at any depth as the tuples they were before they became JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def remote_record(record: dict[str, Any], *, given: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Return a record as one of a device that is not where the report is made."""
    device = dict(record["device"], kind="remote")
    notes = [*record["notes"], *given["notes"], *(LEFT_OUT[name] for name in told["stand_ins"])]
    if told["quick"]:
        notes.append("measured with --quick: too short to rely on")
    return dict(record, device=device, notes=notes, runner=told, artifact=given["artifact"])  # all of it, here a part


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
