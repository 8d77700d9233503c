from __future__ import annotations

import pytest
from tiny_speeds import CALL, PER_MAC_MS, START, make_calibration, make_device

from bertemd_deploy.errors import RecipeError
from bertemd_deploy.estimate.model import breakdown, estimate
from bertemd_deploy.estimate.operators import OperatorCost, Part
from bertemd_deploy.estimate.scaling import MEMORY_REACH, PRODUCT_REACH, SPREAD, UNKNOWN_MEMORY, WAITED, scale

HERE = make_device(name="local", clock_mhz=3000.0)


def ms(calibration, *parts: Part, threads: int = 1) -> dict[str, float]:
    return breakdown([OperatorCost("it", "It", "other", 0, 0, 0, 0, parts)], calibration.at(threads))


def test_products_take_what_the_devices_peak_allows():
    """1500 MHz of 4 fp32 and 16 int8 multiply-adds a cycle: 6e6 and 24e6 a millisecond, of which a share is reached."""
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    for table, peak in (("fp32_product", 6e6), ("int8_product", 24e6)):
        assert scaled.speeds[1].best(table) == pytest.approx(peak * PRODUCT_REACH[table])
        found = ms(scaled, Part(table, 1, 100, macs=10_000_000))
        assert found[table] == pytest.approx(10_000_000 / (peak * PRODUCT_REACH[table]))
    # Products of activations keep their distance from the best product.
    attention = ms(scaled, Part("attention", 1, 100, macs=10_000_000))["fp32_product"]
    relative = PER_MAC_MS["attention"] / PER_MAC_MS["fp32_product"]
    assert attention == pytest.approx(relative * 10_000_000 / (6e6 * PRODUCT_REACH["fp32_product"]))


def test_starts_and_calls_go_by_the_clock():
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    found = ms(scaled, Part("view", 1), Part("fp32_product", 1, 100, macs=1, weight_bytes=4))
    assert found["overhead"] == pytest.approx(2 * (CALL + 2 * START))


def test_passes_over_values_go_by_the_vector_unit():
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    part = Part("gelu", 1001, 320)
    here, there = ms(make_calibration(), part), ms(scaled, part)
    assert there["elementwise"] == pytest.approx(here["elementwise"] * scaled.factors["fp32_product"])
    assert scaled.factors["elementwise"] == scaled.factors["fp32_product"]


def test_weights_come_at_the_devices_bandwidth_and_none_stay_in_a_cache():
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    few = Part("fp32_product", 1, 100, macs=1, weight_bytes=1000)
    assert ms(scaled, few)["memory"] == pytest.approx(1000 * WAITED / (10e6 * MEMORY_REACH))


def test_a_bandwidth_that_is_not_known_is_this_machines():
    calibration = make_calibration()
    scaled = scale(calibration, here=HERE, device=make_device(bandwidth_gb_s=None))
    few = Part("fp32_product", 1, 100, macs=1, weight_bytes=1000)
    here = calibration.speeds[1].stream_gb_s
    assert ms(scaled, few)["memory"] == pytest.approx(1000 * WAITED / (1e6 * here))


def test_threads_share_the_bandwidth():
    """Four threads are no faster at it than one, in this machine's tables nor in the device's."""
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    part = Part("fp32_product", 1, 100, macs=1, weight_bytes=1_000_000)
    one, four = (ms(scaled, part, threads=threads)["memory"] for threads in (1, 4))
    assert four == pytest.approx(one)


def test_threads_divide_the_products():
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    part = Part("fp32_product", 1, 100, macs=10_000_000)
    one, four, eight = (ms(scaled, part, threads=threads)["fp32_product"] for threads in (1, 4, 8))
    assert one == pytest.approx(4 * four)
    assert eight == four  # it has four cores


@pytest.mark.parametrize(
    ("facts", "limit"),
    [
        ({"clock_mhz": 3000.0}, "overhead"),
        ({"clock_mhz": 3000.0}, "fp32_product"),
        ({"fp32_flop_per_cycle": 16.0}, "fp32_product"),
        ({"fp32_flop_per_cycle": 16.0}, "elementwise"),
        ({"int8_op_per_cycle": 64.0}, "int8_product"),
        ({"bandwidth_gb_s": 20.0}, "memory"),
    ],
)
def test_twice_a_fact_is_half_the_time(facts, limit):
    device, better = make_device(), make_device(**facts)
    calibration = make_calibration()
    before, after = (scale(calibration, here=HERE, device=one).factors[limit] for one in (device, better))
    assert after == pytest.approx(before / 2)


def test_a_better_device_is_never_slower(tmp_path):
    from tiny_operators import write_product

    path = write_product(tmp_path / "product.onnx")
    calibration, times = make_calibration(), []
    for facts in (
        {},
        {"clock_mhz": 2000.0},
        {"clock_mhz": 2000.0, "bandwidth_gb_s": 40.0, "fp32_flop_per_cycle": 16.0},
    ):
        scaled = scale(calibration, here=HERE, device=make_device(**facts))
        times.append(estimate(path, batch=8, sequence=128, threads=2, calibration=scaled).p50_ms)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3


def test_what_is_not_known_is_in_the_spread():
    calibration = make_calibration()
    known = scale(calibration, here=HERE, device=make_device())
    unknown = scale(calibration, here=HERE, device=make_device(bandwidth_gb_s=None))
    assert known.spread == SPREAD
    assert unknown.spread["memory"] == UNKNOWN_MEMORY
    assert unknown.factors["memory"] == 1.0
    assert all(low <= 1 <= high for low, high in known.spread.values())


def test_limits_of_the_place_are_kept():
    scaled = scale(make_calibration(), here=HERE, device=make_device(cpu_share=0.5, cores=2))
    assert (scaled.share, scaled.cores, scaled.machine["device"]) == (0.5, 2, "board")


def test_facts_that_are_missing_are_named():
    device = make_device(clock_mhz=None, int8_op_per_cycle=None)
    with pytest.raises(
        RecipeError, match=r"'board' cannot be estimated without clock_mhz, int8_op_per_cycle.*--devices"
    ):
        scale(make_calibration(), here=HERE, device=device)


def test_every_built_in_device_that_is_to_be_estimated_can_be():
    from bertemd_deploy.devices import load_devices

    devices = load_devices()
    local = devices["local"]
    estimated = [device for device in devices.values() if "estimated" in device.ways and device.name != "local"]
    assert len(estimated) >= 4
    for device in estimated:
        factors = scale(make_calibration(), here=local, device=device).factors
        assert all(0 < factor < 1000 for factor in factors.values()), device.name
