"""Cost of exact global selection, beside `torch.cat` and `kthvalue`, which find no more than the threshold.

python examples/benchmarks/selection.py --sizes 1000000 100000000 --json selection.json

Times are of one process, methods taking turns. Memory is how far the resident memory of a fresh process
rises above what it holds with its scores (the kernel's VmHWM, Linux only), without the masks that are
returned, as a share of the scores' own.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `altermoma_pl` is found

from altermoma_pl import top_k

Scores = dict[str, Tensor]

SPARSITY, FLOOR, NUM_TENSORS = 0.9, 0.01, 20


def threshold(scores: Scores) -> Tensor:
    """The usual way, as in Lightning's and torch's global pruning."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    return flat.kthvalue(max(1, round(SPARSITY * flat.numel()))).values


METHODS: dict[str, Callable[[Scores], Any]] = {
    "cat + kthvalue": threshold,
    "top_k": lambda scores: top_k(scores, SPARSITY),
    "top_k with floors": lambda scores: top_k(scores, SPARSITY, min_density=FLOOR),
}


def make_scores(size: int) -> Scores:
    """Absolute normal numbers in tensors of about one size: those of magnitude pruning."""
    generator = torch.Generator().manual_seed(0)
    sizes = [size // NUM_TENSORS + (i < size % NUM_TENSORS) for i in range(NUM_TENSORS)]
    return {f"layer_{i}": torch.randn(n, generator=generator).abs_() for i, n in enumerate(sizes)}


def seconds(scores: Scores, num_repeats: int) -> dict[str, list[float]]:
    """Method -> time of each repetition; all methods take turns."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(num_repeats):
        for name, method in METHODS.items():
            start = time.perf_counter()
            method(scores)
            found[name].append(time.perf_counter() - start)
    return found


def peak_bytes(method: str, size: int) -> int:
    """Memory at the peak of a method beyond the scores and the masks, in this process."""
    METHODS[method](make_scores(100 * NUM_TENSORS))  # code and buffers that stay
    scores = make_scores(size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    METHODS[method](scores)
    masks = 0 if method == "cat + kthvalue" else size
    return _status("VmHWM") - before - masks


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def measure(size: int, num_repeats: int) -> list[dict[str, Any]]:
    """One row for each method."""
    times = seconds(make_scores(size), num_repeats)
    rows = []
    for name in METHODS:
        ratios = [own / other for own, other in zip(times[name], times["cat + kthvalue"], strict=True)]
        with get_context("spawn").Pool(1) as fresh:
            extra = fresh.apply(peak_bytes, (name, size))
        rows.append(
            {
                "scores": size,
                "method": name,
                "seconds": times[name],
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "memory_ratio": extra / (4 * size),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="numbers of scores"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement of time")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    rows = [row for size in options.sizes for row in measure(size, options.repeats)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    title = f"Selection at {SPARSITY:.0%}, {torch.get_num_threads()} threads, {options.repeats} repetitions"
    table = Table("scores", "method", "seconds", "ratio", "range", "memory", title=title)
    for row in rows:
        low, high = row["time_ratio_range"]
        table.add_row(
            f"{row['scores']:,}",
            row["method"],
            f"{statistics.median(row['seconds']):.4f}",
            f"{row['time_ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{row['memory_ratio']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
