"""Running Triton kernels on the CPU: in a second process, as the interpreter must be chosen before triton is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

Errors = dict[str, dict[str, float]]


def errors_under_interpreter(module: str) -> Errors:
    """What `python -m module` prints by `print_errors`, under Triton's interpreter."""
    paths = [ROOT, ROOT / "kernels" / "torch-ext", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths),
    }
    command = [sys.executable, "-m", module]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def print_errors(run: Callable[..., dict[str, float]], cases: dict[str, dict[str, Any]]) -> None:
    """Run every case and print its errors, with memory that is not yet written full of NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # fills memory that is not yet written with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    print(json.dumps({name: run(**case) for name, case in cases.items()}))
