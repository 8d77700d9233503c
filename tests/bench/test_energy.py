from __future__ import annotations

from pathlib import Path

import pytest

from bertemd_deploy.bench import energy
from bertemd_deploy.bench.energy import find_meter


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def zone(root: Path, number: str, name: str, used: int, full: int = 262_143_328_850) -> Path:
    return write(root / f"sys/class/powercap/intel-rapl:{number}", name=name, energy_uj=used, max_energy_range_uj=full)


def battery(root: Path, name: str = "BAT0", **files: object) -> Path:
    return write(root / "sys/class/power_supply" / name, **{"type": "Battery", "status": "Discharging"} | files)


def test_a_package_counts_from_the_meters_beginning(tmp_path):
    package = zone(tmp_path, "0", "package-0", 1_000_000)
    meter = find_meter(tmp_path)
    assert (meter.source, meter.least_joules) == ("rapl:package-0", 0.0)
    assert meter.joules() == 0.0
    write(package, energy_uj=3_500_000)
    assert meter.joules() == 2.5


def test_all_packages_and_nothing_that_is_within_or_around_them(tmp_path):
    zones = [
        zone(tmp_path, "0", "package-0", 0),
        zone(tmp_path, "1", "package-1", 0),
        zone(tmp_path, "0:0", "core", 0),
        zone(tmp_path, "2", "psys", 0),
    ]
    meter = find_meter(tmp_path)
    for one in zones:
        write(one, energy_uj=1_000_000)
    assert meter.source == "rapl:package-0+package-1"
    assert meter.joules() == 2.0


def test_a_counter_that_wraps_goes_on_counting(tmp_path):
    package = zone(tmp_path, "0", "package-0", 900_000, full=1_000_000)
    meter = find_meter(tmp_path)
    write(package, energy_uj=100_000)
    assert meter.joules() == pytest.approx(0.2)
    write(package, energy_uj=600_000)
    assert meter.joules() == pytest.approx(0.7)


def test_a_counter_that_went_back_without_a_known_range_tells_nothing(tmp_path):
    package = zone(tmp_path, "0", "package-0", 900_000)
    (package / "max_energy_range_uj").unlink()
    meter = find_meter(tmp_path)
    write(package, energy_uj=100_000)
    assert meter.joules() is None


def test_a_package_that_may_not_be_read_is_no_meter(tmp_path):
    package = zone(tmp_path, "0", "package-0", 1)
    (package / "energy_uj").unlink()
    assert find_meter(tmp_path) is None
    battery(tmp_path, energy_now=50_000_000)
    assert find_meter(tmp_path).source == "battery"


def test_a_package_that_can_be_read_no_longer_tells_nothing(tmp_path):
    package = zone(tmp_path, "0", "package-0", 1)
    meter = find_meter(tmp_path)
    (package / "energy_uj").unlink()
    assert meter.joules() is None


def test_a_battery_counts_microwatt_hours(tmp_path):
    folder = battery(tmp_path, energy_now=50_000_000)
    meter = find_meter(tmp_path)
    assert meter.least_joules == 360.0
    write(folder, energy_now=49_000_000)
    assert meter.joules() == pytest.approx(3600.0)


def test_a_battery_that_counts_charge_is_taken_at_its_voltage(tmp_path):
    folder = battery(tmp_path, charge_now=4_000_000, voltage_now=12_500_000)
    meter = find_meter(tmp_path)
    write(folder, charge_now=3_900_000, voltage_now=12_000_000)
    assert meter.joules() == pytest.approx(0.1 * 12.0 * 3600)


def test_two_batteries_of_which_one_rests(tmp_path):
    folder = battery(tmp_path, energy_now=50_000_000)
    battery(tmp_path, "BAT1", energy_now=30_000_000, status="Not charging")
    meter = find_meter(tmp_path)
    write(folder, energy_now=49_900_000)
    assert meter.joules() == pytest.approx(360.0)


@pytest.mark.parametrize(
    "files",
    [
        {"status": "Charging", "energy_now": 1},
        {"status": "Full", "energy_now": 1},
        {"energy_now": "?"},
        {"charge_now": 1},
        {"type": "Mains", "energy_now": 1},
        {"scope": "Device", "energy_now": 1},
    ],
    ids=["charging", "on mains", "no number", "no voltage", "a plug", "a mouse"],
)
def test_no_meter(tmp_path, files):
    battery(tmp_path, **files)
    assert find_meter(tmp_path) is None


@pytest.mark.parametrize("files", [{"status": "Charging"}, {"energy_now": "?"}])
def test_a_battery_that_is_plugged_in_or_lost_tells_nothing(tmp_path, files):
    folder = battery(tmp_path, energy_now=50_000_000)
    meter = find_meter(tmp_path)
    write(folder, **files)
    assert meter.joules() is None


def test_a_machine_without_counters(tmp_path, monkeypatch):
    assert find_meter(tmp_path) is None
    monkeypatch.setattr(energy, "ROOT", tmp_path)
    assert find_meter() is None
