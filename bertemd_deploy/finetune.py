"""A task teacher from a pretrained encoder: plain fine-tuning with the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertemd_deploy.bench.environment import uses_bfloat16
from bertemd_deploy.checkpoints import checked_encoder
from bertemd_deploy.config import TeacherSettings
from bertemd_deploy.data import Dataset
from bertemd_deploy.evaluate import dev_metrics
from bertemd_deploy.models import load_classifier, save_model, set_labels
from bertemd_deploy.training import Schedule, Step, fit


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

    Returns:
        The record: dev metrics of the best epoch, epochs, steps, rows.

    Raises:
        ModelError: the checkpoint does not fit.
        TrainingError: the loss is not finite.
    """
    encoder = checked_encoder(model_folder, max_length=max_length)
    train, dev = data.splits["train"].encode(encoder), data.splits["dev"].encode(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # the new head's weights
        model = load_classifier(model_folder, labels=data.labels, new_head=True)
    set_labels(model, data.labels)
    regression = data.task.kind == "regression"

    def step(inputs: dict[str, Tensor], labels: Tensor) -> Step:
        logits = model(**inputs).logits
        loss = F.mse_loss(logits[:, 0], labels) if regression else F.cross_entropy(logits, labels)
        return Step(loss, dict)

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
            bfloat16=uses_bfloat16(settings.precision),
        ),
        data=train,
        pad_id=encoder.pad_id,
        step=step,
        evaluate=lambda: dev_metrics(model, dev, task=data.task, pad_id=encoder.pad_id),
        metric=data.task.metrics[0],
        checkpoints=checkpoints,
        log=log,
        name=f"finetune {model_folder.name}",
    )
    record = {
        "metrics": done.epochs[done.best_epoch - 1],
        "best_epoch": done.best_epoch,
        "epochs": settings.epochs,
        "steps": done.step,
        "rows": len(train.labels),
        "model": model_folder.name,
    }
    save_model(
        model,
        out,
        tokenizer_from=model_folder,
        beside=None if beside is None else lambda folder: beside(folder, record),
    )
    return record
