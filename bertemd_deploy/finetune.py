"""A task teacher from a pretrained encoder: plain fine-tuning with the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bertemd_deploy.batching import Batch
from bertemd_deploy.checkpoints import checked_encoder
from bertemd_deploy.data import Dataset
from bertemd_deploy.evaluate import dev_metrics
from bertemd_deploy.families import known_inputs
from bertemd_deploy.kernels import quicken
from bertemd_deploy.losses import supervised_losses
from bertemd_deploy.models import load_classifier, output_logits, save_model, set_labels
from bertemd_deploy.position_codes import hold_codes
from bertemd_deploy.processes import join_processes
from bertemd_deploy.settings import TeacherSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.training import Outcome, Schedule, fit
from bertemd_deploy.training_device import matrix_precision, training_device, trains_in_bfloat16


def finetune(
    model_folder: Path,
    *,
    data: Dataset,
    max_length: int,
    settings: TeacherSettings,
    out: Path,
    checkpoints: Path,
    log: Path,
    beside: Callable[[Path, dict[str, Any]], None] | None = None,
    max_minutes: float | None = None,
) -> dict[str, Any]:
    """Fine-tune the encoder in `model_folder` on `data` and save the best epoch to `out` as a Hugging Face folder.

    Args:
        model_folder: pretrained encoder, with or without a head.
        data: train and dev splits.
        max_length: longest input in tokens.
        settings: epochs, batch size, learning rate, seed.
        out: folder of the teacher.
        checkpoints: resumable state; continued when present, removed at the end.
        log: JSON-lines training log.
        beside: called with the new teacher folder before it appears, and the record, to write more files into it.
        max_minutes: stop after so long, to be continued; None never stops.

    Returns:
        The record: dev metrics of the best epoch, epochs, steps, rows.

    Raises:
        ModelError: the checkpoint does not fit.
        TrainingError: the loss is not finite.
        UnfinishedError: `max_minutes` are over.
    """
    processes = join_processes()
    encoder = checked_encoder(model_folder, max_length=max_length)
    kind = data.task.kind
    train, dev = data.splits["train"].encode(encoder), data.splits["dev"].encode(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # the new head's weights
        model = load_classifier(model_folder, labels=data.labels, kind=kind, new_head=True)
    set_labels(model, data.labels, kind=kind)
    hold_codes(model)
    device = training_device()
    model.to(device)
    quicken(model)
    done = fit(
        model,
        schedule=Schedule(
            settings.epochs,
            settings.batch_size,
            settings.learning_rate,
            settings.warmup_ratio,
            settings.weight_decay,
            settings.seed,
            checkpoint_seconds=settings.checkpoint_seconds,
            micro_batch_size=settings.micro_batch_size,
            max_minutes=max_minutes,
            best_from=settings.epochs if settings.keep_epoch == "last" else 1,
        ),
        data=train,
        pad_id=encoder.pad_id,
        objective=SupervisedObjective(model, kind=kind, bfloat16=trains_in_bfloat16(settings.precision)),
        evaluate=lambda: dev_metrics(
            model, dev, task=data.task, pad_id=encoder.pad_id, names=data.labels, processes=processes
        ),
        metric=data.task.metrics[0],
        checkpoints=checkpoints,
        log=log,
        name=f"finetune {model_folder.name}",
        processes=processes,
    )
    record = {
        "metrics": done.epochs[done.best_epoch - 1],
        "best_epoch": done.best_epoch,
        "epochs": settings.epochs,
        "steps": done.step,
        "rows": len(data.splits["train"]),
        "model": model_folder.name,
    }
    processes.wait()  # the others have read what is about to be replaced
    if processes.main:
        save_model(
            model.cpu(),
            out,
            tokenizer_from=model_folder,
            beside=None if beside is None else lambda folder: beside(folder, record),
        )
    processes.wait()
    return record


class SupervisedObjective:
    """One step of plain fine-tuning: the mean loss against the labels."""

    def __init__(self, model: nn.Module, *, kind: Kind, bfloat16: bool) -> None:
        """Take the model on its device, the kind of task, and whether matrix products are bfloat16."""
        self.model, self.kind, self.bfloat16 = model, kind, bfloat16
        self.device = next(model.parameters()).device
        self.known = known_inputs(model.config.to_dict())  # type: ignore[union-attr, operator]

    def __call__(self, batch: Batch) -> Outcome:
        """Run the batch's parts and leave this process's share of the gradients in the parameters."""
        total = torch.zeros((), device=self.device)
        for part, seed in zip(batch.parts, batch.seeds, strict=True):
            torch.manual_seed(seed)
            given = {name: value for name, value in part.inputs.items() if name in self.known}
            with matrix_precision(self.device, bfloat16=self.bfloat16):
                logits = output_logits(self.model(**given))
            mask = part.inputs["attention_mask"].bool()
            loss = supervised_losses(self.kind, logits, part.labels, mask=mask).sum() / batch.units
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.detach()
        return Outcome(total, {}, dict)
