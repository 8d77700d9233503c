"""Answer a request with OpenVINO on the CPU; runs in its own environment."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino

CORE = openvino.Core()
OUTPUTS = {"logits", "start_logits", "end_logits"}
# Deterministic and in float32 also where the processor has bfloat16 or float16, which OpenVINO would take by itself.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def outputs(path, batches):
    model = CORE.compile_model(path, "CPU", SETTINGS)
    # An output may have the name of a cast beside its own, in any order.
    names = [next(iter(OUTPUTS & output.get_names())) for output in model.outputs]
    found = []
    for batch in batches:
        results = model({name: np.array(value, dtype=np.int64) for name, value in batch.items()})
        values = [results[output] for output in model.outputs]
        found.append({name: value.tolist() for name, value in zip(names, values, strict=True)})
    return found


def answer(case):
    graphs = {}
    for graph, path in case["graphs"].items():
        try:
            graphs[graph] = {"outputs": outputs(f"{case['folder']}/{path}", case["batches"])}
        except Exception as error:
            graphs[graph] = {"error": str(error).strip()[:500]}
    return {"graphs": graphs}


REQUEST = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
ANSWER = {
    "software": {"openvino": openvino.get_version()},
    "cases": {name: answer(case) for name, case in REQUEST.items()},
}
Path(sys.argv[2]).write_text(json.dumps(ANSWER), encoding="utf-8")
