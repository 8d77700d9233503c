from __future__ import annotations

import re

import numpy as np
import pytest
from tiny_record import estimated, held, in_use, other_student

from bertemd_deploy.report.drawing import Marks, canvas, to_svg
from bertemd_deploy.report.figures import cold_start, device_figures, latency_by_length, memory_and_size
from bertemd_deploy.report.mapping import distillation_figures, flow_maps, loss_curves, marginal_maps, matrix
from bertemd_deploy.report.pareto import frontier, score_by_latency, students_figures
from bertemd_deploy.report.reading import named
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import compare
from bertemd_deploy.report.usage_figures import memory_arena, paced_latency, thread_scaling

pytest.importorskip("matplotlib")


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_flow_cells_hold_percent_of_the_mass_and_small_ones_stay_blank() -> None:
    flow = [[0.5, 0.0], [0.125, 0.3745], [0.0005, 0.0]]
    drawing = flow_maps({"first": {"step": 1, "attention_flow": flow}, "last": None}, "attention")
    assert drawing is not None
    assert {"50", "12", "37"} <= set(texts(drawing.svg))
    assert "0.1" not in texts(drawing.svg)
    assert "first step, 1" in texts(drawing.svg)
    assert "3 teacher and 2 student layers" in drawing.alternative
    assert "teacher 1 to student 1, teacher 2 to student 2." in drawing.alternative
    between = flow_maps({"first": {"step": 1, "attention_flow": [[1.0, 0.0], [0.0, 0.0]]}, "last": None}, "attention")
    assert between is not None
    assert "goes from teacher 1 to student 1; none goes to student 2." in between.alternative


def test_both_maps_share_one_colour_scale() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    weak, strong = [[0.4, 0.1], [0.1, 0.4]], [[0.9, 0.1], [0.0, 0.0]]
    pair = {"first": {"step": 1, "hidden_flow": weak}, "last": {"step": 2, "hidden_flow": strong}}
    drawing = flow_maps(pair, "hidden")
    assert drawing is not None
    colors = [to_hex(colormaps["Blues"](share)) for share in (0.4 / 0.9, 1.0)]
    assert [drawing.svg.count(f"fill: {color}") for color in colors] == [2, 1]


def test_many_student_layers_stack_the_maps() -> None:
    rng = np.random.default_rng(0)
    flow = rng.random((24, 12))
    moment = {"step": 1, "hidden_flow": (flow / flow.sum()).tolist()}
    drawing = flow_maps({"first": moment, "last": moment}, "hidden")
    assert drawing is not None
    assert {"24", "12"} <= set(texts(drawing.svg))
    assert texts(drawing.svg).count("teacher layer") == 2


@pytest.mark.parametrize(
    "value", [None, [], [[]], [[1, 2], [3]], [[1, None]], [["a"]], {"a": 1}, [1, 2], [[float("nan")]]]
)
def test_what_is_no_matrix_is_left_out(value) -> None:
    assert matrix(value) is None
    assert flow_maps({"first": {"step": 1, "attention_flow": value}}, "attention") is None


def test_shared_marginals_are_drawn_once_and_separate_ones_twice(record) -> None:
    distillation = record["distillation"]
    (shared,) = marginal_maps(distillation)
    assert "share one set of weights in this run, drawn once" in shared.caption
    for entry in distillation["marginals"]:
        entry["hidden_teacher"] = list(reversed(entry["hidden_teacher"]))
    attention, hidden = marginal_maps(distillation)
    assert (attention.title, hidden.title) == (
        "Layer weights during training: attention scores",
        "Layer weights during training: hidden states",
    )
    assert "drawn once" not in attention.caption


def test_marginals_state_the_last_weights(record) -> None:
    (drawing,) = marginal_maps(record["distillation"])
    last = record["distillation"]["marginals"][-1]["attention_student"]
    assert "student layers end at " + ", ".join(f"{weight:.3f}" for weight in last) in drawing.alternative
    assert {f"{weight:.3f}".removeprefix("0") for weight in last} <= set(texts(drawing.svg))


