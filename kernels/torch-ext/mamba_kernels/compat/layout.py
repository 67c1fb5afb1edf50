"""Helpers of the compatibility layer: memory layouts and checks its functions share."""

from torch import Tensor

__all__ = ["like_layout", "refuse_complex", "refuse_gradients"]


def like_layout(out: Tensor, model: Tensor) -> Tensor:
    """`out` (B, D, L), channel-last in memory, made contiguous if `model` (B, D, L) is channel-first.

    The CUDA ops give their output the layout of their input, and callers reshape it with `view`.
    """
    return out.contiguous() if model.stride(2) == 1 and model.stride(1) != 1 else out


def refuse_complex(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for complex tensors."""
    for name, value in tensors.items():
        if value is not None and value.is_complex():
            raise TypeError(
                f"{op}: `{name}` is complex ({str(value.dtype).removeprefix('torch.')}), which is not supported; only the "
                "real parametrisation of Mamba is. Use real tensors."
            )


def refuse_gradients(op: str, alternative: str, enabled: bool, **tensors: Tensor | None) -> None:
    """Raise RuntimeError if gradients are `enabled` and a tensor of an op without backward requires one."""
    for name, value in tensors.items():
        if enabled and value is not None and value.requires_grad:
            raise RuntimeError(
                f"{op} updates its state in place and has no gradient, but `{name}` requires one; run it under "
                f"torch.no_grad(), or use {alternative} with initial_states to differentiate."
            )
