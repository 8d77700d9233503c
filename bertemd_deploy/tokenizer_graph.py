"""A graph that takes text: BERT's tokenizer written as ONNX nodes in front of a model, run by onnxruntime-extensions.

    text (batch,)  [text_pair (batch,)]  ->  input_ids, attention_mask, token_type_ids  ->  logits

The extension's own BertTokenizer is not used: it leaves most accents outside Latin-1 on, splits at other punctuation than the
`tokenizers` library, cuts pairs at other places, and of a word with an unknown end it keeps the beginning. Here

    texts   special tokens become a reserved character each; by `tokenizer_tables` a character is dropped, a blank, a word of
            its own, or replaced; all texts are one, with a mark behind each
    words   become pieces (one with an unknown end is a single [UNK]), pieces ids
    rows    are cut, of a pair the longer text first, and get special tokens, segments and padding

Tokenizers with BERT's normalizer, pre-tokenizer and WordPiece (BERT, ELECTRA, DistilBERT, MPNet) have such a graph; others are
refused. A text with a NUL character ends there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
from tokenizers import Tokenizer

from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import IR_VERSIONS
from bertemd_deploy.runtime import INPUT_NAMES
from bertemd_deploy.tokenizer_tables import (
    MARK,
    RESERVED,
    Characters,
    Template,
    escaped,
    one_of,
    read_characters,
    read_template,
    tokenizer_fault,
)

EXTENSIONS = "ai.onnx.contrib"
TEXT_INPUTS = ("text", "text_pair")
_CLASSICAL = "ai.onnx.ml"


def with_tokenizer(model: onnx.ModelProto, front: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` behind its tokenizer: texts in, the model's outputs out.

    Args:
        model: a graph with the inputs `input_ids`, `attention_mask` and `token_type_ids`; it is left as it is.
        front: its tokenizer, from `tokenizer_graph`, of the same operator set.
    """
    behind = onnx.ModelProto()
    behind.CopyFrom(model)
    del behind.metadata_props[:]
    fed = [(f"text/{name}", name) for name in INPUT_NAMES]
    joined = compose.merge_models(front, behind, io_map=fed, producer_name=model.producer_name)
    joined.metadata_props.extend(model.metadata_props)
    return joined


def tokenizer_graph(tokenizer: Path, *, max_length: int, pairs: bool, opset: int = 17) -> onnx.ModelProto:
    """Return the tokenizer alone; its outputs, (batch, sequence) int64, are called as the model's inputs behind "text/".

    Args:
        tokenizer: folder with `tokenizer.json`.
        max_length: longest output in tokens.
        pairs: take two texts a row.
        opset: operator set.

    Raises:
        ModelError: the tokenizer is missing or damaged.
        ExportError: the tokenizer does something that these nodes do not.
    """
    encoder = TextEncoder.load(tokenizer, max_length=max_length)
    where = tokenizer / "tokenizer.json"
    description = where.read_text(encoding="utf-8")
    stored, read = json.loads(description), Tokenizer.from_str(description)
    read.no_truncation()
    read.no_padding()
    if fault := tokenizer_fault(stored):
        raise ExportError(f"{where}: {fault}; a graph with the tokenizer inside cannot do that. Leave it out.")
    characters = _characters(description, where)
    template = read_template(read, stored["model"], pairs=pairs, where=where)
    room = max_length - len(template.before) - len(template.between) - len(template.behind)
    if room < 1:
        raise ExportError(f"{where}: max_length {max_length} leaves no room beside the special tokens. Raise it.")
    graph = _Graph()
    names = TEXT_INPUTS[: 2 if pairs else 1]
    rows = graph.op("Concat", list(names), axis=0) if pairs else names[0]
    words = _words(graph, rows, read, characters=characters, added=stored["added_tokens"])
    ids, starts, counts = _pieces(graph, words, stored["model"], read)
    results = _assemble(graph, ids, starts, counts, template=template, room=room, pad_id=encoder.pad_id)
    for name, result in zip(INPUT_NAMES, results, strict=True):
        graph.op("Identity", [result], outputs=[f"text/{name}"])
    domains = {"": opset, EXTENSIONS: 1, _CLASSICAL: 2}
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "tokenizer",
            [helper.make_tensor_value_info(name, TensorProto.STRING, ["batch"]) for name in names],
            [
                helper.make_tensor_value_info(f"text/{name}", TensorProto.INT64, ["batch", "sequence"])
                for name in INPUT_NAMES
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
        ir_version=IR_VERSIONS[opset],
    )


