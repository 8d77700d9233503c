"""Models as Hugging Face folders: load a classifier, name or reorder its outputs, save it whole.

Every weight that should be loaded is loaded, or it is an error; models keep the fast `sdpa` attention kernel where their
family has it.
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

from bertemd_deploy.checkpoints import WEIGHTS, check_folder, missing_head, no_head, output_names
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import family_of, known_inputs
from bertemd_deploy.files import new_folder
from bertemd_deploy.tasks import Kind

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def auto_class(kind: Kind) -> Any:
    """Return transformers' auto class whose head serves a kind of task."""
    import transformers

    name = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}.get(
        kind, "SequenceClassification"
    )
    return getattr(transformers, f"AutoModelFor{name}")


def read_config(folder: Path) -> Any:
    """Return a folder's transformers config, its defaults filled in, also where the file names no model type.

    Raises:
        ModelError: as `checkpoints.check_folder`.
    """
    import transformers

    stored = check_folder(folder)
    return transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(stored)


def output_logits(output: Any) -> Tensor:
    """Return a model output's logits: (B, outputs), (B, T, labels), or (B, T, 2) start and end for question answering."""
    logits = getattr(output, "logits", None)
    return torch.stack([output.start_logits, output.end_logits], -1) if logits is None else logits


def load_classifier(
    folder: Path, *, labels: Sequence[str], kind: Kind = "classification", new_head: bool = False
) -> nn.Module:
    """Load a task model on the CPU, float32, `sdpa` attention where its family has it, in eval mode.

    A model that tells no token types apart is never given `token_type_ids`, whoever calls it.

    Args:
        folder: Hugging Face folder.
        labels: class names in order; empty for regression and question answering.
        kind: of the task; decides which head the model has.
        new_head: allow a missing head (and pooler), which starts random.

    Raises:
        ModelError: an encoder weight is missing or of another shape, or (without `new_head`) the head is missing or has
            another number of outputs than the data.
    """
    stored = check_folder(folder)
    family = family_of(stored)
    outputs = 2 if kind == "question-answering" else len(labels) or 1
    if not new_head and (absent := missing_head(folder, kind)):
        raise no_head(folder, absent, kind)
    try:
        config = read_config(folder)
        if new_head:
            config.num_labels = outputs
        with quiet_transformers():
            model, info = auto_class(kind).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa" if family.sdpa else "eager",
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head,
            )
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged folder
        raise ModelError(f"{folder}: could not be loaded ({first_lines(error)}).") from error
    absent = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    encoder, pooler = f"{family.prefix}.", f"{family.prefix}.pooler."
    lost = [name for name in absent if name.startswith(encoder) and not name.startswith(pooler)]
    if lost:
        raise ModelError(
            f"{folder}: {len(lost)} weight(s) are missing from {WEIGHTS} and would be random: {', '.join(lost[:4])}"
            f"{', …' if len(lost) > 4 else ''}. The checkpoint does not hold this model."
        )
    if absent and not new_head:
        raise no_head(folder, absent, kind)
    if model.config.num_labels != outputs:
        raise ModelError(
            f"{folder}: the model has {model.config.num_labels} outputs ({_named(stored)}), the data needs {outputs} "
            f"({', '.join(labels) or 'regression'}). Use the data the model was trained for."
        )
    if "token_type_ids" not in known_inputs(stored):
        model.register_forward_pre_hook(_without_types, with_kwargs=True)
    return model.eval()  # type: ignore[no-any-return]  # transformers is untyped


def _without_types(_model: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {name: value for name, value in named.items() if name != "token_type_ids"}


def first_lines(error: Exception) -> str:
    """Return up to three lines of a library's message: what was found and what was allowed often follow the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or repr(error)


def set_labels(model: nn.Module, labels: Sequence[str], *, kind: Kind = "classification") -> None:
    """Write class names into a model's config, and what kind of outputs they are.

    Without labels the outputs are numbers: one for regression, those of start and end for question answering.
    """
    config: Any = model.config
    count = 2 if kind == "question-answering" else 1
    config.id2label = dict(enumerate(labels)) or {at: f"LABEL_{at}" for at in range(count)}
    config.label2id = {name: at for at, name in config.id2label.items()}
    if kind in ("token-classification", "question-answering"):
        config.problem_type = None  # transformers' name for what sequence heads answer
    elif kind == "multilabel":
        config.problem_type = "multi_label_classification"
    else:
        config.problem_type = "single_label_classification" if labels else "regression"


def output_layer(model: nn.Module) -> nn.Linear:
    """Return the last linear map of a task model's head, row k of which makes output k."""
    head: Any = model.qa_outputs if hasattr(model, "qa_outputs") else model.classifier
    return getattr(head, "out_proj", head)  # type: ignore[no-any-return]  # modules are untyped by name


def reorder_outputs(model: nn.Module, order: Sequence[int]) -> None:
    """Permute a task model's outputs so that output k is the data's label k."""
    if list(order) != list(range(len(order))):
        head = output_layer(model)
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


def _named(config: Mapping[str, Any]) -> str:
    return ", ".join(output_names(config, where="the model")[:6]) if config.get("id2label") else "unnamed"
