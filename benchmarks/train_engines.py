"""The processes that `train_step.py` measures: one engine each, answering one JSON command a line on stdin.

    python benchmarks/train_engines.py ENGINE SETTINGS    (started by train_step.py; SETTINGS is JSON)

An engine is a way to make one distillation step: the released one, or ours at some precision and padding. All have the same
random weights (timings do not depend on them) and see the same rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from released_step import ATTENTION, ReleasedStep  # noqa: E402 - found through the line above

from bertemd_deploy import training  # noqa: E402
from bertemd_deploy.artifact import DataSlice  # noqa: E402
from bertemd_deploy.batching import Batch, Batching  # noqa: E402
from bertemd_deploy.data import load_data, training_batches  # noqa: E402
from bertemd_deploy.encoding import Encoded, TextEncoder  # noqa: E402
from bertemd_deploy.kernels import quicken  # noqa: E402
from bertemd_deploy.mapping import LayerMapping  # noqa: E402
from bertemd_deploy.objective import Distiller, Objective  # noqa: E402
from bertemd_deploy.processes import Processes  # noqa: E402
from bertemd_deploy.settings import DistillSettings  # noqa: E402
from bertemd_deploy.training_device import keep_products_in_bfloat16, trains_in_bfloat16  # noqa: E402

BERT_BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
SHAPES = {
    "bert-base": BERT_BASE,
    "4L-312": {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200},
    "6L-768": BERT_BASE | {"num_hidden_layers": 6},
}
SMOKE_SHAPES = {
    "bert-base": {"num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48},
    "4L-312": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    "6L-768": {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48},
}
VOCABULARY = 30522
# Lengths in tokens of the train rows, at every 5th percentile from 0 to 100, by BERT's uncased vocabulary.
LENGTHS = {
    "rte": (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 135, 157, 289),
    "mrpc": (19, 32, 36, 39, 41, 44, 45, 47, 50, 51, 53, 55, 57, 59, 61, 62, 64, 67, 70, 74, 103),
    "cola": (4, 6, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 14, 15, 17, 20, 47),
}
FOLDERS = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA"}
DRAWN_ROWS = 3200  # rows drawn from LENGTHS where there are no files
EQUAL = "equal"  # the workload of rows of one length
NEVER = threading.Event()
NO_ROWS = DataSlice(
    Encoded(*(np.zeros(size, dtype=kind) for size, kind in ((0, "i4"), (0, "i1"), (1, "i8")))), np.zeros(0)
)
LEARNING_RATE, WEIGHT_DECAY, BETA = 2e-5, 0.01, 0.005
COMPARED = ("emd", "uniform", "none")  # mappings that a breakdown interleaves
AGREEMENT_ROWS, AGREEMENT_STEPS = 4, 2
PEAK_SIZE, PEAK_REPEATS = 2048, 5


@dataclass(frozen=True)
class Engine:
    """How an engine computes: `kind` "released" or "ours", precision of ours, whether it batches as released.

    `mask_once` is `released_step`'s.
    """

    kind: str
    precision: str = "float32"
    released_batches: bool = False
    mask_once: bool = False


ENGINES = {
    "released": Engine("released", released_batches=True),
    "released, masked once": Engine("released", released_batches=True, mask_once=True),
    "ours, float32, padded": Engine("ours", released_batches=True),
    "ours, float32": Engine("ours"),
    "ours": Engine("ours", precision="auto"),
}


@dataclass(frozen=True)
class Settings:
    """What is measured; names as `train_step.py`'s options."""

    student: str
    batch: int
    length: int
    pad: int
    batches: int
    threads: int
    glue: str | None = None
    tokenizer: str | None = None
    smoke: bool = False
    seed: int = 0


