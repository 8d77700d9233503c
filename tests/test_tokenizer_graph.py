"""The tokenizer as a graph: the same ids, segments and masks as the tokenizer, whatever the text; texts in front of a model."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_tokenizer_tables import TEXTS
from tiny_family import write_family_tokenizer
from tiny_words import VOCABULARY, write_tokenizer

from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import BertemdError, ExportError
from bertemd_deploy.tokenizer_graph import tokenizer_graph, with_tokenizer
from bertemd_deploy.tokenizer_inside import check_joined, check_tokenizer, open_text_session

MAX_LENGTH = 16
WORDS = (
    *VOCABULARY[5:],
    "goodly",
    "films",
    "unheard",
    "[SEP]",
    "[sep]",
    "[MASK]x",
    "\ufdd0",
    "<unk>",
    "</s>",
    "a" * 101,
)


def extensions() -> None:
    pytest.importorskip("onnxruntime_extensions")


def folder(name: str, path: Path) -> Path:
    if name == "mpnet":
        write_family_tokenizer(path, "mpnet")
    else:
        write_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(request.param, tmp_path_factory.mktemp(request.param))


def texts(count: int, *, seed: int, longest: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("pairs", [False, True])
def test_it_reads_as_the_tokenizer_does(pairs: bool, tokenizer: Path) -> None:
    extensions()
    for max_length in (5, 6, MAX_LENGTH):
        front = tokenizer_graph(tokenizer, max_length=max_length, pairs=pairs)
        onnx.checker.check_model(front)
        first = [*TEXTS, *texts(150, seed=max_length)]
        second = texts(len(first), seed=99) if pairs else None
        check_tokenizer(front, first, second, tokenizer=tokenizer, max_length=max_length)


def _model() -> onnx.ModelProto:
    """Return a model whose logits are each row's ids times its segments and mask, summed."""
    nodes = [
        helper.make_node("Add", ["token_type_ids", "attention_mask"], ["weights"]),
        helper.make_node("Mul", ["input_ids", "weights"], ["products"]),
        helper.make_node("Cast", ["products"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["real", "axis"], ["logits"]),
    ]
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "model", inputs, outputs, [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"task": "mrpc"})
    return model


def test_texts_in_front_of_a_model(tmp_path: Path) -> None:
    extensions()
    write_tokenizer(tmp_path)
    model = _model()
    before = model.SerializeToString()
    joined = with_tokenizer(model, tokenizer_graph(tmp_path, max_length=MAX_LENGTH, pairs=True))
    assert model.SerializeToString() == before
    assert [value.name for value in joined.graph.input] == ["text", "text_pair"]
    assert [value.name for value in joined.graph.output] == ["logits"]
    assert {entry.key: entry.value for entry in joined.metadata_props} == {"task": "mrpc"}
    assert joined.ir_version == 8
    onnx.save(joined, tmp_path / "joined.onnx")
    session = open_text_session(str(tmp_path / "joined.onnx"))
    first, second = ["good film", "", "Bad!"], ["a song", "we saw it", ""]
    feeds = {"text": np.array(first, dtype=object), "text_pair": np.array(second, dtype=object)}
    batch = TextEncoder.load(tmp_path, max_length=MAX_LENGTH).encode(first, second).batch(range(3), pad_id=0)
    weights = batch["token_type_ids"] + batch["attention_mask"]
    (logits,) = session.run(None, feeds)
    np.testing.assert_array_equal(logits[:, 0], (batch["input_ids"] * weights).sum(axis=1))


def test_a_graph_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    extensions()
    front = tokenizer_graph(folder("bert", tmp_path / "one"), max_length=MAX_LENGTH, pairs=False)
    other = folder("bert", tmp_path / "other")
    written = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"lowercase": true', '"lowercase": false')
    (other / "tokenizer.json").write_text(written, encoding="utf-8")
    check_tokenizer(front, ["good film"], tokenizer=other, max_length=MAX_LENGTH)
    message = (
        r"inside a graph it reads 'Good film' as \[2, 5, 14, 3\], by itself as \[2, 1, 14, 3\]. Leave the tokenizer"
    )
    with pytest.raises(ExportError, match=message):
        check_tokenizer(front, ["good film", "Good film"], tokenizer=other, max_length=MAX_LENGTH)


def test_a_whole_graph_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    extensions()
    write_tokenizer(tmp_path)
    given = {"tokenizer": tmp_path, "max_length": MAX_LENGTH}
    joined = with_tokenizer(_model(), tokenizer_graph(tmp_path, max_length=MAX_LENGTH, pairs=True))
    first, second = texts(20, seed=1), texts(20, seed=2)
    onnx.save(_model(), tmp_path / "model.onnx")
    check_joined(joined, first, second, model=tmp_path / "model.onnx", **given)
    other = _model()
    other.graph.initializer[0].CopyFrom(helper.make_tensor("axis", TensorProto.INT64, [1], [0]))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(
        ExportError, match=r"^other\.onnx behind its tokenizer differs from itself by .* on '.*' and what fol"
    ):
        check_joined(joined, first, second, model=tmp_path / "other.onnx", **given)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    write_family_tokenizer(tmp_path, "roberta")
    with pytest.raises(ExportError, match="its model is BPE, not WordPiece; a graph with the tokenizer inside cannot"):
        tokenizer_graph(tmp_path, max_length=MAX_LENGTH, pairs=False)


def test_there_must_be_room_for_a_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ExportError, match="max_length 3 leaves no room beside the special tokens"):
        tokenizer_graph(tmp_path, max_length=3, pairs=True)


def test_without_the_extensions_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(BertemdError, match=r"pip install 'bertemd-deploy\[tokenizer-graph\]'"):
        open_text_session(b"")
