"""Devices: the places a student is shipped to, with the facts that decide how fast it is there and what may go wrong.

The table is `devices.yaml` beside this module; a user's own file has the same keys. A device names its target, the kind of
CPU that graphs are exported for (`targets`), and the ways in which numbers for it can be had:

    measured      on the machine at hand, which is the device "local"
    constrained   on the machine at hand too, within the device's limits (`bench.limits`); only where this machine can stand
                  for it: the same architecture, its instruction sets, as many CPUs
    estimated     computed from the device's facts
    remote        on the device itself

Files of devices come from outside: they are data, every value is checked, and a source is a web address.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.targets import EXACT_INT8, TARGETS, resolve, saturates

Way = Literal["constrained", "estimated", "remote"]
WAYS: tuple[Way, ...] = typing.get_args(Way)
LOCAL = "local"
BUILT_IN = "devices.yaml"
_X86 = ("avx", "fma", "amx")  # how its instruction sets begin
_SPELLINGS = {"amd64": "x86_64", "aarch64": "arm64"}


def _bounds(low: float, high: float, *, above: bool = False) -> dict[str, Any]:
    """Return the metadata of a bounded number; `above` makes the lower bound exclusive."""
    return {"low": low, "high": high, "above": above}


@dataclass(frozen=True)
class Session:
    """How to open an ONNX Runtime session there.

    Attributes:
        threads: intra-op.
        spinning: whether idle threads wait by spinning.
        arena: whether memory comes from ONNX Runtime's arena.
    """

    threads: int = field(metadata=_bounds(1, 4096))
    spinning: bool
    arena: bool


@dataclass(frozen=True)
class Runtimes:
    """Releases of ONNX Runtime seen to work there, and those seen to fail, each with what happens."""

    good: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Device:
    """A place that a student is shipped to.

    Attributes:
        name: what it is asked for by, and what its folder of a report is called.
        title, cpu: for people.
        target: row of `targets.TARGETS`.
        cores, threads: physical cores, and CPUs that the system shows.
        isa: instruction sets, of `environment.ISA_FLAGS`.
        bandwidth_gb_s: of main memory, 10^9 bytes a second.
        fp32_flop_per_cycle, int8_op_per_cycle: per core, the peak of the vector unit that ONNX Runtime uses.
        cpu_share: CPUs of quota, such as 0.5; None leaves all of them.
        memory_limit_bytes: of the container; None where there is none.
        graph: of `artifact.GRAPHS`, to use there first.
        ways: in which numbers for it can be had.
        sources: (fact, web address) pairs.
    """

    name: str
    title: str
    cpu: str
    target: str
    cores: int = field(metadata=_bounds(1, 4096))
    threads: int = field(metadata=_bounds(1, 4096))
    isa: tuple[str, ...]
    memory_bytes: int = field(metadata=_bounds(2**20, 2**50))
    clock_mhz: float | None = field(metadata=_bounds(0, 20_000, above=True))
    bandwidth_gb_s: float | None = field(metadata=_bounds(0, 100_000, above=True))
    fp32_flop_per_cycle: float | None = field(metadata=_bounds(0, 100_000, above=True))
    int8_op_per_cycle: float | None = field(metadata=_bounds(0, 1_000_000, above=True))
    cpu_share: float | None = field(metadata=_bounds(0.01, 4096))
    memory_limit_bytes: int | None = field(metadata=_bounds(2**20, 2**50))
    graph: str
    session: Session
    onnxruntime: Runtimes
    ways: tuple[Way, ...]
    note: str
    sources: tuple[tuple[str, str], ...]


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """Return all devices by name: the built-in ones, a user's own, and "local".

    Args:
        extra: YAML file of further devices; each may start from another (`like`).

    Raises:
        RecipeError: the file cannot be read, or has faults; all of them are in the one message.
    """
    from bertemd_deploy.device_rows import read_devices  # which reads into the classes above

    text = importlib.resources.files("bertemd_deploy").joinpath(BUILT_IN).read_text(encoding="utf-8")
    local = local_device()
    devices = read_devices(text, where=BUILT_IN, known={LOCAL: local})
    if extra is not None:
        try:
            text = extra.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"{extra}: there is no such file of devices.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{extra}: the file of devices cannot be read ({error}).") from error
        devices = read_devices(text, where=str(extra), known=devices)
    return {name: device for name, device in devices.items() if name != LOCAL} | {LOCAL: local}


def find_device(name: str, devices: Mapping[str, Device]) -> Device:
    """Return a device by its name.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in devices:
        raise RecipeError(f"{unknown_device(name, devices)}. Devices of your own go into a file: --devices FILE.")
    return devices[name]


