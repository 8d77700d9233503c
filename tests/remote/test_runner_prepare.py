"""Finding, trying and installing what measuring needs, with packages and a pip that are made here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from remote_parts import write_python

from bertemd_deploy.bench.compare import CHURN
from bertemd_deploy.remote.runner import prepare
from bertemd_deploy.remote.runner.prepare import DeviceError, Software

NAMES = (*prepare.NEEDED, *prepare.WANTED)
# Stands in for pip: makes the packages asked for, or fails as pip does.
PIP = """
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
with open(os.environ["PIP_CALLS"], "a") as calls:
    calls.write(json.dumps({"arguments": arguments, "TMPDIR": os.environ.get("TMPDIR")}) + "\\n")
if "--version" in arguments:
    sys.exit(0)
if "PIP_SAYS" in os.environ:
    print(os.environ["PIP_SAYS"])
    sys.exit(1)
target = Path(arguments[arguments.index("--target") + 1])
for line in Path(arguments[arguments.index("-r") + 1]).read_text().split():
    name, _, version = line.partition("==")
    if version and name not in os.environ.get("PIP_FORGETS", "").split():
        (target / name).mkdir(parents=True, exist_ok=True)
        (target / name / "__init__.py").write_text(f"__version__ = {version.rstrip(';')!r}")
"""


def write_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(source)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A Python that finds only the packages in the folder returned; the standard library aside."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setattr(prepare.sys, "executable", str(write_python(tmp_path / "bin", "-S") / "python3"))
    monkeypatch.setenv("PYTHONPATH", str(packages))
    return packages


@pytest.fixture
def pip(bare, tmp_path, monkeypatch):
    """The stand-in for pip; returns the function that gives its calls."""
    (bare / "pip").mkdir()
    (bare / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.setenv("PIP_CALLS", str(tmp_path / "calls"))
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A runner folder, as far as installing reads it."""
    found = tmp_path / "runner"
    found.mkdir()
    pins = 'numpy==1.2; python_version >= "3"\nonnxruntime==3.4; python_version >= "3"\ntokenizers==5.6\npsutil==7.8\n'
    (found / "requirements.txt").write_text(pins)
    return found


def all_present(packages: Path) -> None:
    for name in NAMES:
        write_package(packages, name, "__version__ = '9'")


def test_what_is_installed_is_taken(bare, folder):
    all_present(bare)
    found = prepare.find_software(folder, install=True)
    assert found == Software(dict.fromkeys(NAMES, "9"))
    assert prepare.stand_ins(found) == []


