"""The sections of a recipe: frozen dataclasses in pipeline order, each field with its type, bounds and meaning.

`config` reads recipes into these and checks nothing but what stands here and how sections fit together.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16"]
Mapping = Literal["none", "uniform", "skip", "last", "emd-fixed", "emd"]
Augmentation = Literal["none", "dropout", "mlm"]
KeepEpoch = Literal["best", "last"]
FitLayers = Literal["auto", "always", "never"]
InitLayers = Literal["auto", "even", "first"] | tuple[int, ...]
CostScale = Literal["absolute", "relative"]
MappedLayers = Literal["auto", "all", "intermediate"]
STUDENT_NAMES = ("4L-312", "6L-768", "4L", "6L")
MAPPINGS: tuple[str, ...] = typing.get_args(Mapping)


def bounded(default: Any, low: float | None = None, high: float | None = None, *, above: bool = False) -> Any:
    """Declare a number with bounds; `above` makes the lower bound exclusive."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class TeacherSettings:
    """Where the teacher comes from, and how it is fine-tuned where it has no head for the task yet.

    Attributes:
        model: Hugging Face folder, hub id, or `package:IMPORT_NAME/sub/folder`.
        sha256: expected hash of its `model.safetensors`; null checks none.
        finetune: "auto" fine-tunes a checkpoint without a classification head, "always" any, "never" none.
        keep_epoch: whose weights: the "best" epoch on dev, or the "last", which leaves dev to measure on.
        precision: of matrix products in training; "auto" is bfloat16 where the processor has it (AVX512-BF16, AMX).
            Weights, optimiser, costs and losses stay float32.
        micro_batch_size: rows held in memory at once; null takes the whole batch. The result is the same up to rounding
            and dropout's draws.
    """

    model: str = ""
    sha256: str | None = None
    finetune: Literal["auto", "always", "never"] = "auto"
    epochs: int = bounded(3, 1, 1000)
    batch_size: int = bounded(32, 1, 4096)
    learning_rate: float = bounded(5e-5, 0, 1, above=True)
    warmup_ratio: float = bounded(0.1, 0, 1)
    weight_decay: float = bounded(0.01, 0, 1)
    seed: int = bounded(42, 0, 2**31)
    keep_epoch: KeepEpoch = "best"
    precision: Precision = "auto"
    micro_batch_size: int | None = bounded(None, 1, 4096)
    checkpoint_seconds: float = bounded(60.0, 0)


@dataclass(frozen=True)
class DataSettings:
    """The data set.

    Attributes:
        path: "demo", "glue/<task>", or a folder with train.* and dev.* (formats by task, see `data`).
        task: row of `tasks.TASKS`; null takes it from "glue/<task>" or "demo", and "classification" for a folder.
        max_length: longest input in tokens; null takes the task's.
        sentence1, sentence2, label: column names; null takes the task's. For token-classification sentence1 is the column
            of the tokens; for question-answering sentence1 is the question and sentence2 its context.
        doc_stride: tokens that neighbouring windows of a long context share (question-answering).
        train_limit: use this many train rows, drawn once with a fixed seed; null uses all.
    """

    path: str = ""
    task: str | None = None
    max_length: int | None = bounded(None, 4, 8192)
    sentence1: str | None = None
    sentence2: str | None = None
    label: str | None = None
    doc_stride: int = bounded(128, 0, 8192)
    train_limit: int | None = bounded(None, 1)


@dataclass(frozen=True)
class StudentSettings:
    """The student's shape and starting weights.

    Attributes:
        name: "4L-312", "6L-768", "4L" or "6L" (the teacher's width), or null with the four sizes given.
        init: "auto" (the name's own start, see `students.STUDENTS`), "teacher" (layers of the teacher), "random", or
            a checkpoint (folder, hub id, package).
        init_layers: which layers of the teacher, or of a deeper checkpoint, the student's are copied from: "even" takes evenly
            spaced ones, "first" the first ones, a list such as [1, 2, 4, 6] these (counted from 1). "auto" is "first" for
            copies of a teacher that adds scores of positions to its attention (MPNet), whose layers a BERT comes near to only
            where none is missing between them, and "even" for all others.
        fit_layers: whether layers copied from the teacher are fitted in closed form to what the teacher's compute, on some
            thousand tokens of train, before training: "auto" where the teacher adds scores of positions to its attention,
            which a copy lacks (MPNet), "always", or "never". Without effect on other starts; not kept where it does not help.
    """

    name: str | None = None
    layers: int | None = bounded(None, 1, 48)
    hidden: int | None = bounded(None, 8, 8192)
    heads: int | None = bounded(None, 1, 128)
    intermediate: int | None = bounded(None, 8, 65536)
    init: str = "auto"
    init_layers: InitLayers = "auto"
    fit_layers: FitLayers = "auto"