def local_device(root: Path = Path("/")) -> Device:
    """Return the machine at hand as a device; what it does not tell is None.

    Args:
        root: where `proc` and `sys` lie.
    """
    from bertemd_deploy.bench import environment

    facts = environment.device(root)
    target = resolve("auto", root).name
    threads, memory, container = facts["threads"] or 1, facts["memory_bytes"], facts["container"]
    share, limit = container["cpu_quota"], container["memory_limit_bytes"]
    clock = facts["frequency"]["max_mhz"] or facts["frequency"]["current_mhz"]
    isa = facts["isa"] or TARGETS[target].isa  # where the system does not tell, the target is known by the architecture
    return Device(
        name=LOCAL,
        title=facts["name"],
        cpu=facts["cpu"] or facts["machine"],
        target=target,
        cores=facts["cores"] or threads,
        threads=threads,
        isa=tuple(isa),
        memory_bytes=memory,
        clock_mhz=clock,
        bandwidth_gb_s=None,
        fp32_flop_per_cycle=None,
        int8_op_per_cycle=None,
        cpu_share=share if share is not None and share < threads else None,
        memory_limit_bytes=limit if limit is not None and limit < memory else None,
        graph="fused-int8" if TARGETS[target].graph == "fused" else "int8",
        session=Session(threads=facts["limits"]["threads"], spinning=False, arena=True),
        onnxruntime=Runtimes(good=(), bad=()),
        ways=("constrained", "estimated"),
        note="The machine at hand, as it tells about itself.",
        sources=(),
    )


def limits_of(device: Device) -> Limits:
    """Return the limits within which a measurement stands for a device: its CPUs, CPU share and memory."""
    return Limits(
        cpus=device.threads,
        cpu_share=device.cpu_share,
        memory_bytes=device.memory_limit_bytes or device.memory_bytes,
    )


def stand_in_faults(
    device: Device, *, local_isa: Collection[str] | None, local_machine: str, local_cores: int
) -> list[str]:
    """Return why a measurement on this machine would not stand for a device; nothing where it would.

    Args:
        device: what it should stand for.
        local_isa: this machine's instruction sets (`environment.instruction_sets`), None where the system does not tell.
        local_machine: `platform.machine()`.
        local_cores: CPUs that this process may use.
    """
    machine = _SPELLINGS.get(local_machine.lower(), local_machine.lower())
    wanted = architecture(device)
    if wanted not in (None, machine):
        return [f"it is {wanted}, and this machine is {machine}"]
    faults = []
    if local_isa is None:
        if device.isa:
            faults.append("this system does not tell which instruction sets its CPU has")
    elif missing := [flag for flag in device.isa if flag not in local_isa]:
        faults.append(f"it has {', '.join(missing)}, and this CPU has not")
    elif saturates(device.isa) and set(EXACT_INT8) & set(local_isa):
        faults.append(
            "its int8 sums saturate and this CPU's do not, so that neither speed nor accuracy would be its own"
        )
    if local_cores < device.threads:
        faults.append(f"it has {device.threads} CPUs, and this process may use {local_cores}")
    return faults


def architecture(device: Device) -> str | None:
    """Return "x86_64", "arm64" or "wasm", or None for a device that may be of any."""
    kind = device.target.partition("-")[0]
    if kind in ("x86", "arm64", "wasm"):
        return "x86_64" if kind == "x86" else kind
    if any(flag.startswith(_X86) for flag in device.isa):
        return "x86_64"
    return "arm64" if "asimd" in device.isa else None


def way_of(
    device: Device, *, asked: str | None, local_isa: Collection[str] | None, local_machine: str, local_cores: int
) -> Literal["measured", "constrained", "estimated"]:
    """Return how numbers for a device are had on this machine.

    Args:
        device: the device.
        asked: the way that was asked for by name; None takes the best there is.
        local_isa: this machine's instruction sets, None where the system does not tell.
        local_machine: `platform.machine()`.
        local_cores: CPUs that this process may use.

    Raises:
        RecipeError: an unknown way, or one in which no numbers for this device can be had here.
    """
    if device.name == LOCAL:
        if asked not in (None, "measured"):
            raise RecipeError(f"{LOCAL}:{asked}: the machine at hand is measured as it is; write {LOCAL}.")
        return "measured"
    if asked not in (None, "constrained", "estimated"):
        raise RecipeError(
            f"{device.name}:{asked}: there is no such way; write {device.name}:constrained or {device.name}:estimated, or "
            "ssh://user@host to measure on the device itself."
        )
    faults = stand_in_faults(device, local_isa=local_isa, local_machine=local_machine, local_cores=local_cores)
    if "constrained" not in device.ways:
        faults = ["its CPU is another one than this machine's, and limits do not make it that"]
    if asked != "estimated" and not faults:
        return "constrained"
    if asked == "constrained":
        raise RecipeError(
            f"{device.name}:constrained: this machine cannot stand for it: {'; '.join(faults)}. Leave :constrained out for "
            "an estimate, or measure on the device: ssh://user@host."
        )
    if "estimated" not in device.ways:
        raise RecipeError(
            f"{device.name}: it is not to be estimated (its ways: {', '.join(device.ways)})"
            f"{'' if asked else ', and this machine cannot stand for it: ' + '; '.join(faults)}. Measure on the device: "
            "ssh://user@host."
        )
    return "estimated"


