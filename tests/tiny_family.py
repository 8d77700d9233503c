"""Tiny random models of every family, each with the kind of tokenizer that its real ones have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_words import SPECIAL, VOCABULARY, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bertemd_deploy.checkpoints import checked_encoder
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.models import auto_class, load_classifier, output_layer, output_logits
from bertemd_deploy.tasks import Kind

WORDS = VOCABULARY[len(SPECIAL) :]
LABELS = ("no", "yes")
MPNET_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "[UNK]")
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
}


def tiny_config(family: str, *, vocabulary: int = 64, pad: int = 0, positions: int = 40, **changes: Any) -> Any:
    """Return a config of 4 layers, width 16, 2 heads, intermediate 32; `changes` are the family's own fields."""
    import transformers

    sizes = dict(zip(FAMILIES[family].fields, (4, 16, 2, 32), strict=True))
    fields = {"vocab_size": vocabulary, "pad_token_id": pad, "max_position_embeddings": positions}
    types = {"roberta": {"type_vocab_size": 1}, "electra": {"embedding_size": 16}}.get(family, {})
    return transformers.CONFIG_MAPPING[family](**(fields | sizes | types | {"initializer_range": 0.2} | changes))


def tiny_model(family: str, *, kind: Kind = "classification", seed: int = 0, **changes: Any) -> Any:
    """Return a random task model of a family in eval mode, its norms and biases random too."""
    config = tiny_config(family, **changes)
    kernel = "sdpa" if FAMILIES[family].sdpa else "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(kind).from_config(config, attn_implementation=kernel).eval()
        for name, value in model.named_parameters():
            if value.dim() == 1:  # all zero or one at the start, which would hide that they are left out
                value.data.add_(torch.randn_like(value) * 0.2)
            elif "embeddings" in name:
                value.data.copy_(torch.randn_like(value) * 0.5)  # the padding row too
    return model


def write_family_tokenizer(folder: Path, family: str) -> tuple[int, int]:
    """Write WordPiece with BERT's or MPNet's specials, byte-level BPE (RoBERTa) or Unigram (DeBERTa); return size, pad id."""
    folder.mkdir(parents=True, exist_ok=True)
    if family in ("bert", "electra", "distilbert"):
        write_tokenizer(folder)
        return len(VOCABULARY), 0
    ends = [("<s>", 0), ("</s>", 2)]
    if family == "mpnet":
        tokens = [*MPNET_SPECIAL, *WORDS, "<mask>"]
        ids = {token: at for at, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens([*MPNET_SPECIAL, "<mask>"])
        tokenizer.post_processor = processors.RobertaProcessing(ends[1], ends[0], add_prefix_space=False)
        tokenizer.enable_padding(direction="right", pad_id=1, pad_token="<pad>", length=16)
        tokenizer.enable_truncation(16)
        roles = dict(zip(_ROLES, ("<s>", "</s>", "<pad>", "[UNK]", "<mask>"), strict=True))
        name = "MPNetTokenizer"
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    elif family == "roberta":
        from tokenizers import trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
        tokenizer.post_processor = processors.RobertaProcessing(ends[1], ends[0], add_prefix_space=False)
        tokenizer.model.save(str(folder))
        roles = dict(zip(_ROLES, ("<s>", "</s>", "<pad>", "<unk>", "<mask>"), strict=True))
        name = "RobertaTokenizer"
    else:
        pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0)]
        pieces += [(f"▁{word}", -1.0 - at / 100) for at, word in enumerate(WORDS)] + [("▁", -9.0), ("[MASK]", 0.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        roles = dict(zip(_ROLES, ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"), strict=True))
        name = "DebertaV2Tokenizer"
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **roles}))
    pad = tokenizer.token_to_id(roles["pad_token"])
    return tokenizer.get_vocab_size(), pad


_ROLES = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")


def write_family(
    folder: Path, family: str, *, labels: Sequence[str] = ("no", "yes"), kind: Kind = "classification", **changes: Any
) -> Path:
    """Write a random task model of a family as a Hugging Face folder with its tokenizer."""
    vocabulary, pad = write_family_tokenizer(folder, family)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: at for at, label in enumerate(labels)}}
    model = tiny_model(family, kind=kind, vocabulary=vocabulary, pad=pad, **(names if labels else {}), **changes)
    model.save_pretrained(folder)
    return folder


def answer_itself(teacher: Path, data: Path) -> None:
    """Scale a two-class teacher's outputs, split about evenly, and label `data` (one text a row) with its own answers."""
    model = load_classifier(teacher, labels=("no", "yes"))
    encoder = TextEncoder.load(teacher, max_length=32)
    files = [data / f"{split}.tsv" for split in ("train", "dev")]
    rows = [[line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    body = [row for part in rows for row in part[1:]]
    examples = encoder.encode([row[0] for row in body])
    with torch.no_grad():
        pad = int(model.config.pad_token_id)
        batch = {name: torch.from_numpy(v) for name, v in examples.batch(range(len(body)), pad_id=pad).items()}
        logits = output_logits(model(**batch))
        last, difference = output_layer(model), logits[:, 1] - logits[:, 0]
        scale = 3 / float(difference.std())
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        last.bias[0] += scale * difference.median()
        answers = output_logits(model(**batch)).argmax(-1)
    model.save_pretrained(teacher)
    for row, answer in zip(body, answers, strict=True):
        row[-1] = ("no", "yes")[answer]
    for file, part in zip(files, rows, strict=True):
        file.write_text("".join("\t".join(row) + "\n" for row in part), encoding="utf-8")


def encoder_of(folder: Path, *, max_length: int = 32) -> TextEncoder:
    """Return a teacher folder's tokenizer."""
    return checked_encoder(folder, max_length=max_length)


def family_teacher(
    tmp_path: Path, family: str, *, kind: Kind = "classification", **changes: Any
) -> tuple[Any, TextEncoder]:
    """Return a loaded teacher of a family with its tokenizer."""
    folder = write_family(tmp_path / family, family, kind=kind, **changes)
    labels = () if kind == "question-answering" else LABELS
    return load_classifier(folder, labels=labels, kind=kind), encoder_of(folder)


def carve_codes(folder: Path, where: list[int]) -> dict[str, torch.Tensor]:
    """Let only the position embedding of a BERT's folder write to the coordinates `where`, as codes are; return its weights."""
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if re.search(r"(word|token_type)_embeddings", name):
            values[:, where] = 0
        elif ".output.dense." in name or name.endswith("LayerNorm.bias"):
            values[where] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def bert_teacher(tiny_bert: Callable[..., Path]) -> tuple[Any, TextEncoder]:
    """Return a loaded BERT teacher with its tokenizer, from the fixture that makes folders."""
    folder = tiny_bert("teacher", layers=4, labels=LABELS)
    return load_classifier(folder, labels=LABELS), encoder_of(folder)
