"""What many tests need: a tiny random BERT folder, a tiny learnable data folder, and the place of the shared test data."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_words import BAD, GOOD, NEUTRAL, VOCABULARY, write_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the hub by accident


@pytest.fixture
def tiny_tokenizer() -> Callable[[Path], None]:
    """Return the function that writes the tiny tokenizer's files into a folder."""
    return write_tokenizer


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Callable[..., Path]:
    """Return a factory of Hugging Face folders: random BERT weights, config and tokenizer.

    `labels` are the class names (empty for regression, one output); `head=False` saves the bare encoder.
    """

    def build(
        name: str = "model",
        *,
        layers: int = 2,
        hidden: int = 16,
        heads: int = 2,
        intermediate: int = 32,
        positions: int = 64,
        labels: tuple[str, ...] = ("0", "1"),
        head: bool = True,
        seed: int = 0,
        dropout: float = 0.1,
    ) -> Path:
        import torch
        from transformers import BertConfig, BertForSequenceClassification, BertModel

        config = BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=positions,
            num_labels=len(labels) or 1,
            initializer_range=0.2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        config.id2label = dict(enumerate(labels)) or {0: "LABEL_0"}
        config.label2id = {label: number for number, label in config.id2label.items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BertForSequenceClassification(config) if head else BertModel(config)
        folder = tmp_path / name
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return build


@pytest.fixture
def tiny_data(tmp_path: Path) -> Callable[..., Path]:
    """Return a factory of data folders with train.tsv and dev.tsv whose labels follow from the words.

    "single": `sentence`, label 1 where good words outnumber bad ones. "pair": `sentence1`, `sentence2`, label 1 where
    both are of one mood. "regression": `sentence`, the share of good words among the moody ones, 0 to 5.
    """

    def sentence(generator: random.Random, good: int, bad: int) -> str:
        words = generator.choices(NEUTRAL, k=generator.randint(1, 6))
        words += generator.choices(GOOD, k=good) + generator.choices(BAD, k=bad)
        generator.shuffle(words)
        return " ".join(words)

    def build(
        kind: str = "single",
        *,
        train: int = 64,
        dev: int = 32,
        labels: tuple[str, str] = ("0", "1"),
        name: str = "data",
        seed: int = 0,
    ) -> Path:
        generator = random.Random(seed)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for split, count in (("train", train), ("dev", dev)):
            lines = ["sentence1\tsentence2\tlabel" if kind == "pair" else "sentence\tlabel"]
            for number in range(count):
                if kind == "pair":
                    moods = (generator.random() < 0.5, number % 2)
                    first = sentence(generator, 2 * moods[0], 2 * (not moods[0]))
                    same = moods[1] == 1
                    second = sentence(generator, 2 * (moods[0] == same), 2 * (moods[0] != same))
                    lines.append(f"{first}\t{second}\t{labels[moods[1]]}")
                elif kind == "regression":
                    good = number % 6
                    lines.append(f"{sentence(generator, good, 5 - good)}\t{good:.1f}")
                else:
                    good = number % 2
                    lines.append(f"{sentence(generator, 2 * good, 2 * (1 - good))}\t{labels[good]}")
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return build


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of recorded vectors and real data beside the checkout; skip the test where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir() or not (folder / "data" / "glue").is_dir():
        pytest.skip(f"no shared test data at {folder}")
    return folder


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for what is costly to make and only read afterwards."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def tiny_task(tiny_bert: Callable[..., Path], tiny_data: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Return a factory of (teacher folder, data folder): a random teacher and `tiny_data` labelled with its own answers.

    The teacher therefore scores 1 on the data, without any training; its outputs are spread and about balanced.
    """

    def build(
        kind: str = "single", *, train: int = 48, dev: int = 24, name: str = "teacher", **sizes: int
    ) -> tuple[Path, Path]:
        import torch
        from transformers import BertForSequenceClassification

        from bertemd_deploy.encoding import TextEncoder
        from bertemd_deploy.evaluate import torch_logits

        regression = kind == "regression"
        teacher = tiny_bert(name, labels=() if regression else ("no", "yes"), **({"layers": 4} | sizes))
        data = tiny_data(kind, train=train, dev=dev, name=f"{name}-data")
        model = BertForSequenceClassification.from_pretrained(teacher).eval()
        encoder = TextEncoder.load(teacher, max_length=32)
        rows = {
            split: [line.split("\t") for line in (data / f"{split}.tsv").read_text(encoding="utf-8").splitlines()]
            for split in ("train", "dev")
        }
        body = [row for split in rows.values() for row in split[1:]]
        pairs = [row[1] for row in body] if kind == "pair" else None
        examples = encoder.encode([row[0] for row in body], pairs)
        with torch.no_grad():
            logits = torch.from_numpy(torch_logits(model, examples, pad_id=encoder.pad_id))
            if not regression:  # class 1 where the difference is above its median
                difference = logits[:, 1] - logits[:, 0]
                scale = 3 / float(difference.std())
                model.classifier.weight.mul_(scale)
                model.classifier.bias.mul_(scale)
                model.classifier.bias[0] += scale * difference.median()
            answers = torch_logits(model, examples, pad_id=encoder.pad_id)
        model.save_pretrained(teacher)
        for row, answer in zip(body, answers, strict=True):
            row[-1] = f"{answer[0]:.6f}" if regression else ("no", "yes")[answer.argmax()]
        for split, lines in rows.items():
            (data / f"{split}.tsv").write_text("\n".join("\t".join(row) for row in lines) + "\n", encoding="utf-8")
        return teacher, data

    return build


@pytest.fixture
def tiny_artifact(tiny_task: Callable[..., tuple[Path, Path]], kept: Path) -> Callable[..., Path]:
    """Return a factory of exported artifacts ("single" or "pair"), fp32 graphs only, each call a fresh copy.

    An artifact is exported once per test session.
    """

    def build(kind: str = "single", *, name: str = "artifact") -> Path:
        from bertemd_deploy.config import build_recipe
        from bertemd_deploy.pipeline import export_stage

        source = kept / f"artifact-{kind}"
        teacher, data = tiny_task(kind, name=f"exported-{kind}")
        if not source.exists():
            content = {
                "teacher": {"model": str(teacher)},
                "data": {"path": str(data), "max_length": 32},
                "student": {"name": "4L"},
                "quantize": {"mode": "none"},
            }
            export_stage(build_recipe(content, where="test"), teacher, source, data=str(data))
        return Path(shutil.copytree(source, teacher.parent / name))

    return build
