"""An artifact's numbers on every device asked for: measured here, within a device's limits, on it over ssh, or estimated.

A place is written as `local`, a name of `bertemd devices` (with `:constrained` or `:estimated` behind it to have it in no other
way), or ssh://user@host. Each gets a record of its own, with the budget and baseline it was held against: that of the first
place is `record.json`, each other's lies in a folder of the place's name.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench import environment
from bertemd_deploy.bench.compare import CHURN, RECORD, bench
from bertemd_deploy.budget import Budget, budget_entry, budget_for
from bertemd_deploy.console import note
from bertemd_deploy.devices import LOCAL, Device, find_device, limits_of, load_devices, way_of
from bertemd_deploy.errors import ArtifactError, BertemdError, MeasurementError, RecipeError
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


@dataclass(frozen=True)
class Benched:
    """What came of the places.

    Attributes:
        records: their paths by place, in the order of the places; those that failed have none.
        failures: by place, in the same order. A noisy measurement is a failure with a record.
    """

    records: dict[str, Path]
    failures: dict[str, BertemdError]

    @property
    def paths(self) -> list[Path]:
        """The records' paths, in the order of the places."""
        return list(self.records.values())

    def check(self) -> None:
        """Raise what failed.

        Raises:
            BertemdError: the failure, or a `MeasurementError` that tells all of several.
        """
        if len(self.failures) == 1:
            raise next(iter(self.failures.values()))
        if self.failures:
            told = "\n".join(f"  - {name}: {error}" for name, error in self.failures.items())
            raise MeasurementError(f"{len(self.failures)} places failed; the others have their records:\n{told}")


def plan_places(names: Sequence[str], devices: Mapping[str, Device]) -> list[Place]:
    """Return the places of `names`, before anything is measured.

    Args:
        names: as in `bench.devices`.
        devices: from `load_devices`.

    Raises:
        RecipeError: an unknown device, an address or a way that cannot be, two places of one folder, or one place twice.
    """
    places = [_place(name, devices) for name in names]
    for at, place in enumerate(places):
        if place.folder in (RECORD, CHURN):
            raise RecipeError(f"{place.name}: a file of the benchmark has this name. Give the device another one.")
        for other in places[:at]:
            same = place.device is not None and (place.device, place.way) == (other.device, other.way)
            if same or other.folder == place.folder:
                raise RecipeError(f"{other.name} and {place.name} would share a folder. Name each device once.")
    return places


def _place(name: str, devices: Mapping[str, Device]) -> Place:
    if name.startswith(SSH):
        from bertemd_deploy.remote.ssh import Address

        Address.parse(name)
        return Place(name, "remote", None)
    plain, colon, asked = name.partition(":")
    device = find_device(plain, devices)
    way = way_of(
        device,
        asked=asked if colon else None,
        local_isa=environment.instruction_sets(),
        local_machine=platform.machine(),
        local_cores=cpu_limits().affinity,
    )
    return Place(name, way, device)


