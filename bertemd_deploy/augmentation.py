"""Altered copies of tokenised train rows: more text for a student to learn its teacher's answers on.

`augment` takes the train rows and returns them followed by copies in which tokens are left out ("dropout") or replaced by
what a masked language model finds likely ("mlm"). Everything happens on token ids; special tokens are never touched, and
the same seed gives the same copies. A copy carries its row's label, which the change of words may have made wrong: with
alpha 1 the student learns from the teacher's answer to the copy alone, with less also from that label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.checkpoints import check_folder
from bertemd_deploy.console import Task, progress
from bertemd_deploy.encoding import Encoded, TextEncoder
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.families import family_of, known_inputs
from bertemd_deploy.models import quiet_transformers
from bertemd_deploy.tasks import Kind

CANDIDATES = 15  # likeliest replacements of a word, among which one is drawn
_STREAM = 0xA06  # sets these random numbers apart from others drawn with the same seed
_HIDDEN_WORDS = 512  # that a batch of the language model has: (512, vocabulary) logits, 63 MB for BERT's 30,522 tokens
_TOKENS_PER_WORD = 16  # a batch has at most so many tokens for each of these words, hidden or not
_MASKS = ("[MASK]", "<mask>")
_WORD_STARTS = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies write the space before a word


@dataclass(frozen=True)
class _Vocabulary:
    """What may be done to each of the V token ids.

    Attributes:
        frame: (V,) bool, put by the tokenizer around and between texts; each ends a segment.
        special: (V,) bool, never changed and never put in: frame, padding, unknown, mask, unused.
        continuation: (V,) bool, pieces that continue a word.
        mask_id: the token that stands for a hidden word; None where there is none.
    """

    frame: NDArray[np.bool_]
    special: NDArray[np.bool_]
    continuation: NDArray[np.bool_]
    mask_id: int | None


def augment(
    part: DataSlice,
    *,
    kind: Kind,
    method: Literal["dropout", "mlm"],
    copies: int,
    rate: float,
    seed: int,
    encoder: TextEncoder,
    teacher_folder: Path,
) -> DataSlice:
    """Return the rows of `part` followed by `copies` altered copies of them all, in the same order.

    "dropout" leaves out each token with probability `rate`, but never all of a segment. "mlm" hides each word that is a
    single token with probability `rate`, all of a row at once, and draws its replacement from the language model's 15
    likeliest words there by their probability; a word of several pieces stays as it is. A short row can thus come out
    unchanged.

    Args:
        part: train rows with the labels of a classification, regression or multi-label task.
        kind: of the task.
        method: how rows are altered.
        copies: of every row, from 1.
        rate: in (0, 1].
        seed: of every random choice.
        encoder: the tokenizer `part` was made with.
        teacher_folder: Hugging Face folder with that tokenizer; for "mlm" also with a masked-LM head.

    Returns:
        (1 + copies) times as many rows.

    Raises:
        RecipeError: labels of this kind belong to token positions, which change.
        ModelError: the folder has another tokenizer, or no masked-LM head, or its weights are broken.
    """
    if kind in ("token-classification", "question-answering"):
        raise RecipeError(
            f"distill.augmentation: {method} does not fit {kind}, whose labels belong to token positions: a copy with "
            "other tokens would carry wrong ones. Use augmentation: none."
        )
    vocabulary = _read_vocabulary(encoder, teacher_folder)
    masked_lm = _MaskedLm(teacher_folder, vocabulary, pad_id=encoder.pad_id) if method == "mlm" else None
    altered = []
    with progress("augment", copies * len(part.examples)) as bar:
        for copy in range(copies):
            generator = np.random.default_rng((seed, copy, _STREAM))
            if masked_lm is None:
                altered.append(_leave_out(part.examples, vocabulary, rate=rate, generator=generator))
                bar.advance(len(part.examples))
            else:
                altered.append(masked_lm.replace(part.examples, rate=rate, generator=generator, bar=bar))
    labels = np.concatenate([part.labels] * (copies + 1))
    return replace(part, examples=_joined([part.examples, *altered]), labels=labels)


def _read_vocabulary(encoder: TextEncoder, folder: Path) -> _Vocabulary:
    """Return what may be done to each token; special tokens are those the tokenizer declares or adds by itself."""
    ids = encoder.vocabulary()
    if TextEncoder.load(folder, max_length=encoder.max_length).vocabulary() != ids:
        raise ModelError(
            f"{folder}: its tokenizer.json has another vocabulary than the one the data was tokenised with; "
            "its tokens would stand for other words. Name the folder of the same model."
        )
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = np.full(max(ids.values()) + 1, "", dtype=object)
    names[list(ids.values())] = list(ids)
    around = encoder.encode([""], [""]).tokens
    frame, special = np.zeros(len(names), dtype=bool), np.array([_unused(name) for name in names])
    frame[around] = special[around] = special[encoder.pad_id] = True
    special[[token["id"] for token in stored.get("added_tokens") or () if token.get("special")]] = True
    masks = [ids[name] for name in _MASKS if name in ids]
    special[masks] = True
    model = stored["model"]
    if model.get("type") == "WordPiece":
        continuation = np.array([name.startswith(model["continuing_subword_prefix"]) for name in names])
    else:
        continuation = np.array([not name.startswith(_WORD_STARTS) for name in names])
    return _Vocabulary(frame, special, continuation & ~special, masks[0] if masks else None)


def _unused(name: str) -> bool:
    """Say whether a vocabulary's entry is no text: an id without a token, or one of BERT's placeholders."""
    return not name or re.fullmatch(r"\[unused\d+\]", name) is not None


def _leave_out(examples: Encoded, vocabulary: _Vocabulary, *, rate: float, generator: np.random.Generator) -> Encoded:
    """Return `examples` with each token left out with probability `rate`, but at least one token in every segment."""
    tokens = examples.tokens
    frame = vocabulary.frame[tokens]
    starts = np.zeros(len(tokens), dtype=bool)
    starts[examples.offsets[:-1][examples.lengths > 0]] = True
    segment = np.cumsum(frame | starts)
    draw = generator.random(len(tokens), dtype=np.float32)
    kept = vocabulary.special[tokens] | (draw >= rate)
    lost = np.bincount(segment[~frame], minlength=len(tokens) + 1) > 0
    lost &= np.bincount(segment[~frame & kept], minlength=len(tokens) + 1) == 0
    members = np.flatnonzero(lost[segment] & ~frame)
    members = members[np.lexsort((draw[members], segment[members]))]
    kept[members[np.diff(segment[members], append=-1) != 0]] = True  # the largest draw of each
    offsets = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[examples.offsets]
    return Encoded(tokens[kept], examples.types[kept], offsets)


class _MaskedLm:
    """A masked language model that replaces words, run in batches of like length and bounded size."""

    def __init__(self, folder: Path, vocabulary: _Vocabulary, *, pad_id: int) -> None:
        """Load the model in `folder`, refusing one without a trained head."""
        self._folder, self._vocabulary, self._pad_id = folder, vocabulary, pad_id
        config = check_folder(folder)
        family = family_of(config, where=str(folder))
        self._inputs, self._model = known_inputs(config), _load_masked_lm(folder, fast=family.sdpa)
        self._hidden = torch.zeros(0, 0, dtype=torch.bool)
        getattr(self._model, family.prefix).register_forward_hook(self._keep_hidden)
        size = int(self._model.config.vocab_size)
        words = ~vocabulary.special & ~vocabulary.continuation
        if vocabulary.mask_id is None or size < len(words) or words.sum() < 2:
            raise ModelError(
                f"{folder}: its tokenizer cannot be used for masked words (mask token {vocabulary.mask_id}, {len(words)} "
                f"tokens for a model of {size}, {int(words.sum())} of them whole words). Use augmentation: dropout."
            )
        self._mask_id = vocabulary.mask_id
        self._barred = torch.from_numpy(~np.pad(words, (0, size - len(words))))

    def _keep_hidden(self, _encoder: Any, _inputs: Any, output: Any) -> Any:
        """Hand the head the hidden words' states alone, (1, K, H): logits of all others would be of no use."""
        output.last_hidden_state = output.last_hidden_state[self._hidden][None]
        return output

    def replace(self, examples: Encoded, *, rate: float, generator: np.random.Generator, bar: Task) -> Encoded:
        """Return `examples` with each word of one token replaced with probability `rate`."""
        tokens, continuation = examples.tokens, self._vocabulary.continuation[examples.tokens]
        word = ~self._vocabulary.special[tokens] & ~continuation & ~np.append(continuation[1:], False)
        chosen = word & (generator.random(len(tokens), dtype=np.float32) < rate)
        draw = generator.random(len(tokens), dtype=np.float32)
        changed = tokens.copy()
        counts = np.diff(np.concatenate([[0], np.cumsum(chosen)])[examples.offsets])
        batches = _bounded_batches(examples.lengths, counts)
        bar.advance(len(examples) - sum(map(len, batches)))
        for batch in batches:
            inputs = examples.batch(batch, pad_id=self._pad_id)
            real = inputs["attention_mask"] == 1
            place = np.where(real, examples.offsets[batch][:, None] + np.arange(real.shape[1]), 0)
            hidden = real & chosen[place]
            inputs["input_ids"][hidden] = self._mask_id
            at = place[hidden]
            changed[at] = self._draw(inputs, hidden, original=tokens[at], draw=draw[at])
            bar.advance(len(batch), tokens=int(real.sum()))
        return Encoded(changed, examples.types, examples.offsets)

    @torch.inference_mode()
    def _draw(
        self,
        inputs: dict[str, NDArray[np.int64]],
        hidden: NDArray[np.bool_],
        *,
        original: NDArray[np.int32],
        draw: NDArray[np.float32],
    ) -> NDArray[np.int32]:
        """Return one replacement for each hidden word.

        Args:
            inputs: a padded batch, each (B, T), hidden words masked.
            hidden: (B, T), K of them true.
            original: (K,) tokens that stood there, row by row.
            draw: (K,) uniform random numbers in [0, 1).
        """
        self._hidden = torch.from_numpy(hidden)
        given = {name: torch.from_numpy(value) for name, value in inputs.items() if name in self._inputs}
        logits: Tensor = self._model(**given).logits[0].float()
        if not torch.isfinite(logits).all():
            raise ModelError(f"{self._folder}: its masked-LM outputs are not finite. The weights are broken.")
        logits.masked_fill_(self._barred, -torch.inf)
        logits.scatter_(1, torch.from_numpy(original).long()[:, None], -torch.inf)
        best = logits.topk(min(CANDIDATES, logits.shape[1]))
        reached = best.values.softmax(-1).cumsum(-1)
        goal = torch.from_numpy(draw)[:, None] * reached[:, -1:]
        picked = best.indices.gather(1, (reached <= goal).sum(-1, keepdim=True))[:, 0]
        return np.asarray(picked.to(torch.int32).numpy())