def test_weights_that_do_not_move_are_not_called_learnt() -> None:
    entry = {"attention_teacher": [0.5, 0.5], "attention_student": [1.0]}
    (drawing,) = marginal_maps({"marginals": [{"step": step} | entry for step in (1, 2)]})
    assert drawing.caption == "The weights stay as they were: this mapping does not move them."


def test_one_logged_step_is_enough_for_weights_but_not_for_a_curve() -> None:
    entry = {"step": 5, "hidden_teacher": [0.5, 0.5], "hidden_student": [1.0], "total": 1.0}
    (drawing,) = distillation_figures({"marginals": [entry], "losses": [entry]})
    assert drawing.title.startswith("Layer weights")


def test_losses_that_were_not_logged_have_no_curve() -> None:
    drawing = loss_curves(
        {"losses": [{"step": 1, "total": 2.0, "prediction": 2.0}, {"step": 2, "total": 1.0, "hidden": None}]}
    )
    assert drawing is not None
    assert drawing.alternative == "Losses over training: total 2.00 to 1.00."
    assert "hidden" not in texts(drawing.svg)


@pytest.mark.parametrize("value", [None, {}, {"mapping": "none", "first": None, "last": None}, "text"])
def test_no_mapping_no_figures(value) -> None:
    assert distillation_figures(value) == []


def test_latency_has_a_panel_for_fewest_and_most_threads(record) -> None:
    drawing = latency_by_length(Record(record, "device"), name="x")
    assert drawing is not None
    assert {"1 thread", "2 threads", "16", "128"} <= set(texts(drawing.svg))
    record["measurements"] = [entry for entry in record["measurements"] if entry["threads"] == 2]
    single = latency_by_length(Record(record, "device"), name="x")
    assert single is not None
    assert "1 thread" not in texts(single.svg)


def test_accuracy_against_latency_needs_two_models(record) -> None:
    assert score_by_latency(compare(Record(record, "device")), name="x") is not None
    record["models"], record["measurements"] = (
        [entry for entry in record[key] if entry["graph"] == "int8"] for key in ("models", "measurements")
    )
    assert score_by_latency(compare(Record(record, "device")), name="x") is None


def test_bar_without_value_says_so(record) -> None:
    for entry in record["models"]:
        if entry["graph"] == "fused":
            entry["peak_rss_bytes"] = None
    drawing = memory_and_size(compare(Record(record, "device")), name="x")
    assert drawing is not None
    assert " not measured" in texts(drawing.svg)
    assert "Student fp32, fused not measured" in drawing.alternative


def titles(svg: str) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", svg)


def test_every_point_says_its_number_and_belongs_to_its_model(record) -> None:
    drawing = latency_by_length(Record(record, "device"), name="x")
    assert drawing is not None
    said = titles(drawing.svg)
    assert len(said) == drawing.svg.count('class="mark"') == 6 * 4 * 2  # models, lengths, panels
    latency = next(
        entry["latency_ms"]
        for entry in record["measurements"]
        if (entry["graph"], entry["batch"], entry["sequence"], entry["threads"]) == ("fused-int8", 1, 64, 1)
    )
    low, high = latency["p50_ci95"]
    assert f"Student int8, fused: {latency['p50']:.2f} ms ({low:.2f}–{high:.2f}) at 64 tokens" in said
    models = set(re.findall(r'data-model="([^"]*)"', drawing.svg))
    assert models == {variant.key for variant in Record(record, "device").variants}
    assert "95% intervals" in drawing.caption


def test_points_without_words_are_our_mistake() -> None:
    marks = Marks()
    with canvas("x") as figure:
        (line,) = figure.subplots().plot([1, 2], [1, 2], marker="o")
        marks.add(line, "model", ["only one"])
        with pytest.raises(ValueError, match="zip"):
            to_svg(figure, alternative="x", marks=marks)


