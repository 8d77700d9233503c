from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from bertemd_deploy.remote import folder
from bertemd_deploy.remote.downlevel import OLDEST, older_source
from bertemd_deploy.remote.folder import PROGRAMS, REPLACED, RUNNER, STAND_INS, needed_modules
from bertemd_deploy.remote.runner import older

FUTURE = "from __future__ import annotations\n"
# Names of the standard library since 3.10, of modules that are imported whole or by name.
NEWER = {
    "collections.abc": {"Buffer"},
    "contextlib": {"aclosing", "chdir"},
    "dataclasses": {"KW_ONLY"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "verify", "member", "nonmember", "global_enum"},
    "hashlib": {"file_digest"},
    "inspect": {"get_annotations", "getmembers_static"},
    "itertools": {"batched", "pairwise"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call"},
    "os": {"process_cpu_count", "unshare", "setns", "EFD_CLOEXEC"},
    "statistics": {"correlation", "covariance", "linear_regression", "kde"},
    "sys": {"exception", "orig_argv", "stdlib_module_names", "monitoring", "activate_stack_trampoline"},
    "types": {"EllipsisType", "NoneType", "NotImplementedType", "UnionType", "get_original_bases"},
    "typing": {
        "Concatenate", "LiteralString", "Never", "NotRequired", "ParamSpec", "Required", "Self", "TypeAlias", "TypeGuard",
        "TypeVarTuple", "Unpack", "assert_never", "assert_type", "clear_overloads", "dataclass_transform", "get_overloads",
        "is_typeddict", "override", "reveal_type",
    },
}  # fmt: skip
NEWER_MODULES = {"tomllib"}
NEWER_METHODS = {"walk", "full_match", "bit_count", "hardlink_to", "is_junction", "from_uri"}
NEWER_KEYWORDS = {"slots", "kw_only", "weakref_slot", "process_group", "delete_on_close", "filter", "root_dir"}
FILLED = {(module.__name__, name) for module, name, _ in older.FILLED}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ok = isinstance(x, int | str)\n", "ok = isinstance(x, (int, str))\n"),
        ("ok = isinstance(x.y[0], a.B | C | None)  # why\n", "ok = isinstance(x.y[0], (a.B, C, type(None)))  # why\n"),
        ("ok = issubclass(x, (int, str))\n", "ok = issubclass(x, (int, str))\n"),
        ("ok = isinstance(\n    x,\n    int\n    | str,\n)\n", "ok = isinstance(\n    x,\n    (int, str),\n)\n"),
        ("zip(a, b, strict=False)\n", "zip(a, b)\n"),
        ("ä = 'é', isinstance('ü', int | str)\n", "ä = 'é', isinstance('ü', (int, str))\n"),
        ("CONSTANTS = OLD | NEW\nfound = old | new\n", "CONSTANTS = OLD | NEW\nfound = old | new\n"),
        ("Known = dict(a=1) | {}\n", "Known = dict(a=1) | {}\n"),
    ],
)
def test_what_is_rewritten_in_place(source: str, expected: str) -> None:
    assert older_source(FUTURE + source, name="m.py") == FUTURE + expected


@pytest.mark.parametrize(
    ("source", "imported", "expected"),
    [
        ("x = list(zip(a, (b + c), strict=True))\n", "zip_strict", "x = list(zip_strict(a, (b + c)))\n"),
        ("zip(\n    a,\n    b,\n    strict=True,\n)\n", "zip_strict", "zip_strict(\n    a,\n    b,\n)\n"),
        ("zip(*zip(a, b, strict=True), strict=True)\n", "zip_strict", "zip_strict(*zip_strict(a, b))\n"),
        ("Text = str | Sequence[str]\n", "Union", "Text = Union[str, Sequence[str]]\n"),
        ("_Text = Word | None\n", "Union", "_Text = Union[Word, None]\n"),
        ("Rows = dict[str, int | None]\n", "Union", "Rows = dict[str, Union[int, None]]\n"),
        (
            "Rows = list[int | A] | np.Array\n",
            "Union",
            "Rows = Union[list[Union[int, A]], np.Array]\n",
        ),
        ("y = cast(int | None, x)\n", "Union", "y = cast(Union[int, None], x)\n"),
        ("A = zip(b, c, strict=True)\nAbc = A_b | 'Later'\n", "Union, zip_strict", None),
    ],
)
def test_what_is_rewritten_with_help(source: str, imported: str, expected: str | None) -> None:
    found = older_source(FUTURE + source, name="m.py")
    assert found.startswith(f"{FUTURE}from bertemd_deploy.older import {imported}\n")
    if expected is not None:
        assert found == f"{FUTURE}from bertemd_deploy.older import {imported}\n{expected}"


