"""The CPUs a graph can be made for: what their int8 products do, and which graphs their runtime reads.

A target decides three things at export: which int8 weights are tried, fastest first, and whether those of 8 bits have to keep
the accuracy on a CPU whose sums saturate (`quantization.saturation`); which of an artifact's graphs is the one to use there;
and the newest file format and operators its runtime knows. At load, the CPU at hand is held against what the file needs.

What int8 products do was read in ONNX Runtime's kernels (its folder onnxruntime/core/mlas/lib) and measured with ONNX
Runtime 1.31 on every kind but AMX and AVX-512 without VNNI, on emulated CPUs mostly (`benchmarks/saturation.py`):

    x86, AVX2 or AVX-512 without VNNI    x86_64/QgemmU8X8KernelAvx2.S, QgemmU8X8KernelAvx512Core.S: `vpmaddubsw` adds two
                                         products of an int8 weight in 16 bits and saturates; uint8 weights: `vpmaddwd`, exact
    x86, VNNI or AMX                     `vpdpbusds`, `tdpbusd`: 32 bits, exact
    x86, older than AVX2                 qgemm_kernel_sse.cpp: `pmaddwd`, exact (Windows builds have `pmaddubsw` from SSE4.1)
    Arm                                  aarch64/QgemmS8S8KernelNeon.S adds two products in 16 bits, which only weights of -128
                                         could overflow, and there are none here; `udot`, `ummla`: 32 bits. Exact
    WebAssembly                          qgemm_kernel_wasmsimd.cpp: `i32x4.dot_i16x8`, exact; relaxed SIMD is used only where
                                         its dot product is tested to be exact

`platform.cpp` there chooses among them when ONNX Runtime starts. Signed activations change nothing on x86: ONNX Runtime makes
them unsigned at load. Runtime half: no onnx, and numpy only where it is used, so that help texts can name the targets.
"""

from __future__ import annotations

import base64
import functools
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bertemd_deploy.compatibility import SINCE, Ceiling, oldest_onnxruntime, release
from bertemd_deploy.errors import ArtifactError, ExportError, RecipeError

AUTO = "auto"
STANDARD, MICROSOFT = "", "com.microsoft"
# Flags of a CPU that adds int8 products in 32 bits, any one of them; Linux' spelling.
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimd")
# The graph of `saturation_probe`.
_PROBE = (
    "CAg6XAoYCgFhCgFiEgFjIg1NYXRNdWxJbnRlZ2VyEgFwWhMKAWESDgoMCAISCAoCCAEKAggEWhMKAWISDgoMCAMSCAoCCAQKAggIYhMKAWMSDgoM"
    "CAYSCAoCCAEKAggIQgQKABAR"
)


@dataclass(frozen=True)
class Weights:
    """How int8 weights are held, by the arguments of `quantization.dynamic.quantize`.

    Attributes:
        weight_type: "uint8" is the same weights 128 higher, with a zero point.
        reduce_range: 7 bits, [-64, 64].
    """

    weight_type: Literal["int8", "uint8"] = "int8"
    reduce_range: bool = False

    @property
    def can_saturate(self) -> bool:
        """Whether a sum of two products with 8-bit activations can exceed 16 bits where a CPU adds in those."""
        return self.weight_type == "int8" and not self.reduce_range


FULL, REDUCED, UNSIGNED = Weights(), Weights(reduce_range=True), Weights(weight_type="uint8")


@dataclass(frozen=True)
class Target:
    """A kind of CPU, or of place, that graphs are made for.

    Attributes:
        name: what it is asked for by.
        isa: instruction sets, any one of which marks such a CPU; Linux' spelling, none where no flag tells.
        saturates: sums of two products of int8 weights are clipped to 16 bits there, or on some CPU it stands for.
        runtime: the oldest release of ONNX Runtime to be run in there.
        domains: of the operators it knows.
        graph: which form is the one to use there.
        weights: int8 weights to try, fastest first; of those that can saturate where `saturates`, the saturating logits
            have to pass too.
        note: what else to know, in one sentence.
    """

    name: str
    isa: tuple[str, ...]
    saturates: bool
    runtime: str
    domains: tuple[str, ...]
    graph: Literal["portable", "fused"]
    weights: tuple[Weights, ...]
    note: str

    @property
    def ceiling(self) -> Ceiling:
        """The newest operator set and file format that its runtime reads."""
        return [most for name, most in SINCE.items() if release(name) <= release(self.runtime)][-1]


