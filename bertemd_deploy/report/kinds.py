"""How numbers were got, in words: measured here, under limits, on the device over ssh, or estimated.

The words stand on every table and in every verdict, so that no number is taken for one of another kind.
"""

from __future__ import annotations

from bertemd_deploy.report.records import Record, count
from bertemd_deploy.report.text import NOT_MEASURED, dig, joined, megabytes, number, percent, plain

BADGES = {
    "measured": "Measured on this machine",
    "constrained": "Measured here, under the device's limits",
    "remote": "Measured on the device",
    "estimated": "Estimated, not measured",
}
_HOW = {
    "measured": "its numbers were measured on the machine that ran the benchmark.",
    "constrained": "its numbers were measured on the machine that ran the benchmark, under limits of the device; the speed of "
    "a core is that of this machine, not of the device.",
    "remote": "its numbers were measured on the device itself, by a runner that was copied there.",
    "estimated": "its times and memory are estimates: the operators of each graph, counted, times rates measured by small "
    "experiments on another machine and scaled to this device. Nothing ran there.",
}


def place(record: Record) -> str:
    """Return the beginning of a verdict: where its numbers hold, and how they were got."""
    cores, cpu = number(record.device.get("cores")), record.device.get("cpu")
    name = str(record.device.get("name") or "")
    machine = str(cpu) if cpu else name or "unnamed device"
    if record.kind == "constrained":
        whose = f" of {name}" if name and not (cpu and str(cpu) in name) else ""
        return f"On this {machine}, held to {_limits(record)}{whose} (constrained)"
    if cores:
        machine = f"{int(cores)}-core {machine}"
    board = name.partition(" (")[0]
    known_as = f"the {machine} of {board}" if cpu and board and str(cpu) not in name else machine
    if record.estimated:
        return f"Estimated, not measured, for {known_as}"
    if record.kind == "remote":
        return f"On {known_as} (remote)"
    return f"On this {machine}"


def _limits(record: Record) -> str:
    """Return what a machine that stands in for a device was held to."""
    limits = record.device.get("limited_to")
    cpus, share, memory = (number(dig(limits, key)) for key in ("cpus", "cpu_share", "memory_bytes"))
    said = [
        count(int(cpus), "core") if cpus else "",
        f"{share:g} of a core's time" if share else "",
        plain("memory_bytes", memory) if memory else "",
    ]
    return f"the {joined(list(filter(None, said)))}" if any(said) else "the limits"


def how(record: Record) -> list[str]:
    """Return how a record's numbers were got, a sentence each."""
    said = [f"{record.name}: {_HOW.get(record.kind, _HOW['measured'])}"]
    confinement = record.device.get("confinement")
    if record.kind == "constrained" and isinstance(confinement, dict):
        held = [_held(_LIMITS.get(str(key), str(key)), way) for key, way in confinement.items() if way is not None]
        said += [f"{record.name}: {joined(held)}."] if held else []
    if record.estimated:
        said += _error(record)
    version = dig(record.raw, "versions", "onnxruntime")
    releases = dig(record.device, "row", "onnxruntime", "bad")
    for release in releases if isinstance(releases, list) else ():
        if version is not None and dig(release, "version") == version:
            said.append(f"{record.name}: ONNX Runtime {version} is known not to work there: {dig(release, 'reason')}.")
    return said


_LIMITS = {"cpus": "cores", "cpu_share": "the share of CPU time", "memory": "memory"}
_WAYS = {
    "affinity": "by affinity",
    "cgroup": "by a control group",
    "rlimit": "by the process's own limit (what is asked for)",
}


def _held(what: str, way: object) -> str:
    return (
        f"{what} not limited, for want of a way to"
        if way == "not limited"
        else f"{what} limited {_WAYS.get(str(way), way)}"
    )


def _error(record: Record) -> list[str]:
    estimate = record.raw.get("estimate")
    words, scaled = dig(estimate, "words"), dig(estimate, "scaled_by")
    median, worst, n = (number(dig(estimate, "error", key)) for key in ("median", "worst", "n"))
    said = [f"{record.name}: {words}"] if isinstance(words, str) and words else []
    if median is not None and worst is not None:
        over = f" over {int(n)} comparisons" if n else ""
        said.append(
            f"{record.name}: where estimates were checked against measurements{over}, the median error was "
            f"{percent(median)} and the worst {percent(worst)}."
        )
    if isinstance(scaled, dict) and scaled:
        said.append(f"{record.name}: scaled by {plain('', scaled)}.")
    return said


def failure_sentences(record: Record) -> list[str]:
    """Return which models could not be measured, and why."""
    said = []
    for variant, failure in record.failures.items():
        text = f"{variant.label}: not measured, {failure.reason}"
        if failure.limit_bytes is not None:
            text += f"; it does not fit in {megabytes(failure.limit_bytes)}"
        if failure.peak_bytes is not None:
            peak = megabytes(failure.peak_bytes)
            text += f" (estimated to need {peak})" if record.estimated else f" (it had reached {peak})"
        said.append(f"{text}.")
    return said


def missing(record: Record) -> str:
    """Return why there is no student to show, in a few words."""
    reasons = {failure.reason for variant, failure in record.failures.items() if not variant.is_teacher}
    return joined(sorted(reasons)) if reasons else NOT_MEASURED


def noise_sentence(record: Record) -> str | None:
    """Return that a measurement was noisy, and by what; None where it was not."""
    if dig(record.raw, "noise", "noisy") is not True:
        return None
    reasons = dig(record.raw, "noise", "reasons")
    said = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    return f"Noisy measurement{': ' + '; '.join(said) if said else ''}. Measure again on an idle machine."
