"""A student's vocabulary trimmed to the tokens that texts use: tokenizer and word embedding rewritten together.

Special tokens and pieces of one character stay, the others by how often the corpus uses them; ids are numbered anew without
holes, in their old order. A text whose pieces all stay becomes the same pieces (why is told in `tokenizer_subset`), these
meet the same embedding rows, so its logits are the same. `trim_student` shows that on real texts, states what share of
them it is, and holds what the others lose against the gate.

In: a student folder and its data. Out: a folder like the student's, without facts and slices: those hold the old ids.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.checkpoints import WEIGHTS, check_folder, checked_encoder, damaged_weights
from bertemd_deploy.console import note
from bertemd_deploy.data import Dataset, calibration_rows
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import GateError, ModelError, RecipeError
from bertemd_deploy.evaluate import dev_metrics, torch_logits
from bertemd_deploy.facts import CALIBRATION_ROWS, RANGES, StudentFacts
from bertemd_deploy.files import new_folder, read_json, write_json, write_text
from bertemd_deploy.models import TOKENIZER_FILES, load_classifier
from bertemd_deploy.tokenizer_subset import (
    is_placeholder,
    needed_tokens,
    renumber_config,
    subset,
    token_ids,
    unknown_token,
)

PROOF_ROWS = 256
PROOF_TOLERANCE = 1e-6  # of a logit; equal inputs give equal bits unless a kernel minds where in memory they lie
_WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Coverage:
    """What a trimmed vocabulary makes of texts.

    Attributes:
        tokens: of the texts, by the full vocabulary.
        kept: how many of these the trimmed vocabulary has.
        trimmed_tokens: of the texts, by the trimmed vocabulary; a token that is gone becomes several.
        unknown: unknown tokens among `tokens`.
        trimmed_unknown: unknown tokens among `trimmed_tokens`.
        texts: how many.
        identical: texts that both make the same tokens of.
    """

    tokens: int
    kept: int
    trimmed_tokens: int
    unknown: int
    trimmed_unknown: int
    texts: int
    identical: int

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return asdict(self) | {"kept_share": self.kept / self.tokens, "identical_share": self.identical / self.texts}


@dataclass(frozen=True)
class Trimmed:
    """A trimmed student: its folder, its facts with slices of its own tokens, and the manifest's entry."""

    folder: Path
    facts: StudentFacts
    record: dict[str, Any]


def trim_student(
    student: Path, *, facts: StudentFacts, data: Dataset, size: int | None, max_drop: float, out: Path
) -> Trimmed:
    """Write `student` with a vocabulary of the train texts to `out`, checked on the dev texts.

    Args:
        student: its folder.
        facts: what it carries for export.
        data: its data set: train says which tokens stay, dev what that costs.
        size: most tokens to keep; None keeps those that train uses.
        max_drop: points (0.01) of the task's first metric that it may lose; words cut off count as lost.
        out: folder to write, replaced where it exists.

    Raises:
        ModelError: the tokenizer cannot be trimmed, or the data's labels are not the student's.
        RecipeError: `size` does not hold the special tokens and characters.
        GateError: equal tokens gave other logits, or the metric drops by more than `max_drop`.
    """
    if list(data.labels) != facts.labels:
        raise ModelError(
            f"{student}: its labels are {', '.join(facts.labels) or 'none'}, the data's {', '.join(data.labels) or 'none'}. "
            "Trim with the data that it was trained on."
        )
    full = checked_encoder(student, max_length=facts.max_length)
    train, dev = (data.splits[name].encode(full) for name in ("train", "dev"))
    kept = trim_vocabulary(student, counts=count_tokens([train.examples]), size=size, out=out)
    small = checked_encoder(out, max_length=facts.max_length)
    trimmed_train, trimmed_dev = (data.splits[name].encode(small) for name in ("train", "dev"))
    vocabulary = full.vocabulary()
    unknown = vocabulary.get(unknown_token(read_json(student / "tokenizer.json", what="tokenizer")) or "", -1)
    pairs = {"train": (train, trimmed_train), "evaluation": (dev, trimmed_dev)}
    covered = {name: coverage(*pair, kept=kept, unknown=unknown).record() for name, pair in pairs.items()}
    sentence = f"{len(kept):,} of {len(vocabulary):,} tokens"
    same = f"{covered['evaluation']['identical_share']:.1%} of the dev texts become the same tokens"
    note(f"vocabulary: {sentence}; {covered['train']['identical_share']:.1%} of the train texts and {same}")
    models = [load_classifier(folder, labels=facts.labels, kind=dev.kind) for folder in (student, out)]
    pads = [full.pad_id, small.pad_id]
    rows, difference = _compare_logits(models, (dev, trimmed_dev), kept=kept, pads=pads, out=out)
    before, after = (
        dev_metrics(model, part, task=data.task, pad_id=pad, names=facts.labels, where=str(student))
        for model, part, pad in zip(models, (dev, trimmed_dev), pads, strict=True)
    )
    metric = data.task.metrics[0]
    cut_off = _cut_off(dev, trimmed_dev)
    drop = round((before[metric] - after[metric] + cut_off) * 100, 6)
    if not drop <= max_drop:
        raise GateError(
            f"{student}: with {sentence} it loses {drop:g} points of {metric} ({before[metric]:.4f} to {after[metric]:.4f}"
            f"{f', and {cut_off:.1%} of the words are cut off' if cut_off else ''}; allowed {max_drop:g}); {same}. "
            "Raise export.vocabulary or quantize.max_drop, or set export.vocabulary to null."
        )
    calibration = calibration_rows(data.splits["train"], rows=CALIBRATION_ROWS).encode(small)
    record = {
        "kept": len(kept),
        "total": len(vocabulary),
        "asked": "corpus" if size is None else size,
        "coverage": covered,
        "equal_tokens": {"rows": rows, "max_abs_logit_difference": difference, "allowed": PROOF_TOLERANCE},
        "metrics": {"full": before, "trimmed": after},
        "cut_off": cut_off,
    }
    return Trimmed(out, replace(facts, evaluation=trimmed_dev, calibration=calibration), record)


