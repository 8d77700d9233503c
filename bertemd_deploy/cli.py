"""The command line: one command per stage, a few lines each; heavy imports live inside the commands.

Results go to stdout, progress and notes to stderr; `--json` prints the record instead of the summary. A `BertemdError`
becomes one message and its exit code; anything else is our own mistake and shows its traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bertemd_deploy import __version__, cli_devices
from bertemd_deploy.cli_options import (
    Data,
    Force,
    Json,
    MaxMinutes,
    Out,
    Set,
    TaskName,
    metrics_text,
    options_to_recipe,
    show,
    stage,
)
from bertemd_deploy.errors import BertemdError, RecipeError
from bertemd_deploy.launch import launch_processes

app = typer.Typer(
    help="Distil a fine-tuned BERT, quantize it, export it to ONNX, and measure what was gained and lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Quantize = Literal["dynamic", "static", "float16", "none"]
LayerMapping = Literal["none", "uniform", "skip", "last", "emd-fixed", "emd"]


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil a fine-tuned BERT, quantize it, export it to ONNX, and measure what was gained and lost."""


@app.command()
@stage
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/<recipe name>].")] = None,
    set_: Set = None,
    from_stage: Annotated[
        str | None,
        typer.Option("--from", help="Do this stage and the later ones again: finetune distill export bench report."),
    ] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="Stop after this stage.")] = None,
    max_minutes: MaxMinutes = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Fine-tune (if asked), distil, export, quantize, bench and report; continues a killed run."""
    from bertemd_deploy import pipeline
    from bertemd_deploy.budget import enforce_records
    from bertemd_deploy.config import load_recipe
    from bertemd_deploy.files import read_json

    resolved = load_recipe(recipe, overrides=set_ or [])
    place = out or Path("runs") / recipe.stem
    first, last = ("export" if stage == "quantize" else stage for stage in (from_stage, to_stage))
    record = pipeline.run(resolved, out=place, from_stage=first, stop_after=last, force=force, max_minutes=max_minutes)
    lines = [f"{name:<16}{metrics_text(values)}" for name, values in _named_metrics(record)]
    paths = {"artifact": record.get("artifact"), "report": record.get("page")}
    lines += [f"{name:<16}{path}" for name, path in paths.items() if path] or [f"{'run':<16}{place}"]
    show(record, as_json=json_, summary=lines)
    if measured := record.get("bench", {}).get("records"):
        enforce_records([read_json(place / name, what="bench record") for name in measured])


def _named_metrics(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the metrics of a run's models, teacher first, as far as the run went."""
    if "distill" not in record:
        yield "teacher", record.get("finetune", {}).get("metrics", {})
        return
    distilled = record["distill"]["metrics"]
    yield "teacher", distilled["teacher"]
    yield "student", distilled["student"]
    for graph, values in record.get("export", {}).get("metrics", {}).items():
        if graph not in ("teacher", "student"):
            yield graph, values


@app.command()
@stage
def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")], set_: Set = None, json_: Json = False
) -> None:
    """Validate a recipe and print it with every default filled in; all faults are listed at once."""
    from bertemd_deploy.config import load_recipe

    resolved = load_recipe(recipe, overrides=set_ or [])
    show(resolved.to_dict(), as_json=json_, summary=[resolved.to_yaml().rstrip()])


