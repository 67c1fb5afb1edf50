"""Argument checks shared by the public ops: each error names the argument, what was expected and what was given."""

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "check_activation", "check_dtype", "check_same_device", "check_shape", "check_tensor"]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{name}` must be a torch.Tensor, got {type(value).__name__}.")


def check_dtype(op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """Raise TypeError unless `value` has one of `dtypes`."""
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: `{name}` must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}.")


def check_shape(op: str, name: str, value: Tensor, expected: tuple[int | None, ...], legend: str) -> None:
    """Raise ValueError unless `value` has shape `expected` (None matches any size); `legend` is e.g. "(B, L, D)"."""
    fits = value.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{op}: `{name}` must have shape {legend} = ({sizes}), got {tuple(value.shape)}.")


def check_same_device(op: str, first: tuple[str, Tensor], **others: Tensor | None) -> None:
    """Raise ValueError unless all given tensors lie on the device of `first`."""
    name, reference = first
    for other, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{op}: `{other}` is on {value.device} but `{name}` is on {reference.device}; "
                f"move it with {other}.to({name}.device)."
            )


def check_activation(op: str, activation: str | None) -> None:
    """Raise ValueError unless `activation` is None, "silu" or "swish" (its other name)."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: `activation` must be None, 'silu' or 'swish', got {activation!r}.")
