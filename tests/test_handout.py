"""The artifact's tokenizer files: other tools, told that the model is a BERT, read the teacher's ids from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_family import write_family_tokenizer
from tokenizers import Tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ArtifactError, ExportError
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.handout import add_measured, check_measured, model_card, write_tokenizer

TEXTS = ["the film was Lovely today!", "we saw a sad song, very dull"]
FILES = {
    "mpnet": {"vocab.txt"},
    "roberta": {"vocab.json", "merges.txt"},
    "deberta-v2": set(),
}


def written(tmp_path: Path, family: str, *, keep: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Return the teacher's and the artifact's folder; `keep` names the teacher's files beside tokenizer.json, () all."""
    teacher, artifact = tmp_path / "teacher", tmp_path / "artifact"
    write_family_tokenizer(teacher, family)
    if keep:
        for path in teacher.iterdir():
            if path.name not in ("tokenizer.json", *keep):
                path.unlink()
    artifact.mkdir()
    write_tokenizer(teacher, artifact, max_length=24)
    (artifact / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return teacher, artifact


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ({"kind": "classification"}, 'bertemd predict . "a text to classify"'),
        ({"kind": "classification", "pairs": False}, 'bertemd predict . "a text to classify"'),
        ({"kind": "classification", "pairs": True}, "bertemd predict . --pair $'a first text\\ta second text'"),
        ({"kind": "multilabel", "pairs": True}, "bertemd predict . --pair $'a first text\\ta second text'"),
        ({"kind": "token-classification"}, 'bertemd predict . "a text with names"'),
        ({"kind": "question-answering"}, "bertemd predict . --pair $'a question\\tthe text that answers it'"),
    ],
)
def test_the_model_card_says_how_the_model_is_called(task: dict[str, object], command: str) -> None:
    card = model_card(
        {
            "task": {"name": "mine", "metrics": ["accuracy"]} | task,
            "labels": ["a", "b"],
            "max_length": 8,
            "student": {"layers": 2, "hidden": 4, "heads": 1, "parameters": 10},
            "teacher": None,
            "metrics": {"student": {"accuracy": 1.0}},
            "parity": {"graphs": {}},
        },
        graphs={},
    )
    assert f"```\n{command}\n```\n" in card
    assert ("split into words at blanks" in card) == (task["kind"] == "token-classification")


def test_measurements_take_the_place_of_earlier_ones_in_the_model_card(tiny_artifact: Callable[..., Path]) -> None:
    folder = tiny_artifact()
    (folder / "README.md").unlink()
    with pytest.raises(ArtifactError, match=r"README\.md: the model card is missing"):
        add_measured(folder, "| a |")
    (folder / "README.md").write_text("# A card\n\nOf its own.\n")
    for table in ("| first |", "| second |"):
        add_measured(folder, table)
    card = (folder / "README.md").read_text()
    assert card.startswith("# A card\n\nOf its own.\n\n<!-- measured: start -->\n## Measured\n\n| second |\n")
    assert "first" not in card
    Artifact.load(folder).file("README.md")
    (folder / "README.md").write_text(card.replace("<!-- measured: end -->", "") + "Mine.\n")
    add_measured(folder, "| third |")
    assert (folder / "README.md").read_text().endswith("Mine.\n")


def test_a_table_is_of_its_own_artifact(tiny_artifact: Callable[..., Path]) -> None:
    folder = tiny_artifact()
    own = {key: Artifact.load(folder).manifest[key] for key in ("task", "labels", "student", "created")}
    check_measured(folder, [{"artifact": own}])
    with pytest.raises(ArtifactError, match=r"its labels is .*, a record's is .*other.*The table of a model card"):
        check_measured(folder, [{"artifact": own | {"labels": ["other"]}}])


