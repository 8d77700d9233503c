"""The runner folder: an artifact and what measures it, to be carried to a device with nothing but Python 3.9 and numpy there.

    run.py              python3 run.py [--out record.json] [--quick]
    requirements.txt    pinned; installed into this folder where numpy and onnxruntime are not there
    README.txt          the same in words
    settings.json       what to measure
    lib/                this package's own measuring modules, as `downlevel` writes them for Python 3.9
    standins/           for packages that a device may lack
    artifact/           as exported, with the graphs that are measured
    teacher/            its fp32 graph, tokenizer and config, where there is a teacher to compare with
    bertemd-files.txt   SHA-256 of every file, as `sha256sum --check bertemd-files.txt` reads it

The modules are found by following imports from `ROOTS`, so what is measured here and there is one code.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import bertemd_deploy
from bertemd_deploy.artifact import GRAPHS, MANIFEST, Artifact
from bertemd_deploy.bench.candidates import TEACHER_GRAPH, Candidate, teachers
from bertemd_deploy.bench.record import artifact_excerpt
from bertemd_deploy.compatibility import release
from bertemd_deploy.errors import MeasurementError, RecipeError
from bertemd_deploy.files import inside, new_bundle, sha256_file, write_json
from bertemd_deploy.handout import CARD
from bertemd_deploy.remote.downlevel import FILLED, older_source
from bertemd_deploy.remote.runner.prepare import LISTING
from bertemd_deploy.settings import BenchSettings

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

PACKAGE = "bertemd_deploy"
SOURCE = Path(bertemd_deploy.__file__).parent
RUNNER = Path(__file__).parent / "runner"
ROOTS = ("bench.compare", "bench.worker", "devices")
# Of the PyTorch teacher and of files of devices, which do not travel.
AT_HOME = frozenset({"models", "export", "device_rows"})
PROGRAMS = ("run.py", "prepare.py", "measure.py", "keeper.py")
REPLACED = ("console.py", "older.py")  # modules of the copied package that are the runner's own
STAND_INS = ("psutil", "tokenizers")
# What has wheels for a Python, for x86-64 and 64-bit Arm alike: package, version, Python. From 3.11 on it is what this package
# is tested with (constraints.txt), before that the newest there is.
PINS = (
    ("numpy", "2.0.2", 'python_version < "3.10"'),
    ("numpy", "2.2.6", 'python_version == "3.10"'),
    ("numpy", "2.4.6", 'python_version >= "3.11"'),
    ("onnxruntime", "1.19.2", 'python_version < "3.10"'),
    ("onnxruntime", "1.23.2", 'python_version == "3.10"'),
    ("onnxruntime", "1.31.1", 'python_version >= "3.11"'),
    ("tokenizers", "0.22.2", 'python_version < "3.10"'),
    ("tokenizers", "0.23.3", 'python_version >= "3.10"'),
    ("psutil", "7.2.2", 'python_version >= "3.9"'),
)
README = """\
Measures the student in this folder on this machine. Needs Python 3.9 or newer, and either numpy and onnxruntime or pip:

    python3 run.py                       writes record.json here; minutes
    python3 run.py --out /tmp/r.json     writes it there
    python3 run.py --quick               seconds: does it run at all?
    python3 run.py --no-install          fetches nothing
    python3 run.py --force               replaces an earlier record, which is kept otherwise

Nothing is written outside of this folder but the record. Where numpy and onnxruntime are not installed, pip puts those of
requirements.txt into site/ in this folder. A device without a network takes them from wheels/ in this folder. Fill it on
another machine, here for Python 3.11 on 64-bit Arm:

    pip download --no-deps --only-binary :all: --python-version 3.11 --platform manylinux2014_aarch64 \\
        --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 --dest wheels -r requirements.txt

`sha256sum --check bertemd-files.txt` says whether the folder was copied whole; run.py checks it too.

Carry record.json back, and put the records of all devices on one page:

    bertemd report record.json OTHER/record.json --out REPORT
"""


def write_runner(
    artifact: Path,
    out: Path,
    *,
    settings: BenchSettings,
    device: Device | None = None,
    teacher: Path | None = None,
    force: bool = False,
) -> Path:
    """Write the runner folder of an artifact, whole or not at all.

    Args:
        artifact: an artifact folder.
        out: a new or empty folder.
        settings: what to measure there.
        device: what it is meant for: its name and session options are used there, its bad releases of onnxruntime avoided.
        teacher: Hugging Face folder whose graph travels too.
        force: replace a runner folder that is there; what else `out` holds stays beside it.

    Returns:
        `out`.

    Raises:
        ArtifactError: the artifact is damaged, or `out` holds something, has to do with the artifact or the teacher, or
            cannot be written.
        ModelError: the teacher is incomplete or does not fit the artifact.
        MeasurementError: the artifact has none of the graphs that `settings` asks for.
        RecipeError: every release of onnxruntime for the device is known to be bad.
    """
    pins = requirements(device)
    loaded = Artifact.load(artifact)
    sources = {"artifact": artifact} | ({} if teacher is None else {"teacher": teacher})
    with new_bundle(out, listing=LISTING, listed=_listed, sources=sources, force=force) as folder:
        _copy_artifact(loaded, folder / "artifact", graphs=settings.graphs)
        notes = [] if teacher is None else _copy_teacher(teacher, loaded, folder / "teacher")
        (folder / "requirements.txt").write_text(pins, encoding="utf-8")
        (folder / "README.txt").write_text(README, encoding="utf-8")
        given = {
            # Where to measure is this machine's affair: its list of devices stays here.
            "settings": dataclasses.asdict(dataclasses.replace(settings, devices=("local",), device_file=None)),
            "device": None if device is None else dataclasses.asdict(device),
            "notes": notes,
            "artifact": artifact_excerpt(loaded),
        }
        write_json(folder / "settings.json", given)
        write_programs(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
        (folder / LISTING).write_text("".join(lines), encoding="utf-8")
    return out


def _listed(path: Path) -> set[str]:
    """Return the names of the files of an earlier runner folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # of a damaged one every file is kept
        return set()
    return {name for _, _, name in (line.partition("  ") for line in lines) if name}


