"""Kernels that start before the one in front of them has ended, and fetch meanwhile what does not depend on it.

A decoding step is a few hundred launches in a row, each of which waits for the one before. Between two of them the memory has
nothing to do for one or two µs. Hopper can start a launch as soon as all programs of the one before have started (programmatic
dependent launch, CUDA programming guide, section of that name): such a kernel reads its weights first, then waits. All that it
reads before `gdc_wait` must have been there before the kernel in front began, and nothing is written before.

It is asked for by those who know what they launch: a CUDA graph takes such a launch behind a kernel only, and refuses it behind
a copy or a fill.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["early_launches", "knows_early_launches", "launches_early"]


class _Asked(threading.local):
    on = False
    used = False


_asked = _Asked()


@contextmanager
def early_launches(on: bool = True) -> Iterator[_Asked]:
    """Let this thread's launches of a decoding step start early, where the GPU can; yields whether one has (`used`).

    Example:
        >>> from mamba_kernels.early import early_launches
        >>> with early_launches() as asked:
        ...     pass
        >>> asked.used
        False
    """
    before = _asked.on, _asked.used
    _asked.on, _asked.used = on, False
    try:
        yield _asked
    finally:
        # a block around this one has used them too; one that ended before has not
        _asked.on, _asked.used = before[0], (before[0] and before[1]) or _asked.used


@cache
def knows_early_launches(device_type: str, index: int | None) -> bool:
    """Whether the GPU and Triton know programmatic dependent launch."""
    if device_type != "cuda" or torch.version.hip is not None:
        return False
    import triton
    import triton.language as tl

    if triton.knobs.runtime.interpret:
        return False
    known = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return known and torch.cuda.get_device_capability(index) >= (9, 0)


def launches_early(tensor: Tensor) -> bool:
    """Whether a kernel on the device of `tensor` is to be launched early now."""
    if not _asked.on or not knows_early_launches(tensor.device.type, tensor.device.index):
        return False
    _asked.used = True
    return True