@pytest.mark.parametrize(
    ("graphs", "told"),
    [
        (("fp32", "fused"), "`model.onnx` uses standard ONNX operators only; the `fused` graphs"),
        (("fp32", "int8", "fused"), "`model.onnx` and `model_quantized.onnx` use standard ONNX operators only"),
    ],
)
def test_the_model_card_names_the_graphs_there_are(tmp_path: Path, graphs: tuple[str, ...], told: str) -> None:
    manifest = {
        "task": {"name": "mine", "metrics": ["accuracy"], "kind": "classification"},
        "labels": ["a", "b"],
        "max_length": 8,
        "student": {"layers": 2, "hidden": 4, "heads": 1, "parameters": 10},
        "teacher": None,
        "metrics": {},
        "parity": {"graphs": {}},
    }
    assert told in model_card(manifest, graphs=dict.fromkeys(graphs, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_teacher_s_ids_beside_a_bert(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    teacher, artifact = written(tmp_path, family)
    plain = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    loaded = AutoTokenizer.from_pretrained(artifact)
    for pairs in (None, TEXTS[::-1]):
        told = loaded(TEXTS, pairs)
        rows = [plain.encode(text, pair) for text, pair in zip(TEXTS, pairs or [None, None], strict=True)]
        assert told["input_ids"] == [row.ids for row in rows]
        assert told["token_type_ids"] == [row.type_ids for row in rows]
    assert loaded.model_max_length == 24
    roles = json.loads((teacher / "special_tokens_map.json").read_text())
    assert {role: token for role, token in loaded.special_tokens_map.items() if role in roles} == roles
    assert loaded.pad_token_id == plain.token_to_id(roles["pad_token"])
    encoder = TextEncoder.load(artifact, max_length=24)
    assert encoder.encode(TEXTS).tokens.tolist() == [at for text in TEXTS for at in plain.encode(text).ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_the_kind_of_tokenizer(family: str, tmp_path: Path) -> None:
    teacher, artifact = written(tmp_path, family)
    common = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in artifact.iterdir()} == common | FILES.get(family, {"vocab.txt"})
    roles = json.loads((teacher / "special_tokens_map.json").read_text())
    assert json.loads((artifact / "special_tokens_map.json").read_text()) == roles
    named = json.loads((artifact / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == ("PreTrainedTokenizerFast" if family in FILES else "BertTokenizer")
    if family == "mpnet":
        stored = json.loads((artifact / "tokenizer.json").read_text())
        assert stored["padding"] is stored["truncation"] is None
        assert (artifact / "vocab.txt").read_text() == (teacher / "vocab.txt").read_text()
    if family == "roberta":
        for name in ("vocab.json", "merges.txt"):
            theirs, ours = (teacher / name).read_text(), (artifact / name).read_text()
            assert (
                ours.splitlines() == theirs.splitlines()
                if name == "merges.txt"
                else json.loads(ours) == json.loads(theirs)
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["special_tokens_map.json", "tokenizer.json"])
def test_roles_are_found_where_no_config_names_them(family: str, keep: str, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    write_family_tokenizer(reference, family)
    roles = json.loads((reference / "special_tokens_map.json").read_text())
    if family == "roberta" and keep == "tokenizer.json":
        del roles["unk_token"]  # bytes are never unknown, so the model has none
    _, artifact = written(tmp_path, family, keep=(keep,))
    assert json.loads((artifact / "special_tokens_map.json").read_text()) == roles


def test_where_the_tokenizer_once_lay_is_not_handed_out(tmp_path: Path) -> None:
    teacher, artifact = tmp_path / "teacher", tmp_path / "artifact"
    write_family_tokenizer(teacher, "bert")
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    more = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "name_or_path": "/home/someone/model"}
    unknown = {"unk_token": {"content": "[UNK]", "lstrip": False}}
    (teacher / "tokenizer_config.json").write_text(json.dumps(config | more | unknown))
    artifact.mkdir()
    write_tokenizer(teacher, artifact, max_length=8)
    assert json.loads((artifact / "tokenizer_config.json").read_text()) == config | {"model_max_length": 8}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0}}, "a WordLevel tokenizer; known: WordPiece, BPE, Unigram"),
        ({"type": "Unigram", "vocab": {"a": 0}}, "a Unigram tokenizer; known"),
        (None, "a damaged tokenizer; known"),
        ({"type": "WordPiece", "vocab": {"a": 0, "b": 2}}, r"no token of id 1 \(2 tokens\)"),
    ],
)
def test_tokenizers_that_cannot_be_handed_out(model: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "artifact").mkdir()
    with pytest.raises(ExportError, match=message):
        write_tokenizer(tmp_path, tmp_path / "artifact", max_length=8)