class OurStep:
    """The project's own training step; the one place here that knows its signatures."""

    def __init__(
        self, teacher: nn.Module, trained: Distiller, *, mapping: str = "emd", precision: str = "auto"
    ) -> None:
        """Take models that share nothing with another step: hooks on them stay."""
        config: tuple[Any, Any] = (teacher.config, trained.student.config)
        settings = DistillSettings(
            mapping=mapping, beta=BETA, reduction="element", cost_scale="absolute", precision=precision
        )
        schedule = training.Schedule(1, 1, LEARNING_RATE, 0.0, WEIGHT_DECAY, seed=0)
        teacher.requires_grad_(False)
        quicken(trained.student)
        self.teacher, self.trained, self.bfloat16 = teacher, trained, trains_in_bfloat16(precision)
        if self.bfloat16:
            keep_products_in_bfloat16(teacher)
        self.mapping = LayerMapping(mapping, *(side.num_hidden_layers for side in config))
        self.objective = Objective(
            teacher, trained, self.mapping, settings, kind="classification", bfloat16=self.bfloat16
        )
        self.folder = tempfile.TemporaryDirectory()  # a run wants a log; its steps write one line, the first
        folder, alone = Path(self.folder.name), Processes()
        self.batching = Batching(1, None, 0, 0, alone, torch.device("cpu"))
        self.run = training._Run(
            trained, schedule, self._observed, self.mapping, folder, folder / "log.jsonl", "step", "accuracy", alone
        )
        self.run.total_steps = 10**9  # the learning rate stays as it is
        self.run.continue_from_checkpoint()
        self.run.estimated = True  # no end to estimate

    def batch(self, data: DataSlice, rows: NDArray[np.int64], *, length: int | None = None) -> Batch:
        """Return `rows` as one batch, padded to `length` or the longest row."""
        batch = self.batching.batch(data, rows, number=self.run.done.step)
        if length is None:
            return batch
        (part,) = batch.parts
        more = (0, length - part.inputs["input_ids"].shape[1])
        inputs = {name: nn.functional.pad(value, more) for name, value in part.inputs.items()}
        return replace(batch, parts=(replace(part, inputs=inputs),))

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Train on one batch; return the loss's parts."""
        self.run.step(batch, self.batching, NO_ROWS, NEVER)
        return {name: part.item() for name, part in self.outcome.parts.items()}

    def _observed(self, batch: Batch) -> training.Outcome:
        self.outcome = self.objective(batch)
        return self.outcome


