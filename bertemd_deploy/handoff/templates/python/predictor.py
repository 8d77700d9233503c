r"""Texts in, answers out: one file for Python 3.9 and newer, with numpy, onnxruntime and tokenizers.

    python predictor.py "a text" "another text"           prints one JSON object a line; texts may come on stdin, one a line
    python predictor.py --pair $'first text\tsecond text'  a tab between the texts of a pair, or a question and its context

    from predictor import Predictor
    Predictor().predict(["a text"])                        [{"label": ..., "score": ..., "scores": {...}}]

The folder `model` beside this file holds the graph, the tokenizer and model.json, which says what the model decides: one of
several classes, any of several labels, a number, entities in a text, or an answer in a context.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

MODEL = Path(__file__).resolve().parent / "model"
BATCH = 32  # rows run together
CHUNK = 1024  # texts held at once
LONGEST_ANSWER = 30  # tokens
SHARED_WORDS = 4  # neighbouring windows of a text that is too long share a quarter of their words

Record = dict[str, Any]
Word = tuple[int, int]  # first and behind-last character
Run = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]

_CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
    "\U0002f800-\U0002fa1f"
)
_PARTS = re.compile(f"[{_CJK}][\ufe00-\ufe0f\U000e0100-\U000e01ef]?|[^\\s{_CJK}]+")
_INITIALS = re.compile(r"(?:[^\W\d_]\.){2,}")
_POSSESSIVE = re.compile(r"['\u2019][sS]")
_ENTITY_TAG = re.compile(r"O|[BIES]-.+", re.DOTALL)


class InputError(ValueError):
    """What was asked cannot be answered; the message says why."""


class Predictor:
    """A loaded model."""

    def __init__(self, folder: str | Path = MODEL, *, threads: int | None = None, run: Run | None = None) -> None:
        """Load what lies in a folder.

        Args:
            folder: holds model.json and the files it names.
            threads: of ONNX Runtime; None takes what this process may use.
            run: logits of a padded batch, computed elsewhere; None runs the folder's graph here.

        Raises:
            RuntimeError: a file is damaged, or ONNX Runtime or the CPU would not compute the graph as it was measured.
        """
        folder = Path(folder)
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.kind: str = model["kind"]
        self.labels: list[str] = model["labels"]
        self.max_length: int = model["max_length"]
        self.model: Record = model
        self._pairs = {"question-answering": True, "token-classification": False}.get(self.kind, model["pairs"])
        stored = checked_file(folder, model, "tokenizer.json").read_text(encoding="utf-8")
        self._cut, self._whole, self._of_words = (Tokenizer.from_str(stored) for _ in range(3))
        for tokenizer in (self._cut, self._whole, self._of_words):
            tokenizer.no_padding()
            tokenizer.enable_truncation(self.max_length)
        self._whole.no_truncation()
        if getattr(self._of_words.pre_tokenizer, "add_prefix_space", True) is False:
            self._of_words.pre_tokenizer.add_prefix_space = True
        self._run = run or open_graph(folder, model, threads or usable_threads())

    def predict(self, texts: Sequence[Any], pairs: Sequence[str] | None = None) -> list[Record]:
        """Return one record per text, in order.

        Args:
            texts: first (or only) texts, or questions; for entities a text may be a list of its words.
            pairs: second texts, or contexts.

        Raises:
            InputError: something else was given, or second texts to a model of single ones, or the other way round.
            RuntimeError: the graph answered with values that are not finite.
        """
        for given, what in ((texts, "texts"), (pairs, "pairs")):
            if isinstance(given, (str, bytes)):
                raise InputError(f"{what} should be a list of texts, found a single one. Write [text].")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"{len(texts)} texts but {len(pairs)} pairs.")
        self._check(texts, pairs)
        found: list[Record] = []
        for first in range(0, len(texts), CHUNK):
            seconds = None if pairs is None else list(pairs[first : first + CHUNK])
            found += self._answer(list(texts[first : first + CHUNK]), seconds, first=first + 1)
        return found

    def _check(self, texts: Sequence[Any], pairs: Sequence[str] | None) -> None:
        words = self.kind == "token-classification"
        for number, text in enumerate(texts, 1):
            values = list(text) if words and isinstance(text, (list, tuple)) else [text]
            for value in values if pairs is None else [*values, pairs[number - 1]]:
                if not isinstance(value, str):
                    wanted = "text or a list of words" if words else "text"
                    raise InputError(f"text {number} should be {wanted}, found {type(value).__name__}.")
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"text {number} is not valid Unicode: {error.reason}.") from error
        if texts and self._pairs is not None and (pairs is not None) != self._pairs:
            fault = "needs two texts, or a question and its context: pairs" if self._pairs else "takes single texts"
            raise InputError(f"this model {fault}.")

    def _answer(self, texts: list[Any], pairs: list[str] | None, *, first: int) -> Iterator[Record]:
        if self.kind == "token-classification":
            return self._entities(texts)
        if self.kind == "question-answering":
            return self._answers(texts, pairs or [], first=first)
        given = texts if pairs is None else list(zip(texts, pairs))
        rows = [(encoding.ids, encoding.type_ids) for encoding in self._cut.encode_batch_fast(given)]
        decide = {"regression": _value, "multilabel": _any_of}.get(self.kind, _one_of)
        return (decide(logits, self.labels) for logits in self._logits(rows))

    def _logits(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[NDArray[Any]]:
        """Return the logits of (token ids, segment ids) rows: of each (outputs,), or of its tokens (tokens, outputs)."""
        found: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda at: len(rows[at][0]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            shape = len(chosen), len(rows[chosen[-1]][0])
            ids = np.full(shape, self.model["pad_id"], dtype=np.int64)
            mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
            for place, at in enumerate(chosen):
                length = len(rows[at][0])
                ids[place, :length], types[place, :length] = rows[at]
                mask[place, :length] = 1
            batch = self._run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
            for at, logits in zip(chosen, batch):
                found[at] = logits[: len(rows[at][0])] if logits.ndim == 2 else logits
                if not np.isfinite(found[at]).all():
                    raise RuntimeError("the graph answered with values that are not finite.")
        return found

    def _entities(self, given: list[Any]) -> Iterator[Record]:
        texts = [(text, words_of(text)) if isinstance(text, str) else joined(text) for text in given]
        tags: list[dict[int, NDArray[Any]]] = [{} for _ in texts]  # logits by word
        pending = [(at, 0) for at, (_, words) in enumerate(texts) if words]
        while pending:  # a window of each text that is not done
            parts = [_texts_of(*texts[at], first, self.max_length) for at, first in pending]
            encodings = self._of_words.encode_batch(parts, is_pretokenized=True)
            windows = zip(pending, parts, encodings, self._logits([(one.ids, one.type_ids) for one in encodings]))
            pending = []
            for (at, first), part, encoding, logits in windows:
                shared = sum(word >= first for word in tags[at])  # the window before knows more of what precedes them
                last, numbers = -1, encoding.word_ids
                for place, word in enumerate(numbers):
                    if word is None or (place and word == numbers[place - 1]):
                        continue  # a special token, or a further piece
                    last = first + word
                    if word >= shared // 2:
                        tags[at][last] = logits[place]
                end = last + 1 if len(encoding.ids) == self.max_length and last >= 0 else first + len(part)
                if end < len(texts[at][1]):
                    pending.append((at, max(first + 1, end - (end - first) // SHARED_WORDS)))
        for (text, words), found in zip(texts, tags):
            kept = sorted(found)
            yield _tagged(text, [words[at] for at in kept], [found[at] for at in kept], self.labels)

    def _answers(self, questions: list[str], contexts: list[str], *, first: int) -> Iterator[Record]:
        rows, owners, places = [], [], []
        for owner, encoding in enumerate(self._whole.encode_batch(list(zip(questions, contexts)))):
            inside = [at for at, part in enumerate(encoding.sequence_ids) if part == 1]
            spans = np.full((len(encoding.ids), 2), -1, dtype=np.int64)
            spans[inside] = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[inside]
            start, behind = (inside[0], inside[-1] + 1) if inside else (len(spans), len(spans))
            room = self.max_length - len(spans) + behind - start
            if room < 1:
                raise InputError(f"question {first + owner} leaves no room for its context. Shorten it.")
            step = room - min(self.model["doc_stride"], room // 2)
            for window in range(start, start + max(1, behind - start - room + step), step):
                kept = np.r_[:start, window : min(window + room, behind), behind : len(spans)]
                rows.append((np.take(encoding.ids, kept).tolist(), np.take(encoding.type_ids, kept).tolist()))
                owners.append(owner)
                places.append(spans[kept])
        logits = self._logits(rows)
        for owner, windows in itertools.groupby(range(len(rows)), key=owners.__getitem__):
            parts = [(logits[at].astype(np.float64), places[at]) for at in windows]
            yield _best_answer(contexts[owner], parts, no_answer=self.model["no_answer"])


def checked_file(folder: Path, model: Record, name: str) -> Path:
    """Return the path of a file that model.json names, after checking its SHA-256."""
    path = folder / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != model["files"][name]:
        raise RuntimeError(f"{path}: missing, truncated or changed. Copy the whole folder again.")
    return path


def open_graph(folder: Path, model: Record, threads: int) -> Run:
    """Return the function that runs the folder's graph in ONNX Runtime."""
    import onnxruntime

    needed, installed = model["onnxruntime"], onnxruntime.__version__
    if needed and _release(installed) < _release(needed):
        raise RuntimeError(f"model.onnx needs onnxruntime {needed} or newer, found {installed}. Update onnxruntime.")

    def session(name: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = checked_file(folder, model, name)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    if model["isa"]:  # of a CPU that adds int8 products in 32 bits
        extreme = {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 8), 127, np.int8)}
        (sums,) = session("saturation.onnx").run(None, extreme)
        if (sums != 4 * 255 * 127).any():
            raise RuntimeError(
                f"model.onnx needs a CPU with one of {', '.join(model['isa'])}: this one clips sums of int8 products, so that "
                "the model would not be as accurate as it was measured. Bundle an artifact exported with --target portable."
            )
    opened = session("model.onnx")
    names = [node.name for node in opened.get_inputs()]

    def run(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        found = opened.run(model["outputs"], {name: inputs[name] for name in names})
        return np.asarray(found[0] if len(found) == 1 else np.stack(found, axis=-1), dtype=np.float32)

    return run


def usable_threads(system: Path = Path("/sys")) -> int:
    """Return the least of the CPUs this process may run on, its container's share of them, and the physical cores."""
    logical = os.cpu_count() or 1
    bounds = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical]
    siblings = [path.read_text() for path in system.glob("devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")]
    bounds.append(len(set(siblings)) or logical)
    for quota, period in (("cpu.max", ""), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            numbers = (system / "fs/cgroup" / quota).read_text().split()
            numbers += (system / "fs/cgroup" / period).read_text().split() if period else []
            share = int(numbers[0]) / int(numbers[1])
        except (OSError, ValueError):
            continue  # another version of cgroups, or no limit
        bounds += [math.ceil(share)] if share > 0 else []
        break
    return max(1, min(bounds))


def words_of(text: str) -> list[Word]:
    """Return the words of a text: parted by blanks, each ideograph and the punctuation around a word apart."""
    found: list[Word] = []
    for part in _PARTS.finditer(text):
        first, last = part.span()
        while first < last and _is_punctuation(text[first]):
            first += 1
        while first < last and _is_punctuation(text[last - 1]):
            last -= 1
        if _INITIALS.fullmatch(text, first, last + 1):
            last += 1
        found += [(at, at + 1) for at in range(part.start(), first)]
        if last - first > 2 and _POSSESSIVE.fullmatch(text, last - 2, last):
            found += [(first, last - 2), (last - 2, last)]
        elif first < last:
            found.append((first, last))
        found += [(at, at + 1) for at in range(last, part.end())]
    return found


def joined(words: Sequence[str]) -> tuple[str, list[Word]]:
    """Return words as one text, a blank between them, and the place of each in it."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return " ".join(words), [(end - 1 - len(word), end - 1) for word, end in zip(words, ends)]


def _texts_of(text: str, words: list[Word], first: int, count: int) -> list[str]:
    return [text[start:end] for start, end in words[first : first + count]]


def _is_punctuation(character: str) -> bool:
    symbol = character.isascii() and character.isprintable() and not (character.isalnum() or character == " ")
    return symbol or unicodedata.category(character).startswith("P")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _value(logits: NDArray[Any], labels: list[str]) -> Record:
    return {"label": None, "score": float(logits[0]), "scores": {}}


def _one_of(logits: NDArray[Any], labels: list[str]) -> Record:
    scores = _softmax(logits).tolist()
    best = scores.index(max(scores))
    return {"label": labels[best], "score": scores[best], "scores": dict(zip(labels, scores))}


def _any_of(logits: NDArray[Any], labels: list[str]) -> Record:
    with np.errstate(over="ignore"):
        scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()
    order = np.argsort(-logits.astype(np.float64), kind="stable").tolist()
    chosen = [labels[at] for at in order if logits[at] > 0]
    named = dict(zip(labels, scores))
    return {"label": chosen[0] if chosen else None, "labels": chosen, "score": scores[order[0]], "scores": named}


def _tagged(text: str, words: list[Word], logits: list[NDArray[Any]], labels: list[str]) -> Record:
    """Return the entities of a text; of tags that name none, such as parts of speech, every word with its tag."""
    if not words:
        return {"entities": [], "score": 1.0}
    scores = _softmax(np.stack(logits))
    best = scores.argmax(axis=-1)
    sure = scores[np.arange(len(words)), best]
    tags = [labels[at] for at in best]
    named = all(_ENTITY_TAG.fullmatch(label) for label in labels)
    found = []
    for label, first, last in _spans(tags) if named else [(tag, at, at) for at, tag in enumerate(tags)]:
        start, end = words[first][0], words[last][1]
        score = float(sure[first : last + 1].mean())
        found.append({"label": label, "text": text[start:end], "start": start, "end": end, "score": score})
    return {"entities": found, "score": float(sure.mean())}


def _spans(tags: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield type, first and last word of every entity; an I- that continues nothing begins one."""
    prefix, kind, first = "O", "", 0
    for at, tag in enumerate([*tags, "O"]):
        next_prefix, _, next_kind = tag.partition("-")
        if not (prefix in ("B", "I") and next_prefix in ("I", "E") and kind == next_kind):
            if prefix != "O":
                yield kind, first, at - 1
            first = at
        prefix, kind = next_prefix, next_kind


def _best_answer(context: str, windows: list[tuple[NDArray[Any], NDArray[Any]]], *, no_answer: bool) -> Record:
    """Return the best span over all windows: start and end logits (tokens, 2), characters of the tokens (tokens, 2)."""
    blanks = np.cumsum([0, *map(str.isspace, context)])
    best, none = (-math.inf, -1, -1), math.inf
    for scores, places in windows:
        none = min(none, float(scores[0].sum()))
        clipped = np.clip(places, 0, len(blanks) - 1)
        said = np.diff(blanks[clipped])[:, 0] < np.diff(clipped)[:, 0]  # more than blanks
        starts, ends = np.where(((places[:, 0] >= 0) & said)[:, None], scores, -math.inf).T
        for width in range(min(LONGEST_ANSWER, len(scores))):
            sums = starts[: len(starts) - width] + ends[width:]
            at = int(sums.argmax())
            if sums[at] > best[0]:
                best = float(sums[at]), int(places[at, 0]), int(places[at + width, 1])
    total = float(np.logaddexp.reduce(np.concatenate([scores for scores, _ in windows]), axis=0).sum())
    score, start, end = best
    if start < 0 or (no_answer and none > score):
        return {"answer": None, "score": float(np.exp(none - total))}
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    while start > 0 and _is_mark(context[start]) and not context[start - 1].isspace():
        start -= 1
    while end < len(context) and _is_mark(context[end]):
        end += 1
    sure = float(np.exp(score - total))
    return {"answer": {"text": context[start:end], "start": start, "end": end, "score": sure}, "score": sure}


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def answer_command(predictor: Predictor, texts: Sequence[str], *, paired: bool) -> None:
    """Print a record for each text, as JSON; the texts are those given, or the lines of stdin.

    Raises:
        InputError: a text of a pair has no tab.
        UnicodeDecodeError: a line is not UTF-8.
    """
    given = list(texts) or [line.decode("utf-8").rstrip("\r\n") for line in sys.stdin.buffer]
    seconds = None
    if paired:
        for number, text in enumerate(given, 1):
            if "\t" not in text:
                raise InputError(f"text {number}: there is no tab between the two texts.")
        given, seconds = [text.partition("\t")[0] for text in given], [text.partition("\t")[2] for text in given]
    for record in predictor.predict(given, seconds):
        print(json.dumps(record), flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Print what the model says of each text, one JSON object a line.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="default: the lines of stdin")
    parser.add_argument("--pair", action="store_true", help="each text is two, with a tab between them")
    parser.add_argument("--threads", type=int, help="default: what this process may use")
    options = parser.parse_args()
    try:
        answer_command(Predictor(threads=options.threads), options.texts, paired=options.pair)
    except (InputError, RuntimeError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
