"""Backward of the SSD scan in Triton.

`triton_states` walks through the sequence both ways and leaves, for every block and head, the state h that enters and the
gradient dh of the state that leaves. After that blocks are independent: `triton_projections` finds the gradients of B and C,
which are sums over heads, and `triton_inputs` all others. `triton_sums` adds up what their programs leave.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_inputs import launch_inputs
from .triton_plan import Operands, Places, Plan, segment_table
from .triton_projections import launch_projections
from .triton_states import launch_states, new_locals
from .triton_sums import launch_sums

__all__ = ["Gradients", "ssd_backward"]

# most bytes of the states kept for all blocks at a time; beyond that heads are taken in turns
WORKSPACE_BYTES = 2 << 30


class Gradients(NamedTuple):
    """Gradients of the operands, None where there is no such operand."""

    x: Tensor
    dt: Tensor
    A: Tensor  # fp32, as those of D and dt_bias
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None  # fp32


def _walk(
    operands: Operands,
    plan: Plan,
    meta: dict[str, Any],
    grad_y: Tensor,
    starts: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The states that enter the blocks and the gradients of those that leave them, (blocks, H, P, N), and the gradient of the
    initial states (S, H, P, N) if there are any."""
    device = operands.x.device
    blocks = plan.n_blocks if operands.cu_seqlens is not None else plan.batch * plan.n_blocks
    shape = (blocks, plan.heads, plan.head_dim, plan.size)
    dtype = plan.states_dtype
    kept = (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
    grad_initial = None
    if operands.initial_states is not None:
        grad_initial = torch.empty((plan.n_states, *shape[1:]), dtype=torch.float32, device=device)
    table = segment_table(operands, plan, plan.segment)
    local = new_locals(plan, device) if plan.split else None
    for keep_local, directions in ((2, (0, 2)), (0, (1, 2))) if plan.split else ((0, (0, 2)),):
        launch_states(
            operands,
            plan,
            meta,
            table,
            local,
            keep_local,
            grad_y=grad_y,
            starts=starts if directions[0] == 0 else None,
            grad_final=grad_final,
            kept=kept,
            grad_initial=grad_initial,
            directions=directions,
        )
    return *kept, grad_initial


def _backward(
    operands: Operands,
    plan: Plan,
    grad_y: Tensor,
    starts: Tensor | None,
    grad_final: Tensor | None,
    places: Places | None = None,
) -> Gradients:
    meta = plan.meta(operands)
    entering, leaving, grad_initial = _walk(operands, plan, meta, grad_y, starts, grad_final)
    table = segment_table(operands, plan, plan.block)
    projections = launch_projections(operands, plan, meta, table, grad_y, entering, leaving, places)
    inputs = launch_inputs(operands, plan, meta, table, grad_y, entering, leaving, projections, places)
    totals, (dB, dC) = launch_sums(inputs.sums, projections.parts, operands.B.dtype)
    heads, D = plan.heads, operands.D
    if places is not None and projections.parts.shape[0] > 1:
        dB, dC = places.B.copy_(dB), places.C.copy_(dC)
    return Gradients(
        x=inputs.x,
        dt=inputs.dt,
        A=totals[:heads],
        B=dB,
        C=dC,
        D=None if D is None else totals[2 * heads :].view(D.shape),
        z=inputs.z,
        dt_bias=None if operands.dt_bias is None else totals[heads : 2 * heads],
        initial_states=grad_initial,
    )


def ssd_backward(
    operands: Operands,
    plan: Plan,
    grad_y: Tensor,
    starts: Tensor | None,
    grad_final: Tensor | None,
    places: Places | None = None,
) -> Gradients:
    """Gradients from grad_y (B, L, H, P), of innermost stride 1, and grad_final (S, H, P, N), contiguous, or None.

    `starts` is what `ssd_forward` saved: the states that enter the segments if sequences are split, else None. With `places`
    the gradients that have a place are in it.
    """
    if not plan.split:
        starts = operands.initial_states
    rows = plan.n_blocks if operands.cu_seqlens is not None else plan.batch * plan.n_blocks
    bytes_of_head = 2 * rows * plan.head_dim * plan.size * plan.states_dtype.itemsize
    most = max(1, WORKSPACE_BYTES // bytes_of_head)
    if plan.heads <= most:
        return _backward(operands, plan, grad_y, starts, grad_final, places)
    gradients = _backward_in_turns(operands, plan, grad_y, starts, grad_final, most)
    if places is None:
        return gradients
    return gradients._replace(
        x=places.x.copy_(gradients.x),
        dt=places.dt.copy_(gradients.dt),
        B=places.B.copy_(gradients.B),
        C=places.C.copy_(gradients.C),
    )


def _backward_in_turns(
    operands: Operands, plan: Plan, grad_y: Tensor, starts: Tensor | None, grad_final: Tensor | None, most: int
) -> Gradients:
    """The same with at most `most` heads at a time, all of one group, so that the states of all blocks fit in memory."""
    heads = plan.heads // plan.groups
    dB, dC = (torch.zeros(value.shape, dtype=torch.float32, device=value.device) for value in (operands.B, operands.C))
    turns = []
    for group in range(plan.groups):
        for first in range(group * heads, (group + 1) * heads, most):
            taken = slice(first, min(first + most, (group + 1) * heads))
            own = slice(group, group + 1)
            part = operands._replace(
                x=operands.x[:, :, taken],
                dt=operands.dt[:, :, taken],
                A=operands.A[taken],
                B=operands.B[:, :, own],
                C=operands.C[:, :, own],
                D=None if operands.D is None else operands.D[taken],
                z=None if operands.z is None else operands.z[:, :, taken],
                dt_bias=None if operands.dt_bias is None else operands.dt_bias[taken],
                initial_states=None if operands.initial_states is None else operands.initial_states[:, taken],
            )
            gradients = _backward(
                part,
                plan._replace(heads=taken.stop - first, groups=1),
                grad_y[:, :, taken],
                None if starts is None else starts[:, taken].contiguous(),
                None if grad_final is None else grad_final[:, taken].contiguous(),
            )
            dB[:, :, own] += gradients.B
            dC[:, :, own] += gradients.C
            turns.append(gradients)

    def joined(name: str, dim: int) -> Tensor | None:
        values = [getattr(turn, name) for turn in turns]
        return None if values[0] is None else torch.cat(values, dim=dim)

    return Gradients(
        x=torch.cat([turn.x for turn in turns], dim=2),
        dt=torch.cat([turn.dt for turn in turns], dim=2),
        A=torch.cat([turn.A for turn in turns]),
        B=dB.to(operands.B.dtype),
        C=dC.to(operands.C.dtype),
        D=joined("D", 0),
        z=joined("z", 2),
        dt_bias=joined("dt_bias", 0),
        initial_states=joined("initial_states", 1),
    )