def _native(name: str, *isa: str, saturates: bool = False, note: str) -> Target:
    """Return a CPU on which this package runs, with ONNX Runtime 1.21 or newer."""
    weights = (FULL, REDUCED, UNSIGNED) if saturates else (FULL,)
    return Target(name, isa, saturates, "1.21", (STANDARD, MICROSOFT), "fused", weights, note)


_ROWS = (
    Target(
        name="portable",
        isa=(),
        saturates=True,
        runtime="1.12",
        domains=(STANDARD,),
        graph="portable",
        weights=(FULL, REDUCED, UNSIGNED),
        note="Any CPU and any runtime since 2022; 7-bit weights keep the fast kernel of every CPU.",
    ),
    _native("x86-avx2", "avx2", saturates=True, note="Intel Haswell to Coffee Lake, AMD Zen to Zen 3."),
    _native("x86-avx512", "avx512bw", saturates=True, note="Intel Skylake-X and the first Xeon Scalable: no VNNI."),
    _native(
        "x86-avx512-vnni",
        *("avx512_vnni", "avx_vnni"),
        note="Intel Cascade Lake, Ice Lake, Alder Lake and later, AMD Zen 4 and later.",
    ),
    _native("x86-amx", "amx_int8", note="Intel Sapphire Rapids and later Xeons."),
    _native("arm64", "asimd", note="Any 64-bit Arm, such as Cortex-A53 and A72."),
    _native("arm64-dotprod", "asimddp", note="Cortex-A76, Neoverse N1 and later."),
    _native(
        "arm64-i8mm",
        "i8mm",
        note="Neoverse V1, Cortex-A710 and later; where there is SME too, ONNX Runtime from 1.23 on quantizes the "
        "activations of dynamic products row by row, which moves logits, unless weights are unsigned.",
    ),
    Target(
        name="wasm",
        isa=(),
        saturates=False,
        runtime="1.21",
        domains=(STANDARD, MICROSOFT),
        graph="portable",
        weights=(FULL,),
        note="onnxruntime-web, whose usual build has the fused operators too; with older ones, such as in transformers.js 2, "
        "take portable.",
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ROWS}
# What `auto` looks for, in turn: a later one of these CPUs has what the earlier ones have.
_LATEST_FIRST = ("x86-amx", "x86-avx512-vnni", "x86-avx512", "x86-avx2", "arm64-i8mm", "arm64-dotprod", "arm64")


def resolve(name: str, root: Path = Path("/")) -> Target:
    """Return a target by its name; "auto" is this machine's, or "portable" where the system does not tell.

    Args:
        name: a key of `TARGETS`, or "auto".
        root: where `proc` lies.

    Raises:
        RecipeError: there is no such target.
    """
    if name == AUTO:
        from bertemd_deploy.bench.environment import instruction_sets

        found = instruction_sets(root) or (["asimd"] if platform.machine().lower() in {"arm64", "aarch64"} else [])
        name = next((known for known in _LATEST_FIRST if set(TARGETS[known].isa) & set(found)), "portable")
    if name not in TARGETS:
        raise RecipeError(f"there is no target {name!r}; targets are {', '.join([*TARGETS, AUTO])}.")
    return TARGETS[name]


def check_graph(target: Target, model: Any, *, name: str) -> None:
    """Refuse a graph that a target's runtime would not load, or would answer wrongly.

    Args:
        target: where it is to run.
        model: the graph, `onnx.ModelProto`.
        name: of the graph, for the message.

    Raises:
        ExportError: an operator, the operator set or the file format is beyond the target.
    """
    most = target.ceiling
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    unknown = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in target.domains}
    faults = []
    if unknown:
        known = " and ".join(domain or "standard operators" for domain in target.domains)
        faults.append(
            f"it has {', '.join(sorted(unknown))}, and {target.name} knows {known} only: use the portable graph"
        )
    if opset > most.opset or model.ir_version > most.ir_version:
        faults.append(
            f"it is of operator set {opset} in file format {model.ir_version}, and ONNX Runtime {target.runtime} reads up to "
            f"{most.opset} in {most.ir_version}: set export.opset to {most.opset} or less"
        )
    elif not unknown and release(needed := oldest_onnxruntime(model)) > release(target.runtime):
        faults.append(
            f"it is answered rightly from ONNX Runtime {needed} on, and {target.name} is for {target.runtime}"
        )
    if faults:
        raise ExportError(f"{name} would not run on {target.name}: {'; '.join(faults)}.")


