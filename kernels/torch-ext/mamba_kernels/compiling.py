"""The kernels of an op are compiled side by side when it is first called, which takes as long as the slowest of them."""

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from .dispatch import warn_once

__all__ = ["compile_together", "is_only_compiling", "kernel"]

THREADS = min(8, os.cpu_count() or 1)

# the thread whose launches compile their kernel and stop there; those of others run
_only_compiling: int | None = None
_lock = threading.Lock()
_seen: set[Hashable] = set()


def is_only_compiling() -> bool:
    """Whether this thread is inside of `compile_together`, where kernels do nothing."""
    return _only_compiling is not None and _only_compiling == threading.get_ident()


class Kernel(JITFunction):
    """A Triton kernel that is only compiled inside of `compile_together`."""

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return super().run(*args, grid=grid, warmup=warmup or is_only_compiling(), **kwargs)


def kernel(fn: Callable[..., None], **options: Any) -> Any:
    """`triton.jit` with the given options, for kernels that `compile_together` is to compile."""
    made = triton.jit(fn, **options)
    # under the interpreter it is something else
    return Kernel(fn, **options) if isinstance(made, JITFunction) else made


def compile_together(signature: Hashable, launch: Callable[[], object]) -> None:
    """Compile the kernels that `launch` starts, the first time that there is such a signature.

    `launch` runs with kernels that do nothing, so that its results are garbage. The signature should tell apart what needs
    other kernels; where it does not, a kernel is compiled when it is needed.
    """
    global _only_compiling
    if signature in _seen or torch.compiler.is_compiling():
        return
    _seen.add(signature)
    if THREADS == 1 or triton.knobs.runtime.interpret or not hasattr(triton, "AsyncCompileMode"):
        return
    with _lock:
        _only_compiling = threading.get_ident()
        try:
            _launch_side_by_side(launch)
        finally:
            _only_compiling = None


def _launch_side_by_side(launch: Callable[[], object]) -> None:
    try:
        with ThreadPoolExecutor(THREADS) as executor, torch.no_grad(), triton.AsyncCompileMode(executor):
            launch()
    except Exception as problem:
        # what is wrong with the call or the compiler, the call itself says better
        warn_once(
            f"mamba_kernels: kernels are compiled one after the other, because of {type(problem).__name__}: {problem}"
        )
