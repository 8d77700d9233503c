"""The model as an HTTP service: one process, one prediction at a time with all threads, every limit in service.json.

    python service.py                                                     PORT, HOST and THREADS come from the environment
    curl localhost:8000/predict --json '{"texts": ["a text"]}'            {"predictions": [{"label": ..., ...}]}
    curl localhost:8000/predict --json '{"texts": [...], "pairs": [...]}' second texts, or contexts

Answers: 200; 413 for a body that is too large; 422 for texts that the model does not take; 503 where too many wait already.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse
from predictor import InputError, Predictor, usable_threads
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

LIMITS = json.loads(Path(__file__).with_name("service.json").read_text(encoding="utf-8"))
THREADS = int(os.environ.get("THREADS", "0")) or usable_threads()

Text = Annotated[str, StringConstraints(max_length=LIMITS["characters"])]
Words = Annotated[list[Text], Field(max_length=LIMITS["words"])]


class Question(BaseModel):
    """What /predict takes: texts (for entities also lists of words), and second texts or contexts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: Annotated[list[Text | Words], Field(min_length=1, max_length=LIMITS["texts"])]
    pairs: Annotated[list[Text], Field(max_length=LIMITS["texts"])] | None = None


class BodyLimit:
    """Refuses a request once its body has grown past a number of bytes, whatever its headers say."""

    def __init__(self, app: Any, limit: int) -> None:
        """Wrap an ASGI application."""
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, counting."""
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise HTTPException(413, f"the body is larger than {self.limit} bytes.")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


app = FastAPI(title="student", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
app.add_middleware(BodyLimit, limit=LIMITS["body_bytes"])
predictor = Predictor(threads=THREADS)
turn = asyncio.Lock()
taken = 0  # requests, the running one included


@app.exception_handler(RequestValidationError)
async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong where, without the texts themselves."""
    faults = [{"where": [ascii(part) for part in fault["loc"]], "what": fault["msg"]} for fault in error.errors()]
    return JSONResponse({"detail": faults}, status_code=422)


@app.get("/health")
async def health() -> dict[str, Any]:
    """Say that the model is loaded; a running prediction does not delay the answer."""
    return {"status": "ok", "kind": predictor.kind, "graph": predictor.model["graph"], "threads": THREADS}


@app.post("/predict")
async def predict(question: Question) -> dict[str, Any]:
    """Return one record per text, in order."""
    global taken
    if taken >= LIMITS["requests"]:
        raise HTTPException(503, "too many requests are waiting.", headers={"Retry-After": "1"})
    taken += 1
    try:
        async with turn:
            found = await run_in_threadpool(predictor.predict, question.texts, question.pairs)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    finally:
        taken -= 1
    return {"predictions": found}


if __name__ == "__main__":
    uvicorn.run(app, host=os.environ.get("HOST", "0.0.0.0"), port=int(os.environ.get("PORT", "8000")))