@functools.lru_cache(maxsize=1)  # seconds; the graphs of one artifact share it
def _characters(description: str, where: Path) -> Characters:
    return read_characters(Tokenizer.from_str(description), where=where)


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any) -> str:
        name = f"text/constant_{len(self.constants)}"
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            encoded = [item.encode() for item in value]
            self.constants.append(helper.make_tensor(name, TensorProto.STRING, [len(value)], encoded))
        else:
            self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def number(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def op(
        self, kind: str, inputs: list[str], *, domain: str = "", outputs: list[str] | None = None, **attributes: Any
    ) -> str:
        """Add a node; return the name of its first output."""
        name = f"text/{kind}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, outputs or [f"{name}_out"], name=name, domain=domain, **attributes)
        )
        return str(self.nodes[-1].output[0])

    def replace(self, texts: str, pattern: str, by: str) -> str:
        inputs = [texts, self.constant([pattern]), self.constant([by])]
        return self.op("StringRegexReplace", inputs, domain=EXTENSIONS, global_replace=1)

    def split(self, texts: str, pattern: str, *, kept: str) -> str:
        """Split texts at matches of `pattern`; return all parts, with those matches that `kept` matches too."""
        name = f"text/split_{len(self.nodes)}"
        inputs = [texts, self.constant([pattern]), self.constant([kept])]
        outputs = [f"{name}_{part}" for part in ("parts", "begins", "ends", "rows")]
        return self.op("StringRegexSplitWithOffsets", inputs, domain=EXTENSIONS, outputs=outputs)

    def join(self, texts: str, separator: str) -> str:
        inputs = [texts, self.constant([separator]), self.number(0)]
        return self.op("StringJoin", inputs, domain=EXTENSIONS)

    def count(self, values: str) -> str:
        """Return how many entries a list has, as a list of one number."""
        return self.op("Shape", [values])

    def range(self, count: str) -> str:
        """Return 0 .. count - 1, for a list of one number."""
        zero, one = self.constant(np.int64(0)), self.constant(np.int64(1))
        return self.op("Range", [zero, self.op("Squeeze", [count]), one])


def _words(
    graph: _Graph, rows: str, read: Tokenizer, *, characters: Characters, added: Sequence[dict[str, Any]]
) -> str:
    """Add the nodes from texts (R,) to their words in one list, with a `MARK` behind each text's."""
    spares = RESERVED[: len(added)]
    if spares:
        rows = graph.replace(rows, one_of(spares), RESERVED[-1])  # a text's own
    for token, spare in zip(added, spares, strict=True):
        if not token["normalized"]:
            rows = graph.replace(rows, escaped(token["content"]), spare)
    dropped = sorted(set(characters.dropped).difference(spares))
    if dropped:
        rows = graph.replace(rows, one_of(dropped), "")
    rows = graph.replace(rows, one_of(characters.blank), " ")
    whole = graph.join(graph.op("Concat", [rows, graph.constant([""])], axis=0), MARK)
    if characters.alone:
        whole = graph.replace(whole, f"({one_of(characters.alone)})", r" \1 ")
    if characters.replaced:
        letters = graph.split(whole, "(?s)(.)", kept="(?s)(.)")
        table = "\n".join(f"{letter}\t{text}" for letter, text in characters.replaced.items())
        whole = graph.join(graph.op("StringMapping", [letters], domain=EXTENSIONS, map=table), "")
    for token, spare in zip(added, spares, strict=True):
        if token["normalized"]:
            whole = graph.replace(whole, escaped(read.normalizer.normalize_str(token["content"])), spare)
    whole = graph.replace(whole, one_of(characters.spacing), " ")
    whole = graph.replace(whole, f"({one_of(characters.parting)})", r" \1 ")
    for token, spare in zip(added, spares, strict=True):
        literal = token["content"].replace("\\", "\\\\")
        whole = graph.replace(whole, spare, f" {literal} ")
    return graph.split(whole, f"( +|{MARK})", kept=f"({MARK})")


def _pieces(graph: _Graph, words: str, model: dict[str, Any], read: Tokenizer) -> tuple[str, str, str]:
    """Add the nodes from words to the ids of all their pieces in one list, and each text's start and count in it."""
    unknown = model["unk_token"]
    vocabulary: dict[str, int] = dict(read.get_vocab(with_added_tokens=True))
    mark = max(vocabulary.values()) + 1
    found = [f"text/pieces_{part}" for part in ("tokens", "rows", "begins", "limits")]
    tokens = graph.op(
        "WordpieceTokenizer",
        [words, graph.constant(np.zeros(0, dtype=np.int64))],
        domain=EXTENSIONS,
        outputs=found,
        vocab=json.dumps(model["vocab"] | {MARK: mark}, ensure_ascii=False),
        suffix_indicator=model["continuing_subword_prefix"],
        unknown_token=unknown,
        max_input_chars_per_word=model["max_input_chars_per_word"],
    )
    ids = graph.op(
        "LabelEncoder",
        [tokens],
        domain=_CLASSICAL,
        keys_strings=[*vocabulary, MARK],
        values_int64s=[*vocabulary.values(), mark],
        default_int64=vocabulary[unknown],
    )
    # Of a word that ends in an unknown piece only that piece stays.
    lasts = graph.op("Sub", [found[3], graph.number(1)])
    size = graph.count(ids)
    none = graph.op("ConstantOfShape", [size], value=numpy_helper.from_array(np.zeros(1, dtype=np.int64)))
    is_last = graph.op("ScatterElements", [none, lasts, graph.op("Sign", [found[3]])], axis=0)
    word = graph.op("CumSum", [is_last, graph.constant(np.int64(0))], exclusive=1)
    bad_word = graph.op("Equal", [graph.op("Gather", [ids, lasts]), graph.number(vocabulary[unknown])])
    good = graph.op("Not", [graph.op("Gather", [bad_word, word])])
    kept = graph.op("Or", [good, graph.op("Cast", [is_last], to=TensorProto.BOOL)])
    ids = graph.op("Compress", [ids, kept], axis=0)

    is_mark = graph.op("Equal", [ids, graph.number(mark)])
    marks = graph.op("Compress", [graph.range(graph.count(ids)), is_mark], axis=0)
    ends = graph.op("Sub", [marks, graph.range(graph.count(marks))])
    before = graph.op("Slice", [ends, graph.number(0), graph.number(-1)])
    starts = graph.op("Concat", [graph.number(0), before], axis=0)
    ids = graph.op("Compress", [ids, graph.op("Not", [is_mark])], axis=0)
    return ids, starts, graph.op("Sub", [ends, starts])


