"""The Triton model repository: the graph with its config.pbtxt and labels, and a Python client that tokenises and decides.

Triton's ONNX Runtime backend computes logits; every kind of task is decided by the client, with the predictor of the Python
bundle. Facts of Triton: its model_config.proto and the backend's README, see the links in the template; the release of ONNX
Runtime in an image: github.com/triton-inference-server/server/pull/8867 (1.24.4 up to then, 1.27 from then on).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bertemd_deploy.artifact import GRAPH_PRECISION, Artifact
from bertemd_deploy.files import write_json, write_text
from bertemd_deploy.handoff.student import (
    GRAPH,
    Student,
    copy_template,
    fill_template,
    find_student,
    pins,
    write_model,
    write_readme,
)
from bertemd_deploy.runtime import BATCH_SIZE

IMAGE, ONNXRUNTIME = "nvcr.io/nvidia/tritonserver:26.06-py3", "1.24"
NAME = "student"
PREFERRED_BATCH_SIZES = (8, BATCH_SIZE)
MAX_QUEUE_DELAY_US = 1000  # about what a row of a small student takes
PAD_TO_MULTIPLE_OF = 16  # tokens
LABELS = "labels.txt"
_LABELLED = f"- **Labels.** `{LABELS}` names the logits for Triton's classification extension, which ranks them.\n"
_PADDED = f"""A decision depends neither on padding nor on the rows that run beside it. The client pads to a multiple of
  {PAD_TO_MULTIPLE_OF} tokens (`client/client.json`), so that requests of about one length meet in a batch."""
_UNPADDED = """The int8 scales of activations are measured over the whole batch: a close decision may fall otherwise with
  padding or beside other rows{share}. The client pads only to its own longest row
  (`client/client.json`). Where answers have to be the same every time, export with `quantize.mode: static`."""


def write(artifact: Artifact, folder: Path) -> str:
    """Write the bundle into `folder` and return the name of its graph.

    Raises:
        ArtifactError: see `find_student`.
    """
    student = find_student(artifact, runtime=f"{IMAGE} (ONNX Runtime {ONNXRUNTIME})", release=ONNXRUNTIME)
    place = folder / "model_repository" / NAME
    (place / "1").mkdir(parents=True)
    shutil.copyfile(student.path, place / "1" / GRAPH)
    labelled = artifact.kind in ("classification", "multilabel") and all(map(_is_one_line, artifact.labels))
    if labelled:
        write_text(place / LABELS, "".join(f"{label}\n" for label in artifact.labels))
    write_text(place / "config.pbtxt", config(student, labelled=labelled))
    client = folder / "client"
    write_model(student, client / "model", graph=False)
    copy_template("python/predictor.py", client)
    copy_template("triton/client.py", client)
    padding = _padding(artifact, student.graph)
    multiple = PAD_TO_MULTIPLE_OF if padding == _PADDED else 1
    write_json(client / "client.json", {"name": NAME, "pad_to_multiple_of": multiple})
    versions = pins(artifact)
    write_text(client / "requirements.txt", fill_template("triton/requirements.txt", **versions))
    write_readme(
        folder,
        "triton/README.md",
        **student.described(),
        image=IMAGE,
        onnxruntime=ONNXRUNTIME,
        name=NAME,
        outputs=", ".join(f"`{name}`" for name in student.outputs),
        max_batch_size=BATCH_SIZE,
        max_queue_delay_microseconds=MAX_QUEUE_DELAY_US,
        padding=padding,
        labels=_LABELLED if labelled else "",
    )
    return student.graph


def config(student: Student, *, labelled: bool) -> str:
    """Return the model's config.pbtxt; every text in it is one of the names that `runtime` allows.

    Args:
        student: what is handed off.
        labelled: labels.txt lies beside it.
    """
    width = student.artifact.outputs
    dims = {"token-classification": f"-1, {width}", "question-answering": "-1"}.get(student.artifact.kind, str(width))
    output = "triton/labelled_output.pbtxt" if labelled else "triton/output.pbtxt"
    inputs = [fill_template("triton/input.pbtxt", name=name).rstrip() for name in student.inputs]
    outputs = [fill_template(output, name=name, dims=dims).rstrip() for name in student.outputs]
    return fill_template(
        "triton/config.pbtxt",
        name=NAME,
        max_batch_size=BATCH_SIZE,
        inputs=",\n".join(inputs),
        outputs=",\n".join(outputs),
        preferred_batch_sizes=", ".join(map(str, PREFERRED_BATCH_SIZES)),
        max_queue_delay_microseconds=MAX_QUEUE_DELAY_US,
    )


def _is_one_line(label: str) -> bool:
    """Say whether a label can be a line of labels.txt."""
    return label.splitlines() == [label] and label.isprintable()


def _padding(artifact: Artifact, graph: str) -> str:
    """Return what the README says of padding, by whether a graph's answers depend on what else is in the batch."""
    measured = artifact.manifest.get("invariance")
    found = measured.get(graph) if isinstance(measured, dict) else None
    told = found if isinstance(found, dict) else {}
    scales = told.get("activation_scales")
    if scales != "per-tensor" and (scales is not None or GRAPH_PRECISION[graph] != "int8"):
        return _PADDED
    share = told.get("changed_decision_share")
    known = isinstance(share, float) and 0 <= share <= 1
    return _UNPADDED.format(share=f" ({share:.1%} of them did at export)" if known else "")