def budget_name(name: str) -> str:
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
    reuse: Collection[str] = (),
    done: Callable[[str, Path], object] = lambda name, path: None,
) -> Benched:
    """Get the numbers of every place in `settings.devices`, and write a record for each.

    A record that is there is replaced once its successor is complete.

    Args:
        artifact: an artifact folder.
        teacher: Hugging Face folder that the speed-ups are against; None leaves it out.
        out: folder for the records.
        settings: what is measured, and where.
        budgets: from `budget.read_budget`, by device.
        flags: limits of the command line, by field of `Budget`.
        baseline: an earlier record, of one of the places.
        force: write into `out` even if it holds something else, or records of another kind.
        reuse: names of `settings.devices` whose record in `out` is taken as it is.
        done: called with a place's name and its record once that is there and nothing failed.

    Raises:
        RecipeError: a place or limit that cannot be, found before anything is measured.
        ArtifactError: the artifact or baseline is damaged, the baseline is of no place, or `out` is in the way.
    """
    from bertemd_deploy.bench.baseline import with_baseline

    devices = load_devices(None if settings.device_file is None else Path(settings.device_file))
    places = plan_places(settings.devices, devices)
    limits = [budget_for(budget_name(name), budgets or {}, flags=flags) for name in settings.devices]
    Artifact.load(artifact)
    folders = [out / place.folder if at else out for at, place in enumerate(places)]
    earlier = None if baseline is None else _read_baseline(baseline, places=places, folders=folders)
    for place, folder in zip(places, folders, strict=True):
        _check_place(place, folder, ours=any((one / RECORD).is_file() for one in folders), force=force)
    get = _Getter(artifact, teacher, settings, here=devices[LOCAL])
    failures: dict[str, BertemdError] = {}
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for place, folder, limit in zip(places, folders, limits, strict=True):
        if len(places) > 1:
            note(f"bench: {place.name} ({place.way})")
        if place.name in reuse:
            note(f"bench: {place.name}: measured already")
            found[place.name] = (folder / RECORD, read_json(folder / RECORD, what="bench record"))
            continue
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".bertemd-", dir=out) as scratch:
            try:
                get.by_way[place.way](place, Path(scratch) / "record")
            except BertemdError as error:
                failures[place.name] = error
            made = Path(scratch) / "record"
            if (made / RECORD).is_file():
                record = read_json(made / RECORD, what="bench record")
                record |= {"budget": budget_entry(record, limit)} if limit else {}
                write_json(made / RECORD, record)
                _place_files(made, folder)
                if place.name not in failures:
                    done(place.name, folder / RECORD)
                found[place.name] = (folder / RECORD, record)
    records = [record for _, record in found.values()]
    if earlier is not None and records:
        for (path, _), record in zip(found.values(), with_baseline(records, earlier, where=str(baseline)), strict=True):
            write_json(path, record)
    return Benched({name: path for name, (path, _) in found.items()}, failures)


def _read_baseline(path: Path, *, places: Sequence[Place], folders: Sequence[Path]) -> dict[str, Any]:
    """Return a baseline's record.

    Raises:
        ArtifactError: it is no record, would be overwritten, or is of none of the places.
    """
    from bertemd_deploy.report.reading import read_record

    record: dict[str, Any] = read_record(path)
    if any(path.resolve() == (folder / RECORD).resolve() for folder in folders):
        raise ArtifactError(f"{path}: the baseline would be overwritten. Choose another --out.")
    theirs = (record["device"].get("name"), record["device"].get("kind"))
    here = environment.device()["name"]
    ours = [(place.device.name if place.way != "measured" else here, place.way) for place in places if place.device]
    if theirs not in ours and all(place.device for place in places):
        told = "; ".join(f"{name} ({way})" for name, way in ours)
        raise ArtifactError(
            f"{path}: is of the device {theirs[0]} ({theirs[1]}), asked for are {told}. Name a baseline of one of these."
        )
    return record


def _check_place(place: Place, folder: Path, *, ours: bool, force: bool) -> None:
    """Refuse a folder that holds something else, or a record that was got in another way.

    Args:
        place: what is to be written there.
        folder: where.
        ours: an earlier run's records are there, of this place or of another that is asked for.
        force: refuse neither.

    Raises:
        ArtifactError: it does, and `force` is not set; or the record's name is taken by a folder.
    """
    if not (force or ours) and folder.exists():
        claim_folder(folder, marker=RECORD, force=False)
    if (folder / RECORD).is_dir():
        raise ArtifactError(f"{folder / RECORD}: a folder has the record's name. Choose another --out.")
    if force or not (folder / RECORD).exists():
        return
    device = read_json(folder / RECORD, what="bench record").get("device")
    kind = device.get("kind") if isinstance(device, dict) else None
    if kind != place.way:
        raise ArtifactError(
            f"{folder / RECORD}: a record that is {kind}, and {place.name} would be {place.way}. Choose another --out, or add "
            "--force to replace it."
        )


def _place_files(made: Path, folder: Path) -> None:
    """Move a record and its list of changes to where they belong; of an earlier list none is left beside another record."""
    folder.mkdir(parents=True, exist_ok=True)
    if (made / CHURN).is_file():
        (made / CHURN).replace(folder / CHURN)
    else:
        (folder / CHURN).unlink(missing_ok=True)
    (made / RECORD).replace(folder / RECORD)


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
        out.mkdir(parents=True)
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
        limit = budget_for(budget_name(name), budgets)
        entry = budget_entry(record, limit) if limit else None
        if record.get("budget") != entry:
            plain = {key: value for key, value in record.items() if key != "budget"}
            write_json(path, plain | ({"budget": entry} if entry else {}))
