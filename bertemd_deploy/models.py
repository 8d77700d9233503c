"""Models: load the teacher, build the student, and read what the layers of both compute.

Every weight that should be loaded is loaded, or it is an error. `LayerOutputs` holds
one forward pass: logits, hidden states (index 0 is the embedding), and the queries and keys from which attention scores
before the softmax come; both models keep their fast `sdpa` kernel.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bertemd_deploy.checkpoints import WEIGHTS, check_folder, find_model
from bertemd_deploy.config import StudentSettings
from bertemd_deploy.console import warn
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.files import new_folder
from bertemd_deploy.mapping import even_layers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Shape:
    """A student's sizes and where a student of this name starts; None takes the teacher's size."""

    layers: int
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    start: str = "teacher"


STUDENTS: dict[str, Shape] = {
    "4L-312": Shape(4, 312, 12, 1200, "huawei-noah/TinyBERT_General_4L_312D"),
    "6L-768": Shape(6, 768, 12, 3072),
    "4L": Shape(4),
    "6L": Shape(6),
}


@dataclass(frozen=True)
class LayerOutputs:
    """One forward pass; L layers.

    Attributes:
        logits: (B, outputs).
        embedding: (B, T, H), `hidden_states[0]`.
        hidden_states: (L, B, T, H), the layers' outputs.
        queries: (L, B, A, T, d) before scaling.
        keys: (L, B, A, T, d).
    """

    logits: Tensor
    embedding: Tensor
    hidden_states: Tensor
    queries: Tensor
    keys: Tensor


def load_classifier(folder: Path, *, labels: Sequence[str], new_head: bool = False) -> nn.Module:
    """Load a sequence classifier on the CPU, float32, `sdpa` attention, in eval mode.

    Args:
        folder: Hugging Face folder.
        labels: class names in order; empty for regression.
        new_head: allow a missing head (and pooler), which starts random.

    Raises:
        ModelError: an encoder weight is missing or of another shape, or (without `new_head`) the head is missing or has
            another number of outputs than the data.
    """
    from transformers import AutoModelForSequenceClassification

    config = check_folder(folder)
    outputs = len(labels) or 1
    extra: dict[str, Any] = {"num_labels": outputs, "ignore_mismatched_sizes": True} if new_head else {}
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
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


def student_shape(settings: StudentSettings, teacher: Mapping[str, Any]) -> Shape:
    """Return the student's sizes with the teacher's filled in, from the settings and the teacher's config.

    Raises:
        RecipeError: unknown name, or sizes that do not fit together or exceed the teacher's layers.
    """
    if settings.name is None:
        shape = Shape(settings.layers or 0, settings.hidden, settings.heads, settings.intermediate)
    elif settings.name in STUDENTS:
        shape = STUDENTS[settings.name]
    else:
        raise RecipeError(f"student.name: unknown {settings.name!r}; known: {', '.join(STUDENTS)}, or give the sizes.")
    hidden = shape.hidden or int(teacher["hidden_size"])
    heads = shape.heads or int(teacher["num_attention_heads"])
    shape = Shape(
        shape.layers,
        hidden,
        heads,
        shape.intermediate or (int(teacher["intermediate_size"]) if hidden == teacher["hidden_size"] else 4 * hidden),
        shape.start,
    )
    if shape.layers > int(teacher["num_hidden_layers"]):
        raise RecipeError(
            f"student: {shape.layers} layers, the teacher has {teacher['num_hidden_layers']}; a student is not deeper."
        )
    if hidden % heads:
        raise RecipeError(f"student: hidden {hidden} is not a multiple of heads {heads}.")
    return shape


def build_student(teacher: nn.Module, *, shape: Shape, init: str, seed: int) -> tuple[nn.Module, str]:
    """Return the student in eval mode and a sentence on where its weights come from.

    Args:
        teacher: the teacher's classifier, whose config (vocabulary, labels) the student shares.
        shape: full sizes, from `student_shape`.
        init: "auto" takes `shape.start`; "teacher", "random", or a checkpoint.
        seed: of the random weights.

    Raises:
        ModelError: the teacher's width differs where layers should be copied, or a checkpoint does not fit.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source: Any = teacher.config
    start = shape.start if init == "auto" else init
    fields = source.to_dict() | {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
    }
    fields.pop("_name_or_path", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").float()
    if start == "random":
        warn(
            "the student starts from RANDOM weights: expect far lower accuracy than from a checkpoint or teacher layers"
        )
        return student.eval(), "random weights"
    if start == "teacher":
        same = (shape.hidden, shape.heads, shape.intermediate)
        if same != (source.hidden_size, source.num_attention_heads, source.intermediate_size):
            raise ModelError(
                f"student: sizes {same} (hidden, heads, intermediate) differ from the teacher's "
                f"{(source.hidden_size, source.num_attention_heads, source.intermediate_size)}, so its layers cannot be "
                "copied. Set student.init to a checkpoint, or to random."
            )
        layers = even_layers(source.num_hidden_layers, shape.layers)
        _copy_weights(student, teacher.state_dict(), layers=layers, where="the teacher")
        return student.eval(), f"teacher layers {', '.join(str(at + 1) for at in layers)}"
    folder = find_model(start)
    stored = _encoder_weights(folder)
    _copy_weights(student, stored, layers=list(range(shape.layers)), where=str(folder), head=False)
    return student.eval(), f"checkpoint {start}"


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by the classifier's names (with the `bert.` prefix)."""
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    return {
        name if name.startswith(("bert.", "classifier.")) else f"bert.{name}": value for name, value in stored.items()
    }


def _copy_weights(
    student: nn.Module, stored: Mapping[str, Tensor], *, layers: Sequence[int], where: str, head: bool = True
) -> None:
    """Fill every weight of `student` from `stored`, layer j from `layers[j]`; none but the head may be left random."""
    mine = student.state_dict()
    absent = []
    for name, value in mine.items():
        source = name
        if name.startswith("bert.encoder.layer."):
            at, rest = name.removeprefix("bert.encoder.layer.").split(".", 1)
            source = f"bert.encoder.layer.{layers[int(at)]}.{rest}"
        given = stored.get(source)
        if given is not None and given.shape == value.shape:
            value.copy_(given)
        elif head or not name.startswith(("classifier.", "bert.pooler.")):
            absent.append(
                f"{source} ({'missing' if given is None else f'{tuple(given.shape)} for {tuple(value.shape)}'})"
            )
    if absent:
        raise ModelError(
            f"student: {len(absent)} weight(s) cannot be loaded from {where} and would be left random: "
            f"{', '.join(absent[:3])}{', …' if len(absent) > 3 else ''}. Choose a checkpoint of the student's sizes."
        )


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


class LayerReader:
    """Runs a BERT classifier and keeps what its layers computed, through hooks on the query and key projections."""

    def __init__(self, model: nn.Module) -> None:
        """Hook `model`; hooks stay for the reader's life."""
        self.model = model
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        encoder: Any = model.bert.encoder  # type: ignore[union-attr]
        self._heads = int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        for layer in encoder.layer:
            layer.attention.self.query.register_forward_hook(self._keep(self._queries))
            layer.attention.self.key.register_forward_hook(self._keep(self._keys))

    def _keep(self, store: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            batch, tokens, width = output.shape
            store.append(output.view(batch, tokens, self._heads, width // self._heads).transpose(1, 2))

        return hook

    def __call__(self, inputs: Mapping[str, Tensor]) -> LayerOutputs:
        """Run one batch (`input_ids`, `attention_mask`, `token_type_ids`, each (B, T) int64)."""
        self._queries.clear()
        self._keys.clear()
        output = self.model(**inputs, output_hidden_states=True)
        hidden = output.hidden_states
        return LayerOutputs(
            output.logits, hidden[0], torch.stack(hidden[1:]), torch.stack(self._queries), torch.stack(self._keys)
        )


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
