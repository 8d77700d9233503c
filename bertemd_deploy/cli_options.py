"""What the commands share: options, failures as messages and exit codes, records on stdout, recipes from options."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from bertemd_deploy.errors import BertemdError, RecipeError, UnfinishedError, missing_extra

_TRAIN_PACKAGES = {
    "torch",
    "transformers",
    "datasets",
    "ot",
    "scipy",
    "onnx",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
}
_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that holds something else; start over.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe key.")]
Out = Annotated[Path, typer.Option(help="Output folder.")]
Data = Annotated[str, typer.Option(help="glue/<task>, a folder with train.* and dev.*, or demo.")]
TaskName = Annotated[str | None, typer.Option(help="Task of a data folder, such as mrpc or regression.")]
MaxMinutes = Annotated[
    float | None, typer.Option(min=0.0, help="Stop training after so many minutes, to be continued [default: never].")
]

P = ParamSpec("P")


def stage(command: Callable[P, None]) -> Callable[P, None]:
    """Turn known failures and interrupts of a command into one message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BertemdError as error:
            _fail(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _TRAIN_PACKAGES:
                raise
            _fail(missing_extra("train", package=package))
        except KeyboardInterrupt:
            if not _follows():  # all stop together
                typer.echo(
                    "interrupted; what is finished is kept, the same command (without --force or --from) continues",
                    err=True,
                )
            raise typer.Exit(_INTERRUPTED) from None

    return wrapped


def _fail(error: BertemdError) -> None:
    """Say the error and exit; of several processes one says what is the same for all, and each what may be its own."""
    if not (_follows() and isinstance(error, RecipeError | UnfinishedError)):
        who = f"process {os.environ['RANK']}: " if _follows() else ""
        typer.echo(f"error: {who}{error}", err=True)
    raise typer.Exit(error.exit_code) from error


def _follows() -> bool:
    """Say whether this is one of several processes, and not the main one."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return rank.isdigit() and size.isdigit() and 0 < int(rank) < int(size)


def show(record: dict[str, Any], *, as_json: bool, summary: list[str]) -> None:
    """Print a record, or its summary lines, on stdout; of several processes the main one does."""
    if _follows():
        return
    typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(summary))


def metrics_text(metrics: dict[str, float]) -> str:
    """Return metrics as one line."""
    return " ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def options_to_recipe(path: Path | None, given: Mapping[str, Mapping[str, Any]], overrides: list[str] | None) -> Any:
    """Return a recipe from a file or nothing, with options that were given on top, then `--set` overrides."""
    from bertemd_deploy.config import load_recipe, options_recipe

    settings = [
        f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
        for section, body in given.items()
        for key, value in body.items()
        if value is not None
    ]
    if path is None:
        return options_recipe([*settings, *(overrides or [])])
    return load_recipe(path, overrides=[*settings, *(overrides or [])])
