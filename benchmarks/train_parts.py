"""Two parts of a training step on a CPU that are not torch's usual: attention without dropout, and freed memory.

    python benchmarks/train_parts.py --out FILE

Attention: torch's fused kernel against `kernels`' plain products, forward and backward, for the shapes that students have.
Memory: whole steps of a classifier (both passes, clipping, AdamW) with freed memory kept against glibc as it ends up by its
own adjustment, which is what `allocator` leaves behind. Both sides of a ratio run in one process and take turns, in reversed
order every other round; a ratio is the median over rounds of usual time / ours, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from latency import ratio  # noqa: E402 - found through the line above

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEADS = 12
WIDTHS = {"4L-312": 26, "6L-768": 64}  # of a head
SIZES = ((32, 16), (32, 64), (32, 128), (16, 256), (8, 512))  # rows and tokens of a batch
SHAPES = {
    "4L-312": {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200},
    "6L-768": {"num_hidden_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
LENGTHS = (16, 64)
USUAL, OURS = "usual", "ours"
Run = Callable[[], object]


def main() -> None:
    """Read the command line, measure, print the ratios and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="smallest shapes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, help="write raw samples and machine facts here, as JSON")
    options = parser.parse_args()
    record = measure(options)
    print_table(record)
    if options.out:
        from bertemd_deploy.files import write_json

        write_json(options.out, record)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record: settings, machine, and the seconds of every round."""
    from bertemd_deploy.bench.environment import conditions, device, versions

    torch.set_num_threads(options.threads)
    before = conditions()
    samples = {}
    for dtype in DTYPES:
        for student, width in WIDTHS.items():
            for rows, tokens in SIZES[:1] if options.smoke else SIZES:
                name = f"attention, {dtype}, {student}, {rows} x {tokens}"
                samples[name] = in_turns(attention(DTYPES[dtype], width, rows, tokens), options.rounds)
    for student, shape in SHAPES.items():
        for tokens in LENGTHS[:1] if options.smoke else LENGTHS:
            name = f"memory, {student}, 32 x {tokens}"
            samples[name] = in_turns(
                steps(dict.fromkeys(shape, 12) if options.smoke else shape, tokens), options.rounds
            )
            gc.collect()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {"rounds": options.rounds, "threads": options.threads, "smoke": options.smoke},
        "device": device(),
        "conditions": {"before": before, "after": conditions()},
        "versions": versions(),
        "seconds": samples,
    }


def in_turns(sides: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Run both sides once unmeasured, then in every round; return their seconds."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def attention(dtype: torch.dtype, width: int, rows: int, tokens: int) -> dict[str, Run]:
    """Return one layer's attention, forward and backward, both ways; of every fourth row half is padding."""
    from bertemd_deploy.kernels import plain_attention

    generator = torch.Generator().manual_seed(0)
    shape = (rows, tokens, HEADS, width)
    arrays = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    mask[::4, :, :, tokens // 2 :] = False

    def both(forward: Callable[..., Tensor]) -> Run:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = forward(*arrays, mask)
            torch.autograd.grad(output.float().sum(), arrays)

        return run

    return {
        USUAL: both(lambda *given: nn.functional.scaled_dot_product_attention(*given).transpose(1, 2).contiguous()),
        OURS: both(plain_attention),
    }


def steps(shape: Mapping[str, int], tokens: int) -> dict[str, Run]:
    """Return two updates of a classifier's weights, with and without freed memory kept."""
    from transformers import BertConfig, BertForSequenceClassification

    from bertemd_deploy.allocator import freed_memory_kept
    from bertemd_deploy.kernels import quicken
    from bertemd_deploy.training_device import matrix_precision, trains_in_bfloat16

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**shape)).train()
    quicken(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1000, 30_000, (32, tokens))
    bfloat16 = trains_in_bfloat16("auto")

    def update() -> None:
        with matrix_precision(torch.device("cpu"), bfloat16=bfloat16):
            loss = model(input_ids=ids).logits.float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    def several(memory: Callable[[], contextlib.AbstractContextManager[None]]) -> Run:
        def run() -> None:
            with memory():
                for _ in range(4):  # the first asks for its memory on either side
                    update()

        return run

    return {USUAL: several(contextlib.nullcontext), OURS: several(freed_memory_kept)}


def print_table(record: Mapping[str, Any]) -> None:
    """Print a line for each part: median milliseconds of both sides, and their ratio with its interval."""
    for name, seconds in record["seconds"].items():
        middle, low, high = ratio(*([[value] for value in seconds[side]] for side in (USUAL, OURS)))
        usual, ours = (1000 * sorted(seconds[side])[len(seconds[side]) // 2] for side in (USUAL, OURS))
        print(f"{name}: usual {usual:.1f} ms, ours {ours:.1f} ms; usual / ours {middle:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
