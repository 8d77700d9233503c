"""An artifact's numbers on every device asked for: measured here, within a device's limits, on it over ssh, or estimated.

A place is written as `local`, a name of `bertemd devices` (with `:constrained` or `:estimated` behind it to have it in no other
way), or ssh://user@host. Each gets a record of its own, with the budget and baseline it was held against: that of the first
place is `record.json`, each other's lies in a folder of the place's name.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bertemd_deploy.bench import environment
from bertemd_deploy.bench.compare import RECORD, bench
from bertemd_deploy.budget import Budget, budget_entry, budget_for
from bertemd_deploy.console import note
from bertemd_deploy.devices import LOCAL, Device, find_device, limits_of, load_devices, way_of
from bertemd_deploy.errors import BertemdError, MeasurementError, RecipeError
from bertemd_deploy.files import claim_folder, read_json, write_json
from bertemd_deploy.runtime import cpu_limits
from bertemd_deploy.settings import BenchSettings

SSH = "ssh://"


@dataclass(frozen=True)
class Place:
    """Where numbers are asked for, and how they are had.

    Attributes:
        name: as it was asked for.
        way: kind of its numbers.
        device: None for a machine that is reached over ssh.
    """

    name: str
    way: Literal["measured", "constrained", "remote", "estimated"]
    device: Device | None

    @property
    def folder(self) -> str:
        """A name for its folder: that of the place, of letters, digits, dots and hyphens only."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name.removeprefix(SSH)).strip("-.")


def plan_places(names: Sequence[str], devices: Mapping[str, Device]) -> list[Place]:
    """Return the places of `names`, before anything is measured.

    Args:
        names: as in `bench.devices`.
        devices: from `load_devices`.

    Raises:
        RecipeError: an unknown device, an address or a way that cannot be, or two places of one folder.
    """
    places = [_place(name, devices) for name in names]
    for at, place in enumerate(places):
        if same := next((other for other in places[:at] if other.folder == place.folder), None):
            raise RecipeError(f"{same.name} and {place.name} would share a folder. Name each device once.")
    return places


def _place(name: str, devices: Mapping[str, Device]) -> Place:
    if name.startswith(SSH):
        from bertemd_deploy.remote.ssh import Address

        Address.parse(name)
        return Place(name, "remote", None)
    plain, _, asked = name.partition(":")
    device = find_device(plain, devices)
    way = way_of(
        device,
        asked=asked or None,
        local_isa=environment.instruction_sets(),
        local_machine=platform.machine(),
        local_cores=cpu_limits().affinity,
    )
    return Place(name, way, device)


def _budget_name(name: str) -> str:
    """Return what a place is called in a budget: its device's name, or its address."""
    return name if name.startswith(SSH) else name.partition(":")[0]