@dataclass(frozen=True)
class DistillSettings:
    """Distillation, by the names of the method.

    Attributes:
        mapping: which teacher layers a student layer learns from.
        beta, theta, alpha: weights of the total loss, L = beta (theta (EMD_H + EMD_A) + L_emb) + L_pred. The published beta
            (0.001 and 0.005) belongs to the published cost_scale and reduction.
        temperature: tau_kd of the prediction loss.
        reduction: "batch" sums over classes and takes the mean over the batch; "element" is the mean over both, to
            which the published beta belongs.
        cost_attention: form of the marginals' update; emd_temperature (T_emd) belongs to "softmax".
        marginal_momentum: share of the marginals that a step keeps; 0 replaces them at every step, as published, and lets
            them swing.
        separate_marginals: keep attention and hidden marginals apart instead of averaging them.
        transported_mass: share of the teacher layers' mass that a flow moves; 1 moves all, as published. With less, every
            student layer still learns its share, and teacher layers that none of them resembles are left alone. null moves
            N' / M' of it, for N' student and M' teacher layers in the flow, where the student's layers are copies of
            the teacher's, and all of it where they are fitted or come from elsewhere (`LayerMapping.of`).
        mapped_layers: "all", as published, or "intermediate": the last layers of both models, which the prediction loss
            serves, are left out of the flow (`emd` and `emd-fixed`; `skip` and `last` leave the student's out anyway).
            "auto" leaves them out where the student's layers, two or more, are copies of the teacher's.
        cost_scale: "absolute", as published, or "relative" to the mean square of the teacher layer, which weighs attention
            and hidden states, and early and late layers, alike. L_emb stays absolute.
        dropout: of the student's hidden states and attention; null takes the teacher's.
        hidden_projection: learn W also where the widths agree (it starts as the identity).
        precision: of matrix products in training, as in `TeacherSettings`.
        micro_batch_size: rows held in memory at once; null takes the whole batch. The result is the same up to rounding
            and dropout's draws: costs of all parts are joined before a flow is solved, at the price of a second forward
            pass.
        teacher_cache_bytes: disk space for the teacher's outputs, kept from the first epoch on where reading them back is
            measured to be faster than computing them; 0 keeps none.
        augmentation: "dropout" adds copies of the train rows with tokens left out, "mlm" copies with tokens replaced by
            what a masked language model finds likely.
        augmentation_copies: copies of every train row.
        augmentation_rate: share of a row's tokens that are changed.
        quant_aware: the last `quant_aware_epochs` epochs train the student as its static int8 graph will compute; export with
            quantize.mode static takes the ranges learnt there.
        keep_epoch: as in `TeacherSettings`.
        checkpoint_seconds: longest time between two resumable checkpoints.
    """

    mapping: Mapping = "emd"
    epochs: int = bounded(10, 1, 1000)
    batch_size: int = bounded(32, 1, 4096)
    learning_rate: float = bounded(2e-5, 0, 1, above=True)
    warmup_ratio: float = bounded(0.1, 0, 1)
    weight_decay: float = bounded(0.01, 0, 1)
    max_grad_norm: float = bounded(1.0, 0, above=True)
    beta: float = bounded(16.0, 0)
    theta: float = bounded(1.0, 0)
    alpha: float = bounded(1.0, 0, 1)
    temperature: float = bounded(1.0, 0, 100, above=True)
    reduction: Literal["batch", "element"] = "batch"
    cost_attention: Literal["ratio", "softmax"] = "ratio"
    emd_temperature: float = bounded(1.0, 0, above=True)
    marginal_momentum: float = bounded(0.9, 0, 0.999)
    separate_marginals: bool = False
    transported_mass: float | None = bounded(None, 0.02, 1)
    mapped_layers: MappedLayers = "auto"
    cost_scale: CostScale = "relative"
    dropout: float | None = bounded(None, 0, 0.9)
    hidden_projection: bool = False
    micro_batch_size: int | None = bounded(None, 1, 4096)
    teacher_cache_bytes: int = bounded(0, 0)
    augmentation: Augmentation = "none"
    augmentation_copies: int = bounded(1, 1, 100)
    augmentation_rate: float = bounded(0.15, 0, 1, above=True)
    quant_aware: bool = False
    quant_aware_epochs: int = bounded(1, 1, 1000)
    seed: int = bounded(42, 0, 2**31)
    keep_epoch: KeepEpoch = "best"
    precision: Precision = "auto"
    logging_steps: int = bounded(10, 1)
    checkpoint_seconds: float = bounded(60.0, 0)


