"""Find or install what measuring needs, see that it starts on this processor, then measure in a process of its own.

numpy and onnxruntime are taken as they are installed; where they are not, pip puts the pinned versions of requirements.txt
into `site/` beside this file, from `wheels/` if that folder exists. tokenizers and psutil are wanted too: where they cannot
be had, `standins/` serves and the record says what was not measured. Nothing is written outside of this folder but the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LISTING = "bertemd-files.txt"  # a name of our own: the files that it names are replaced with the folder
CHURN = "churn.jsonl"  # the list that is written beside the record
NEEDED = ("numpy", "onnxruntime")
WANTED = ("tokenizers", "psutil")
KNOWN_FAILURE = 3  # exit code
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20")
MOST_PIP_SECONDS = 1800
# Some releases of ONNX Runtime keep a number of the machine in the home folder, and send it with what they count.
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": "1"}
IMPORT = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    print(name, file=sys.stderr, flush=True)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        continue
    found[name] = str(getattr(module, "__version__", "unknown"))
print(json.dumps(found))
"""


class DeviceError(Exception):
    """What a person has to mend before this can measure."""


@dataclass(frozen=True)
class Software:
    """What measuring will import.

    Attributes:
        versions: by package, of those that import.
        path: further folders to import from, in order.
        installed: packages that were installed into this folder for it.
    """

    versions: dict[str, str]
    path: tuple[Path, ...] = ()
    installed: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Measure the student in this folder on this machine and write a record for `bertemd report`.",
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "record.json", help="where to write the record")
    parser.add_argument("--quick", action="store_true", help="a few seconds per model, to see that it works")
    parser.add_argument("--force", action="store_true", help="replace an earlier record")
    parser.add_argument("--no-install", action="store_true", help="take what is installed; fetch nothing")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out, force=options.force)
        check_files(FOLDER)
        software = find_software(FOLDER, install=not options.no_install)
    except DeviceError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return KNOWN_FAILURE
    scratch = FOLDER / "scratch"
    scratch.mkdir(exist_ok=True)
    told = {"installed": list(software.installed), "stand_ins": stand_ins(software), "quick": options.quick}
    try:
        return subprocess.run(
            [sys.executable, str(FOLDER / "measure.py"), str(options.out.resolve()), json.dumps(told)],
            cwd=FOLDER,
            env=measuring_environment(software, scratch=scratch),
            check=False,
        ).returncode
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse to write over what is there, before the minutes that measuring takes.

    Raises:
        DeviceError: `out` is a folder or has the list's name, or it or the list exists and `force` is not set.
    """
    if out.name == CHURN:
        raise DeviceError(f"{out}: a list of this name is written beside the record. Choose another name with --out.")
    if out.is_dir():
        raise DeviceError(f"{out} is a folder. Name a file with --out, such as {out / 'record.json'}.")
    found = [path for path in (out, out.with_name(CHURN)) if path.exists()]
    if found and not force:
        raise DeviceError(
            f"{found[0]} exists, such as of an earlier measurement. Add --force to replace it, or name another file "
            "in another folder with --out."
        )


def check_files(folder: Path) -> None:
    """Refuse a folder that was not copied whole.

    Raises:
        DeviceError: a file that the list names is missing or has other bytes.
    """
    for line in (folder / LISTING).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise DeviceError(f"{path} is missing. Copy the whole folder again.")
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            for block in iter(lambda: handle.read(2**20), b""):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise DeviceError(
                f"{path} is damaged: its SHA-256 is not the one in {LISTING}. Copy the whole folder again."
            )


def find_software(folder: Path, *, install: bool) -> Software:
    """Return what measuring can import, installed into `folder` where it has to be and `install` allows it.

    Raises:
        DeviceError: numpy or onnxruntime cannot be had, or does not start on this machine.
    """
    site = folder / "site"
    present = Software(importable((*NEEDED, *WANTED), path=(site,)), path=(site,) if site.is_dir() else ())
    lacking = [name for name in (*NEEDED, *WANTED) if name not in present.versions]
    if not lacking:
        return present
    required = any(name in NEEDED for name in lacking)
    # numpy and onnxruntime come as the pair that is pinned, so a lone one is not mixed with another's partner.
    chosen = [*NEEDED, *(name for name in lacking if name in WANTED)] if required else lacking
    if not install:
        if required:
            raise DeviceError(
                f"{' and '.join(name for name in lacking if name in NEEDED)} cannot be imported by {sys.executable}. "
                "Install it, or leave out --no-install."
            )
        return present
    fault = pip_install(chosen, folder=folder, site=site)
    if fault is not None:
        if required:
            raise DeviceError(fault)
        print(f"{' and '.join(lacking)} could not be installed; measuring goes on without: {fault}", file=sys.stderr)
        return present
    found = Software(importable((*NEEDED, *WANTED), path=(site,)), path=(site,), installed=tuple(chosen))
    missing = [name for name in NEEDED if name not in found.versions]
    if missing:
        raise DeviceError(f"pip installed {', '.join(chosen)} into {site}, yet {missing[0]} is not there.")
    return found


def importable(names: tuple[str, ...], *, path: tuple[Path, ...]) -> dict[str, str]:
    """Return the versions of those packages that import, tried in a process of its own.

    Raises:
        DeviceError: one is there and fails: it is ended by a signal, or lacks a library.
    """
    environment = dict(os.environ, **QUIET)
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        check=False,
    )
    said = done.stderr.decode("utf-8", "replace").splitlines()
    if done.returncode == 0:
        found: dict[str, str] = json.loads(done.stdout.decode().splitlines()[-1])
        return found
    name = next((line for line in reversed(said) if line in names), "python")
    if name in WANTED:  # broken is as good as absent
        return importable(tuple(one for one in names if one != name), path=path)
    here = where()
    if done.returncode < 0:
        raise DeviceError(f"importing {name} on this machine ({here}) {signal_sentence(-done.returncode, name=name)}")
    raise DeviceError(
        f"{name} is installed for {here} and cannot be imported: {said[-1] if said else 'it said nothing'}. Install a "
        "version that fits this system."
    )


def where() -> str:
    """Return what wheels have to fit: the Python and the system, whose programs may be 32-bit on a 64-bit kernel."""
    bits = "" if sys.maxsize > 2**32 else ", a 32-bit system, for which onnxruntime has no wheels"
    return f"Python {platform.python_version()} on {platform.machine()}{bits}"


def signal_sentence(number: int, *, name: str) -> str:
    """Return what it means that importing `name` was ended by a signal, and what to do about it."""
    version = installed_version(name)
    which = f"{name} {version}" if version else name
    if number == signal.SIGILL:
        return (
            f"ends with an illegal instruction: this build of {which} uses instructions that the processor lacks. "
            f"Install another version, such as the one before: python3 -m pip install '{name}<{version or 'VERSION'}'."
        )
    if number == signal.SIGKILL:
        return f"was killed, most often because memory ran out. Free some and measure again ({which})."
    return f"ends with {signal.Signals(number).name}: {which} crashes here. Install another version of it."


def installed_version(name: str) -> str | None:
    """Return the version of an installed package without importing it, also of one in `site/`; None if unknown."""
    from importlib import metadata

    for found in metadata.distributions(name=name, path=[str(FOLDER / "site"), *sys.path]):
        return str(found.version)
    return None


def pip_install(names: list[str], *, folder: Path, site: Path) -> str | None:
    """Install the pinned versions of packages into `site`; return what went wrong, or None.

    Without their own dependencies: importing onnxruntime and tokenizers needs none of them but numpy.
    """
    here = where()
    asked = subprocess.run(
        [sys.executable, *PIP, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    if asked.returncode:
        return (
            f"{names[0]} is not installed for {here}, and neither is pip. Install python3-pip with the system's package "
            "manager, or install onnxruntime."
        )
    pins = [
        line
        for line in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line.partition("==")[0] in names
    ]
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    command = [sys.executable, *PIP, "install", "--quiet", "--no-cache-dir", "--no-compile", "--no-deps"]
    command += ["--only-binary", ":all:", "--upgrade", "--target", str(site), "-r", str(scratch / "requirements.txt")]
    if (folder / "wheels").is_dir():
        command += ["--no-index", "--find-links", str(folder / "wheels")]
    print(f"installing {', '.join(names)} into {site}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, TMPDIR=str(scratch), PYTHONDONTWRITEBYTECODE="1"),
            timeout=MOST_PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"pip did not finish within {MOST_PIP_SECONDS // 60} minutes. Put wheels into {folder / 'wheels'}."
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line.startswith("ERROR")]
    reason = (lines or ["ERROR: it said nothing"])[-1].partition(": ")[2]
    if "No space left" in reason:
        return f"there is no space left for {', '.join(names)} in {site}. Free some, or set TMPDIR to another disk."
    return (
        f"pip cannot install {', '.join(names)} for {here}: {reason} Install onnxruntime yourself, or put wheels that fit "
        f"into {folder / 'wheels'} (README.txt says how)."
    )


def stand_ins(software: Software) -> list[str]:
    """Return the packages that stand-ins serve for."""
    return [name for name in WANTED if name not in software.versions]


def measuring_environment(software: Software, *, scratch: Path) -> dict[str, str]:
    """Return the environment of the measuring process: what it imports, and no file outside of this folder."""
    path = [FOLDER / "lib", *software.path, *(FOLDER / "standins" / name for name in stand_ins(software))]
    before = os.environ.get("PYTHONPATH")
    return dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([*map(str, path), *filter(None, [before])]),
        TMPDIR=str(scratch),
        XDG_CACHE_HOME=str(scratch),
        **QUIET,
    )
