"""Which implementation of an op runs: `triton` on a GPU, `eager` (vectorised torch) everywhere else.

`backend("eager")` forces one for a block of code, the environment variable `HF_MAMBA_BACKEND` does it from outside.
`reference` (the fp64 oracle) can be forced too, for tests and debugging; it is never chosen by itself.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "MOST_ROWS",
    "OPS",
    "backend",
    "forced_backend",
    "left_to_eager",
    "on_device",
    "select",
    "unfit_for_kernels",
    "warn_once",
]

BACKENDS = ("triton", "eager", "reference")

# Turing; older GPUs lack the bf16 conversions and the memory instructions Triton emits
OLDEST_CAPABILITY = (7, 5)

# most states of a channel that the Triton kernels take, as in mamba-ssm
LARGEST_STATE = 256
# most taps of a convolution that they take; published models have 4
LARGEST_WIDTH = 8
# most rows that a projection of a decoding step takes; with more, the partial sums leave the registers
MOST_ROWS = 4

# every op and whether it has a Triton implementation yet; `hf-mamba env` prints this table
OPS: dict[str, bool] = {
    "selective_scan": True,
    "ssd_chunk_scan": True,
    "causal_conv1d": True,
    "selective_state_update": True,
    "ssd_state_update": True,
    "causal_conv1d_update": True,
    "rms_norm": True,
    "add_rms_norm": True,
    "rms_norm_gated": True,
    "fused_linear": True,
    "mamba_step": True,
    "mamba2_step": True,
    "route": True,
    "routed_experts": True,
    "experts_step": True,
}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("HF_MAMBA_BACKEND", "").strip().lower()
    if name in ("", "auto"):
        return None
    return _check_name(name, "The environment variable HF_MAMBA_BACKEND")


# a plain global and not a ContextVar: torch.compile guards on it without a graph break
_forced: str | None = _from_environment()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation of every op inside the `with` block.

    Args:
        name: `"triton"`, `"eager"` or `"reference"`.

    Raises:
        ValueError: `name` is none of these.

    Example:
        >>> import torch, mamba_kernels
        >>> with mamba_kernels.backend("eager"):
        ...     y = mamba_kernels.rms_norm(torch.randn(1, 5, 4), torch.ones(4))
        >>> y.shape
        torch.Size([1, 5, 4])
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "backend()'s argument `name`")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend forced by `backend()` or `HF_MAMBA_BACKEND`, or None when each op chooses by its inputs' device."""
    return _forced


def select(op: str, device: torch.device) -> str:
    """The backend that `op` uses for tensors on `device`.

    Raises:
        RuntimeError: `triton` was forced for an op that has no Triton implementation.
    """
    if _forced is not None:
        if _forced == "triton" and not OPS[op]:
            raise RuntimeError(f"{op} has no Triton implementation; use backend('eager') or unset HF_MAMBA_BACKEND.")
        return _forced
    kind = device.type
    if OPS[op] and kind in ("cuda", "xpu") and _triton_works(kind, device.index):
        return "triton"
    return "eager"


_NO_CHANGE = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one while kernels are launched: Triton launches on the current GPU, wherever its operands are.

    Models spread over several GPUs call ops on all of them without changing the current one.
    """
    # compiled code looks after this itself
    kind = device.type
    if kind not in ("cuda", "xpu") or torch.compiler.is_compiling():
        return _NO_CHANGE
    module = torch.cuda if kind == "cuda" else torch.xpu
    return _NO_CHANGE if device.index == module.current_device() else module.device(device)


def unfit_for_kernels(
    x: Tensor, *others: Tensor | None, state_size: int | None = None, taps: int | None = None
) -> str | None:
    """What of a call the Triton kernels do not take, empty if it has no elements; None if they take it.

    They compute in fp32, hold at most LARGEST_STATE states and are unrolled over at most LARGEST_WIDTH taps.
    """
    if x.numel() == 0 or state_size == 0:
        return ""
    for value in (x, *others):
        if value is not None and value.dtype == torch.float64:
            return "fp64 operands"
    if state_size is not None and state_size > LARGEST_STATE:
        return f"states of more than {LARGEST_STATE}"
    if taps is not None and taps > LARGEST_WIDTH:
        return f"convolutions of more than {LARGEST_WIDTH} taps"
    return None


def left_to_eager(x: Tensor, *others: Tensor | None, state_size: int | None = None, taps: int | None = None) -> bool:
    """Whether a Triton op leaves a call to the eager one; the reason, if it is not that there is nothing to do, is said once."""
    reason = unfit_for_kernels(x, *others, state_size=state_size, taps=taps)
    if reason and not torch.compiler.is_compiling():
        warn_once(
            f"mamba_kernels: the Triton kernels do not take {reason}; those run as plain torch, which is slower."
        )
    return reason is not None


# a constant to torch.compile, which cannot look into it; it would look through a cache around it
@torch.compiler.assume_constant_result
def _triton_works(device_type: str, index: int | None) -> bool:
    """Whether Triton kernels run on a device; warns with the reason and the cure if they do not."""
    return _try_device(device_type, index)


@cache
def _try_device(device_type: str, index: int | None) -> bool:
    if importlib.util.find_spec("triton") is None:
        warn_once(
            "mamba_kernels: Triton is not installed, so the operators run as plain torch on this GPU, which is slower. "
            "Cure: pip install triton"
        )
        return False
    if device_type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            warn_once(
                f"mamba_kernels: Triton kernels need compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}, this "
                f"GPU has {capability[0]}.{capability[1]}; the operators run as plain torch, which is slower."
            )
            return False
    return True


@cache
def warn_once(message: str) -> None:
    """Emit `message` as a UserWarning, the first time only."""
    warnings.warn(message, UserWarning, stacklevel=3)
