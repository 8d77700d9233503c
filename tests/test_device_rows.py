"""Files of devices: what a row takes from another, and every fault told, all of a file at once."""

from __future__ import annotations

import pytest

from bertemd_deploy.device_rows import read_devices
from bertemd_deploy.devices import Device, Runtimes, Session, load_devices
from bertemd_deploy.errors import RecipeError

KNOWN = load_devices()
WHOLE = """
box:
  title: Box
  cpu: Some CPU
  target: x86-avx2
  cores: 2
  threads: 4
  isa: [avx2, fma]
  memory_bytes: 1_073_741_824
  graph: int8
  session: {threads: 2, spinning: true, arena: false}
  ways: [remote]
"""


def read(text: str) -> dict[str, Device]:
    return read_devices(text, where="mine.yaml", known=KNOWN)


def faults(text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        read(text)
    assert error.value.exit_code == 2
    first, *lines = str(error.value).splitlines()
    assert first == f"mine.yaml: {len(lines)} fault(s) in the devices:"
    return [line.removeprefix("  - ") for line in lines]


def fault(text: str) -> str:
    (only,) = faults(text)
    return only


def test_a_row_of_its_own_may_leave_out_what_is_not_known():
    found = read(WHOLE)["box"]
    assert found == Device(
        name="box",
        title="Box",
        cpu="Some CPU",
        target="x86-avx2",
        cores=2,
        threads=4,
        isa=("avx2", "fma"),
        memory_bytes=2**30,
        clock_mhz=None,
        bandwidth_gb_s=None,
        fp32_flop_per_cycle=None,
        int8_op_per_cycle=None,
        cpu_share=None,
        memory_limit_bytes=None,
        graph="int8",
        session=Session(threads=2, spinning=True, arena=False),
        onnxruntime=Runtimes(good=(), bad=()),
        ways=("remote",),
        note="",
        sources=(),
    )


def test_a_row_like_another_overrides_what_it_gives_and_nothing_else():
    found = read(
        """
mine:
  like: raspberry-pi-4
  clock_mhz: 2000
  session: {threads: 2}
  onnxruntime: {good: ["1.23.0"]}
  sources: {clock_mhz: "https://example.org/overclocked"}
"""
    )["mine"]
    parent = KNOWN["raspberry-pi-4"]
    assert (found.clock_mhz, found.cpu, found.isa) == (2000, parent.cpu, parent.isa)
    assert found.session == Session(threads=2, spinning=parent.session.spinning, arena=parent.session.arena)
    assert found.onnxruntime == Runtimes(good=("1.23.0",), bad=parent.onnxruntime.bad)
    assert dict(found.sources) == dict(parent.sources) | {"clock_mhz": "https://example.org/overclocked"}


def test_the_source_of_an_overridden_fact_is_not_taken_over():
    found = read("mine: {like: raspberry-pi-5, bandwidth_gb_s: 10}")["mine"]
    assert "bandwidth_gb_s" not in dict(found.sources)
    assert "clock_mhz" in dict(found.sources)


def test_rows_may_be_like_later_ones_and_like_this_machine():
    found = read("b: {like: a, title: B}\na: {like: local, memory_limit_bytes: 67_108_864}")
    assert found["b"].title == "B"
    assert found["b"].memory_limit_bytes == found["a"].memory_limit_bytes == 2**26
    assert found["a"].cpu == KNOWN["local"].cpu


def test_a_value_may_be_taken_away():
    assert read("mine: {like: container-500m-512mb, cpu_share: null}")["mine"].cpu_share is None
    assert read("mine: {like: browser-wasm, isa: []}")["mine"].isa == ()


def test_all_faults_of_a_file_are_told_at_once():
    found = faults(
        """
one: {like: raspberry-pi-5, cores: four, colour: green}
Two: {like: raspberry-pi-5}
three: {like: rasberry-pi-5}
raspberry-pi-4: {clock_mhz: 2000}
five: 5
six: {like: [raspberry-pi-5]}
seven: {like: one}
"""
    )
    starts = [
        "'Two': a device's name is of small letters, digits, '.', '_' and '-', at most 64 of them",
        "five: should be a mapping of keys, found int",
        "one.colour: unknown key; known: name, title, ",
        "one.cores: found str 'four', allowed: a whole number",
        "raspberry-pi-4: this name is taken; give yours another, such as my-raspberry-pi-4 with like: raspberry-pi-4",
        "six.like: should be the name of a device, found ['raspberry-pi-5']",
        "three.like: unknown device 'rasberry-pi-5'. Did you mean 'raspberry-pi-5'? Known are ",
    ]
    assert len(found) == len(starts)
    assert all(line.startswith(start) for line, start in zip(sorted(found), starts, strict=True))


def test_rows_like_each_other_are_told_and_so_is_one_like_itself():
    assert sorted(faults("a: {like: b}\nb: {like: a}\nc: {like: c}")) == [
        "a.like: b is like a in turn; give one all keys",
        "b.like: a is like b in turn; give one all keys",
        "c.like: c is like c in turn; give one all keys",
    ]


def test_a_row_like_a_faulty_one_is_not_blamed():
    assert fault("a: {like: nowhere}\nb: {like: a}\nc: {like: b}").startswith("a.like: unknown device 'nowhere'.")


def test_missing_keys_are_listed_together():
    assert fault("bare: {title: Bare, note: n}") == (
        "bare: cpu, target, cores, threads, memory_bytes, graph, session, ways missing; give all of these, or start from "
        "another device with like:"
    )
    assert fault(WHOLE.replace(", arena: false", "")) == "box.session: arena missing"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cores: 0", "cores: found 0, allowed: from 1 to 4096"),
        ("cores: true", "cores: found bool True, allowed: a whole number"),
        ("clock_mhz: 0", "clock_mhz: found 0, allowed: above 0 to 20000"),
        ("clock_mhz: .nan", "clock_mhz: found float nan, allowed: a number or nothing"),
        ("cpu_share: 0", "cpu_share: found 0, allowed: from 0.01 to 4096"),
        ("cpu_share: 5", "cpu_share: 5 is more than threads, 4"),
        ("memory_bytes: 8 GB", "memory_bytes: found str '8 GB', allowed: a whole number"),
        (
            "memory_limit_bytes: 2147483648",
            "memory_limit_bytes: 2,147,483,648 is more than memory_bytes, 1,073,741,824",
        ),
        ("cores: 5", "threads: 4 is less than cores, 5"),
        ("ways: []", "ways: found list [], allowed: a list of 'constrained', 'estimated', 'remote'"),
        ("ways: [guessed]", "ways: found str 'guessed', allowed: constrained, estimated, remote"),
        ("title: ''", "title and cpu should not be empty"),
        ('title: "two\\nlines"', "title: should be one line of at most 1,000 printable characters"),
        (f"note: {'n' * 1001}", "note: should be one line of at most 1,000 printable characters"),
        ("name: other", "name: a device's name is the key of its row; remove it"),
        ("session: 3", "session: should be a mapping of keys, found int"),
        ("session: {threads: 9}", "session.threads: 9 is more than threads, 4"),
        ("session: {speed: 9}", "session.speed: unknown key; known: threads, spinning, arena"),
        ("session: {spinning: 1}", "session.spinning: found int 1, allowed: true or false"),
        ("onnxruntime: [1.22.0]", "onnxruntime: should be a mapping of keys, found list"),
        ("onnxruntime: {ugly: 1}", "onnxruntime.ugly: unknown key; known: good, bad"),
        ("onnxruntime: {good: 1.22.0}", "onnxruntime.good: should be a list of versions, found str"),
        ("onnxruntime: {good: [1.22]}", 'onnxruntime.good: 1.22 is not a version; write it like "1.22.0", in quotes'),
        ("onnxruntime: {good: [[1]]}", 'onnxruntime.good: [1] is not a version; write it like "1.22.0", in quotes'),
        (
            "onnxruntime: {bad: [1.22.0]}",
            "onnxruntime.bad: should be a mapping of versions to what happens, found list",
        ),
        (
            "onnxruntime: {bad: {1.22.0: null}}",
            "onnxruntime.bad: what happens with '1.22.0' should be one line of text",
        ),
        ("onnxruntime: {good: [1.22.0], bad: {1.22.0: dies}}", "onnxruntime: 1.22.0 cannot be both good and bad"),
        ("sources: here", "sources: should be a mapping of keys, found str"),
        ("sources: {1: 'https://a.b'}", "sources: 1 is no name of a fact"),
        (
            "sources: {cpu: 'javascript:alert(1)'}",
            "sources.cpu: should be a web address (https://...), found 'javascript:alert(1)'",
        ),
        (
            'sources: {cpu: "https://a.b/ c"}',
            "sources.cpu: should be a web address (https://...), found 'https://a.b/ c'",
        ),
        ("isa: [avx2, sse9]", "isa: unknown sse9; known: avx, f16c, "),
        ("isa: [fma]", "isa: x86-avx2 means a CPU with avx2; add it, or name another target"),
        ("target: z80", "target: unknown 'z80'; known: portable, x86-avx2, "),
        ("graph: int4", "graph: unknown 'int4'; known: fp32, int8, "),
    ],
)
def test_a_fact_that_cannot_be_is_told(given, said):
    text = WHOLE.replace("box:", "base:") + f"box:\n  like: base\n  {given}\n"
    assert fault(text).startswith(f"box.{said}")


def test_a_runtime_without_fused_operators_gets_no_fused_graph():
    assert fault("mine: {like: browser-wasm, graph: fused-int8}") == (
        "mine.graph: wasm is for graphs of standard operators; write int8"
    )


@pytest.mark.parametrize("text", ["", "just words", "[a, b]", "{}"])
def test_a_file_of_another_form_is_refused(text):
    with pytest.raises(RecipeError, match=r"mine\.yaml: a file of devices is a mapping of names to facts"):
        read(text)


def test_yaml_that_is_none_says_where():
    with pytest.raises(RecipeError, match=r"mine\.yaml: line 2 not valid YAML"):
        read("a: {like: local\nb: [")
    with pytest.raises(RecipeError, match="the key 'a' stands twice"):
        read("a: {like: local}\na: {like: local}")


def test_tags_and_aliases_are_not_followed(tmp_path):
    with pytest.raises(RecipeError, match="not valid YAML"):
        read(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists()
    bomb = "a: &a [x, x]\n" + "".join(
        f"{name}: &{name} [*{before}, *{before}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(RecipeError, match=r"YAML aliases .* are not read here; write `like: NAME`"):
        read(bomb)