def check_judge(target: Target) -> None:
    """Refuse to judge int8 graphs on a CPU that computes them otherwise than all that they are made for.

    Raises:
        ExportError: sums of int8 products are clipped on this CPU and on none of the target's.
    """
    if not target.saturates and products_saturate():
        raise ExportError(
            f"int8 graphs for {target.name} cannot be judged here: this CPU adds two int8 products in 16 bits and clips them "
            f"where they do not fit, which {target.name} does not, so that the accuracy measured would be another. Export with "
            f"--target portable, or on a CPU with one of {', '.join(EXACT_INT8)}."
        )


def requirements(target: Target, *, weights: Mapping[str, Weights], harmless: Collection[str] = ()) -> dict[str, Any]:
    """Return a manifest's `requires`.

    Args:
        target: what the artifact was made for.
        weights: of every int8 graph, by its name.
        harmless: graphs that keep the accuracy where sums saturate too.

    Returns:
        target (its name); isa: for each graph that needs one, the flags of which its CPU must have any one.
    """
    needing = [graph for graph, held in weights.items() if held.can_saturate and graph not in harmless]
    return {"target": target.name, "isa": {graph: list(EXACT_INT8) for graph in needing}}


def check_isa(requires: Any, *, graph: str, found: Collection[str] | None) -> None:
    """Refuse a graph whose int8 products this CPU does not compute as they were measured.

    Args:
        requires: the manifest's entry; None, or of an older version, asks for nothing.
        graph: name of the graph that is to be loaded.
        found: this CPU's instruction sets (`bench.environment.instruction_sets`); None, where the system does not tell,
            has ONNX Runtime multiply two extreme rows.

    Raises:
        ArtifactError: the CPU lacks what the graph needs, or the entry is not of its form.
    """
    needs = requires.get("isa") if isinstance(requires, Mapping) else None
    needed = needs.get(graph, []) if isinstance(needs, Mapping) else []
    if not isinstance(needed, list) or not all(isinstance(flag, str) for flag in needed):
        raise ArtifactError(
            f"requires.isa of graph {graph!r} should be a list of names, found {needed!r}. Export again."
        )
    if not needed or (found is not None and set(needed) & set(found)):
        return
    if not (products_saturate() if found is None else saturates(found)):
        return  # such as x86 older than AVX2
    unknown = "the sums that ONNX Runtime makes on this one saturate"
    raise ArtifactError(
        f"graph {graph!r} needs a CPU with one of {', '.join(needed)}; "
        f"{unknown if found is None else 'this one has ' + ', '.join(found)}. Two int8 products are added in 16 bits here and "
        "clipped where they do not fit, so that this graph would not be as accurate as it was measured. Load graph 'fp32' or "
        "'fused', or export with --target portable."
    )


def saturates(found: Collection[str]) -> bool:
    """Return whether ONNX Runtime clips sums of two int8 products on a CPU with these instruction sets."""
    return "avx2" in found and not set(EXACT_INT8) & set(found)


def saturation_probe() -> bytes:
    """Return an ONNX graph: c = MatMulInteger(a, b), a (1, 4) uint8, b (4, 8) int8. Extreme rows tell what a CPU does."""
    return base64.b64decode(_PROBE)


@functools.cache
def products_saturate() -> bool:
    """Return whether ONNX Runtime, on this CPU, clips sums of two int8 products: it multiplies two rows to see."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(saturation_probe(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 8), 127, np.int8)})
    return bool((sums != 4 * 255 * 127).any())