def test_the_rewritten_source_does_the_same() -> None:
    source = FUTURE + (
        "Text = str | None\n"
        "def pairs(a, b):\n    return list(zip(a, b, strict=True))\n"
        "def kind(x):\n    return isinstance(x, dict | list | None)\n"
    )
    new, old = {}, {}
    exec(source, new)
    exec(older_source(source, name="m.py").replace("bertemd_deploy.older", "bertemd_deploy.remote.runner.older"), old)
    assert old["Text"] == new["Text"]
    assert old["pairs"]("ab", [1, 2]) == new["pairs"]("ab", [1, 2])
    with pytest.raises(ValueError, match="argument"):
        old["pairs"]("ab", [1])
    for value in ({}, [], None, 1, ""):
        assert old["kind"](value) == new["kind"](value)


def test_newer_syntax_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m\.py, line \d: Python 3\.9 cannot read it \(Pattern matching"):
        older_source(FUTURE + "match x:\n    case 1:\n        pass\n", name="m.py")


def test_evaluated_annotations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^m\.py: evaluates its annotations; begin it with `from __future__"):
        older_source("def f(x: int | None):\n    pass\n", name="m.py")
    assert older_source('"""Only words."""\n', name="m.py") == '"""Only words."""\n'


def test_other_keywords_of_zip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^m\.py, line 2: zip with other keywords than strict=True or strict=False"):
        older_source(FUTURE + "zip(a, b, strict=c)\n", name="m.py")


def test_a_line_of_the_future_that_spans_lines() -> None:
    source = "from __future__ import (\n    annotations,\n)\nx = list(zip(a, b, strict=True))\n"
    assert older_source(source, name="m.py").splitlines()[3] == "from bertemd_deploy.older import zip_strict"


def travelling() -> dict[str, str]:
    """Return the source of everything that runs on a device, as it runs there."""
    found = {}
    for module in needed_modules():
        path = folder._file_of(module)
        found[module or "__init__"] = older_source(path.read_text(encoding="utf-8"), name=str(path))
    paths = [
        *(RUNNER / name for name in (*PROGRAMS, *REPLACED)),
        *(RUNNER / "standins" / f"{name}.py" for name in STAND_INS),
    ]
    return found | {path.name: path.read_text(encoding="utf-8") for path in paths}


TRAVELLING = travelling()


def newer(source: str) -> list[str]:
    """Return what a source uses of the standard library that came after 3.9 and is not filled in."""
    tree = ast.parse(source, feature_version=OLDEST)
    modules = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            found.append((modules[base], node.attr) if base in modules else ("method", node.attr))
        elif isinstance(node, ast.Call):
            names = NEWER_KEYWORDS | ({"strict"} if ast.unparse(node.func) == "zip" else set())
            found += [("keyword", keyword.arg) for keyword in node.keywords if keyword.arg in names]
    faults = [
        f"{module}.{name}" for module, name in found if name in NEWER.get(module, ()) and (module, name) not in FILLED
    ]
    faults += [f".{name}()" for module, name in found if module == "method" and name in NEWER_METHODS]
    faults += [f"{name}=" for module, name in found if module == "keyword"]
    return faults + [name for name in modules.values() if name in NEWER_MODULES]


@pytest.mark.parametrize("name", sorted(TRAVELLING))
def test_what_travels_is_for_python_3_9(name: str) -> None:
    assert newer(TRAVELLING[name]) == []


def test_the_search_for_newer_names_finds_some() -> None:
    source = (
        "import tomllib, itertools\nfrom typing import Self\nimport datetime\n"
        "@dataclass(slots=True)\nclass A: x = itertools.batched(y, 2), datetime.UTC, number.bit_count(), zip(a, strict=b)\n"
    )
    assert sorted(newer(source)) == sorted(
        ["typing.Self", "itertools.batched", ".bit_count()", "slots=", "strict=", "tomllib"]
    )


def test_what_travels_imports_nothing_else() -> None:
    """At their top level the modules import the standard library, numpy and tokenizers; onnxruntime and psutil later."""
    for name, source in TRAVELLING.items():
        tops = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.parse(source).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        outside = {top.partition(".")[0] for top in tops} - set(sys.stdlib_module_names)
        assert outside <= {"bertemd_deploy", "numpy", "tokenizers"}, name


def test_older_names_are_the_programs() -> None:
    assert {path.name for path in RUNNER.glob("*.py")} == {*PROGRAMS, *REPLACED, "__init__.py"}
    assert {path.stem for path in Path(RUNNER / "standins").glob("*.py")} == {*STAND_INS, "__init__"}