def test_an_estimate_is_drawn_with_its_interval_and_called_one(record) -> None:
    comparison = compare(Record(estimated(in_use(record)), "device"))
    found = {drawing.title: drawing for drawing in device_figures(comparison, name="x")}
    assert set(found) == {
        "Latency against input length",
        "Accuracy against latency",
        "What threads give and cost",
        "Memory and size",
    }
    assert all("estimate" in drawing.caption.lower() for drawing in found.values())
    latency = found["Latency against input length"]
    assert all(": estimate " in title and "–" in title for title in titles(latency.svg))
    assert latency.alternative.startswith("Estimated median latency")


def test_threads_show_latency_and_cpu_time(record) -> None:
    drawing = thread_scaling(compare(Record(record, "device")), name="x")
    assert drawing is not None
    assert {"latency, p50", "CPU time per call", "1", "2"} <= set(texts(drawing.svg))
    assert len(titles(drawing.svg)) == 6 * 2 * 2
    for entry in record["measurements"]:
        entry["cpu_seconds_per_inference"] = None
    alone = thread_scaling(compare(Record(record, "device")), name="x")
    assert alone is not None
    assert "CPU" not in alone.alternative
    record["measurements"] = [entry for entry in record["measurements"] if entry["threads"] == 2]
    assert thread_scaling(compare(Record(record, "device")), name="x") is None


def test_paced_stands_beside_the_loop(record) -> None:
    assert paced_latency(compare(Record(record, "device")), name="x") is None
    used = compare(Record(in_use(record), "device"))
    drawing = paced_latency(used, name="x")
    assert drawing is not None
    assert {"in a loop", "one by one"} <= set(texts(drawing.svg))
    assert "batch 1, replay of real lengths, 2 threads" in drawing.caption
    assert len(titles(drawing.svg)) == 6 * 2


def test_arena_on_and_off(record) -> None:
    assert memory_arena(compare(Record(record, "device")), name="x") is None
    drawing = memory_arena(compare(Record(in_use(record), "device")), name="x")
    assert drawing is not None
    assert "Student int8, fused 124 MB with arena, 87 MB without" in drawing.alternative
    assert "PyTorch" not in drawing.alternative


def test_cold_start_shows_the_process_where_it_was_measured(record) -> None:
    before = cold_start(compare(Record(record, "device")), name="x")
    after = cold_start(compare(Record(in_use(record), "device")), name="x")
    assert before is not None
    assert after is not None
    assert "start of the process" not in before.alternative
    assert "start of the process 60.0 ms, import 180 ms" in after.alternative
    assert len(titles(after.svg)) == 6 * 4


def test_a_model_that_did_not_fit_has_no_bar(record) -> None:
    drawing = memory_and_size(compare(Record(held(record), "device")), name="x")
    assert drawing is not None
    assert texts(drawing.svg).count(" did not fit") == 2


def test_students_stand_on_one_plot_per_device_and_kind(record) -> None:
    raws = [record, other_student(record), estimated(record), estimated(other_student(record)), held(record)]
    drawings = students_figures([compare(found) for found in named(raws)])
    assert [drawing.title for drawing in drawings] == [
        "Students on AMD EPYC (2 cores, Linux x86_64) (measured)",
        "Students on raspberry-pi-5 (estimated)",
    ]
    measured, guessed = drawings
    assert len(titles(measured.svg)) == 3
    assert "6 layers, width 768: int8, fused 0.947" in measured.alternative
    assert all("estimate " in title for title in titles(guessed.svg))
    assert students_figures([compare(found) for found in named([record, held(record)])]) == []


def test_frontier_drops_what_is_beaten_in_both() -> None:
    assert frontier([(3, 0.9), (1, 0.8), (2, 0.7), (4, 0.9), (1, 0.6)]) == [(1, 0.8), (3, 0.9)]