@dataclass(frozen=True)
class ExportSettings:
    """How torch becomes ONNX, and for what.

    Attributes:
        exporter: which of torch's two.
        opset: ONNX operator set.
        target: the CPUs that int8 graphs have to keep the accuracy on (a row of `targets.TARGETS`); "auto" is this machine's
            kind, "portable" any.
        vocabulary: most tokens to keep of the student's vocabulary, or "corpus" for those that train uses; null keeps all.
        tokenizer_inside: also write a graph that takes texts (needs onnxruntime-extensions).
    """

    exporter: Literal["torchscript", "dynamo"] = "torchscript"
    opset: int = bounded(17, 17, 21)
    target: str = "portable"
    vocabulary: int | Literal["corpus"] | None = bounded(None, 1)
    tokenizer_inside: bool = False


@dataclass(frozen=True)
class QuantizeSettings:
    """How graphs become smaller and faster, and what that may cost on the dev set.

    Attributes:
        mode: int8 with activation scales measured at each call ("dynamic") or known beforehand ("static"); "float16" for
            GPUs; or none.
        max_drop: points (0.01) of the task's first metric that a graph may lose.
        max_changed: percent of the decisions that padding and batch mates may change in a dynamic graph; no other may
            change any.
        embedding_bits: of the table of words, 8 or 4.
        float16_on_cpu: write float16 graphs though every target is a CPU, where they are slower than fp32.
    """

    mode: Literal["dynamic", "static", "float16", "none"] = "dynamic"
    max_drop: float = bounded(1.0, 0, 100)
    max_changed: float = bounded(5.0, 0, 100)
    embedding_bits: Literal[8, 4] = 8
    float16_on_cpu: bool = False


@dataclass(frozen=True)
class BenchSettings:
    """What is measured: every sequence length at every batch size and thread count, for every graph.

    Attributes:
        sequence_lengths: tokens, or "max" for the artifact's longest input.
        threads: thread counts, or "all" for every CPU this process may use.
        rounds: how often the models take turns.
        seconds_per_cell: time for one model in one cell, over all rounds.
        replay: also run the dev set's real lengths.
        end_to_end: also time these from text to decision.
        graphs: which of the artifact's graphs; null takes all it holds.
        devices: where: "local", names of `bertemd devices`, or ssh://user@host addresses.
        device_file: YAML file of further devices.
        strict: a noisy measurement is a failure.
        paced_interval_ms: time between two requests where they come one by one, as on a device in use; 0 leaves it out.
        paced_requests: how many of these, for every model.
        idle_seconds: for how long waiting threads' CPU time is watched; 0 leaves it out.
        arena: also measure memory without ONNX Runtime's memory arena.
    """

    sequence_lengths: tuple[int | Literal["max"], ...] = (16, 32, 64, 128, "max")
    batch_sizes: tuple[int, ...] = (1, 8)
    threads: tuple[int | Literal["all"], ...] = (1, "all")
    rounds: int = bounded(5, 2, 1000)
    seconds_per_cell: float = bounded(0.4, 0, above=True)
    replay: bool = True
    end_to_end: bool = True
    graphs: tuple[str, ...] | None = None
    devices: tuple[str, ...] = ("local",)
    device_file: str | None = None
    strict: bool = False
    paced_interval_ms: float = bounded(100.0, 0)
    paced_requests: int = bounded(20, 2, 10_000)
    idle_seconds: float = bounded(1.0, 0, 60)
    arena: bool = True
    seed: int = bounded(0, 0, 2**31)