@app.command()
@stage
def finetune(
    model: Annotated[str, typer.Option(help="Pretrained encoder: folder, hub id, or package:IMPORT_NAME/sub/folder.")],
    data: Data,
    out: Out,
    task: TaskName = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs [default: 3].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed [default: 42].")] = None,
    max_minutes: MaxMinutes = None,
    set_: Set = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Fine-tune a pretrained encoder into a task teacher."""
    from bertemd_deploy import pipeline, stages
    from bertemd_deploy.checkpoints import find_model
    from bertemd_deploy.stage_inputs import finetune_inputs

    given: dict[str, dict[str, Any]] = {
        "teacher": {"model": model, "epochs": epochs, "seed": seed, "finetune": "always"},
        "data": {"path": data, "task": task},
        "student": {"name": "4L"},
    }
    recipe = options_to_recipe(None, given, set_)
    launch_processes()
    loaded, max_length = stages.load_recipe_data(recipe.data)
    folder = find_model(recipe.teacher.model, sha256=recipe.teacher.sha256)
    inputs = finetune_inputs(recipe, folder, {"data": loaded.sha256, "max_length": max_length})
    record = pipeline.stand_alone(
        "finetune",
        out,
        inputs=inputs,
        force=force,
        train=lambda work, **extra: stages.finetune_stage(
            recipe, loaded, max_length, work, max_minutes=max_minutes, **extra
        ),
    )
    show(record, as_json=json_, summary=[f"dev {metrics_text(record['metrics'])}", str(out)])


@app.command()
@stage
def distill(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file, instead of the options.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Fine-tuned teacher: folder, hub id, or package:…")] = None,
    data: Annotated[str | None, typer.Option(help="glue/<task>, a folder with train.* and dev.*, or demo.")] = None,
    student: Annotated[str | None, typer.Option(help="4L-312, 6L-768, 4L or 6L (the teacher's width).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Student folder [default with RECIPE: runs/<recipe name>-student].")
    ] = None,
    task: TaskName = None,
    mapping: Annotated[LayerMapping | None, typer.Option(help="Layer mapping [default: emd].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs [default: 10].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed [default: 42].")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MAPPING,...", help="One student per mapping, and a table of them.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEED,...", help="With --compare: students per mapping [default: the seed].")
    ] = None,
    max_minutes: MaxMinutes = None,
    set_: Set = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Distil a fine-tuned teacher into a student, or with --compare into one per layer mapping."""
    from bertemd_deploy import pipeline, stages
    from bertemd_deploy.checkpoints import find_model
    from bertemd_deploy.stage_inputs import distill_inputs

    given: dict[str, dict[str, Any]] = {
        "teacher": {"model": teacher},
        "data": {"path": data, "task": task},
        "student": {"name": student},
        "distill": {"mapping": mapping, "epochs": epochs, "seed": seed},
    }
    if recipe is None and (teacher is None or data is None or student is None):
        raise RecipeError("distill: name a RECIPE, or all of --teacher, --data and --student.")
    if out is None:
        if recipe is None:
            raise RecipeError("distill: name the student folder with --out.")
        out = Path("runs") / f"{recipe.stem}-{'comparison' if compare is not None else 'student'}"
    if seeds is not None and compare is None:
        raise RecipeError("distill: --seeds belongs to --compare; for one student use --seed.")
    resolved = options_to_recipe(recipe, given, set_)
    launch_processes()
    if compare is not None:
        from bertemd_deploy import comparison

        students = comparison.read_options(compare, seeds, given=given["distill"], overrides=set_ or [])
        loaded, max_length = stages.load_recipe_data(resolved.data)
        folder = find_model(resolved.teacher.model, sha256=resolved.teacher.sha256)
        record = comparison.compare_mappings(
            resolved, folder, loaded, max_length, *students, out=out, force=force, max_minutes=max_minutes
        )
        show(record, as_json=json_, summary=[comparison.text_table(record), str(out)])
        return
    loaded, max_length = stages.load_recipe_data(resolved.data)
    folder = find_model(resolved.teacher.model, sha256=resolved.teacher.sha256)
    inputs = distill_inputs(resolved, folder, {"data": loaded.sha256, "max_length": max_length})
    record = pipeline.stand_alone(
        "distill",
        out,
        inputs=inputs,
        force=force,
        train=lambda work, **extra: stages.distill_stage(
            resolved, folder, loaded, max_length, work, max_minutes=max_minutes, **extra
        ),
    )
    lines = [f"{name:<8} {metrics_text(values)}" for name, values in record["metrics"].items()]
    show(record, as_json=json_, summary=[*lines, str(out)])


@app.command()
@stage
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or artifact.")],
    data: Data,
    task: TaskName = None,
    graph: Annotated[str, typer.Option(help="Artifact's graph: auto fp32 int8 fp16 fused fused-int8.")] = "auto",
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Print the task's metrics of a model on the dev split."""
    from bertemd_deploy.artifact import MANIFEST

    given: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(model)},
        "data": {"path": data, "task": task},
        "student": {"name": "4L"},
    }
    settings = options_to_recipe(None, given, set_).data
    if (model / MANIFEST).exists():
        from bertemd_deploy.classifier import evaluate_artifact

        record = evaluate_artifact(model, settings=settings, graph=graph)
    else:
        from bertemd_deploy.checkpoints import find_model
        from bertemd_deploy.evaluate import evaluate_model

        record = evaluate_model(find_model(str(model)), settings=settings)
    summary = f"dev {metrics_text(record['metrics'])} ({record['rows']:,} rows, {record['backend']})"
    show(record, as_json=json_, summary=[summary])


