"""Layer mappings side by side: one student per mapping and seed, everything else equal, one table with its uncertainty.

Each student is an ordinary distillation in a folder of its own, resumed or skipped as such; where layers are fitted, one fit is
kept for all of them until the last is done. Students are compared in pairs of one seed on the same dev rows:

    difference(mapping) = mean over seeds of metric(mapping, seed) - metric(first mapping, seed)

Its 95% interval is a paired bootstrap (see `resampling`). An interval that covers 0 shows no difference, and says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy import pipeline, stages
from bertemd_deploy.checkpoints import check_folder, checked_encoder
from bertemd_deploy.config import Recipe, build_recipe
from bertemd_deploy.console import note
from bertemd_deploy.data import Dataset
from bertemd_deploy.errors import ArtifactError, ModelError, RecipeError
from bertemd_deploy.evaluate import torch_logits
from bertemd_deploy.facts import StudentFacts, read_student
from bertemd_deploy.families import sizes
from bertemd_deploy.files import claim_folder, discard_partial, read_json, write_json, write_text
from bertemd_deploy.kept_fits import remove_fits
from bertemd_deploy.mapping import LayerMapping, flow_settings
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.models import load_classifier
from bertemd_deploy.resampling import RESAMPLES, bootstrap, metric_of_units
from bertemd_deploy.settings import MAPPINGS
from bertemd_deploy.stage_inputs import changed_inputs, distill_inputs
from bertemd_deploy.students import copies_layers, student_shape

COMPARISON = "comparison.json"
TABLE = "comparison.md"
FITS = "fits"
NOT_SHOWN = "no difference shown"
_SHOWN_DIGITS = 1e-4  # of a metric in the table
_FEW_SEEDS = 5


def read_options(
    compare: str, seeds: str | None, *, given: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the mappings and seeds that the command line names; no seeds stand for the recipe's own.

    Args:
        compare: the text of `--compare`.
        seeds: the text of `--seeds`, if given.
        given: keys of the recipe's section distill that other options set, None where they do not.
        overrides: the texts of `--set`.

    Raises:
        RecipeError: a mapping or seed is wrong, or another option names one as well.
    """
    keys = {f"distill.{key}" for key, value in given.items() if value is not None}
    keys |= {override.partition("=")[0].strip() for override in overrides}
    if "distill.mapping" in keys:
        raise RecipeError("distill: --compare names the mappings; leave out --mapping (and --set distill.mapping).")
    if seeds is not None and "distill.seed" in keys:
        raise RecipeError("distill: --seeds names the seeds; leave out --seed (and --set distill.seed).")
    return parse_mappings(compare), () if seeds is None else parse_seeds(seeds)


