"""The single-file predictor in Python 3.9, with the packages there are for it: answers are those of `Classifier`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from compat_asking import installed
from compat_bundles import fp32_only, records
from compat_cases import DESIGNS, Case

from bertemd_deploy.handoff import write_bundle

pytestmark = pytest.mark.compat
ASKED = [name for name in DESIGNS if "dynamo" not in name and "opset" not in name]
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_the_classifier_s(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = installed("python3.9", program="bin/python") / "bin" / "python"
    case: Case = request.getfixturevalue("cases")[name]
    texts = [" ".join(text.split()) for text in case.texts]  # one a line, without tabs
    pairs = None if case.pairs is None else [" ".join(text.split()) for text in case.pairs]
    out = write_bundle(fp32_only(case.artifact, tmp_path / "fp32"), kind="python", out=tmp_path / "out")
    lines = texts if pairs is None else [f"{text}\t{pair}" for text, pair in zip(texts, pairs, strict=True)]
    command = [str(python), str(out / "predictor.py"), "--threads", "1", *([] if pairs is None else ["--pair"])]
    kept = {"PATH": os.environ["PATH"]}
    stdin = "".join(f"{line}\n" for line in lines).encode()
    done = subprocess.run(command, input=stdin, capture_output=True, env=kept, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr.decode()
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for text, found, expected in zip(texts, answers, records(case, "fp32", texts, pairs), strict=True):
        assert found.keys() == expected.keys()
        assert found["score"] == pytest.approx(expected["score"], abs=TOLERANCE), text
        assert found.get("scores") == pytest.approx(expected.get("scores"), abs=TOLERANCE), text
        for key in ("entities", "answer"):
            places, wanted = ([] if one.get(key) is None else one[key] for one in (found, expected))
            for place, want in zip(*([one] if isinstance(one, dict) else one for one in (places, wanted)), strict=True):
                assert place | {"score": 0} == want | {"score": 0}, text
