"""Models as Hugging Face folders: load a classifier, name or reorder its outputs, save it whole.

Every weight that should be loaded is loaded, or it is an error; models keep their fast `sdpa` attention kernel.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bertemd_deploy.checkpoints import WEIGHTS, check_folder
from bertemd_deploy.errors import ModelError
from bertemd_deploy.files import new_folder
from bertemd_deploy.tasks import Kind

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def auto_class(kind: Kind) -> Any:
    """Return transformers' auto class whose head serves a kind of task."""
    import transformers

    name = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}.get(
        kind, "SequenceClassification"
    )
    return getattr(transformers, f"AutoModelFor{name}")


def output_logits(output: Any) -> Tensor:
    """Return a model output's logits: (B, outputs), (B, T, labels), or (B, T, 2) start and end for question answering."""
    logits = getattr(output, "logits", None)
    return torch.stack([output.start_logits, output.end_logits], -1) if logits is None else logits


def load_classifier(
    folder: Path, *, labels: Sequence[str], kind: Kind = "classification", new_head: bool = False
) -> nn.Module:
    """Load a task model on the CPU, float32, `sdpa` attention, in eval mode.

    Args:
        folder: Hugging Face folder.
        labels: class names in order; empty for regression and question answering.
        kind: of the task; decides which head the model has.
        new_head: allow a missing head (and pooler), which starts random.

    Raises:
        ModelError: an encoder weight is missing or of another shape, or (without `new_head`) the head is missing or has
            another number of outputs than the data.
    """
    config = check_folder(folder)
    outputs = 2 if kind == "question-answering" else len(labels) or 1
    extra: dict[str, Any] = {"num_labels": outputs, "ignore_mismatched_sizes": True} if new_head else {}
    try:
        with quiet_transformers():
            model, info = auto_class(kind).from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa",
                dtype=torch.float32,
                output_loading_info=True,
                **extra,
            )
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged folder
        raise ModelError(f"{folder}: could not be loaded ({str(error).strip().splitlines()[0][:200]}).") from error
    absent = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    lost = [name for name in absent if not name.startswith(("classifier.", "bert.pooler."))]
    if lost:
        raise ModelError(
            f"{folder}: {len(lost)} weight(s) are missing from {WEIGHTS} and would be random: {', '.join(lost[:4])}"
            f"{', …' if len(lost) > 4 else ''}. The checkpoint does not hold this model."
        )
    if absent and not new_head:
        raise ModelError(
            f"{folder}: no classification head ({', '.join(absent)} missing). Fine-tune it first: `bertemd finetune`, "
            "or teacher.finetune: auto in a recipe."
        )
    if model.config.num_labels != outputs:
        raise ModelError(
            f"{folder}: the model has {model.config.num_labels} outputs ({_names(config)}), the data needs {outputs} "
            f"({', '.join(labels) or 'regression'}). Use the data the model was trained for."
        )
    return model.eval()  # type: ignore[no-any-return]  # transformers is untyped


def set_labels(model: nn.Module, labels: Sequence[str]) -> None:
    """Write class names into a model's config, or mark it as a regression model."""
    config: Any = model.config
    config.id2label = dict(enumerate(labels)) or {0: "LABEL_0"}
    config.label2id = {name: at for at, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if labels else "regression"


def reorder_outputs(model: nn.Module, order: Sequence[int]) -> None:
    """Permute a classifier's outputs so that output k is the data's label k."""
    if list(order) != list(range(len(order))):
        head: Any = model.classifier
        with torch.no_grad():
            head.weight.copy_(head.weight[list(order)].clone())
            head.bias.copy_(head.bias[list(order)].clone())


def save_model(
    model: nn.Module, out: Path, *, tokenizer_from: Path, beside: Callable[[Path], None] | None = None
) -> None:
    """Write a Hugging Face folder, whole or not at all: config, safetensors, and the tokenizer's files.

    Args:
        model: the classifier.
        out: folder to write; replaced if it exists.
        tokenizer_from: folder whose tokenizer files are copied.
        beside: called with the temporary folder, to write more files into it before it appears.

    Raises:
        ArtifactError: the operating system refused a write (full disk); `out` is as it was.
    """
    with new_folder(out) as partial:
        try:
            with quiet_transformers():
                model.save_pretrained(partial, safe_serialization=True)  # type: ignore[operator]
        except SafetensorError as error:  # how the Rust side reports a full disk
            raise OSError(str(error)) from error
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, partial / name)
        if beside is not None:
            beside(partial)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's progress bars and load reports; what matters of them is checked and raised here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _names(config: Mapping[str, Any]) -> str:
    stored = config.get("id2label") or {}
    return ", ".join(str(stored[key]) for key in sorted(stored, key=int)[:6]) or "unnamed"
