"""A machine's tables: what each kind of operator takes by size, for each thread count; written and read as JSON.

With n values, M rows, K N weights:

    a pass over values      t(n), the least of which is what starting the operator takes
    a product               macs x c(M, K N) + bytes of weights x stall(M, W),  W = all weights of the graph
    activations, attention  matrices x macs of one x c(macs of one, head width)

c is milliseconds per multiply-add with weights that stay in the caches, and `stall` what a byte of weights costs beyond that
where a call reads more of them than the caches hold. Between measured points lines are straight in logarithms. For n threads
that were not measured, each time is split by Amdahl's law from those of 1 and of most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bertemd_deploy.errors import ArtifactError, MeasurementError

LIMITS = ("fp32_product", "int8_product", "elementwise", "memory", "overhead")  # what a time is made of
SHARED = ("fp32_product", "int8_product")  # products with constant weights, by M and K N
PER_MAC = (*SHARED, "batched_product", "attention")  # tables of milliseconds per multiply-add
VERSION = 1

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Surface:
    """A quantity by size and width: for each width, ascending, its points (size, value), ascending, all above 0."""

    lines: tuple[tuple[float, Points], ...]

    def at(self, size: float, width: float, *, grows: bool = False) -> float:
        """Return the value at a size and width, by straight lines in logarithms.

        Args:
            size: below the least the least's value, beyond the largest see `grows`.
            width: taken to the nearest one known where it is outside.
            grows: beyond the largest size the value goes on in proportion to the size; otherwise it stays.
        """
        values = tuple((at, _along(points, size, grows=grows)) for at, points in self.lines)
        return _along(values, width, grows=False)

    @property
    def start(self) -> float:
        """The least value at the least size: of passes over values, what starting one takes."""
        return min(points[0][1] for _, points in self.lines)

    def changed(self, change: Callable[[float], float]) -> Surface:
        """Return the surface with every value changed."""
        return Surface(tuple((at, tuple((size, change(value)) for size, value in line)) for at, line in self.lines))

    def merged(self, other: Surface, merge: Callable[[float, float], float]) -> Surface:
        """Return the surface whose values are made of this one's and another's at the same points."""
        return Surface(
            tuple(
                (at, tuple((size, merge(value, others[size])) for size, value in line))
                for (at, line), others in zip(self.lines, (dict(line) for _, line in other.lines), strict=True)
            )
        )

    def written(self) -> list[list[Any]]:
        """Return it as JSON values."""
        return [[width, [list(point) for point in line]] for width, line in self.lines]

    @classmethod
    def read(cls, lines: Sequence[Any]) -> Surface:
        """Return the surface that `written` gave.

        Raises:
            ValueError: it has no points, they do not ascend, or a value is not above 0.
            TypeError: it is not of that form.
        """
        found = tuple(
            (float(width), tuple((float(size), float(value)) for size, value in line)) for width, line in lines
        )
        for places in ([width for width, _ in found], *([size for size, _ in line] for _, line in found)):
            if not places or sorted(set(places)) != places or not 0 < places[0] <= places[-1] < math.inf:
                raise ValueError("a table whose places do not ascend from above 0")
        if not all(0 < value < math.inf for _, line in found for _, value in line):
            raise ValueError("a table with a value that is not above 0")
        return cls(found)


def _along(points: Sequence[tuple[float, float]], place: float, *, grows: bool) -> float:
    """Return the value at `place` on straight lines in logarithms through `points`."""
    after = bisect_left(points, place, key=lambda point: point[0])
    if after in (0, len(points)):
        value = points[min(after, len(points) - 1)][1]
    else:
        (left, low), (right, high) = points[after - 1], points[after]
        value = low * (high / low) ** (math.log(place / left) / math.log(right / left))
    beyond = place / points[-1][0]
    return value * beyond if grows and beyond > 1 else value


@dataclass(frozen=True)
class Speeds:
    """The tables of one thread count.

    Attributes:
        tables: surfaces by name (see `operators.TABLES`): milliseconds of one operator by values and row width, or, of
            those in `PER_MAC`, milliseconds per multiply-add.
        product_start: milliseconds that starting a product takes, by table.
        stall: milliseconds per byte of weights beyond those in the caches, by bytes of weights in the graph (size) and
            rows (width).
        call_ms: of a call, before and after its operators.
    """

    tables: Mapping[str, Surface]
    product_start: Mapping[str, float]
    stall: Surface
    call_ms: float

    @property
    def stream_gb_s(self) -> float:
        """How fast weights come from memory where little else is to do: one row, the most weights that were measured."""
        table = self.tables["fp32_product"]
        per_byte = table.at(1, table.lines[-1][0]) / 4 + self.stall.lines[0][1][-1][1]  # 4 bytes a multiply-add
        return 1e-6 / per_byte

    def best(self, table: str) -> float:
        """Return the most multiply-adds per millisecond of a product with constant weights."""
        return 1 / min(value for _, line in self.tables[table].lines for _, value in line)

    def merged(self, other: Speeds, merge: Callable[[float, float], float]) -> Speeds:
        """Return tables whose every value is made of this one's and another's."""
        return Speeds(
            {name: surface.merged(other.tables[name], merge) for name, surface in self.tables.items()},
            {name: merge(value, other.product_start[name]) for name, value in self.product_start.items()},
            self.stall.merged(other.stall, merge),
            merge(self.call_ms, other.call_ms),
        )


@dataclass(frozen=True)
class Calibration:
    """A machine's tables by thread count.

    Attributes:
        speeds: by number of threads; 1 among them.
        machine: what they are of: cpu, onnxruntime, rss_after_import_bytes; of a scaled one, device too.
        samples: raw: by thread count and case, the median milliseconds of a call in each round; empty of a scaled one.
        factors: what the times were multiplied by to get to another device, by limit; empty on this machine.
        spread: by limit, the least and the most that the true time may be of the stated; empty on this machine.
        cores: that the place has; more threads than that are no faster. None where more were not asked for.
        share: CPUs that the place may use, where fewer than its threads would; None leaves all.
    """

    speeds: Mapping[int, Speeds]
    machine: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cores: int | None = None
    share: float | None = None

    def at(self, threads: int) -> Speeds:
        """Return the tables of a thread count: as measured, or by Amdahl's law from 1 and the most threads measured.

        Raises:
            MeasurementError: one thread is all that was measured.
        """
        threads = min(threads, self.cores or threads)
        if threads in self.speeds:
            return self.speeds[threads]
        most = max(self.speeds)
        if most == 1 or 1 not in self.speeds:
            counts = ", ".join(map(str, self.speeds))
            raise MeasurementError(
                f"estimate: {threads} threads asked for, and the calibration has {counts} only. Calibrate on a machine with at "
                "least two CPUs, or set bench.threads to [1]."
            )
        return self.speeds[1].merged(self.speeds[most], lambda one, many: amdahl(one, many, most=most, threads=threads))

    def record(self, *, samples: bool = False) -> dict[str, Any]:
        """Return it as JSON values; raw samples only where asked for."""
        found = {
            "version": VERSION,
            "machine": dict(self.machine),
            "speeds": {
                str(threads): {
                    "tables": {name: surface.written() for name, surface in speeds.tables.items()},
                    "product_start_ms": dict(speeds.product_start),
                    "stall_ms_per_byte": speeds.stall.written(),
                    "call_ms": speeds.call_ms,
                    "stream_gb_s": speeds.stream_gb_s,
                }
                for threads, speeds in self.speeds.items()
            },
            "factors": dict(self.factors),
            "spread": {name: list(bounds) for name, bounds in self.spread.items()},
            "cores": self.cores,
            "share": self.share,
        }
        return found | ({"samples_ms": {key: dict(value) for key, value in self.samples.items()}} if samples else {})

    @classmethod
    def read(cls, record: Mapping[str, Any], *, where: str) -> Calibration:
        """Return a calibration from what `record` gave.

        Args:
            record: JSON values.
            where: what they are from, for the message.

        Raises:
            ArtifactError: they are not of this form.
        """
        try:
            if record["version"] != VERSION:
                raise ValueError(f"version {record['version']!r}")
            speeds = {
                int(threads): Speeds(
                    {str(name): Surface.read(lines) for name, lines in entry["tables"].items()},
                    {str(name): float(value) for name, value in entry["product_start_ms"].items()},
                    Surface.read(entry["stall_ms_per_byte"]),
                    float(entry["call_ms"]),
                )
                for threads, entry in record["speeds"].items()
            }
            cores, share = record["cores"], record["share"]
            return cls(
                speeds,
                dict(record["machine"]),
                record.get("samples_ms", {}),
                {str(name): float(value) for name, value in record["factors"].items()},
                {str(name): (float(low), float(high)) for name, (low, high) in record["spread"].items()},
                None if cores is None else int(cores),
                None if share is None else float(share),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{where}: this is no calibration of version {VERSION} ({type(error).__name__}: {error}). Calibrate again."
            ) from error


def amdahl(one: float, many: float, *, most: int, threads: int) -> float:
    """Return the time of `threads` threads from that of 1 and of `most`: a serial part, and one that is divided.

    What took longer with more threads stays as long.
    """
    if many >= one:
        return many
    divided = min(one, (one - many) * most / (most - 1))
    return one - divided + divided / threads
