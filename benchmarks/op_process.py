"""First calls in fresh processes: `python -m benchmarks.op_process ROWS CONTENDER` prints the seconds they took as JSON.

Such processes also fill the cache of compiled kernels for the process that measures, several at a time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.op_contenders import implementation
from benchmarks.op_rows import OPS, OpRow, make_operands
from benchmarks.op_variants import variant
from benchmarks.timing import synchronize

__all__ = ["FirstCall", "first_calls"]

# seconds of a first forward and of a first forward with backward after it, or why there are none
FirstCall = tuple[float, float | None] | str
TIMEOUT_S = 240


def measure_first_call(row: OpRow, contender: str) -> tuple[float, float | None]:
    """Seconds of the first forward, and of the first forward with backward in the same process; imports are not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operands = make_operands(row, device)
    synchronize(device)
    start = time.perf_counter()
    chosen = variant(row.op, contender) or implementation(row.op, contender)
    if chosen is None:
        raise ValueError(f"{contender} has no {row.op}.")
    with chosen.applied():
        prepared = chosen.prepare(operands)
        with torch.no_grad():
            chosen.call(prepared)
        synchronize(device)
        forward = time.perf_counter() - start
        if OPS[row.op].updates is not None:
            return forward, None
        leaves = {name: value.detach().requires_grad_() for name, value in prepared.items()}
        start = time.perf_counter()
        outputs = chosen.call(leaves)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(y) for y in outputs])
        synchronize(device)
    return forward, time.perf_counter() - start


def first_calls(cells: Sequence[tuple[Sequence[OpRow], str]], cache: Path, at_once: int) -> list[FirstCall]:
    """`measure_first_call` of the first row of every cell in a process of its own, `at_once` of them side by side.

    Args:
        cells: rows and contender; a process goes on to the other rows for their kernels.
        cache: the folder for compiled kernels; the calls are first ones if it is empty.
        at_once: processes that run at the same time.
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}

    def run(cell: tuple[Sequence[OpRow], str]) -> FirstCall:
        rows, contender = cell
        given = json.dumps([asdict(row) for row in rows])
        command = [sys.executable, "-m", "benchmarks.op_process", given, contender]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"took more than {TIMEOUT_S} s"
        if result.returncode:
            return (result.stderr.strip().splitlines() or ["no message"])[-1][:200]
        forward, both = json.loads(result.stdout.splitlines()[-1])
        return forward, both

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        return list(pool.map(run, cells))


if __name__ == "__main__":
    took = [measure_first_call(OpRow(**row), sys.argv[2]) for row in json.loads(sys.argv[1])]
    print(json.dumps(took[0]))
