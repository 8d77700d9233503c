r"""Texts to Triton, answers back: tokens and decisions are made here (predictor.py), logits there.

    python client.py --url http://localhost:8000 "a text" "another text"
    python client.py --pair $'first text\tsecond text'

    from client import triton_predictor
    triton_predictor("http://localhost:8000").predict(["a text"])

Requests are those of the KServe protocol, version 2, in JSON, which Triton's HTTP port speaks.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from predictor import MODEL, InputError, Predictor, answer_command

SETTINGS = json.loads(Path(__file__).with_name("client.json").read_text(encoding="utf-8"))


def triton_predictor(url: str, *, name: str = SETTINGS["name"], timeout: float = 30.0) -> Predictor:
    """Return a predictor whose logits a Triton server computes.

    Args:
        url: of the server's HTTP port.
        name: of the model there.
        timeout: of a request, in seconds.
    """
    model = json.loads((MODEL / "model.json").read_text(encoding="utf-8"))
    return Predictor(run=partial(_ask, f"{url.rstrip('/')}/v2/models/{name}/infer", model, timeout))


def _ask(url: str, model: dict[str, Any], timeout: float, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    length, step = inputs["input_ids"].shape[1], SETTINGS["pad_to_multiple_of"]
    more = max(0, min(-(-length // step) * step, model["max_length"]) - length)
    tensors = []
    for name in model["inputs"]:
        fill = model["pad_id"] if name == "input_ids" else 0
        values = np.pad(inputs[name], ((0, 0), (0, more)), constant_values=fill)
        data = values.ravel().tolist()
        tensors.append({"name": name, "shape": list(values.shape), "datatype": "INT64", "data": data})
    found = _post(url, {"inputs": tensors, "outputs": [{"name": name} for name in model["outputs"]]}, timeout)
    answered = {tensor["name"]: np.array(tensor["data"]).reshape(tensor["shape"]) for tensor in found["outputs"]}
    logits = [answered[name] for name in model["outputs"]]
    return np.asarray(logits[0] if len(logits) == 1 else np.stack(logits, axis=-1), dtype=np.float32)


def _post(url: str, question: dict[str, Any], timeout: float) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(question).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            found: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code}, {error.read(2000).decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        raise RuntimeError(f"{url}: no answer ({error.reason}).") from error
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(description="Print what the model says of each text, one JSON object a line.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="default: the lines of stdin")
    parser.add_argument("--pair", action="store_true", help="each text is two, with a tab between them")
    parser.add_argument("--url", default="http://localhost:8000", help="of Triton's HTTP port")
    options = parser.parse_args()
    try:
        answer_command(triton_predictor(options.url), options.texts, paired=options.pair)
    except (InputError, RuntimeError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