def count_tokens(parts: Iterable[Encoded]) -> NDArray[np.int64]:
    """Return how often each token id occurs in tokenised texts, (highest id + 1,) int64."""
    counts = np.zeros(0, dtype=np.int64)
    for part in parts:
        found = np.bincount(part.tokens, minlength=len(counts)).astype(np.int64)
        found[: len(counts)] += counts
        counts = found
    return counts


def trim_vocabulary(student: Path, *, counts: NDArray[np.integer], size: int | None, out: Path) -> NDArray[np.int64]:
    """Write a student with part of `student`'s vocabulary to `out`; return the old id of each new one, ascending.

    Of equally frequent tokens, unused ones among them, those of lower ids go first: vocabularies are sorted by frequency.

    Args:
        student: Hugging Face folder with a WordPiece or Unigram tokenizer.
        counts: how often the corpus uses each token id; ids beyond its end are unused.
        size: most tokens to keep; None keeps those used.
        out: folder to write, replaced where it exists: config, weights, tokenizer.

    Raises:
        ModelError: the folder is no model of a supported family, or its tokenizer is of another kind or damaged.
        RecipeError: `size` does not hold the special tokens and characters.
    """
    config = check_folder(student)
    where = student / "tokenizer.json"
    tokenizer = read_json(where, what="tokenizer")
    ids = token_ids(tokenizer, where)
    beside = {
        name: read_json(student / name, what="tokenizer's config")
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if (student / name).is_file()
    }
    needed = needed_tokens(tokenizer, ids, [config, *beside.values()])
    if size is not None and size < len(needed):
        raise RecipeError(
            f"export.vocabulary is {size:,}; the special tokens and single characters of {where} are {len(needed):,}, which "
            "stay whatever the corpus. Give these and room for words, or set it to corpus."
        )
    frequency = {token: int(counts[at]) if at < len(counts) else 0 for token, at in ids.items()}
    others = [
        token for token in ids if token not in needed and (frequency[token] or (size and not is_placeholder(token)))
    ]
    others.sort(key=lambda token: (-frequency[token], ids[token]))
    chosen = needed.union(others if size is None else others[: size - len(needed)])
    kept = np.array(sorted({ids[token] for token in chosen}), dtype=np.int64)
    number = {old: new for new, old in enumerate(kept.tolist())}
    new_ids = {token: number[ids[token]] for token in chosen}
    with new_folder(out) as folder:
        for name in (*TOKENIZER_FILES, RANGES):
            if (student / name).is_file():
                shutil.copyfile(student / name, folder / name)
        small = subset(tokenizer, new_ids, where=where)
        write_text(folder / "tokenizer.json", json.dumps(small, ensure_ascii=False))
        for name, content in beside.items():
            write_json(folder / name, renumber_config(content, new_ids))
        if (folder / "vocab.txt").exists():
            lines = sorted(new_ids, key=new_ids.__getitem__)
            write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in lines))
        roles = {name: value for name, value in config.items() if name.endswith("_token_id") and value is not None}
        write_json(
            folder / "config.json",
            config | {name: _renumbered(value, number) for name, value in roles.items()} | {"vocab_size": len(kept)},
        )
        _write_weights(student, folder, kept)
    return kept