def write_programs(folder: Path) -> None:
    """Write everything that runs on a device into `folder`."""
    for name in PROGRAMS:
        shutil.copyfile(RUNNER / name, folder / name)
    for name in STAND_INS:
        (folder / "standins" / name).mkdir(parents=True)
        shutil.copyfile(RUNNER / "standins" / f"{name}.py", folder / "standins" / name / f"{name}.py")
    library = folder / "lib" / PACKAGE
    for module in needed_modules():
        source = _file_of(module)
        path = library / source.relative_to(SOURCE)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = older_source(source.read_text(encoding="utf-8"), name=str(source))
        if not module:
            text = text.replace(
                "import annotations\n", f"import annotations\n\nimport {FILLED}  # before all others\n", 1
            )
        path.write_text(text, encoding="utf-8")
    for name in REPLACED:
        shutil.copyfile(RUNNER / name, library / name)


def requirements(device: Device | None) -> str:
    """Return the text of requirements.txt.

    Raises:
        RecipeError: a pinned onnxruntime is known to be bad on `device`, and none is known to be good.
    """
    bad = {} if device is None else dict(device.onnxruntime.bad)
    good = [] if device is None else sorted(set(device.onnxruntime.good) - set(bad), key=release)
    lines = []
    for package, version, python in PINS:
        if package == "onnxruntime" and version in bad:
            if not good:
                assert device is not None
                raise RecipeError(
                    f"{device.name}: onnxruntime {version} is bad there ({bad[version]}), and no release is known to be "
                    "good. Name one in the device file, under onnxruntime.good."
                )
            version = good[-1]
        lines.append(f"{package}=={version}; {python}\n")
    return "".join(lines)


def needed_modules() -> list[str]:
    """Return the package's modules that measuring imports, at once or later, "" for the package itself."""
    found: set[str] = set()
    waiting = ["", *ROOTS]
    while waiting:
        module = waiting.pop()
        parents = module.rpartition(".")[0]
        if module in found or module in AT_HOME or f"{module}.py" in REPLACED:
            continue
        found.add(module)
        waiting += [parents, *_imports(module)]
    return sorted(found)


def _file_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")) if module else SOURCE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> Iterator[str]:
    """Yield the modules of this package that `module` imports anywhere but for type checking."""

    def known(name: str) -> bool:
        return _file_of(name).is_file()

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            base = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if known(inner) else base
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}."))
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    # What the package's own __init__ offers to its users is not what measuring needs.
    return visit(ast.parse(_file_of(module).read_text(encoding="utf-8"))) if module else iter(())


def _copy_artifact(artifact: Artifact, folder: Path, *, graphs: tuple[str, ...] | None) -> None:
    """Copy what the manifest names, each file checked, but for graphs not asked for; the manifest names what is there.

    The model card stays here: measuring does not read it, and people edit it.

    Raises:
        MeasurementError: none of `graphs` is there.
    """
    if graphs is not None and not set(graphs) & set(artifact.graphs()):
        raise MeasurementError(
            f"{artifact.folder}: has none of the graphs asked for ({', '.join(graphs) or 'none'}); it has: "
            f"{', '.join(artifact.graphs())}. Choose among these with bench.graphs."
        )
    left_out = (CARD, *(path for name, path in GRAPHS.items() if graphs is not None and name not in graphs))
    files = {name: entry for name, entry in artifact.manifest["files"].items() if not name.startswith(left_out)}
    for name in files:
        target = inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.file(name), target)
    if "config.json" not in files and (artifact.folder / "config.json").is_file():
        shutil.copyfile(artifact.folder / "config.json", folder / "config.json")
    write_json(folder / MANIFEST, artifact.manifest | {"files": files})


def _copy_teacher(teacher: Path, artifact: Artifact, folder: Path) -> list[str]:
    """Copy the teacher's graph with what says how it is read; return notes for the record."""
    with tempfile.TemporaryDirectory(prefix="bertemd-teacher-") as scratch:
        found, _ = teachers(teacher, artifact, scratch=Path(scratch))
        graph = next((candidate for candidate in found if candidate.backend == "onnxruntime"), None)
        if graph is None:
            family = json.loads((teacher / "config.json").read_text(encoding="utf-8")).get("model_type")
            return [f"the teacher is not measured there: the graph of a {family} is not written"]
        _copy_graph(graph, folder / TEACHER_GRAPH)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(teacher / name, folder / name)
    return []


def _copy_graph(candidate: Candidate, path: Path) -> None:
    """Copy a graph with its external weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".data", "_data"):
        part = candidate.path.with_name(candidate.path.name + suffix)
        if part.is_file():
            shutil.copyfile(part, path.with_name(part.name if suffix else path.name))
