"""The recipe: YAML in, every fault listed at once.

A field's type and bounds stand in its declaration in `settings` and are all that the reader checks against; combinations
that cannot work are in `_combination_faults`. A recipe holds data only: no Python paths, no inheritance, no interpolation.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bertemd_deploy.artifact import GRAPHS
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.settings import (
    STUDENT_NAMES,
    BenchSettings,
    DataSettings,
    DistillSettings,
    ExportSettings,
    QuantizeSettings,
    StudentSettings,
    TeacherSettings,
)
from bertemd_deploy.targets import AUTO, TARGETS
from bertemd_deploy.tasks import TASKS, column_fault, task_name


@dataclass(frozen=True)
class Recipe:
    """Everything one run needs; sections follow the pipeline."""

    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    quantize: QuantizeSettings = field(default_factory=QuantizeSettings)
    bench: BenchSettings = field(default_factory=BenchSettings)
    budget: dict[str, Any] = field(default_factory=dict)  # as written; `budget.read_budget` reads it

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain dictionaries, lists and scalars."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: 2e-5 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of a recipe; SafeLoader refuses it below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that looks like a number, such as 1e5, is quoted."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a YAML text holds, without tags, a key given twice being an error.

    Raises:
        RecipeError: it is not valid YAML; `where` opens the message.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}:{line} not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    except ValueError as error:  # a scalar that only looks like a date or number, such as 2020-13-01
        raise RecipeError(f"{where}: not valid YAML ({error}); put quotes around such a text.") from error


def load_recipe(path: Path, *, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, or the recipe has faults; all of them are in the one message.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}).") from error
    content = parse_yaml(text, where=str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections ({', '.join(_sections())}).")
    faults: list[str] = []
    for override in overrides:
        _apply_override(content, override, faults)
    return build_recipe(content, where=str(path), faults=faults)


def options_recipe(overrides: typing.Sequence[str]) -> Recipe:
    """Return a recipe made of `section.key=value` settings alone, as command-line options give them.

    Raises:
        RecipeError: the settings have faults; all of them are in the one message.
    """
    content: dict[str, Any] = {}
    faults: list[str] = []
    for override in overrides:
        _apply_override(content, override, faults)
    return build_recipe(content, where="options", faults=faults)


def build_recipe(content: typing.Mapping[str, Any], *, where: str, faults: typing.Sequence[str] = ()) -> Recipe:
    """Return the recipe in `content` (sections of plain values).

    Raises:
        RecipeError: an unknown section or key, a wrong type or bound, an impossible combination; all listed together.
    """
    found = list(faults)
    known = _sections()
    sections: dict[str, Any] = {}
    for name, body in content.items():
        if name not in known:
            found.append(f"unknown section {name!r}; known: {', '.join(known)}")
        elif body is not None and not isinstance(body, dict):
            found.append(f"{name} should be a mapping of keys, found {_describe(body)}")
        elif name == "budget":
            sections[name] = dict(body or {})
        else:
            sections[name] = _read_section(known[name], name, body or {}, found)
    recipe = Recipe(**sections)
    found += _combination_faults(recipe)
    if found:
        listed = "\n".join(f"  - {fault}" for fault in dict.fromkeys(found))
        raise RecipeError(f"{where}: {len(dict.fromkeys(found))} fault(s) in the recipe:\n{listed}")
    return recipe


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(Recipe)
    return {item.name: hints[item.name] for item in dataclasses.fields(Recipe)}


def _apply_override(content: dict[str, Any], override: str, faults: list[str]) -> None:
    name, equals, raw = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not section or not key:
        faults.append(f"--set {override!r}: write it as section.key=value")
        return
    body = content.setdefault(section, {})
    if body is None:
        body = content[section] = {}
    if not isinstance(body, dict):
        return  # the section's own fault is reported when it is read
    try:
        body[key] = parse_yaml(raw, where=f"--set {name}")
    except RecipeError as error:
        faults.append(str(error))


def _read_section(kind: type, name: str, body: dict[str, Any], faults: list[str]) -> Any:
    return kind(**read_values(kind, name, body, faults))


def read_values(kind: type, name: str, body: typing.Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Return the fields of the dataclass `kind` that `body` gives, of their types and within their bounds.

    Args:
        kind: its annotations say what is allowed, its metadata the bounds (see `settings.bounded`).
        name: of the section, for messages.
        body: values by key.
        faults: gains a line for every unknown key and every value that is not allowed.
    """
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in body.items():
        if key not in fields:
            faults.append(f"{name}.{key}: unknown key; known: {', '.join(fields)}")
            continue
        try:
            values[key] = _check_bounds(_convert(value, hints[key]), fields[key].metadata)
        except ValueError as error:
            faults.append(f"{name}.{key}: {error}")
    return values


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type `hint`, or raise ValueError saying what was allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise ValueError(f"found {_describe(value)}, allowed: {', '.join(map(str, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option)
            except ValueError:
                if isinstance(value, list) and value and typing.get_origin(option) is tuple:
                    raise  # it says what is wrong in the list
        raise ValueError(f"found {_describe(value)}, allowed: {' or '.join(map(_type_name, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"found {_describe(value)}, allowed: {_type_name(hint)}")
        items = tuple(_convert(item, arguments[0]) for item in value)
        if any(isinstance(item, int) and item < 1 for item in items):
            raise ValueError(f"found {list(items)}, allowed: numbers from 1")
        return items
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"found {_describe(value)}, allowed: {_type_name(hint)}")
    return value


def _check_bounds(value: Any, bounds: typing.Mapping[str, Any]) -> Any:
    low, high = bounds.get("low"), bounds.get("high")
    if isinstance(value, int | float) and not isinstance(value, bool):
        too_low = low is not None and (value <= low if bounds.get("above") else value < low)
        if too_low or (high is not None and value > high):
            lower = "" if low is None else f"{'above' if bounds.get('above') else 'from'} {low:g} "
            raise ValueError(f"found {value:g}, allowed: {lower}{'' if high is None else f'to {high:g}'}".rstrip())
    return value


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(repr(item) for item in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(hint, str(hint))


def _device_faults(recipe: Recipe) -> list[str]:
    """Return what is wrong with the devices that a recipe names and with its budget."""
    given = (recipe.bench.devices, recipe.bench.device_file, recipe.budget)
    if given == (BenchSettings.devices, BenchSettings.device_file, {}):
        return []
    from bertemd_deploy.bench.places import budget_name, plan_places  # both read recipes' values themselves
    from bertemd_deploy.budget import collect_budget
    from bertemd_deploy.devices import load_devices

    faults: list[str] = []
    file = recipe.bench.device_file
    try:
        devices = load_devices(None if file is None else Path(file))
        plan_places(recipe.bench.devices, devices)
    except RecipeError as error:
        faults.append(f"bench.devices: {error}")
    asked = [budget_name(name) for name in recipe.bench.devices]
    collect_budget(recipe.budget, where="budget", devices=asked, faults=faults)
    return faults


def _layer_faults(student: StudentSettings) -> list[str]:
    """Return what is wrong with `student.init_layers`, but for what only the model that is copied can tell."""
    rule = student.init_layers
    if rule == "auto":
        return []
    if student.init == "random":
        return ["student.init_layers only acts where layers are copied, and student.init is random; remove one"]
    if isinstance(rule, str):
        return []
    count = student.layers
    if count is None and student.name in STUDENT_NAMES:
        count = int(student.name.partition("L")[0])
    if list(rule) != sorted(set(rule)) or count not in (None, len(rule)):
        number = "" if count is None else f"{count} "
        return [f"student.init_layers: found {list(rule)}, allowed: {number}different layers in rising order"]
    return []


def _combination_faults(recipe: Recipe) -> list[str]:
    faults = []
    if not recipe.teacher.model:
        faults.append("teacher.model is missing: a Hugging Face folder, a hub id, or package:IMPORT_NAME/sub/folder")
    if not recipe.data.path:
        faults.append("data.path is missing: demo, glue/<task>, or a folder with train.* and dev.*")
    if recipe.data.task is not None and recipe.data.task not in TASKS:
        faults.append(f"data.task: unknown task {recipe.data.task!r}; known: {', '.join(TASKS)}")
    task = TASKS.get(task_name(recipe.data.path, recipe.data.task), TASKS["classification"])
    if fault := column_fault(task, sentence1=recipe.data.sentence1, sentence2=recipe.data.sentence2):
        faults.append(fault)
    student = recipe.student
    sizes = (student.layers, student.hidden, student.heads, student.intermediate)
    if student.name is not None and any(size is not None for size in sizes):
        faults.append("student: give a name or the sizes layers, hidden, heads, intermediate, not both")
    if student.name is None and any(size is None for size in sizes):
        faults.append(
            f"student: give a name ({', '.join(STUDENT_NAMES)}) or all of layers, hidden, heads, intermediate"
        )
    if student.name is not None and student.name not in STUDENT_NAMES:
        faults.append(f"student.name: unknown {student.name!r}; known: {', '.join(STUDENT_NAMES)}, or give the sizes")
    if student.hidden is not None and student.heads is not None and student.hidden % student.heads:
        faults.append(f"student: hidden {student.hidden} is not a multiple of heads {student.heads}")
    faults += _layer_faults(student)
    distill = recipe.distill
    if distill.alpha == 0 and distill.beta == 0 and distill.mapping != "none":
        faults.append("distill: alpha 0 and beta 0 leave nothing of the teacher; raise one, or use mapping: none")
    if distill.quant_aware and distill.quant_aware_epochs > distill.epochs:
        faults.append(
            f"distill.quant_aware_epochs is {distill.quant_aware_epochs}, distill.epochs {distill.epochs}; lower the first"
        )
    if distill.quant_aware_epochs != 1 and not distill.quant_aware:
        faults.append("distill.quant_aware_epochs only acts with quant_aware: true; remove it or switch")
    if distill.emd_temperature != 1 and distill.cost_attention == "ratio" and distill.mapping == "emd":
        faults.append("distill.emd_temperature only acts with cost_attention: softmax; remove it or switch")
    kind = TASKS[recipe.data.task].kind if recipe.data.task in TASKS else None
    if distill.augmentation != "none" and kind in ("token-classification", "question-answering"):
        faults.append(f"distill.augmentation: labels of {kind} belong to token positions; use augmentation: none")
    faults += _device_faults(recipe)
    graphs = recipe.bench.graphs or ()
    unknown = [graph for graph in graphs if graph not in GRAPHS]
    if unknown:
        faults.append(f"bench.graphs: unknown {', '.join(unknown)}; known: {', '.join(GRAPHS)}")
    mode = recipe.quantize.mode
    if mode in ("none", "float16") and any("int8" in graph for graph in graphs):
        faults.append(f"bench.graphs asks for int8 graphs, but quantize.mode is {mode}; name graphs [fp32, fused]")
    if mode != "float16" and "fp16" in graphs:
        faults.append(
            f"bench.graphs asks for fp16, but quantize.mode is {mode}; leave it out, or set the mode to float16"
        )
    if mode in ("none", "float16") and recipe.quantize.embedding_bits != 8:
        faults.append(
            f"quantize.embedding_bits only acts on int8 graphs, and quantize.mode is {mode}; remove it or switch"
        )
    if mode != "float16" and recipe.quantize.float16_on_cpu:
        faults.append("quantize.float16_on_cpu only acts with quantize.mode: float16; remove it or switch")
    if distill.quant_aware and mode != "static":
        faults.append(f"distill.quant_aware trains for quantize.mode: static, and it is {mode}; set it to static")
    if kind in ("token-classification", "question-answering") and recipe.export.tokenizer_inside:
        faults.append(f"export.tokenizer_inside: what {kind} says belongs to tokens; set it to false")
    if mode == "float16" and not recipe.quantize.float16_on_cpu:
        faults.append(
            "quantize.mode: float16 is for GPUs, and every target is a CPU, where it is slower than fp32; set "
            "quantize.float16_on_cpu to true to write it all the same"
        )
    if recipe.export.target not in (*TARGETS, AUTO):
        faults.append(f"export.target: unknown {recipe.export.target!r}; known: {', '.join((*TARGETS, AUTO))}")
    elif recipe.export.target != AUTO and recipe.export.opset > (most := TARGETS[recipe.export.target].ceiling.opset):
        faults.append(
            f"export.opset is {recipe.export.opset}, and {recipe.export.target} reads up to {most}; lower it, or name another "
            "export.target"
        )
    return faults