def coverage(original: DataSlice, trimmed: DataSlice, *, kept: NDArray[np.int64], unknown: int) -> Coverage:
    """Return what a trimmed vocabulary makes of texts.

    Args:
        original: the texts by the full vocabulary.
        trimmed: the same texts by the trimmed one.
        kept: (new ids,) their old ids.
        unknown: old id of the unknown token; -1 where there is none.
    """
    before, after = original.examples.tokens, kept[trimmed.examples.tokens]
    same = _identical(original, trimmed, kept)
    return Coverage(
        tokens=len(before),
        kept=int(np.isin(before, kept).sum()),
        trimmed_tokens=len(after),
        unknown=int((before == unknown).sum()),
        trimmed_unknown=int((after == unknown).sum()),
        texts=len(same),
        identical=int(same.sum()),
    )


def _identical(original: DataSlice, trimmed: DataSlice, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each text, a question with all its windows, whether both vocabularies make the same of it."""
    before, after = original.examples, trimmed.examples
    mapped = kept[after.tokens]
    return np.array(
        [
            np.array_equal(before.tokens[old], mapped[new]) and np.array_equal(before.types[old], after.types[new])
            for old, new in zip(_texts(original), _texts(trimmed), strict=True)
        ],
        dtype=bool,
    )


def _text_numbers(part: DataSlice) -> NDArray[np.integer]:
    """Return which text each row is of; windows of one context follow one another."""
    return np.arange(len(part)) if part.gold is None else part.gold.example


def _texts(part: DataSlice) -> list[slice]:
    """Return the tokens of each text."""
    first = np.unique(_text_numbers(part), return_index=True)[1]
    edges = [*part.examples.offsets[first].tolist(), len(part.examples.tokens)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _cut_off(original: DataSlice, trimmed: DataSlice) -> float:
    """Return the share of scored words that more pieces push beyond the longest input: no metric counts them."""
    if original.kind != "token-classification":
        return 0.0
    before, after = (int((part.labels != NOT_SCORED).sum()) for part in (original, trimmed))
    return 1 - after / before


def _compare_logits(
    models: Sequence[nn.Module],
    parts: tuple[DataSlice, DataSlice],
    *,
    kept: NDArray[np.int64],
    pads: Sequence[int],
    out: Path,
) -> tuple[int, float | None]:
    """Return on how many rows of equal tokens two students were compared, and the largest difference of a logit.

    Raises:
        GateError: it is over `PROOF_TOLERANCE`.
    """
    same = _identical(*parts, kept)
    found = []
    for model, part, pad in zip(models, parts, pads, strict=True):
        rows = np.flatnonzero(same[_text_numbers(part)])[:PROOF_ROWS]
        if not len(rows):
            return 0, None
        found.append(torch_logits(model, part.examples.select(rows), pad_id=pad))
    difference = float(np.abs(found[0] - found[1]).max())
    if not difference <= PROOF_TOLERANCE:
        raise GateError(
            f"{out}: on {len(rows)} rows of the same tokens before and after trimming a logit differs by {difference:.1e} "
            f"(allowed {PROOF_TOLERANCE:.0e}); its embedding rows are not those of its tokens. Set export.vocabulary to null."
        )
    return len(rows), difference


def _renumbered(value: Any, number: Mapping[int, int]) -> Any:
    """Return a config's token id, or list of them, in new numbers; an id of no token is none."""
    return [number.get(one) for one in value] if isinstance(value, list) else number.get(value)


def _write_weights(student: Path, folder: Path, kept: NDArray[np.int64]) -> None:
    """Write the student's weights with the word embedding's rows of the kept ids."""
    try:
        weights = load_file(student / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise damaged_weights(student, error) from error
    names = [name for name in weights if name.endswith(_WORDS)]
    rows = [len(weights[name]) for name in names]
    if len(names) != 1 or rows[0] <= kept[-1]:
        raise ModelError(
            f"{student / WEIGHTS}: needs one word embedding ({_WORDS}) of more than {kept[-1]} rows, one for each token; found "
            f"{', '.join(f'{name} of {count} rows' for name, count in zip(names, rows, strict=True)) or 'none'}."
        )
    weights[names[0]] = weights[names[0]][torch.from_numpy(kept)].contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
