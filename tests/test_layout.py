"""The two halves: what an edge device installs never needs the training half, and every `--help` is quick to come."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bertemd_deploy

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bertemd_deploy"
RUNTIME = {
    "answers",
    "artifact",
    "bench",
    "budget",
    "churn",
    "classifier",
    "cli",
    "cli_devices",
    "cli_options",
    "compatibility",
    "config",
    "console",
    "data",
    "decisions",
    "demo",
    "device_rows",
    "devices",
    "encoding",
    "errors",
    "estimate",
    "files",
    "handoff",
    "handout",
    "launch",
    "metrics",
    "predictions",
    "readers",
    "remote",
    "report",
    "resampling",
    "rows",
    "runtime",
    "settings",
    "spans",
    "splits",
    "targets",
    "tasks",
}
QUANTIZING = {"gate", "invariance", "onnx_edit", "quantization"}  # runtime half as well, with onnx on top
TRAINING_WITHIN = {"quantization.aware"}  # torch, beside what it is about
# Not what the small install brings: training packages, and the optional ones, which are imported where they are used.
FORBIDDEN = (
    "torch",
    "transformers",
    "datasets",
    "ot",
    "scipy",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "onnxscript",
    "pyarrow",
    "sklearn",
    "matplotlib",
)
# Commands of the training half, and the worker process that runs the PyTorch teacher, import it inside their functions.
LATE_IMPORTERS = {"cli", "cli_devices", "bench.worker"}


def modules() -> list[str]:
    """Return every module of the package, without the package's own name."""
    found = pkgutil.walk_packages(bertemd_deploy.__path__, f"{PACKAGE}.")
    return sorted(item.name.removeprefix(f"{PACKAGE}.") for item in found if not item.name.endswith("__main__"))


def half(module: str) -> str:
    runtime = module.partition(".")[0] in RUNTIME | QUANTIZING and module not in TRAINING_WITHIN
    return "runtime" if runtime else "training"


RUNTIME_MODULES = [module for module in modules() if half(module) == "runtime"]
TRAINING_MODULES = [module for module in modules() if half(module) == "training"]


def imports(module: str, *, top_level: bool) -> set[str]:
    """Return the package's own modules that `module` imports, at its top level or anywhere but under TYPE_CHECKING."""
    path = ROOT / PACKAGE / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.ImportFrom):
            found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source.read_text(encoding="utf-8")))
    known = set(modules())
    return {name.removeprefix(f"{PACKAGE}.") for name in found} & known


def run(code: str, *arguments: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_both_halves_are_there():
    tops = {module.partition(".")[0] for module in modules()}
    assert tops >= RUNTIME | QUANTIZING
    assert {"emd", "mapping", "losses", "models", "training", "distill", "finetune", "export"} <= set(TRAINING_MODULES)
    assert {"bench.worker", "report.html"} <= set(RUNTIME_MODULES)


@pytest.mark.parametrize(("onnx", "count"), [(False, 25), (True, 28)])
def test_runtime_half_imports_no_training_package(onnx, count):
    """An import hook refuses the packages, as a device without them would; `onnx` only the quantizing modules may have."""
    code = """
import importlib, sys
forbidden, names = set(sys.argv[1].split()), sys.argv[2].split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
for name in names:
    importlib.import_module(f"bertemd_deploy.{name}")
own = [name.removeprefix("bertemd_deploy.") for name in sys.modules if name.startswith("bertemd_deploy.")]
print(" ".join(own))
"""
    chosen = [name for name in RUNTIME_MODULES if onnx or name.partition(".")[0] not in QUANTIZING]
    assert len(chosen) >= count
    forbidden = FORBIDDEN if onnx else (*FORBIDDEN, "onnx")
    imported = run(code, " ".join(forbidden), " ".join(chosen)).split()
    assert set(chosen) <= set(imported)
    assert [name for name in imported if half(name) == "training"] == []


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_runtime_half_does_not_import_the_training_half(module):
    found = imports(module, top_level=module in LATE_IMPORTERS)
    assert sorted(name for name in found if half(name) == "training") == []


def test_the_exceptions_are_real():
    """`cli` and the worker do reach the training half, late: the rule above would see them otherwise."""
    for module in LATE_IMPORTERS:
        assert any(half(name) == "training" for name in imports(module, top_level=False))


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, bertemd_deploy; print(*(set(sys.argv[1:]) & set(sys.modules)))"
    assert run(code, "numpy", "onnxruntime", "tokenizers", "torch", "typer", "rich", "yaml").strip() == ""


def test_every_help_answers_without_heavy_imports():
    code = """
import sys
from typer.testing import CliRunner
from bertemd_deploy.cli import app
names = [command.name or command.callback.__name__ for command in app.registered_commands]
for arguments in [[], *([name] for name in names)]:
    answer = CliRunner().invoke(app, [*arguments, "--help"])
    assert answer.exit_code == 0, (arguments, answer.output)
    assert "Usage:" in answer.output, arguments
    heavy = set(sys.argv[1:]) & set(sys.modules)
    assert not heavy, (arguments, heavy)
print(*names)
"""
    heavy = ("numpy", "onnxruntime", "tokenizers", "yaml", "psutil", "onnx", *FORBIDDEN)
    named = run(code, *heavy).split()
    stages = {"run", "check", "finetune", "distill", "evaluate", "export", "bench", "report", "predict"}
    assert stages <= set(named)


def test_package_runs_as_a_module():
    command = [sys.executable, "-m", PACKAGE, "--version"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, f"{bertemd_deploy.__version__}\n"), answer.stderr