def parse_mappings(text: str) -> tuple[str, ...]:
    """Return the mappings that `--compare` names, the first being the one the others are compared with.

    Raises:
        RecipeError: an unknown mapping, one named twice, or none.
    """
    names = [name.strip() for name in text.split(",")]
    known = f"known: {', '.join(MAPPINGS)}."
    if not text.strip():
        raise RecipeError(f"--compare: names no mapping. Name them as in --compare uniform,skip,emd; {known}")
    unknown = [name for name in names if name not in MAPPINGS]
    if unknown:
        raise RecipeError(f"--compare: unknown mapping {', '.join(map(repr, dict.fromkeys(unknown)))}; {known}")
    twice = [name for name in MAPPINGS if names.count(name) > 1]
    if twice:
        raise RecipeError(f"--compare: {', '.join(twice)} stands twice; name each mapping once; {known}")
    return tuple(names)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds that `--seeds` names.

    Raises:
        RecipeError: not whole numbers from 0 to 2^31, or one of them twice.
    """
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if not (name.isascii() and name.isdigit() and int(name) <= 2**31)]
    if wrong:
        raise RecipeError(
            f"--seeds: found {', '.join(map(repr, wrong))}, allowed: whole numbers from 0 to {2**31}, as in --seeds 1,2,3."
        )
    seeds = tuple(map(int, names))
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds: {text.strip()} names a seed twice; the same seed gives the same student.")
    return seeds


def compare_mappings(
    recipe: Recipe,
    teacher: Path,
    data: Dataset,
    max_length: int,
    mappings: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    force: bool,
    max_minutes: float | None = None,
) -> dict[str, Any]:
    """Distil one student per mapping and seed into `out`/<mapping>-seed<seed> and compare them on the dev split.

    Args:
        recipe: everything but the mapping and the seed.
        teacher: folder of the fine-tuned teacher.
        data: train and dev splits.
        max_length: longest input in tokens.
        mappings: names, the first being the one the others are compared with.
        seeds: of every mapping's students; none stand for the recipe's own.
        out: folder of the students, `comparison.json` and `comparison.md`.
        force: start over whatever is there.
        max_minutes: stop training after so long in all, to be continued; None never stops.

    Returns:
        The record, as in `comparison.json`.

    Raises:
        RecipeError: the recipe does not fit a mapping, or there are several processes.
        UnfinishedError: `max_minutes` are over.
        ArtifactError: `out` holds something else, or students of other settings.
        ModelError, TrainingError: as `distill.distill`.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("--compare: students are compared on one process; distil each by itself on several.")
    seeds = tuple(seeds) or (recipe.distill.seed,)
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    variants = {(name, seed): _variant(recipe, name, seed) for name in mappings for seed in seeds}
    config = check_folder(teacher)
    depths = sizes(config).layers, student_shape(recipe.student, config).layers
    copied = copies_layers(recipe.student, config)
    for variant in variants.values():  # refuse what cannot work before the first student, not after the last but one
        LayerMapping.of(flow_settings(variant.distill, *depths, copied=copied), *depths)
    shared = {"data": data.sha256, "max_length": max_length}
    given = distill_inputs(recipe, teacher, shared)
    given["distill"] = {key: value for key, value in given["distill"].items() if key not in ("mapping", "seed")}
    _claim(out, given=given, force=force)
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        for name in mappings:
            variant = variants[name, seed]
            note(f"compare: mapping {name}, seed {seed} ({len(records) + 1} of {len(variants)})")
            records[name, seed] = pipeline.stand_alone(
                "distill",
                out / f"{name}-seed{seed}",
                inputs=distill_inputs(variant, teacher, shared),
                force=force,
                train=lambda work, variant=variant, **extra: stages.distill_stage(
                    variant,
                    teacher,
                    data,
                    max_length,
                    work,
                    max_minutes=_minutes_until(deadline),
                    fits=out / FITS,
                    **extra,
                ),
            )
    record = _compared(out, records, mappings=mappings, seeds=seeds) | {"given": given}
    write_text(out / TABLE, markdown_table(record))
    write_json(out / COMPARISON, record)
    remove_fits(out / FITS)
    return record


def _minutes_until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)


def _variant(recipe: Recipe, mapping: str, seed: int) -> Recipe:
    """Return the recipe with another mapping and seed, checked as if it had been written so."""
    content = recipe.to_dict()
    content["distill"] |= {"mapping": mapping, "seed": seed}
    return build_recipe(content, where=f"--compare {mapping}")


def _claim(out: Path, *, given: dict[str, Any], force: bool) -> None:
    """Make `out` the folder of this comparison: new, or an earlier one's of the same settings."""
    claim_folder(out, marker=COMPARISON, force=force)
    if force:
        remove_fits(out / FITS)
    discard_partial(out / FITS)
    if (out / COMPARISON).exists() and not force:
        before = read_json(out / COMPARISON, what="comparison").get("given")
        if before != given:
            raise ArtifactError(
                f"{out}: holds students of other settings ({changed_inputs(before, given)}). "
                "Choose another --out, or add --force to start over."
            )
    else:
        write_json(out / COMPARISON, {"schema_version": 1, "status": "running", "given": given})


