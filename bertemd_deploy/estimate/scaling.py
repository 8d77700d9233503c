"""From this machine's tables to another device's, by the device's facts; and how far off that may be.

    products of one kind      times  (best here, multiply-adds a second) / (clock x multiply-adds per cycle x share reached)
    passes over values        as fp32 products: the same vector unit
    stalls on weights         share waited for / (bandwidth there x share reached) a byte, as if none stayed in a cache
    starts, calls             times  clock here / clock there

"Best here" is measured and per core; how a product's speed falls with fewer rows, and how it grows with threads, is taken from
here too. The shares of a peak that kernels reach are set from published measurements:

    fp32   OpenBLAS on a Cortex-A76 84 % and 90 % (OpenBLAS issue 4581), on a Cortex-A72 81 % (BLIS issue 754); ONNX
           Runtime's MLAS half of OpenBLAS's speed on a Zen 3 (onnxruntime issue 15908)
    int8   nothing was found; set below fp32, since codes are also unpacked and summed

What cannot be known from facts is in the spread. Memory: a device's bandwidth is STREAM's or a data sheet's peak, of which
STREAM reaches 40 to 80 %. Passes over values: their kernels are written for x86 first. Starts: a small core does less per
clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bertemd_deploy.errors import RecipeError
from bertemd_deploy.estimate.speeds import PER_MAC, SHARED, Calibration, Speeds, Surface

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

PRODUCT_REACH = {"fp32_product": 0.75, "int8_product": 0.6}
MEMORY_REACH = 0.8
WAITED = 0.6  # of the time that weights take from memory: measured here, the rest is hidden behind the arithmetic
UNTOLD_CLOCK_MHZ = 3000.0  # of a calibrated machine that does not tell its own
# The least and the most of the stated time, by limit.
SPREAD: Mapping[str, tuple[float, float]] = {
    "fp32_product": (0.8, 1.6),
    "int8_product": (0.65, 2.0),
    "elementwise": (0.5, 2.0),
    "memory": (0.5, 2.0),
    "overhead": (0.8, 2.5),
}
UNKNOWN_MEMORY = (0.4, 3.0)  # of a device whose bandwidth is not known
NEEDED = ("clock_mhz", "fp32_flop_per_cycle", "int8_op_per_cycle")


def scale(calibration: Calibration, *, here: Device, device: Device) -> Calibration:
    """Return the tables of a device, from those of this machine and the device's facts.

    Args:
        calibration: of this machine.
        here: this machine; its clock is used.
        device: the place asked about.

    Raises:
        RecipeError: the device lacks a fact that this needs.
    """
    check_facts(device)
    factors = _factors(calibration.speeds[1], here=here, device=device)
    return Calibration(
        {count: _scaled(speeds, factors, device) for count, speeds in calibration.speeds.items()},
        dict(calibration.machine) | {"device": device.name},
        factors=factors,
        spread=dict(SPREAD) | ({} if device.bandwidth_gb_s else {"memory": UNKNOWN_MEMORY}),
        cores=device.cores,
        share=device.cpu_share,
    )


def check_facts(device: Device) -> None:
    """Refuse a device without the facts that its products and starts are scaled by.

    Raises:
        RecipeError: it lacks one.
    """
    if missing := [fact for fact in NEEDED if getattr(device, fact) is None]:
        raise RecipeError(
            f"device {device.name!r} cannot be estimated without {', '.join(missing)}. Give it in the file of devices "
            "(--devices FILE), or measure on the device: ssh://user@host."
        )


def _factors(one: Speeds, *, here: Device, device: Device) -> dict[str, float]:
    """Return what each limit's times are multiplied by, from the tables of one thread."""
    assert device.clock_mhz is not None
    assert device.fp32_flop_per_cycle is not None
    assert device.int8_op_per_cycle is not None
    per_cycle = {"fp32_product": device.fp32_flop_per_cycle / 2, "int8_product": device.int8_op_per_cycle / 2}
    factors = {
        table: one.best(table) / (1000 * device.clock_mhz * macs * PRODUCT_REACH[table])
        for table, macs in per_cycle.items()
    }
    return factors | {
        "elementwise": factors["fp32_product"],
        "memory": _memory(one, device),
        "overhead": (here.clock_mhz or UNTOLD_CLOCK_MHZ) / device.clock_mhz,
    }


def _memory(speeds: Speeds, device: Device) -> float:
    """Return by how much longer weights take from a device's memory; as long as here where that is not known."""
    return speeds.stream_gb_s / _bandwidth(speeds, device)


def _bandwidth(speeds: Speeds, device: Device) -> float:
    """Return the bandwidth that is reached on a device, in GB/s; that of this machine where the device's is not known."""
    return device.bandwidth_gb_s * MEMORY_REACH if device.bandwidth_gb_s else speeds.stream_gb_s


def _scaled(speeds: Speeds, factors: Mapping[str, float], device: Device) -> Speeds:
    """Return the device's tables of one thread count; all its threads share the memory's bandwidth."""
    tables = {name: _table(name, surface, factors) for name, surface in speeds.tables.items()}
    per_byte = 1e-6 * WAITED / _bandwidth(speeds, device)
    stall = speeds.stall.changed(lambda _: per_byte)
    start = factors["overhead"]
    starts = {name: value * start for name, value in speeds.product_start.items()}
    return Speeds(tables, starts, stall, speeds.call_ms * start)


def _table(name: str, surface: Surface, factors: Mapping[str, float]) -> Surface:
    """Return a device's table: of a product by its peak, of a pass over values by clock (the start) and vector unit."""
    if name in PER_MAC:
        factor = factors[name if name in SHARED else "fp32_product"]
        return surface.changed(lambda value: value * factor)
    least, start, work = surface.start, factors["overhead"], factors["elementwise"]
    return surface.changed(lambda value: least * start + (value - least) * work)