@app.command()
@stage
def export(
    student: Annotated[Path, typer.Argument(help="Student folder (Hugging Face, safetensors).")],
    out: Out,
    onnx: Annotated[bool, typer.Option("--onnx", help="Format of the artifact: ONNX, the only one there is.")] = True,
    quantize: Annotated[
        Quantize, typer.Option(help="Int8 with scales measured at each call, or known; float16; none.")
    ] = "dynamic",
    max_drop: Annotated[float, typer.Option(help="Points (0.01) of the task's metric int8 may lose.")] = 1.0,
    target: Annotated[
        str,
        typer.Option(help="CPUs that int8 has to be exact enough on: portable, auto (this one), x86-avx2, arm64, ..."),
    ] = "portable",
    exporter: Annotated[
        Literal["torchscript", "dynamo"] | None, typer.Option(help="Which of torch's ONNX exporters.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data for a student that was not distilled here.")] = None,
    task: TaskName = None,
    set_: Set = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Export a student to a parity-checked, accuracy-gated ONNX artifact."""
    from bertemd_deploy import stages
    from bertemd_deploy.artifact import Artifact

    given: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(student)},
        "data": {"path": data or "demo", "task": task},
        "student": {"name": "4L"},
        "export": {"exporter": exporter, "target": target},
        "quantize": {"mode": quantize, "max_drop": max_drop},
    }
    recipe = options_to_recipe(None, given, set_)
    folder = stages.export_stage(recipe, student, out, data=data, force=force)
    record = stages.export_record(Artifact.load(folder))
    lines = [f"{name:<12} {metrics_text(values)}" for name, values in record["metrics"].items()]
    sizes = [f"{name:<34} {size / 1e6:8.2f} MB" for name, size in record["bytes"].items()]
    show(record, as_json=json_, summary=[*lines, *sizes, str(folder)])


for _command in (cli_devices.bench, cli_devices.report, cli_devices.bundle, cli_devices.devices):
    app.command()(_command)


@app.command()
@stage
def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; without any, stdin line by line.")
    ] = None,
    pair: Annotated[
        bool,
        typer.Option("--pair", help="Each text is a pair (question and context, too), separated by a tab."),
    ] = False,
    graph: Annotated[str, typer.Option(help="auto fp32 int8 fp16 fused fused-int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [default: what this process may use].")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print what each text is or holds (a label, several, entities, an answer) with its probability, in order; - for none."""
    from bertemd_deploy.classifier import Classifier
    from bertemd_deploy.predictions import as_text

    classifier = Classifier.load(artifact, graph=graph, threads=threads)
    lines = iter(texts) if texts else _stdin_lines()
    try:
        for prediction in classifier.stream(_rows(lines, pair=pair)):
            record = classifier.record(prediction)
            line = json.dumps(record, ensure_ascii=False) if json_ else as_text(record)
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nothing to say, and nobody to say it to
        raise typer.Exit(0) from None


def _stdin_lines() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BertemdError(f"stdin line {number}: not UTF-8. Convert it, e.g. with iconv -t UTF-8.") from error


def _rows(lines: Iterator[str], *, pair: bool) -> Iterator[tuple[str] | tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if not pair:
            yield (line,)
            continue
        first, tab, second = line.partition("\t")
        if not tab:
            raise BertemdError(f"text {number}: --pair needs two texts separated by a tab, found one: {line[:60]!r}.")
        yield (first, second)


def main() -> None:
    """Run the command line."""
    app()
