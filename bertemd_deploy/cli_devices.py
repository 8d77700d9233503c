"""The commands about places that a student is shipped to: bench, report, bundle, devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bertemd_deploy.cli_options import Force, Json, Out, Set, options_to_recipe, show, stage
from bertemd_deploy.errors import RecipeError

Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact folder.")]
Teacher = Annotated[str | None, typer.Option(help="Teacher to compare with: folder, hub id, or package:…")]
DeviceFile = Annotated[Path | None, typer.Option("--devices", metavar="FILE", help="YAML file of devices of your own.")]
Baseline = Annotated[
    Path | None,
    typer.Option(metavar="RECORD", help="Earlier record.json; a number that is worse ends with exit code 4."),
]


@stage
def bench(
    artifact: Artifact,
    out: Out,
    teacher: Teacher = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name of `bertemd devices`, or ssh://user@host[:port] [default: local]."),
    ] = None,
    devices: DeviceFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="A noisy measurement ends with exit code 3.")] = False,
    max_p95_ms: Annotated[str | None, typer.Option(metavar="MS", help="Budget: p95 latency at batch 1.")] = None,
    max_rss_mb: Annotated[str | None, typer.Option(metavar="MB", help="Budget: peak memory of the process.")] = None,
    max_size_mb: Annotated[str | None, typer.Option(metavar="MB", help="Budget: size of the graph's file.")] = None,
    min_retention: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Budget: share of the teacher's metric, such as 0.97 or 97%.")
    ] = None,
    baseline: Baseline = None,
    set_: Set = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Measure latency, memory and accuracy of an artifact against its teacher, here or on other devices."""
    from bertemd_deploy.bench.places import bench_places
    from bertemd_deploy.budget import enforce_records, read_budget
    from bertemd_deploy.config import parse_yaml
    from bertemd_deploy.files import read_json

    given: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(teacher or artifact)},
        "data": {"path": "demo"},
        "student": {"name": "4L"},
        "bench": {"devices": device, "device_file": devices and str(devices), "strict": strict or None},
    }
    recipe = options_to_recipe(None, given, set_)
    texts = {
        "max_p95_ms": max_p95_ms,
        "max_rss_mb": max_rss_mb,
        "max_size_mb": max_size_mb,
        "min_retention": min_retention,
    }
    flags = {
        key: parse_yaml(text, where=f"--{key.replace('_', '-')}") for key, text in texts.items() if text is not None
    }
    if empty := [key for key, value in flags.items() if value is None]:
        raise RecipeError(f"--{empty[0].replace('_', '-')} is empty. Give a limit, or leave it out.")
    folder = None
    if teacher is not None:
        from bertemd_deploy.checkpoints import find_model

        folder = find_model(teacher)
    done = bench_places(
        artifact,
        teacher=folder,
        out=out,
        settings=recipe.bench,
        budgets=read_budget(recipe.budget),
        flags=flags,
        baseline=baseline,
        force=force,
    )
    records = [read_json(path, what="bench record") for path in done.paths]
    shown = records[0] if len(records) == 1 else {"records": records}
    lines = [line.get("words") for record in records for line in (record.get("budget") or {}).get("lines", [])]
    if records:
        show(shown, as_json=json_, summary=[*map(str, lines), *map(str, done.paths)])
    done.check()
    enforce_records(records)


@stage
def report(
    records: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...", help="record.json files of one or more devices, or students of one teacher."
        ),
    ],
    out: Out,
    baseline: Baseline = None,
    card: Annotated[
        Path | None, typer.Option(metavar="ARTIFACT", help="Artifact whose model card gets the measured table.")
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Merge bench records into one page: HTML, Markdown and JSON."""
    from bertemd_deploy.files import read_json
    from bertemd_deploy.handout import add_measured, check_measured
    from bertemd_deploy.report import enforce, model_card_table
    from bertemd_deploy.report import report as write

    if card is not None:
        check_measured(card, [read_json(path, what="bench record") for path in records])
    page = write(records, out=out, force=force, baseline=baseline)
    if card is not None:
        add_measured(card, model_card_table([read_json(path, what="bench record") for path in records]))
    show({"page": str(page)}, as_json=json_, summary=[str(page)])
    enforce(out)


@stage
def bundle(
    artifact: Artifact,
    out: Out,
    for_: Annotated[
        Literal["device", "triton", "onnxruntime-node", "fastapi-docker", "python"],
        typer.Option("--for", help="What it is to run in; device is a folder that measures where it is carried to."),
    ] = "device",
    teacher: Annotated[
        str | None, typer.Option(help="With --for device: teacher whose graph is measured beside, as in bench.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --for device: the device it is carried to.")
    ] = None,
    devices: DeviceFile = None,
    set_: Set = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write a ready folder: to measure on another device by hand, or to serve the student with other software."""
    if for_ == "device":
        from bertemd_deploy.devices import find_device, load_devices
        from bertemd_deploy.remote.folder import write_runner

        given: dict[str, dict[str, Any]] = {
            "teacher": {"model": str(teacher or artifact)},
            "data": {"path": "demo"},
            "student": {"name": "4L"},
        }
        settings = options_to_recipe(None, given, set_).bench
        place = find_device(device, load_devices(devices)) if device is not None else None
        folder = None
        if teacher is not None:
            from bertemd_deploy.checkpoints import find_model

            folder = find_model(teacher)
        made = write_runner(artifact, out, settings=settings, device=place, teacher=folder, force=force)
        lines = [str(made), "there: python3 run.py, then carry record.json back to `bertemd report`"]
    else:
        from bertemd_deploy.handoff import write_bundle

        unused = {"--teacher": teacher, "--device": device, "--devices": devices, "--set": set_}
        if idle := [name for name, value in unused.items() if value]:
            raise RecipeError(f"bundle: {', '.join(idle)} only acts with --for device; leave it out.")
        made = write_bundle(artifact, kind=for_, out=out, force=force)
        lines = [str(made)]
    show({"bundle": str(made), "for": for_}, as_json=json_, summary=lines)


@stage
def devices(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One device, with the source of every fact.")
    ] = None,
    file: DeviceFile = None,
    json_: Json = False,
) -> None:
    """List the devices that a student can be measured or estimated for."""
    from bertemd_deploy.devices import device_record, device_text, devices_table, find_device, load_devices

    known = load_devices(file)
    if name is not None:
        device = find_device(name, known)
        typer.echo(json.dumps(device_record(device), ensure_ascii=False) if json_ else device_text(device))
        return
    records = [device_record(device) for device in known.values()]
    typer.echo(json.dumps(records, ensure_ascii=False) if json_ else devices_table(known))
