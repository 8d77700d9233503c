"""Joules the machine has used, from a counter that the system offers: the processor's own (RAPL), else a battery's.

RAPL counts whole processor packages, https://docs.kernel.org/power/powercap/powercap.html, whatever runs on them and also
while they idle; reading it usually needs root. A battery counts everything in the machine, in coarse steps, and only while
it is discharged, https://docs.kernel.org/power/power_supply_class.html. Most machines, and nearly all virtual ones, offer
neither: there is no meter then, and no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path("/")
BATTERY_STEP_JOULES = 36.0  # gauges count in steps of about 10 mWh
BATTERY_STEPS = 10  # fewer are no measurement


class Meter(Protocol):
    """Something that counts joules.

    Attributes:
        source: what is counted, for the record.
        least_joules: a smaller difference of two readings is not a measurement.
    """

    source: str
    least_joules: float

    def joules(self) -> float | None:
        """Return the joules used since the meter was made, or None when the counter can no longer be read."""


def find_meter(root: Path | None = None) -> Meter | None:
    """Return the best meter of this machine, or None where it has none that this process may read.

    Args:
        root: where `sys` lies; None takes `ROOT`.
    """
    classes = (root or ROOT) / "sys/class"
    packages = [
        zone
        for zone in sorted((classes / "powercap").glob("intel-rapl:*"))
        if zone.name.count(":") == 1 and (_text(zone / "name") or "").startswith("package")
    ]
    if packages and all(_integer(zone / "energy_uj") is not None for zone in packages):
        return _Packages(packages)
    batteries = [
        supply
        for supply in sorted((classes / "power_supply").glob("*"))
        if _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device"  # not a mouse's
    ]
    if batteries:
        meter = _Batteries(batteries)
        return None if meter.joules() is None else meter
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdigit() else None


class _Packages:
    """RAPL: one counter of microjoules per processor package, each starting again at 0 beyond its range."""

    least_joules = 0.0

    def __init__(self, zones: Sequence[Path]) -> None:
        self.source = "rapl:" + "+".join(_text(zone / "name") or zone.name for zone in zones)
        self._zones = zones
        self._ranges = [_integer(zone / "max_energy_range_uj") for zone in zones]
        self._last = self._read()
        self._used = 0

    def _read(self) -> list[int | None]:
        return [_integer(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        now = self._read()
        for at, value in enumerate(now):
            before, full = self._last[at], self._ranges[at]
            if value is None or before is None or (value < before and full is None):
                return None
            self._used += value - before + (full or 0) * (value < before)
        self._last = now
        return self._used / 1e6


class _Batteries:
    """Batteries that are being discharged: what is left in them, as energy, or as charge at the present voltage."""

    source = "battery"
    least_joules = BATTERY_STEPS * BATTERY_STEP_JOULES

    def __init__(self, supplies: Sequence[Path]) -> None:
        self._supplies = supplies
        self._last = [self._left(supply) for supply in supplies]
        self._used = 0.0

    @staticmethod
    def _left(supply: Path) -> tuple[int, float] | None:
        """Return what the gauge says is left and how many joules one of its units is."""
        energy = _integer(supply / "energy_now")
        if energy is not None:
            return energy, 3600 / 1e6  # microwatt-hours
        charge, voltage = _integer(supply / "charge_now"), _integer(supply / "voltage_now")
        if charge is None or voltage is None:
            return None
        return charge, 3600 / 1e6 * voltage / 1e6  # microampere-hours

    def joules(self) -> float | None:
        states = {_text(supply / "status") for supply in self._supplies}
        if "Discharging" not in states or "Charging" in states:
            return None
        now = [self._left(supply) for supply in self._supplies]
        for at, reading in enumerate(now):
            before = self._last[at]
            if reading is None or before is None:
                return None
            self._used += (before[0] - reading[0]) * reading[1]
        self._last = now
        return self._used