def _assemble(
    graph: _Graph, ids: str, starts: str, counts: str, *, template: Template, room: int, pad_id: int
) -> tuple[str, str, str]:
    """Add the nodes from pieces to padded ids, mask and segments, (batch, sequence) each."""
    pairs = template.pairs
    column = graph.number(1)
    if pairs:
        (first, second), (kept, other) = _halves(graph, starts), _cut(graph, *_halves(graph, counts), room=room)
        split = graph.op("Slice", [second, graph.number(0), graph.number(1)])
    else:
        first, kept = starts, graph.op("Min", [counts, graph.number(room)])
        second, other, split = first, graph.op("Sub", [counts, counts]), graph.count(ids)
    first, second, kept, other = (graph.op("Unsqueeze", [value, column]) for value in (first, second, kept, other))
    lengths = (len(template.before), len(template.between), len(template.behind))
    bounds = [graph.number(lengths[0])]  # where each part ends: before, first text, between, second text, behind
    for length in (kept, graph.number(lengths[1]), other, graph.number(lengths[2])):
        bounds.append(graph.op("Add", [bounds[-1], length]))
    total = graph.op("ReduceMax", [bounds[-1]], keepdims=0)
    place = graph.range(graph.op("Reshape", [total, graph.number(1)]))
    # Special tokens and padding lie behind the pieces, in the order of the template.
    size = graph.count(ids)
    origins = [
        size,
        graph.op("Sub", [first, bounds[0]]),
        graph.op("Sub", [graph.op("Add", [size, graph.number(lengths[0])]), bounds[1]]),
        graph.op("Sub", [second, bounds[2]]),
        graph.op("Sub", [graph.op("Add", [size, graph.number(lengths[0] + lengths[1])]), bounds[3]]),
    ]
    index = graph.op("Add", [size, graph.number(sum(lengths))])
    for bound, origin in reversed(list(zip(bounds, origins, strict=True))):
        inside = graph.op("Less", [place, bound])
        index = graph.op("Where", [inside, graph.op("Add", [place, origin]), index])
    special = [*template.before, *template.between, *template.behind, (pad_id, 0)]
    numbers, types = zip(*special, strict=True)
    in_first = graph.op("Less", [graph.range(size), split])
    segments = graph.op("Where", [in_first, *(graph.number(segment) for segment in template.segments)])
    sources = [
        graph.op("Concat", [values, graph.number(*added)], axis=0)
        for values, added in ((ids, numbers), (segments, types))
    ]
    mask = graph.op("Cast", [graph.op("Less", [place, bounds[-1]])], to=TensorProto.INT64)
    return graph.op("Gather", [sources[0], index]), mask, graph.op("Gather", [sources[1], index])


def _halves(graph: _Graph, values: str) -> list[str]:
    """Split a list in two: of the first texts, and of the second ones."""
    name = f"text/halves_{len(graph.nodes)}"
    half = graph.op("Div", [graph.count(values), graph.number(2)])
    sizes = graph.op("Concat", [half, half], axis=0)
    graph.op("Split", [values, sizes], outputs=[f"{name}_first", f"{name}_second"], axis=0)
    return [f"{name}_first", f"{name}_second"]


def _cut(graph: _Graph, first: str, second: str, *, room: int) -> list[str]:
    """Cut pairs to `room` tokens as the `tokenizers` library does: the longer text first, then both in half."""
    half = room // 2
    small = graph.op("Min", [first, second, graph.number(half)])
    large = graph.op("Sub", [graph.number(room), small])
    fits = graph.op("LessOrEqual", [graph.op("Add", [first, second]), graph.number(room)])
    swapped = graph.op("Greater", [first, second])
    cut = [
        graph.op("Where", [swapped, large, small]),
        graph.op("Where", [swapped, small, large]),
    ]
    return [graph.op("Where", [fits, whole, part]) for whole, part in zip((first, second), cut, strict=True)]