def _bounded_batches(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the rows with words to replace in batches of like length whose tokens and hidden words fit the memory.

    Args:
        lengths: (n,) tokens of each row.
        counts: (n,) hidden words of each row.
    """
    rows = np.flatnonzero(counts)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    size = np.maximum(counts[rows], lengths[rows] / _TOKENS_PER_WORD)
    batch = np.cumsum(size) // _HIDDEN_WORDS
    return np.split(rows, np.flatnonzero(np.diff(batch)) + 1) if len(rows) else []


def _load_masked_lm(folder: Path, *, fast: bool) -> Any:
    """Return the masked language model of a folder in eval mode; every weight comes from the folder or it is an error."""
    from transformers import AutoModelForMaskedLM

    try:
        with quiet_transformers():
            model, info = AutoModelForMaskedLM.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa" if fast else "eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged folder
        raise ModelError(f"{folder}: could not be loaded ({str(error).strip().splitlines()[0][:200]}).") from error
    absent = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    if absent:
        raise ModelError(
            f"{folder}: has no masked-LM head ({', '.join(absent[:3])}{', …' if len(absent) > 3 else ''} missing), so it "
            "cannot say which words are likely. Use augmentation: dropout."
        )
    return model.eval()


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Return the rows of all `parts`, one part after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Encoded(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.types for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
