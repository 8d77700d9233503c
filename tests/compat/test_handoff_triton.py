"""The bundle for Triton: its config.pbtxt, read with Triton's own schema, says what the graph beside it takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from compat_asking import ANSWERING, ask, installed
from compat_cases import DESIGNS

from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.triton import NAME

pytestmark = pytest.mark.compat
ASKED = ("classification", "pairs", "regression", "multilabel", "token-classification", "question-answering", "static")
TYPES = {"TYPE_INT64": onnx.TensorProto.INT64, "TYPE_FP32": onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cases, folder = request.getfixturevalue("cases"), tmp_path_factory.mktemp("handoff-triton")
    bundles = {name: write_bundle(cases[name].artifact.folder, kind="triton", out=folder / name) for name in ASKED}
    return {name: bundle / "model_repository" / NAME for name, bundle in bundles.items()}


@pytest.fixture(scope="module")
def configs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = installed("triton", program="bin/python") / "bin" / "python"
    work = tmp_path_factory.mktemp("triton")
    models: dict[str, Path] = request.getfixturevalue("models")
    texts = {name: (model / "config.pbtxt").read_text(encoding="utf-8") for name, model in models.items()}
    found = ask([str(python), str(ANSWERING / "triton_python.py")], texts, work=work, folder=work)
    configs: dict[str, Any] = found["configs"]
    return configs


@pytest.mark.parametrize("name", ASKED)
def test_the_config_is_the_graph_s(name: str, configs: dict[str, Any], models: dict[str, Path]) -> None:
    config = configs[name]
    graph = onnx.load_model(models[name] / "1" / config["default_model_filename"]).graph
    for told, tensors in ((config["input"], graph.input), (config["output"], graph.output)):
        assert [tensor["name"] for tensor in told] == [tensor.name for tensor in tensors]
        for entry, tensor in zip(told, tensors, strict=True):
            found = tensor.type.tensor_type
            assert TYPES[entry["data_type"]] == found.elem_type
            sizes = [str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in found.shape.dim]
            assert [*entry["dims"]] == sizes[1:], "without the batch dimension"
    assert config["name"] == models[name].name
    assert DESIGNS[name].kind != "classification" or config["output"][0]["label_filename"] == "labels.txt"