def test_an_illegal_instruction_becomes_a_sentence(bare):
    all_present(bare)
    write_package(bare, "onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(DeviceError) as caught:
        prepare.importable(NAMES, path=())
    said = str(caught.value)
    assert said.startswith("importing onnxruntime on this machine (Python 3.")
    assert "ends with an illegal instruction: this build of onnxruntime" in said
    assert "uses instructions that the processor lacks" in said
    assert "python3 -m pip install 'onnxruntime<" in said


def test_the_version_that_fails_is_named(bare, monkeypatch, tmp_path):
    (bare / "onnxruntime-1.21.0.dist-info").mkdir()
    (bare / "onnxruntime-1.21.0.dist-info" / "METADATA").write_text("Name: onnxruntime\nVersion: 1.21.0\n")
    monkeypatch.setattr(prepare.sys, "path", [str(bare)])
    sentence = prepare.signal_sentence(signal.SIGILL, name="onnxruntime")
    assert "this build of onnxruntime 1.21.0 uses" in sentence
    assert "'onnxruntime<1.21.0'" in sentence
    assert prepare.installed_version("absent") is None


def test_other_signals_become_sentences():
    killed = prepare.signal_sentence(signal.SIGKILL, name="numpy")
    assert killed.startswith("was killed, most often because memory ran out.")
    crashed = prepare.signal_sentence(signal.SIGSEGV, name="absent")
    assert crashed == "ends with SIGSEGV: absent crashes here. Install another version of it."


def test_a_package_that_lacks_a_library_is_told(bare):
    all_present(bare)
    write_package(bare, "onnxruntime", "raise ImportError('libstdc++.so.6: version `GLIBCXX_3.4.30` not found')")
    with pytest.raises(
        DeviceError, match=r"^onnxruntime is installed for Python .* and cannot be imported: ImportError: lib"
    ):
        prepare.importable(NAMES, path=())
    write_package(bare, "onnxruntime", "import coloredlogs_absent")
    with pytest.raises(DeviceError, match="No module named 'coloredlogs_absent'"):
        prepare.importable(NAMES, path=())


def test_a_broken_wanted_package_is_as_good_as_absent(bare):
    all_present(bare)
    write_package(bare, "tokenizers", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert set(prepare.importable(NAMES, path=())) == {"numpy", "onnxruntime", "psutil"}


def test_without_pip_what_to_install_is_said(bare, folder):
    with pytest.raises(
        DeviceError, match=r"numpy is not installed for Python .*, and neither is pip\. Install python3-pip"
    ):
        prepare.find_software(folder, install=True)


def test_nothing_is_installed_where_that_is_asked_for(bare, folder):
    with pytest.raises(
        DeviceError, match=r"numpy and onnxruntime cannot be imported by .*Install it, or leave out --no-inst"
    ):
        prepare.find_software(folder, install=False)
    write_package(bare, "numpy", "")
    write_package(bare, "onnxruntime", "")
    found = prepare.find_software(folder, install=False)
    assert prepare.stand_ins(found) == ["tokenizers", "psutil"]
    assert not (folder / "site").exists()


def test_pip_installs_the_pinned_pair_into_the_folder(pip, bare, folder, capsys):
    write_package(bare, "numpy", "__version__ = '0.1'")
    write_package(bare, "psutil", "__version__ = '0.2'")
    found = prepare.find_software(folder, install=True)
    site = folder / "site"
    assert found.versions == {"numpy": "1.2", "onnxruntime": "3.4", "tokenizers": "5.6", "psutil": "0.2"}
    assert (found.path, found.installed) == ((site,), ("numpy", "onnxruntime", "tokenizers"))
    call = pip()[-1]
    assert {"--no-deps", "--no-cache-dir", "--no-input", ":all:"} <= set(call["arguments"])
    assert "--find-links" not in call["arguments"]
    assert call["TMPDIR"].startswith(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["requirements.txt", "site"]
    assert "installing numpy, onnxruntime, tokenizers into" in capsys.readouterr().err
    assert prepare.find_software(folder, install=True).path == (site,)
    assert len(pip()) == 2  # whether there is a pip, and the installation


def test_pip_takes_wheels_that_were_brought_along(pip, folder):
    (folder / "wheels").mkdir()
    prepare.find_software(folder, install=True)
    arguments = pip()[-1]["arguments"]
    assert arguments[arguments.index("--find-links") + 1] == str(folder / "wheels")
    assert "--no-index" in arguments


def test_what_pip_says_is_told(pip, folder, monkeypatch):
    monkeypatch.setenv("PIP_SAYS", "WARNING: old\nERROR: No matching distribution found for onnxruntime==3.4")
    with pytest.raises(DeviceError) as caught:
        prepare.find_software(folder, install=True)
    said = str(caught.value)
    assert "pip cannot install numpy, onnxruntime, tokenizers, psutil for Python 3." in said
    assert ": No matching distribution found for onnxruntime==3.4 Install onnxruntime yourself, or put wheels" in said
    monkeypatch.setenv(
        "PIP_SAYS", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    )
    with pytest.raises(DeviceError, match=r"there is no space left for numpy.* Free some, or set TMPDIR"):
        prepare.find_software(folder, install=True)
    monkeypatch.setenv("PIP_SAYS", "nothing of use")
    with pytest.raises(DeviceError, match="it said nothing"):
        prepare.find_software(folder, install=True)


def test_a_32_bit_system_is_named(monkeypatch):
    monkeypatch.setattr(prepare.platform, "machine", lambda: "aarch64")  # the kernel's
    assert prepare.where().endswith(" on aarch64")
    monkeypatch.setattr(prepare, "sys", SimpleNamespace(maxsize=2**31 - 1))
    assert prepare.where().endswith(" on aarch64, a 32-bit system, for which onnxruntime has no wheels")


def test_an_endless_pip_is_given_up(pip, folder, monkeypatch):
    def run(command, **options):
        if options.get("timeout"):
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return real(command, **options)

    real = prepare.subprocess.run
    monkeypatch.setattr(prepare.subprocess, "run", run)
    with pytest.raises(DeviceError, match=r"^pip did not finish within 30 minutes\. Put wheels into "):
        prepare.find_software(folder, install=True)


def test_wanted_packages_that_cannot_be_had_are_done_without(pip, bare, folder, monkeypatch, capsys):
    write_package(bare, "numpy", "")
    write_package(bare, "onnxruntime", "")
    monkeypatch.setenv("PIP_SAYS", "ERROR: No matching distribution found for psutil")
    found = prepare.find_software(folder, install=True)
    assert prepare.stand_ins(found) == ["tokenizers", "psutil"]
    assert "tokenizers and psutil could not be installed; measuring goes on without" in capsys.readouterr().err


def test_an_installation_without_effect_is_noticed(pip, folder, monkeypatch):
    monkeypatch.setenv("PIP_FORGETS", "onnxruntime")
    with pytest.raises(DeviceError, match=r"pip installed numpy, .* into .*site, yet onnxruntime is not there\."):
        prepare.find_software(folder, install=True)


def test_the_measuring_process_keeps_its_files_here(folder, monkeypatch):
    monkeypatch.setattr(prepare, "FOLDER", folder)
    monkeypatch.setenv("PYTHONPATH", "/before")
    software = Software({"numpy": "1", "onnxruntime": "1", "psutil": "1"}, path=(folder / "site",))
    found = prepare.measuring_environment(software, scratch=folder / "scratch")
    expected = [folder / "lib", folder / "site", folder / "standins" / "tokenizers", "/before"]
    assert found["PYTHONPATH"].split(os.pathsep) == list(map(str, expected))
    assert found["TMPDIR"] == found["XDG_CACHE_HOME"] == str(folder / "scratch")
    assert (found["PYTHONDONTWRITEBYTECODE"], found["ORT_DISABLE_TELEMETRY"]) == ("1", "1")


def test_a_damaged_folder_is_refused(runner_folder, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(runner_folder, tmp_path / "copy")
    prepare.check_files(copy)
    graph = copy / "artifact" / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(
        DeviceError, match=r"model\.onnx is damaged: its SHA-256 is not the one in bertemd-files\.txt\. Copy"
    ):
        prepare.check_files(copy)
    graph.unlink()
    monkeypatch.setattr(prepare, "FOLDER", copy)
    assert prepare.main([]) == 3
    assert capsys.readouterr().err.startswith(f"error: {graph} is missing. Copy the whole folder again.")


def test_measuring_is_started_with_what_was_found(runner_folder, tmp_path, monkeypatch):
    copy = shutil.copytree(runner_folder, tmp_path / "copy")
    (copy / "measure.py").write_text("import os, sys; print(sys.argv[1:], os.environ['TMPDIR']); sys.exit(7)")
    (copy / prepare.LISTING).write_text("")
    monkeypatch.setattr(prepare, "FOLDER", copy)
    monkeypatch.setattr(prepare, "find_software", lambda *_, **__: Software({"numpy": "1", "onnxruntime": "1"}))
    assert prepare.main(["--out", str(tmp_path / "r.json"), "--quick"]) == 7
    assert not (copy / "scratch").exists()


@pytest.mark.parametrize("there", ["r.json", "churn.jsonl"])
def test_an_earlier_record_is_replaced_only_with_force(there, runner_folder, tmp_path, monkeypatch, capsys):
    """Refused at once: nothing is looked for, and nothing measured."""
    (tmp_path / there).write_text("mine")
    monkeypatch.setattr(prepare, "FOLDER", runner_folder)
    monkeypatch.setattr(prepare, "find_software", lambda *_, **__: pytest.fail("looked for software"))
    assert prepare.main(["--out", str(tmp_path / "r.json")]) == 3
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {tmp_path / there} exists, such as of an earlier measurement. Add --force to replace"
    )
    assert len(said.splitlines()) == 1
    assert (tmp_path / there).read_text() == "mine"
    prepare.check_out(tmp_path / "r.json", force=True)


def test_the_record_is_a_file_beside_the_list(tmp_path):
    assert prepare.CHURN == CHURN
    with pytest.raises(DeviceError, match=r"is a folder\. Name a file with --out, such as .*record\.json\.$"):
        prepare.check_out(tmp_path, force=True)
    with pytest.raises(DeviceError, match=r"churn\.jsonl: a list of this name is written beside the record\. Choose"):
        prepare.check_out(tmp_path / "churn.jsonl", force=True)


@pytest.mark.parametrize("version", [(3, 8, 1), (2, 7, 18)])
def test_an_old_python_is_told(version, runner_folder):
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=runner_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    name = ".".join(map(str, version[:2]))
    assert done.stderr.startswith(
        f"error: this is Python {name}; measuring needs Python 3.9 or newer. Start run.py with"
    )
