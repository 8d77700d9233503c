"""Run jobs in ONNX Runtime on whatever CPU this interpreter has, real or emulated; numpy and onnxruntime are all it needs.

    python saturation_worker.py JOBS.json

A job is a graph, its inputs as raw files, and where to put its first output, float32 or int32. Prints one line of JSON: the
machine, the versions, and the shape of every output.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    shapes = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(job["graph"], options, providers=["CPUExecutionProvider"])
        wanted = {node.name for node in session.get_inputs()}
        inputs = {
            name: np.fromfile(held["file"], dtype=held["dtype"]).reshape(held["shape"])
            for name, held in job["inputs"].items()
            if name in wanted
        }
        (output,) = session.run([session.get_outputs()[0].name], inputs)
        output.tofile(job["output"])
        shapes.append(list(output.shape))
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps({"machine": platform.machine(), "versions": versions, "shapes": shapes}))


if __name__ == "__main__":
    main()
