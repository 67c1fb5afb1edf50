"""The single step: `selective_state_update` with and without heads."""

import math

from torch import Tensor

from ..checks import check_shape, check_tensor
from ..state_update import selective_state_update as channel_update
from ..state_update import ssd_state_update
from .layout import refuse_complex

__all__ = ["selective_state_update"]

OP = "selective_state_update"


def _tied(value: Tensor | None, dims: int) -> bool:
    """Whether `value` is the same number along its last `dims` dimensions, as its strides show."""
    if value is None:
        return True
    return all(
        size == 1 or stride == 0 for size, stride in zip(value.shape[-dims:], value.stride()[-dims:], strict=True)
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`mamba_ssm.ops.triton.selective_state_update.selective_state_update`: advance the state by one token, in place.

    | argument | without heads | with heads |
    | --- | --- | --- |
    | state | (S, D, N) | (S, H, P, N) |
    | x, dt, z | (B, D) | (B, H, P) |
    | A | (D, N) | (H, P, N) |
    | B, C | (B, N) | (B, G, N), G a divisor of H |
    | D, dt_bias | (D,) | (H, P) |

    Mamba-2 expands its A, dt and dt_bias of one number a head to these shapes. The strides of 0 show it, and the cheaper
    update of Mamba-2 is used.

    Args:
        state: any floating dtype, updated in place.
        x, dt, A, B, C, D, z, dt_bias: as in the table; D, z and dt_bias may be None.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (B,) integer, the row of `state` of each batch entry; negative = padding, which gives 0 and
            leaves the state alone. None: S = B.

    Returns:
        out, shaped as x, in x.dtype.

    Raises:
        TypeError: complex A, or an argument is no floating tensor.
        ValueError: a shape that does not fit.
        RuntimeError: gradients are enabled and an argument requires one; the update has no backward.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import selective_state_update
        >>> state, x, dt, A = torch.zeros(2, 4, 3), torch.randn(2, 4), torch.rand(2, 4), -torch.rand(4, 3)
        >>> out = selective_state_update(state, x, dt, A, torch.randn(2, 3), torch.randn(2, 3), dt_softplus=True)
        >>> print(out.shape)
        torch.Size([2, 4])
    """
    for name, value in (("state", state), ("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C)):
        check_tensor(OP, name, value)
    refuse_complex(OP, A=A, B=B, C=C)
    if state.dim() == 3:
        check_shape(OP, "x", x, (None, state.shape[1]), "(B, D)")
        check_shape(OP, "B", B, (x.shape[0], state.shape[2]), "(B, N)")
        out = channel_update(
            state,
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            state_indices=state_batch_indices,
        )
        assert isinstance(out, Tensor)
        return out
    check_shape(OP, "state", state, (None, None, None, None), "(S, D, N) or (S, H, P, N)")
    _, heads, head_dim, size = state.shape
    check_shape(OP, "x", x, (None, heads, head_dim), "(B, H, P)")
    check_shape(OP, "dt", dt, tuple(x.shape), "(B, H, P)")
    check_shape(OP, "A", A, (heads, head_dim, size), "(H, P, N)")
    check_shape(OP, "B", B, (x.shape[0], None, size), "(B, G, N)")
    check_shape(OP, "C", C, tuple(B.shape), "(B, G, N)")
    for name, option in (("D", D), ("dt_bias", dt_bias)):
        if option is not None:
            check_tensor(OP, name, option)
            check_shape(OP, name, option, (heads, head_dim), "(H, P)")
    if z is not None:
        check_tensor(OP, "z", z)
        check_shape(OP, "z", z, tuple(x.shape), "(B, H, P)")
    if head_dim and size and _tied(A, 2) and _tied(dt, 1) and _tied(dt_bias, 1):
        out = ssd_state_update(
            state,
            x,
            dt[..., 0],
            A[:, 0, 0],
            B,
            C,
            D=D,
            z=z,
            dt_bias=None if dt_bias is None else dt_bias[:, 0],
            dt_softplus=dt_softplus,
            dt_limit=(-math.inf, math.inf),
            state_indices=state_batch_indices,
        )
        assert isinstance(out, Tensor)
        return out
    # every channel has numbers of its own: heads are only a way to count channels
    rows = state.flatten(1, 2)
    out = channel_update(
        rows,
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        D=None if D is None else D.flatten(),
        z=None if z is None else z.flatten(1),
        dt_bias=None if dt_bias is None else dt_bias.flatten(),
        dt_softplus=dt_softplus,
        state_indices=state_batch_indices,
    )
    assert isinstance(out, Tensor)
    if rows.data_ptr() != state.data_ptr():
        # a state whose strides do not allow the view was copied
        state.copy_(rows.view_as(state))
    return out.view_as(x)