def bench_places(
    artifact: Path,
    *,
    teacher: Path | None,
    out: Path,
    settings: BenchSettings,
    budgets: Mapping[str, Budget] | None = None,
    flags: Mapping[str, Any] | None = None,
    baseline: Path | None = None,
    force: bool = False,
) -> list[Path]:
    """Get the numbers of every place in `settings.devices`, write a record for each, and return the records' paths.

    Args:
        artifact: an artifact folder.
        teacher: Hugging Face folder that the speed-ups are against; None leaves it out.
        out: folder for the records.
        settings: what is measured, and where.
        budgets: from `budget.read_budget`, by device.
        flags: limits of the command line, by field of `Budget`.
        baseline: an earlier record, of one of the places.
        force: write into `out` even if it holds something else.

    Raises:
        RecipeError: a place or limit that cannot be, found before anything is measured.
        ArtifactError: the artifact or baseline is damaged, the baseline is of no place, or `out` is in the way.
        ModelError: the teacher is incomplete or does not fit the artifact.
        MeasurementError: some place could not be measured, or was noisy under `settings.strict`; the others have their
            records.
    """
    from bertemd_deploy.bench.baseline import with_baseline

    devices = load_devices(None if settings.device_file is None else Path(settings.device_file))
    places = plan_places(settings.devices, devices)
    limits = [budget_for(_budget_name(name), budgets or {}, flags=flags) for name in settings.devices]
    earlier = None if baseline is None else read_json(baseline, what="baseline")
    claim_folder(out, marker=RECORD, force=force)
    get = _Getter(artifact, teacher, settings, here=devices[LOCAL])
    failures: list[BertemdError] = []
    found: list[tuple[Path, dict[str, Any]]] = []
    for at, (place, limit) in enumerate(zip(places, limits, strict=True)):
        folder = out / place.folder if at else out
        if len(places) > 1:
            note(f"bench: {place.name} ({place.way})")
        (folder / RECORD).unlink(
            missing_ok=True
        )  # of an earlier run, which a failure would leave to be taken for this one's
        try:
            get.by_way[place.way](place, folder)
        except MeasurementError as error:
            failures.append(error)
        if (folder / RECORD).is_file():  # of a noisy measurement, too
            record = read_json(folder / RECORD, what="bench record")
            found.append((folder / RECORD, record | ({"budget": budget_entry(record, limit)} if limit else {})))
    records = [record for _, record in found]
    if earlier is not None and records:
        records = with_baseline(records, earlier, where=str(baseline))
    for (path, _), record in zip(found, records, strict=True):
        write_json(path, record)
    if failures:
        raise failures[0]
    return [path for path, _ in found]


class _Getter:
    """Gets a place's record written; what estimates share is measured once."""

    def __init__(self, artifact: Path, teacher: Path | None, settings: BenchSettings, *, here: Device) -> None:
        self._artifact, self._teacher, self._settings, self._here = artifact, teacher, settings, here
        self._calibration: Any = None
        self.by_way: dict[str, Callable[[Place, Path], object]] = {
            "measured": self._measure,
            "constrained": self._confine,
            "remote": self._visit,
            "estimated": self._estimate,
        }

    def _measure(self, place: Place, out: Path) -> object:
        return bench(self._artifact, teacher=self._teacher, out=out, settings=self._settings, force=True)

    def _confine(self, place: Place, out: Path) -> object:
        assert place.device is not None
        return bench(
            self._artifact,
            teacher=self._teacher,
            out=out,
            settings=self._settings,
            force=True,
            device=place.device,
            limits=limits_of(place.device),
        )

    def _visit(self, place: Place, out: Path) -> object:
        from bertemd_deploy.remote.session import bench_remote

        return bench_remote(
            self._artifact, url=place.name, teacher=self._teacher, out=out, settings=self._settings, force=True
        )

    def _estimate(self, place: Place, out: Path) -> object:
        from bertemd_deploy.estimate.record import calibrate_here, estimate_record

        assert place.device is not None
        if self._calibration is None:
            self._calibration = calibrate_here()
        record = estimate_record(
            self._artifact,
            teacher=self._teacher,
            settings=self._settings,
            device=place.device,
            here=self._here,
            calibration=self._calibration,
        )
        claim_folder(out, marker=RECORD, force=True)
        write_json(out / RECORD, record)
        return record


def judge_again(paths: Sequence[Path], *, budgets: Mapping[str, Budget], settings: BenchSettings) -> None:
    """Hold records against budgets that may have changed since, and write down what was found.

    Args:
        paths: from `bench_places`.
        budgets: from `budget.read_budget`.
        settings: those of the records, whose devices are in the order of `paths`.
    """
    for path, name in zip(paths, settings.devices, strict=True):
        record = read_json(path, what="bench record")
        limit = budget_for(_budget_name(name), budgets)
        entry = budget_entry(record, limit) if limit else None
        if record.get("budget") != entry:
            plain = {key: value for key, value in record.items() if key != "budget"}
            write_json(path, plain | ({"budget": entry} if entry else {}))
