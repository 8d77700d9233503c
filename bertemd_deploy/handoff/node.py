"""The Node script: `predict.mjs` on onnxruntime-node and @huggingface/tokenizers, for tasks that decide on a whole text.

Ids of a text's tokens come from the JavaScript tokenizer. How they are framed is data, found out here with the tokenizer of the
training: programs differ in it, and one frame holds for every text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import read_json
from bertemd_deploy.handoff.student import (
    TEMPLATES,
    TOKENIZER,
    copy_template,
    find_student,
    write_model,
    write_readme,
)
from bertemd_deploy.tasks import Kind

KINDS: tuple[Kind, ...] = ("classification", "regression", "multilabel")
TOKENIZERS = ("WordPiece", "BPE", "Unigram")  # that @huggingface/tokenizers has
_RARE_IDEOGRAPH = "\U00020000"  # of those beyond 16 bits


def write(artifact: Artifact, folder: Path) -> str:
    """Write the bundle into `folder` and return the name of its graph.

    Raises:
        ArtifactError: the task or the tokenizer is of a kind that the script does not know; or see `find_student`.
    """
    if artifact.kind not in KINDS:
        raise ArtifactError(
            f"{artifact.folder}: a bundle for onnxruntime-node is for {', '.join(KINDS)}, the artifact is for {artifact.kind}. "
            "Take --for python, fastapi-docker or triton; transformers.js reads the artifact's own folder."
        )
    release = json.loads((TEMPLATES / "node/package.json").read_text(encoding="utf-8"))["dependencies"][
        "onnxruntime-node"
    ]
    student = find_student(artifact, runtime=f"onnxruntime-node {release}", release=release)
    write_model(student, folder / "model", more=_tokenizing(artifact))
    for name in ("predict.mjs", "package.json"):
        copy_template(f"node/{name}", folder)
    write_readme(folder, "node/README.md", **student.described(), onnxruntime=release)
    return student.graph


def _tokenizing(artifact: Artifact) -> dict[str, Any]:
    """Return what the script has to do itself to the texts of the artifact's tokenizer: entries of model.json."""
    path = artifact.folder / TOKENIZER
    model = read_json(path, what="tokenizer").get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in TOKENIZERS:
        raise ArtifactError(
            f"{path}: a {kind or 'damaged'} tokenizer; @huggingface/tokenizers has {', '.join(TOKENIZERS)}. Take --for python, "
            "fastapi-docker or triton."
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    return {
        "frames": [_frame(tokenizer, "a"), _frame(tokenizer, "a", "a")],
        "normalizer": {
            "lowers": normalize("\u03a3") == "\u03c3",
            "parts_ideographs": normalize(f"a{_RARE_IDEOGRAPH}a") == f"a {_RARE_IDEOGRAPH} a",
        },
    }


def _frame(tokenizer: Tokenizer, first: str, second: str | None = None) -> list[dict[str, int]]:
    """Return what stands around one or two texts: special tokens and the places of the texts, each with its segment id."""
    encoding = tokenizer.encode(first, second)
    found: list[dict[str, int]] = []
    for sequence, token, segment in zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True):
        if sequence is None:
            found.append({"token": token, "type": segment})
        elif {"sequence": sequence, "type": segment} not in found:
            found.append({"sequence": sequence, "type": segment})
    if sorted(part["sequence"] for part in found if "sequence" in part) != ([0] if second is None else [0, 1]):
        raise ArtifactError(
            "tokenizer.json: what it puts around a text could not be told, as it reads no token in the letter a. Take --for "
            "python, fastapi-docker or triton."
        )
    return found
