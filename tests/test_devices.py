"""Devices: the built-in table with its sources, this machine as one, which way numbers are had, and what people read."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import platform
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from bertemd_deploy import devices
from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.bench.environment import ISA_FLAGS, instruction_sets
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.compatibility import release
from bertemd_deploy.devices import (
    LOCAL,
    WAYS,
    Device,
    architecture,
    device_record,
    device_text,
    devices_table,
    find_device,
    limits_of,
    load_devices,
    local_device,
    stand_in_faults,
    way_of,
)
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.targets import TARGETS

NAMES = [
    "server-2vcpu",
    "container-500m-512mb",
    "laptop-x86",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "jetson-orin-nano-cpu",
    "android-midrange",
    "browser-wasm",
    "local",
]
VNNI = ["avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"]
BUILT_IN = {name: device for name, device in load_devices().items() if name != LOCAL}


def way(device: Device, *, asked: str | None = None, isa: list[str] | None = VNNI, machine="x86_64", cores=4) -> str:
    return way_of(device, asked=asked, local_isa=isa, local_machine=machine, local_cores=cores)


def test_the_table_is_package_data():
    found = importlib.resources.files("bertemd_deploy").joinpath(devices.BUILT_IN)
    assert found.is_file()
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "packages": ["bertemd_deploy"]
    }  # all that is in it


def test_the_built_in_devices_are_there_and_local_comes_last():
    assert list(load_devices()) == NAMES


@pytest.mark.parametrize("device", BUILT_IN.values(), ids=list(BUILT_IN))
def test_a_built_in_device_is_whole_and_says_where_its_facts_are_from(device):
    sources = dict(device.sources)
    assert all(re.fullmatch(r"https://\S+", url) for url in sources.values())
    told = ["cpu", "clock_mhz", "bandwidth_gb_s", "fp32_flop_per_cycle", "int8_op_per_cycle", "cpu_share"]
    told += ["memory_limit_bytes"]
    assert [fact for fact in told if getattr(device, fact) is not None and fact not in sources] == []
    assert [version for version, _ in device.onnxruntime.bad if f"onnxruntime {version}" not in sources] == []
    for version in device.onnxruntime.good:
        assert (
            f"onnxruntime {version}" in sources
            or f"ONNX Runtime {version} is what this package is tested" in device.note
        )
        assert release(version) >= release(TARGETS[device.target].runtime)
    assert device.clock_mhz is not None
    assert device.fp32_flop_per_cycle is not None
    assert device.int8_op_per_cycle >= device.fp32_flop_per_cycle
    assert device.note
    assert set(device.ways) <= set(WAYS)
    assert set(device.isa) <= set(ISA_FLAGS)
    assert device.graph in GRAPHS
    assert device.session.threads == (
        1 if device.target == "wasm" else max(1, min(device.cores, math.ceil(device.cpu_share or 99)))
    )


def test_known_bad_releases_are_those_of_the_threads():
    bad = {name: [version for version, _ in device.onnxruntime.bad] for name, device in BUILT_IN.items()}
    assert bad["raspberry-pi-4"] == ["1.21.0"]
    assert bad["raspberry-pi-5"] == []
    assert bad["jetson-orin-nano-cpu"] == ["1.22.0"]
    assert dict(BUILT_IN["raspberry-pi-4"].onnxruntime.bad)["1.21.0"] == "ends with an illegal instruction on import"


def test_the_pi_without_dot_products_differs_from_the_one_with_them():
    four, five = BUILT_IN["raspberry-pi-4"], BUILT_IN["raspberry-pi-5"]
    assert (four.target, five.target) == ("arm64", "arm64-dotprod")
    assert "asimddp" in five.isa
    assert "asimddp" not in four.isa
    assert four.int8_op_per_cycle / four.fp32_flop_per_cycle < five.int8_op_per_cycle / five.fp32_flop_per_cycle


def test_an_unknown_device_is_answered_with_what_was_meant():
    with pytest.raises(RecipeError) as error:
        find_device("raspbery-pi5", load_devices())
    assert str(error.value) == (
        f"unknown device 'raspbery-pi5'. Did you mean 'raspberry-pi-5'? Known are {', '.join(NAMES)}. "
        "Devices of your own go into a file: --devices FILE."
    )
    assert error.value.exit_code == 2
    with pytest.raises(RecipeError, match=r"unknown device 'zx81'\. Known are server-2vcpu, "):
        find_device("zx81", load_devices())
    assert find_device("raspberry-pi-5", load_devices()) == BUILT_IN["raspberry-pi-5"]


def test_a_file_of_ones_own_adds_devices(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("my-pi:\n  like: raspberry-pi-5\n  title: The one in the greenhouse\n  clock_mhz: 1500\n")
    found = load_devices(path)
    assert list(found) == [*NAMES[:-1], "my-pi", LOCAL]
    assert found["my-pi"].clock_mhz == 1500
    assert found["my-pi"].bandwidth_gb_s == found["raspberry-pi-5"].bandwidth_gb_s


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: there is no such file of devices\."):
        load_devices(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"pi: \xe4")
    with pytest.raises(RecipeError, match=r"latin\.yaml: the file of devices cannot be read \("):
        load_devices(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="the file of devices cannot be read"):
        load_devices(tmp_path)


def machine(root: Path, cpuinfo: str, **files: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(cpuinfo)
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machine_at_hand_is_a_device(tmp_path):
    flags = "model name : Some CPU\nflags : avx avx2 fma avx512f avx512bw avx512_vnni\ncpu MHz : 2500.5\n"
    root = machine(
        tmp_path, flags, sys__fs__cgroup__cpu_dot_max="50000 100000\n", sys__fs__cgroup__memory_dot_max="268435456\n"
    )
    found = local_device(root)
    assert (found.name, found.cpu, found.target, found.graph) == (LOCAL, "Some CPU", "x86-avx512-vnni", "fused-int8")
    assert found.isa == ("avx", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni")
    assert (found.cpu_share, found.memory_limit_bytes, found.clock_mhz) == (0.5, 268435456, 2500.5)
    assert 1 <= found.cores <= found.threads
    assert (found.bandwidth_gb_s, found.fp32_flop_per_cycle, found.sources) == (None, None, ())


def test_limits_that_bind_nothing_are_none_here(tmp_path):
    root = machine(
        tmp_path,
        "flags : avx\n",
        sys__fs__cgroup__cpu_dot_max=f"{(os.cpu_count() or 1) * 100000} 100000\n",
        sys__fs__cgroup__memory_dot_max=str(2**50),
    )
    found = local_device(root)
    assert (found.cpu_share, found.memory_limit_bytes) == (None, None)
    assert (found.target, found.graph) == ("portable", "int8")


def test_limits_of_a_device():
    assert limits_of(BUILT_IN["container-500m-512mb"]) == Limits(cpus=1, cpu_share=0.5, memory_bytes=512 * 2**20)
    assert limits_of(BUILT_IN["server-2vcpu"]) == Limits(cpus=2, cpu_share=None, memory_bytes=4 * 2**30)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("server-2vcpu", "x86_64"),
        ("container-500m-512mb", "x86_64"),
        ("raspberry-pi-4", "arm64"),
        ("jetson-orin-nano-cpu", "arm64"),
        ("browser-wasm", "wasm"),
    ],
)
def test_architecture_follows_from_the_target(name, expected):
    assert architecture(BUILT_IN[name]) == expected


def test_architecture_of_a_portable_device_follows_from_its_instruction_sets():
    portable = replace(BUILT_IN["laptop-x86"], target="portable")
    assert architecture(portable) == "x86_64"
    assert architecture(replace(portable, isa=("asimd",))) == "arm64"
    assert architecture(replace(portable, isa=())) is None


def test_a_fitting_machine_stands_for_a_server():
    server = BUILT_IN["server-2vcpu"]
    assert stand_in_faults(server, local_isa=VNNI, local_machine="AMD64", local_cores=2) == []
    assert way(server) == "constrained"
    assert way(server, asked="constrained") == "constrained"
    assert way(server, asked="estimated") == "estimated"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"machine": "aarch64"}, "it is x86_64, and this machine is arm64"),
        (
            {"isa": ["avx", "f16c", "fma", "avx2"]},
            "it has avx512f, avx512bw, avx512vl, avx512_vnni, and this CPU has not",
        ),
        ({"isa": None}, "this system does not tell which instruction sets its CPU has"),
        ({"cores": 1}, "it has 2 CPUs, and this process may use 1"),
    ],
)
def test_another_machine_does_not_stand_for_it(changed, reason):
    server = BUILT_IN["server-2vcpu"]
    assert way(server, **changed) == "estimated"
    with pytest.raises(RecipeError) as error:
        way(server, asked="constrained", **changed)
    assert str(error.value) == (
        f"server-2vcpu:constrained: this machine cannot stand for it: {reason}. Leave :constrained out for an estimate, or "
        "measure on the device: ssh://user@host."
    )
    assert error.value.exit_code == 2


def test_a_cpu_with_exact_sums_does_not_stand_for_one_whose_sums_saturate():
    old = replace(BUILT_IN["laptop-x86"], ways=("constrained",))
    assert way(old, isa=["avx", "f16c", "fma", "avx2"], cores=8) == "constrained"
    with pytest.raises(
        RecipeError, match="its int8 sums saturate and this CPU's do not, so that neither speed nor accuracy"
    ):
        way(old, cores=8)


def test_limits_do_not_make_this_cpu_another_one():
    with pytest.raises(
        RecipeError, match=r"raspberry-pi-5:constrained: this machine cannot stand for it: its CPU is another"
    ):
        way(BUILT_IN["raspberry-pi-5"], asked="constrained")
    assert way(BUILT_IN["raspberry-pi-5"]) == "estimated"


def test_a_device_not_to_be_estimated_is_not():
    remote_only = replace(BUILT_IN["raspberry-pi-5"], ways=("remote",))
    with pytest.raises(RecipeError) as error:
        way(remote_only)
    assert str(error.value) == (
        "raspberry-pi-5: it is not to be estimated (its ways: remote), and this machine cannot stand for it: its CPU is "
        "another one than this machine's, and limits do not make it that. Measure on the device: ssh://user@host."
    )
    with pytest.raises(RecipeError, match=r"not to be estimated \(its ways: remote\)\. Measure"):
        way(remote_only, asked="estimated")


def test_the_machine_at_hand_is_measured_and_nothing_else():
    local = local_device()
    assert way(local) == way(local, asked="measured") == "measured"
    with pytest.raises(RecipeError, match="local:estimated: the machine at hand is measured as it is; write local"):
        way(local, asked="estimated")


def test_an_unknown_way_lists_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"raspberry-pi-5:guessed: there is no such way; write raspberry-pi-5:constrained or"
    ):
        way(BUILT_IN["raspberry-pi-5"], asked="guessed")


def test_this_machine_stands_for_a_device_like_itself_with_less_memory():
    local = local_device()
    small = replace(local, name="small", memory_limit_bytes=2**28, threads=1, cores=1)
    isa = instruction_sets()
    found = way_of(small, asked=None, local_isa=isa, local_machine=platform.machine(), local_cores=1)
    assert found == ("constrained" if isa else "estimated")


def test_the_table_has_a_line_for_every_device_and_aligned_columns():
    lines = devices_table(load_devices()).splitlines()
    assert [line.split()[0] for line in lines] == ["device", *NAMES]
    at = lines[0].index("target")
    assert [line[at:].split()[0] for line in lines[1:]] == [device.target for device in load_devices().values()]
    container = next(line for line in lines if line.startswith("container"))
    assert re.search(r"0\.5\s+512 MiB\s+3,500 MHz\s", container)
    assert all(line == line.rstrip() for line in lines)


def test_one_device_in_words_gives_each_fact_with_its_source():
    text = device_text(BUILT_IN["raspberry-pi-4"])
    lines = text.splitlines()
    assert lines[0] == "raspberry-pi-4: Raspberry Pi 4 Model B (4 GB)"
    assert re.search(
        r"^  memory bandwidth +5\.56 GB/s  \[https://www\.sci-pi\.org\.uk/bench/stream\.html\]$", text, re.M
    )
    assert re.search(
        r"^  onnxruntime +1\.21\.0 ends with an illegal instruction on import  \[https://github\.com/microsoft/onnxruntime/"
        r"issues/23957\]$",
        text,
        re.M,
    )
    assert re.search(r"^  session +threads 4, spinning off, arena off$", text, re.M)
    assert re.search(r"^  onnxruntime wheels +see  \[https://", text, re.M)
    assert all(url in text for _, url in BUILT_IN["raspberry-pi-4"].sources)
    assert lines[-1].strip() == BUILT_IN["raspberry-pi-4"].note
    assert "memory bandwidth  not known" in device_text(local_device())


def test_the_record_of_a_device_is_json():
    record = json.loads(json.dumps(device_record(BUILT_IN["jetson-orin-nano-cpu"])))
    assert record["onnxruntime"]["bad"][0]["version"] == "1.22.0"
    assert record["session"] == {"threads": 6, "spinning": False, "arena": True}
    assert {"fact": "onnxruntime 1.22.0", "url": "https://github.com/microsoft/onnxruntime/issues/25103"} in record[
        "sources"
    ]
    assert record["isa"] == ["asimd", "fphp", "asimdhp", "asimddp"]
    assert set(record) == set(Device.__dataclass_fields__)
