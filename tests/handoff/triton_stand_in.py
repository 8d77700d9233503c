"""A server of KServe's HTTP protocol, version 2, over a Triton model repository: what Triton checks of a request, and no more.

It reads config.pbtxt, runs the graph in ONNX Runtime, and refuses what the config does not allow: other names, types or
shapes, a batch that is too large.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from triton_config import read_config

from bertemd_deploy.runtime import open_session

TYPES = {"TYPE_INT64": "INT64", "TYPE_FP32": "FP32"}


class Model:
    """One model of a repository."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config((folder / "config.pbtxt").read_text())
        assert self.config["name"] == folder.name
        assert self.config["backend"] == "onnxruntime"
        self.session = open_session(folder / "1" / self.config["default_model_filename"], threads=1)
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        feed = {}
        for wanted in self.config["input"]:
            (found,) = [tensor for tensor in request["inputs"] if tensor["name"] == wanted["name"]]
            assert found["datatype"] == TYPES[wanted["data_type"]]
            batch, *rest = found["shape"]
            assert batch <= self.config["max_batch_size"], f"batch of {batch}"
            assert fits(rest, wanted["dims"])
            feed[wanted["name"]] = np.array(found["data"], dtype=np.int64).reshape(found["shape"])
        assert len(request["inputs"]) == len(feed)
        self.shapes.append(feed["input_ids"].shape)
        names = [tensor["name"] for tensor in request["outputs"]]
        outputs = []
        for name, values in zip(names, self.session.run(names, feed), strict=True):
            (told,) = [tensor for tensor in self.config["output"] if tensor["name"] == name]
            assert fits(values.shape[1:], told["dims"])
            data = values.ravel().tolist()
            outputs.append(
                {"name": name, "datatype": TYPES[told["data_type"]], "shape": list(values.shape), "data": data}
            )
        return {"model_name": self.config["name"], "model_version": "1", "outputs": outputs}


def fits(shape: Any, dims: list[str]) -> bool:
    """Say whether a shape without its batch dimension is what a config's dims allow."""
    return len(shape) == len(dims) and all(int(dim) in (-1, size) for size, dim in zip(shape, dims, strict=True))


@contextmanager
def serving(repository: Path) -> Iterator[tuple[str, Model]]:
    """Serve a repository's only model; yield the server's address and the model."""
    (folder,) = repository.iterdir()
    model = Model(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != f"/v2/models/{folder.name}/infer":
                self.answer(404, {"error": f"unknown model: {self.path}"})
                return
            try:
                self.answer(200, model.infer(json.loads(body)))
            except (AssertionError, ValueError, KeyError) as error:
                self.answer(400, {"error": str(error)})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", model
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