def build(engine: Engine, settings: Settings, *, mapping: str = "emd", dropout: float = 0.1) -> ReleasedStep | OurStep:
    """Return an engine's step with fresh models; same settings, same weights."""
    from transformers import BertConfig, BertForSequenceClassification

    def model(shape: str, seed: int) -> Any:
        attention = ATTENTION if engine.kind == "released" else "sdpa"
        probs = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        sizes = (SMOKE_SHAPES if settings.smoke else SHAPES)[shape]
        torch.manual_seed(seed)
        config = BertConfig(**sizes, **probs, vocab_size=VOCABULARY, attn_implementation=attention)
        return BertForSequenceClassification(config).eval()

    teacher, student = model("bert-base", 1), model(settings.student, 2)
    widths = {"student_hidden": student.config.hidden_size, "teacher_hidden": teacher.config.hidden_size}
    project = widths["student_hidden"] != widths["teacher_hidden"] and mapping != "none"
    trained = Distiller(student, **widths, project=project, seed=3)
    if engine.kind == "released":
        rates = {"beta": BETA, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
        return ReleasedStep(teacher, trained, **rates, mask_once=engine.mask_once)
    return OurStep(teacher, trained, mapping=mapping, precision=engine.precision)


def load_rows(workload: str, settings: Settings) -> DataSlice:
    """Return a workload's rows: of one length; a task's train rows, cut at the padded length; or of drawn lengths."""
    random = np.random.default_rng(settings.seed)
    if workload == EQUAL:
        lengths = np.full(settings.batch, settings.length)
    elif settings.glue and settings.tokenizer:
        encoder = TextEncoder.load(Path(settings.tokenizer), max_length=settings.pad)
        data = load_data(str(Path(settings.glue) / FOLDERS[workload]), task=workload, splits=("train",))
        return data.splits["train"].encode(encoder)
    else:
        drawn = np.interp(random.random(DRAWN_ROWS) * 100, np.arange(0, 101, 5), LENGTHS[workload])
        lengths = np.minimum(drawn.round().astype(np.int64), settings.pad)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(1000, 30000, size=offsets[-1], dtype=np.int32)
    types = np.zeros(len(tokens), dtype=np.int8)
    return DataSlice(Encoded(tokens, types, offsets), np.zeros(len(lengths), dtype=np.int64))


def choose_batches(
    lengths: NDArray[np.integer], *, batch: int, count: int, number: int, seed: int, shuffled: bool
) -> list[NDArray[np.int64]]:
    """Return the batches of round `number`: `count` of an epoch's training batches, each from another range of widths.

    With `shuffled`, the same rows in batches drawn without regard to length. Partial batches are left out.
    """
    epoch = [rows for rows in training_batches(lengths, batch_size=batch, seed=seed, epoch=0) if len(rows) == batch]
    epoch.sort(key=lambda rows: (int(lengths[rows].max()), *rows.tolist()))
    count = min(count, len(epoch))
    random = np.random.default_rng(seed)
    ranges = [random.permutation(part) for part in np.array_split(np.arange(len(epoch)), count)]
    chosen = [epoch[part[number % len(part)]] for part in ranges]
    generator = np.random.default_rng((seed, number))
    if shuffled:
        return list(generator.permutation(np.concatenate(chosen)).reshape(count, batch))
    return [chosen[at] for at in generator.permutation(count)]


@contextlib.contextmanager
def phases(step: OurStep, clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Yield what `clock` counts in each part of the steps made inside, their sum being the whole.

    teacher, student: their forward passes. losses: the objective without both and without flow and projection: score and
    hidden-state costs, embedding and prediction loss. projection, projection backward: of the student's hidden states to
    the teacher's width, a trained layer on the student's side. flow: the solver and the layer weights. losses backward:
    from the start of the backward pass until the gradient enters the student's logits, by when autograd, which goes back
    in reverse order, has left the costs. student backward: the rest. optimizer: clipping and the update. Other: preparing
    the step.
    """
    spent: dict[str, float] = defaultdict(float)
    last = clock()

    def mark(phase: str) -> None:
        nonlocal last
        now = clock()
        spent[phase] += now - last
        last = now

    def entering_logits(gradient: Tensor) -> Tensor:
        mark("losses backward")
        return gradient

    def after_student(_module: nn.Module, _inputs: Any, output: Any) -> None:
        mark("student")
        output.logits.register_hook(entering_logits)

    def spanned(function: Callable[..., Any], before: str, phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            mark(before)
            result = function(*arguments, **keywords)
            mark(phase)
            return result

        return call

    hooks = [
        step.teacher.register_forward_pre_hook(lambda *_: mark("losses")),
        step.teacher.register_forward_hook(lambda *_: mark("teacher")),
        step.trained.student.register_forward_pre_hook(lambda *_: mark("losses")),
        step.trained.student.register_forward_hook(after_student),
    ]
    if (projection := step.trained.projection) is not None:
        hooks += [
            projection.register_forward_pre_hook(lambda *_: mark("losses")),
            projection.register_forward_hook(lambda *_: mark("projection")),
            projection.register_full_backward_pre_hook(lambda *_: mark("losses backward")),
            projection.register_full_backward_hook(lambda *_: mark("projection backward")),
        ]
    with (
        mock.patch.object(step.mapping, "step", spanned(step.mapping.step, "losses", "flow")),
        mock.patch.object(step, "objective", spanned(step.objective, "other", "losses")),
        mock.patch.object(Tensor, "backward", spanned(Tensor.backward, "losses", "student backward")),
    ):
        yield spent
        mark("optimizer")
    for hook in hooks:
        hook.remove()


def model_flops(config: Any, *, batch: int, tokens: int) -> float:
    """Return the additions and multiplications of a BERT classifier's matrix products in one forward pass."""
    width, layers = config.hidden_size, config.num_hidden_layers
    layer = 2 * batch * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * batch * tokens**2 * width
    return layers * layer + 2 * batch * width * (width + config.num_labels)


def count_flops(step: OurStep, batch: Batch) -> dict[str, float]:
    """Return the arithmetic of a step's matrix products by phase: of the models as the shapes say, of the losses as run."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, phases(step, counter.get_total_flops) as counted:
        step(batch)
    rows, tokens = batch.parts[0].inputs["input_ids"].shape
    teacher, student = (
        model_flops(model.config, batch=rows, tokens=tokens) for model in (step.teacher, step.trained.student)
    )
    names = ("losses", "losses backward", "projection", "projection backward")
    losses = {name: float(counted[name]) for name in names if name in counted}
    return losses | {"teacher": teacher, "student": student, "student backward": 2 * student}


def gemm_peak(size: int) -> dict[str, float]:
    """Return the GFLOP/s of a square matrix product in float32 and bfloat16, the best of a few."""
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(2, size, size).to(dtype)
        left @ right
        seconds = []
        for _ in range(PEAK_REPEATS):
            started = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - started)
        peaks[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(seconds) / 1e9
    return peaks


class Worker:
    """One engine and what it can be asked."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Build nothing yet: a command builds what it needs."""
        torch.set_num_threads(settings.threads)
        self.engine, self.settings = ENGINES[name], settings
        self.rows: dict[str, DataSlice] = {}
        self.steps: dict[str, Any] = {}

    def ask(self, command: str, **arguments: Any) -> Any:
        """Answer one command: the method of this name."""
        return getattr(self, command)(**arguments)

    def facts(self) -> dict[str, Any]:
        """Build the step, make one, and return what it computes with."""
        step = self._step("emd")
        step(self._batches(EQUAL, 0)[0](step))
        bfloat16 = isinstance(step, OurStep) and step.bfloat16
        precision = "bfloat16" if bfloat16 else "float32"
        return {"precision": precision, "threads": torch.get_num_threads(), "process": os.getpid()}

    def turn(self, workload: str, number: int) -> list[dict[str, float]]:
        """Return seconds, rows, tokens and padded width of each step of a round; making the batch counts as well."""
        step, samples, data = self._step("emd"), [], self._rows(workload)
        for rows, batch in zip(self._chosen(workload, number), self._batches(workload, number), strict=True):
            started = time.perf_counter()
            step(batch(step))
            seconds = time.perf_counter() - started
            lengths = data.examples.lengths[rows]
            width = self._length(workload) or int(lengths.max())
            samples.append({"seconds": seconds, "rows": len(rows), "tokens": int(lengths.sum()), "width": width})
        return samples

    def breakdown(self, workload: str, number: int) -> dict[str, list[dict[str, float]]]:
        """Return seconds by phase of the same steps under each mapping, taking turns batch by batch."""
        spent: dict[str, list[dict[str, float]]] = {mapping: [] for mapping in COMPARED}
        for at, batch in enumerate(self._batches(workload, number)):
            turn = (at + number) % len(COMPARED)
            for mapping in COMPARED[turn:] + COMPARED[:turn]:
                step = self._step(mapping)
                with phases(step) as seconds:
                    step(batch(step))
                spent[mapping].append(dict(seconds))
        return spent

    def flops(self, workload: str, number: int) -> list[dict[str, float]]:
        """Return the arithmetic by phase of the steps that `breakdown` times."""
        step = self._step("emd")
        return [count_flops(step, batch(step)) for batch in self._batches(workload, number)]

    def peak(self) -> dict[str, float]:
        """Return the machine's matrix-product peak in GFLOP/s."""
        return gemm_peak(256 if self.settings.smoke else PEAK_SIZE)

    def memory(self) -> dict[str, int | None]:
        """Return resident bytes before the first step, and the most during two steps (None where unknown).

        For a process of its own.
        """
        from bertemd_deploy.bench.memory import peak_rss_bytes, rss_bytes

        step, batch = self._step("emd"), self._batches(EQUAL, 0)[0]
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the models freed is no room for the step
        before, built = rss_bytes(), peak_rss_bytes()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of building the models
            built = 0
        for _ in range(2):  # the optimizer's state exists from the second step on
            step(batch(step))
        peak = peak_rss_bytes()
        return {"before": before, "peak": peak if peak and built is not None and peak > built else None}

    def agree(self) -> dict[str, float]:
        """Return the largest relative differences between the released step's losses and weights and ours.

        In float32, without dropout, on rows without padding.
        """
        mine = build(Engine("ours"), self.settings, dropout=0.0)
        theirs = build(Engine("released"), self.settings, dropout=0.0)
        rows = load_rows(EQUAL, self.settings)
        worst: dict[str, float] = defaultdict(float)
        for _ in range(AGREEMENT_STEPS):
            first = np.arange(min(AGREEMENT_ROWS, len(rows)))
            ours, released = (step(step.batch(rows, first)) for step in (mine, theirs))
            for name, value in released.items():
                worst[name] = max(worst[name], abs(ours[name] - value) / abs(value))
        for left, right in zip(mine.mapping.marginals["hidden"], theirs.weights, strict=True):
            worst["layer weights"] = max(worst["layer weights"], float((np.abs(left.numpy() - right) / right).max()))
        return dict(worst)

    def _step(self, mapping: str) -> Any:
        if mapping not in self.steps:
            self.steps[mapping] = build(self.engine, self.settings, mapping=mapping)
        return self.steps[mapping]

    def _rows(self, workload: str) -> DataSlice:
        if workload not in self.rows:
            self.rows[workload] = load_rows(workload, self.settings)
        return self.rows[workload]

    def _length(self, workload: str) -> int | None:
        """Return what this engine pads to; None is the longest row of a batch."""
        return self.settings.pad if self.engine.released_batches and workload != EQUAL else None

    def _chosen(self, workload: str, number: int) -> list[NDArray[np.int64]]:
        data = self._rows(workload)
        return choose_batches(
            data.examples.lengths,
            batch=min(self.settings.batch, len(data)),
            count=self.settings.batches,
            number=number,
            seed=self.settings.seed,
            shuffled=self.engine.released_batches,
        )

    def _batches(self, workload: str, number: int) -> list[Callable[[Any], Any]]:
        """Return one function for each batch of a round, which makes it for a step."""

        def make(rows: NDArray[np.int64]) -> Callable[[Any], Any]:
            return lambda step: step.batch(self._rows(workload), rows, length=self._length(workload))

        return [make(rows) for rows in self._chosen(workload, number)]


def main() -> None:
    """Answer commands until stdin ends."""
    worker = Worker(sys.argv[1], Settings(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        print(json.dumps(worker.ask(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
