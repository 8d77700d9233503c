"""Files of devices: YAML in, `devices.Device` out, with all faults of a file told at once.

A row may be `like` another: it has that row's facts but for those it gives itself. The source of a fact is not taken over
where the fact is another, for it does not state that one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.bench.environment import ISA_FLAGS
from bertemd_deploy.config import parse_yaml, read_values
from bertemd_deploy.devices import BUILT_IN, Device, Runtimes, Session, unknown_device
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.targets import TARGETS

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"https?://[!-~]+")
_VERSION = re.compile(r"\d+\.\d+[0-9A-Za-z.+-]{0,40}")
_LONGEST = 1000  # characters of a text
_NESTED = ("session", "onnxruntime", "sources")
# What a row that is like no other may leave out, and what that means.
_OPTIONAL: dict[str, Any] = {
    "isa": (),
    "clock_mhz": None,
    "bandwidth_gb_s": None,
    "fp32_flop_per_cycle": None,
    "int8_op_per_cycle": None,
    "cpu_share": None,
    "memory_limit_bytes": None,
    "note": "",
    "onnxruntime": Runtimes(good=(), bad=()),
    "sources": (),
}


def read_devices(text: str, *, where: str, known: Mapping[str, Device]) -> dict[str, Device]:
    """Return `known` and the devices of a YAML text.

    Args:
        text: a mapping of names to facts.
        where: opens the message.
        known: devices that rows may be `like`; their names are taken.

    Raises:
        RecipeError: it is not such a text, or rows have faults; all of them are in the one message.
    """
    content = parse_yaml(text, where=where)
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"{where}: a file of devices is a mapping of names to facts. See the built-in {BUILT_IN}.")
    # A few nested aliases stand for a text of any length, and messages quote what they found.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise RecipeError(f"{where}: YAML aliases (*name) are not read here; write `like: NAME` in a device instead.")
    faults: list[str] = []
    devices = dict(known)
    waiting = {name: body for name, body in content.items() if _is_row(name, body, known, faults)}
    failed = set(content) - set(waiting) - set(known)
    while waiting:
        ready = [name for name, body in waiting.items() if body.get("like") in (None, *devices, *failed)]
        if not ready:
            lost = [name for name, body in waiting.items() if body["like"] not in waiting]
            for name in lost:
                faults.append(f"{name}.like: {unknown_device(waiting[name]['like'], [*devices, *waiting])}")
            circle = [] if lost else list(waiting)
            faults += [
                f"{name}.like: {waiting[name]['like']} is like {name} in turn; give one all keys" for name in circle
            ]
            failed.update(lost or circle)
            waiting = {name: body for name, body in waiting.items() if name not in failed}
            continue
        for name in ready:
            body = waiting.pop(name)
            # Of a row like a failed one nothing can be told: only that one's faults are.
            device = None if body.get("like") in failed else _read(name, body, devices.get(body.get("like")), faults)
            if device is None:
                failed.add(name)
            else:
                devices[name] = device
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise RecipeError(f"{where}: {len(faults)} fault(s) in the devices:\n{listed}")
    return {**known, **{name: devices[name] for name in content}}  # in the order of the file


def _is_row(name: Any, body: Any, known: Mapping[str, Device], faults: list[str]) -> bool:
    """Say whether a name and its facts are of the form of a row, adding to the faults where not."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        faults.append(f"{name!r}: a device's name is of small letters, digits, '.', '_' and '-', at most 64 of them")
    elif name in known:
        faults.append(f"{name}: this name is taken; give yours another, such as my-{name} with like: {name}")
    elif not isinstance(body, dict):
        faults.append(f"{name}: should be a mapping of keys, found {type(body).__name__}")
    elif not isinstance(body.get("like"), str | None):
        faults.append(f"{name}.like: should be the name of a device, found {body['like']!r}")
    else:
        return True
    return False


def _read(name: str, body: Mapping[str, Any], parent: Device | None, faults: list[str]) -> Device | None:
    """Return the device of a row, or None after adding to the faults."""
    before = len(faults)
    own = {key: value for key, value in body.items() if key != "like"}
    if "name" in own:
        faults.append(f"{name}.name: a device's name is the key of its row; remove it")
    flat = {key: value for key, value in own.items() if key not in ("name", *_NESTED) and (key, value) != ("isa", [])}
    given = read_values(Device, name, flat, faults)
    if own.get("isa") == []:  # such as of a browser
        given["isa"] = ()
    faults += [f"{name}.{key}: {fault}" for key, value in given.items() if (fault := _text_fault(value))]
    for key, read in (("session", _session), ("onnxruntime", _runtimes), ("sources", _sources)):
        if key in own:
            given[key] = read(f"{name}.{key}", own[key], parent, faults)
    inherited = (
        _OPTIONAL if parent is None else {item.name: getattr(parent, item.name) for item in dataclasses.fields(Device)}
    )
    values = {**inherited, **given, "name": name}
    if parent is not None:
        added = dict(given.get("sources", ()))
        kept = {fact: url for fact, url in parent.sources if fact not in own}
        values["sources"] = tuple((kept | added).items())
    missing = [item.name for item in dataclasses.fields(Device) if item.name not in values and item.name not in own]
    if missing:
        faults.append(
            f"{name}: {', '.join(missing)} missing; give all of these, or start from another device with like:"
        )
    if len(faults) > before:
        return None
    device = Device(**values)
    faults += [f"{name}.{fault}" for fault in _combination_faults(device)]
    return device if len(faults) == before else None