def unknown_device(name: str, names: Iterable[str]) -> str:
    """Return what to say of a device that there is none of, without the last full stop."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown device {name!r}.{meant} Known are {', '.join(known)}"


def devices_table(devices: Mapping[str, Device]) -> str:
    """Return the devices as a table for people, one a line, with blanks between columns."""
    rows = [("device", "CPUs", "memory", "clock", "target", "numbers are", "what it is")]
    for device in devices.values():
        rows.append(
            (
                device.name,
                f"{device.cpu_share or device.threads:g}",
                _binary(device.memory_limit_bytes or device.memory_bytes),
                "" if device.clock_mhz is None else f"{device.clock_mhz:,.0f} MHz",
                device.target,
                "measured" if device.name == LOCAL else ", ".join(device.ways),
                device.title,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def device_text(device: Device) -> str:
    """Return all facts of a device for people, a line each, with the source of each."""
    urls = dict(device.sources)
    session = device.session
    facts: list[tuple[str, str, str]] = [
        ("cpu", device.cpu, "cpu"),
        ("target", f"{device.target}, instruction sets {', '.join(device.isa) or 'not told'}", "isa"),
        ("cores", f"{device.cores}, CPUs shown by the system: {device.threads}", "cores"),
        ("CPU share", "all of them" if device.cpu_share is None else f"{device.cpu_share:g} CPUs", "cpu_share"),
        ("memory", _binary(device.memory_bytes), "memory_bytes"),
        (
            "memory limit",
            "none" if device.memory_limit_bytes is None else _binary(device.memory_limit_bytes),
            "memory_limit_bytes",
        ),
        ("clock", _amount(device.clock_mhz, "MHz"), "clock_mhz"),
        ("memory bandwidth", _amount(device.bandwidth_gb_s, "GB/s"), "bandwidth_gb_s"),
        ("fp32", _amount(device.fp32_flop_per_cycle, "operations a cycle and core"), "fp32_flop_per_cycle"),
        ("int8", _amount(device.int8_op_per_cycle, "operations a cycle and core"), "int8_op_per_cycle"),
        ("graph", device.graph, "graph"),
        (
            "session",
            f"threads {session.threads}, spinning {'on' if session.spinning else 'off'}, "
            f"arena {'on' if session.arena else 'off'}",
            "session",
        ),
    ]
    facts += [("onnxruntime", f"{version} works", f"onnxruntime {version}") for version in device.onnxruntime.good]
    facts += [("onnxruntime", f"{version} {why}", f"onnxruntime {version}") for version, why in device.onnxruntime.bad]
    facts.append(("numbers are", "measured" if device.name == LOCAL else " or ".join(device.ways), ""))
    told = {key for _, _, key in facts}
    facts += [(fact, "see", fact) for fact in urls if fact not in told]
    width = max(len(label) for label, _, _ in facts)
    lines = [f"{device.name}: {device.title}"]
    for label, value, key in facts:
        lines.append(f"  {label.ljust(width)}  {value}" + (f"  [{urls[key]}]" if key in urls else ""))
    return "\n".join([*lines, *([f"  {device.note}"] if device.note else [])])


def device_record(device: Device) -> dict[str, Any]:
    """Return a device as a JSON object; `bad` releases and `sources` are lists of objects."""
    record = dataclasses.asdict(device)
    record["isa"], record["ways"] = list(device.isa), list(device.ways)
    record["onnxruntime"] = {
        "good": list(device.onnxruntime.good),
        "bad": [{"version": version, "reason": reason} for version, reason in device.onnxruntime.bad],
    }
    record["sources"] = [{"fact": fact, "url": url} for fact, url in device.sources]
    return record


def _binary(count: int) -> str:
    """Return a number of bytes in GiB, or in MiB below one."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _amount(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:,g} {unit}"