def _compared(
    out: Path, records: Mapping[tuple[str, int], dict[str, Any]], *, mappings: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the record of finished students."""
    logits = {}
    for name, seed in records:
        folder = out / f"{name}-seed{seed}"
        facts = read_student(folder)
        logits[name, seed] = _dev_logits(folder, facts)
    part, labels, names = facts.evaluation, facts.labels, list(facts.task["metrics"])
    metrics = {
        student: evaluate_metrics(names, logits=outputs, part=part, label_names=labels)
        for student, outputs in logits.items()
    }
    statistics = {
        student: metric_of_units(names[0], logits=outputs, part=part, label_names=labels)
        for student, outputs in logits.items()
    }
    units = len(part.gold.contexts) if part.gold is not None else len(part)
    draws = bootstrap([[statistics[name, seed] for seed in seeds] for name in mappings], units=units)
    teacher = next(iter(records.values()))["metrics"]["teacher"]
    return {
        "schema_version": 1,
        "status": "done",
        "task": facts.task,
        "dev": units,
        "metrics": names,
        "seeds": list(seeds),
        "resamples": RESAMPLES,
        "teacher": teacher,
        "mappings": [
            {
                "mapping": name,
                "students": [f"{name}-seed{seed}" for seed in seeds],
                "metrics": {metric: _spread([metrics[name, seed][metric] for seed in seeds]) for metric in names},
                "difference": _difference(metrics, name, mappings[0], seeds) | _interval(draws[:, at] - draws[:, 0])
                if at
                else None,
            }
            | _speed([records[name, seed] for seed in seeds])
            for at, name in enumerate(mappings)
        ],
    }


def _dev_logits(folder: Path, facts: StudentFacts) -> NDArray[np.float32]:
    model = load_classifier(folder, labels=facts.labels, kind=facts.task["kind"])
    pad_id = checked_encoder(folder, max_length=facts.max_length).pad_id
    logits = torch_logits(model, facts.evaluation.examples, pad_id=pad_id)
    if not np.isfinite(logits).all():
        raise ModelError(f"{folder}: an output on dev is not finite. The weights are broken, or training diverged.")
    return logits


def _difference(
    metrics: Mapping[tuple[str, int], dict[str, float]], name: str, against: str, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return what a mapping's students score more than the other's of the same seed, by metric."""
    return {"against": against} | {
        metric: _spread([metrics[name, seed][metric] - metrics[against, seed][metric] for seed in seeds])
        for metric in metrics[name, seeds[0]]
    }


def _speed(trained: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of training one student, and the tokens per second over all of them."""
    seconds, tokens = (sum(record[key] for record in trained) for key in ("seconds", "tokens"))
    return {"seconds": seconds / len(trained), "tokens_per_s": tokens / seconds}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation (n - 1 in the denominator; None for one value) and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation, "values": list(values)}


def _interval(draws: NDArray[np.float64]) -> dict[str, Any]:
    low, high = (float(bound) for bound in np.percentile(draws, (2.5, 97.5)))
    seen = _SHOWN_DIGITS / 2  # what the table would print as 0 is no difference
    return {"ci95": [low, high], "shown": "higher" if low >= seen else "lower" if high <= -seen else None}


def _table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return headings, lines and remarks."""
    names, against = record["metrics"], record["mappings"][0]["mapping"]
    headings = ["mapping", *names, f"{names[0]} against {against} [95%]", "seconds", "tokens/s"]
    lines = []
    for row in record["mappings"]:
        cells = [row["mapping"], *(_with_deviation(row["metrics"][name]) for name in names)]
        difference = row["difference"]
        if difference is None:
            cells.append("")
        else:
            low, high = difference["ci95"]
            verdict = difference["shown"] or NOT_SHOWN
            cells.append(f"{difference[names[0]]['mean']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict}")
        lines.append([*cells, f"{row['seconds']:,.1f}", f"{row['tokens_per_s']:,.0f}"])
    return headings, lines, _remarks(record)


def _with_deviation(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.4f}" + (f" ± {spread['sd']:.4f}" if spread["sd"] is not None else "")


def _remarks(record: Mapping[str, Any]) -> list[str]:
    seeds, unit = record["seeds"], "examples" if record["task"]["kind"] == "question-answering" else "rows"
    teacher = ", ".join(f"{name} {value:.4f}" for name, value in record["teacher"].items())
    several = len(seeds) > 1
    told = f"seeds {', '.join(map(str, seeds))} (mean ± standard deviation)" if several else f"seed {seeds[0]}"
    remarks = [
        f"{record['dev']:,} dev {unit}, {told}; teacher {teacher}; seconds and tokens/s of training one student."
    ]
    if len(record["mappings"]) > 1:
        drawn = f"dev {unit} and seeds" if several else f"dev {unit}"
        remarks.append(
            f"[95%]: paired bootstrap over {drawn}, {record['resamples']:,} resamples; "
            f'"{NOT_SHOWN}" where it covers 0, which does not show that the mappings are equal.'
        )
        if not several:
            remarks.append(
                "One seed: how much another seed would change is not in the interval; see --seeds 1,2,3,4,5."
            )
        elif len(seeds) < _FEW_SEEDS:
            remarks.append(
                f"{len(seeds)} seeds tell little of how much seeds differ; the interval is rather too narrow."
            )
    return remarks


def text_table(record: Mapping[str, Any]) -> str:
    """Return a comparison's table for a terminal."""
    headings, lines, remarks = _table(record)
    widths = [max(len(row[at]) for row in (headings, *lines)) for at in range(len(headings))]
    last = len(headings) - 2  # numbers to the right from here on
    aligned = [
        "  ".join(
            cell.rjust(width) if at >= last else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (headings, *lines)
    ]
    return "\n".join([*aligned, *remarks])


def markdown_table(record: Mapping[str, Any]) -> str:
    """Return a comparison's table as Markdown."""
    headings, lines, remarks = _table(record)
    rules = [":--", *("--:" for _ in record["metrics"]), ":--", "--:", "--:"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (headings, rules, *lines))
    return "\n\n".join([f"## Layer mappings on {record['task']['name']}", table, *remarks]) + "\n"
