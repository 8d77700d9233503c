"""Answer a request with this package's runtime half, in an environment that holds nothing else."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bertemd_deploy import Classifier
from bertemd_deploy.runtime import open_session, run_session


def outputs(case, path):
    session = open_session(Path(case["folder"]) / path, threads=1)
    spans = case["kind"] == "question-answering"
    found = []
    for batch in case["batches"]:
        values = run_session(session, {name: np.array(value) for name, value in batch.items()})
        both = {"start_logits": values[..., 0], "end_logits": values[..., 1]} if spans else {"logits": values}
        found.append({name: value.tolist() for name, value in both.items()})
    return found


def answer(case):
    graphs = {}
    for graph, path in case["graphs"].items():
        try:
            classifier = Classifier.load(case["folder"], graph=graph, threads=1)
            predictions = classifier.predict(case["texts"], case["pairs"])
            decisions = [{"label": one.label, "score": one.score} for one in predictions]
            graphs[graph] = {"outputs": outputs(case, path), "decisions": decisions}
        except Exception as error:
            graphs[graph] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"graphs": graphs}


REQUEST = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
ANSWER = {
    "software": {name: version(name) for name in ("numpy", "onnxruntime", "tokenizers")},
    "cases": {name: answer(case) for name, case in REQUEST.items()},
}
Path(sys.argv[2]).write_text(json.dumps(ANSWER), encoding="utf-8")
