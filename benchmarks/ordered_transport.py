"""An idea beyond the paper, tried: transport that prefers to keep the order of layers. Result in README.md.

    python benchmarks/ordered_transport.py --task cola=FOLDER --task mrpc=FOLDER --model ENCODER --work FOLDER --out FILE

Cost attention may carry flow from a late teacher layer to an early student layer. Here the flow is solved on
    C[i, j] / mean(C) + strength * ((i + 1/2) / M - (j + 1/2) / N)^2
layers are weighed by the same costs, and the loss stays <F, C>. Everything else is `mapping: emd`. A teacher is fine-tuned for
each task, then a student per variant and seed is distilled from the same start with the same batches. What is finished is
kept in --work and not done again; --out is written after every student. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - found through the line above
from torch import Tensor  # noqa: E402

from bertemd_deploy import distill as stage  # noqa: E402
from bertemd_deploy import pipeline, stages  # noqa: E402
from bertemd_deploy.bench.environment import device, versions  # noqa: E402
from bertemd_deploy.config import options_recipe  # noqa: E402
from bertemd_deploy.errors import BertemdError  # noqa: E402
from bertemd_deploy.files import write_json  # noqa: E402
from bertemd_deploy.mapping import LayerMapping  # noqa: E402
from bertemd_deploy.stage_inputs import distill_inputs, finetune_inputs  # noqa: E402

VARIANTS = ("emd", "ordered")
PUBLISHED = (
    "distill.beta=0.005",
    "distill.cost_scale=absolute",
    "distill.marginal_momentum=0",
    "distill.transported_mass=1",
    "distill.mapped_layers=all",
)


def order_penalty(teacher_layers: int, student_layers: int) -> Tensor:
    """Return the (M, N) squared distances of relative depths, in [0, 1)."""
    depths = [(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in (teacher_layers, student_layers)]
    return (depths[0][:, None] - depths[1][None, :]).square()


def ordered(strength: float) -> type[LayerMapping]:
    """Return the mapping `emd` with flows that prefer to keep the layers' order."""

    class OrderedMapping(LayerMapping):
        def step(self, costs: Tensor | None = None) -> dict[str, Tensor]:
            if costs is None:
                return super().step(costs)
            costs = costs.detach().to("cpu", torch.float64)
            penalty = strength * order_penalty(self.teacher_layers, self.student_layers)
            plain = [cost / cost.mean() for cost in costs]
            return super().step(torch.stack([cost + penalty for cost in plain]))

    return OrderedMapping


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing and return the record."""
    record: dict[str, Any] = {
        "idea": "order-preserving transport",
        "strength": options.strength,
        "epochs": options.epochs,
        "teacher_epochs": options.teacher_epochs,
        "train_limit": options.train_limit,
        "device": device(),
        "versions": versions(("torch", "transformers", "numpy")),
        "students": [],
    }
    for task in options.task:
        name, _, folder = task.partition("=")
        recipe = options_recipe(
            [
                f"teacher.model={options.model}",
                f"teacher.epochs={options.teacher_epochs}",
                f"data.path={folder}",
                f"data.task={name}",
                f"data.train_limit={options.train_limit}",
                "student.name=4L",
                f"distill.epochs={options.epochs}",
                "distill.learning_rate=5e-5",
                *PUBLISHED,
            ]
        )
        data, max_length = stages.load_recipe_data(recipe.data)
        teacher = options.work / f"{name}-teacher"
        shared = {"data": data.sha256, "max_length": max_length}
        pipeline.stand_alone(
            "finetune",
            teacher,
            inputs=finetune_inputs(recipe, Path(options.model), shared),
            force=False,
            train=lambda work, **more: stages.finetune_stage(recipe, data, max_length, work, **more),  # noqa: B023
        )
        for seed in options.seeds:
            for variant in VARIANTS:
                one = options_recipe([*_lines(recipe), f"distill.seed={seed}"])
                kind = ordered(options.strength) if variant == "ordered" else LayerMapping
                with mock.patch.object(stage, "LayerMapping", kind):
                    result = pipeline.stand_alone(
                        "distill",
                        options.work / f"{name}-{variant}-{seed}",
                        inputs=distill_inputs(one, teacher, shared) | {"variant": variant},
                        force=False,
                        train=lambda work, **more: stages.distill_stage(
                            one, teacher, data, max_length, work, **more  # noqa: B023
                        ),
                    )  # fmt: skip
                record["students"].append(
                    {"task": name, "variant": variant, "seed": seed} | {"metrics": result["metrics"]}
                )
                write_json(options.out, record)
    return record


def _lines(recipe: Any) -> list[str]:
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, body in recipe.to_dict().items()
        for key, value in body.items()
        if value is not None
    ]


def print_table(record: dict[str, Any]) -> None:
    """Print each task's first metric by variant and seed, and the paired differences."""
    for task in dict.fromkeys(row["task"] for row in record["students"]):
        rows = [row for row in record["students"] if row["task"] == task]
        metric = next(iter(rows[0]["metrics"]["student"]))
        scores = {
            variant: [row["metrics"]["student"][metric] for row in rows if row["variant"] == variant]
            for variant in VARIANTS
        }
        print(f"{task} {metric}: teacher {rows[0]['metrics']['teacher'][metric]:.4f}")
        for variant, values in scores.items():
            print(f"  {variant:8s} {' '.join(f'{value:.4f}' for value in values)}  mean {statistics.mean(values):.4f}")
        gaps = [new - old for new, old in zip(scores["ordered"], scores["emd"], strict=True)]
        spread = f" sd {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
        print(f"  ordered - emd: mean {statistics.mean(gaps):+.4f}{spread}, better on {sum(gap > 0 for gap in gaps)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", required=True, help="name=folder, such as cola=data/CoLA")
    parser.add_argument("--model", required=True, help="pretrained encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-limit", type=int, default=2500, help="train rows of each task")
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--strength", type=float, default=4.0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    try:
        print_table(measure(parser.parse_args()))
    except BertemdError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