def _session(name: str, body: Any, parent: Device | None, faults: list[str]) -> Session | None:
    if not _is_mapping(name, body, faults):
        return None
    before = len(faults)
    values = read_values(Session, name, body, faults)
    if parent is not None:
        values = dataclasses.asdict(parent.session) | values
    missing = [item.name for item in dataclasses.fields(Session) if item.name not in values and item.name not in body]
    if missing:
        faults.append(f"{name}: {', '.join(missing)} missing")
    return Session(**values) if len(faults) == before else None


def _runtimes(name: str, body: Any, parent: Device | None, faults: list[str]) -> Runtimes | None:
    """Return the releases of ONNX Runtime; `good` and `bad` are each taken from the parent where not given."""
    if not _is_mapping(name, body, faults):
        return None
    inherited = _OPTIONAL["onnxruntime"] if parent is None else parent.onnxruntime
    before = len(faults)
    faults += [f"{name}.{key}: unknown key; known: good, bad" for key in body if key not in ("good", "bad")]
    good, bad = body.get("good", list(inherited.good)), body.get("bad", dict(inherited.bad))
    if not isinstance(good, list):
        faults.append(f"{name}.good: should be a list of versions, found {type(good).__name__}")
        good = []
    if not isinstance(bad, dict):
        faults.append(f"{name}.bad: should be a mapping of versions to what happens, found {type(bad).__name__}")
        bad = {}
    for key, versions in (("good", good), ("bad", bad)):
        for version in versions:
            if not isinstance(version, str) or not _VERSION.fullmatch(version):
                faults.append(f'{name}.{key}: {version!r} is not a version; write it like "1.22.0", in quotes')
    for version, reason in bad.items():
        if not isinstance(reason, str) or _text_fault(reason):
            faults.append(f"{name}.bad: what happens with {version!r} should be one line of text")
    if both := [version for version in good if isinstance(version, str) and version in bad]:
        faults.append(f"{name}: {', '.join(both)} cannot be both good and bad")
    return Runtimes(tuple(good), tuple(bad.items())) if len(faults) == before else None


def _sources(name: str, body: Any, parent: Device | None, faults: list[str]) -> tuple[tuple[str, str], ...]:
    """Return (fact, web address) pairs of the row itself; reports link to them."""
    if not _is_mapping(name, body, faults):
        return ()
    for fact, url in body.items():
        if not isinstance(fact, str) or _text_fault(fact):
            faults.append(f"{name}: {fact!r} is no name of a fact")
        elif not isinstance(url, str) or not _ADDRESS.fullmatch(url):
            faults.append(f"{name}.{fact}: should be a web address (https://...), found {url!r}")
    return tuple(body.items())


def _is_mapping(name: str, body: Any, faults: list[str]) -> bool:
    if not isinstance(body, dict):
        faults.append(f"{name}: should be a mapping of keys, found {type(body).__name__}")
    return isinstance(body, dict)


def _text_fault(value: Any) -> str | None:
    """Return what is wrong with a text, or None; anything else is right."""
    if not isinstance(value, str):
        return None
    if not value.isprintable() or len(value) > _LONGEST:
        return f"should be one line of at most {_LONGEST:,} printable characters"
    return None


def _combination_faults(device: Device) -> list[str]:
    """Return which facts of a device cannot be, or do not fit together."""
    faults = []
    target = TARGETS.get(device.target)
    if target is None:
        faults.append(f"target: unknown {device.target!r}; known: {', '.join(TARGETS)}")
    elif target.isa and not set(target.isa) & set(device.isa):
        faults.append(f"isa: {target.name} means a CPU with {' or '.join(target.isa)}; add it, or name another target")
    if device.graph not in GRAPHS:
        faults.append(f"graph: unknown {device.graph!r}; known: {', '.join(GRAPHS)}")
    elif target is not None and target.graph == "portable" and "fused" in device.graph:
        faults.append(
            f"graph: {target.name} is for graphs of standard operators; write {device.graph.replace('fused-', '')}"
        )
    if unknown := [flag for flag in device.isa if flag not in ISA_FLAGS]:
        faults.append(f"isa: unknown {', '.join(unknown)}; known: {', '.join(ISA_FLAGS)}")
    if not device.title or not device.cpu:
        faults.append("title and cpu should not be empty")
    if device.threads < device.cores:
        faults.append(f"threads: {device.threads} is less than cores, {device.cores}")
    if device.session.threads > device.threads:
        faults.append(f"session.threads: {device.session.threads} is more than threads, {device.threads}")
    if device.cpu_share is not None and device.cpu_share > device.threads:
        faults.append(f"cpu_share: {device.cpu_share:g} is more than threads, {device.threads}")
    if device.memory_limit_bytes is not None and device.memory_limit_bytes > device.memory_bytes:
        faults.append(
            f"memory_limit_bytes: {device.memory_limit_bytes:,} is more than memory_bytes, {device.memory_bytes:,}"
        )
    return faults
