"""The SSD scan in vectorised torch (arXiv 2405.21060, section 6): matrix products inside chunks, a recurrence between them.

Inside a chunk of Q tokens, with `a = dt A`, `cum` its running sum and `u = dt x`, for every head

    y[q] = Σ_{s ≤ q} exp(cum[q] - cum[s]) (C[q]·B[s]) u[s]  +  exp(cum[q]) state C[q]  +  D x[q]
    state ← exp(cum[-1]) state + Σ_s exp(cum[-1] - cum[s]) u[s] B[s]ᵀ

Every exponent is a sum of `a` over consecutive tokens, never positive for negative A. Forward keeps no state; backward walks
through the chunks again to get the states that enter them, then from the last chunk to the first.

Shapes: b batch, k chunks, g groups, r heads a group, q or s tokens of a chunk, p head_dim, n state size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..packing import cu_seqlens_to_seq_idx, segments_and_valid
from .grid import chunk_grid

__all__ = ["ssd_chunk_scan_eager"]

# tokens a chunk; measured on two CPU cores, where 32 and 128 are slower (docs/performance.md)
BLOCK = 64
# elements of the (b, k, h, q, q) tensors worked on at once: as many as stay in the last level cache, or as fill a GPU
CPU_ELEMENTS = 2**19
ELEMENTS = 2**26


class _Span(NamedTuple):
    """Consecutive chunks of equal length that are computed together."""

    start: int
    chunks: int
    block: int
    first_chunk: int


def _spans(x: Tensor) -> list[_Span]:
    batch, length, heads, _ = x.shape
    small = x.device.type == "cpu" and not torch.compiler.is_compiling()
    together = max(1, (CPU_ELEMENTS if small else ELEMENTS) // max(1, batch * heads * BLOCK * BLOCK))
    full = length // BLOCK
    spans = [_Span(i * BLOCK, min(together, full - i), BLOCK, i) for i in range(0, full, together)]
    if length % BLOCK:
        spans.append(_Span(full * BLOCK, 1, length % BLOCK, full))
    return spans


class _Problem:
    """The inputs of one scan and views of them chunk by chunk, in the dtype of the sums."""

    def __init__(
        self, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, segments: Tensor | None
    ):
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # running sums grow over a chunk while their differences may be tiny; MPS has no fp64
        self.wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.x, self.step, self.B, self.C, self.segments = x, step, B, C, segments
        self.groups = B.shape[2]
        self.rate = self._heads(A.to(self.wide))[:, :, None]
        self.skip = None
        if D is not None:
            self.skip = self._heads(D.to(self.dtype))
            self.skip = self.skip[:, :, None, None] if D.dim() == 1 else self.skip[:, :, None, :]

    def _heads(self, value: Tensor) -> Tensor:
        """(H, …) → (g, r, …)."""
        return value.unflatten(0, (self.groups, -1))

    def per_head(self, value: Tensor, span: _Span) -> Tensor:
        """(B, L, H, …) → (b, k, g, r, q, …)."""
        part = value[:, span.start : span.start + span.chunks * span.block].to(self.dtype)
        part = part.unflatten(1, (span.chunks, span.block)).unflatten(3, (self.groups, -1)).movedim(2, 4)
        # one copy here spares the matrix products theirs; a single chunk of a single row needs none
        return part.contiguous() if part.shape[0] * span.chunks > 1 else part

    def per_group(self, value: Tensor, span: _Span) -> Tensor:
        """(B, L, G, N) → (b, k, g, 1, q, n)."""
        part = value[:, span.start : span.start + span.chunks * span.block].to(self.dtype)
        return part.unflatten(1, (span.chunks, span.block)).movedim(2, 3).unsqueeze(3)

    def store(self, target: Tensor, value: Tensor, span: _Span) -> None:
        """Write (b, k, g, r, q, …) into (B, L, H, …)."""
        part = target[:, span.start : span.start + span.chunks * span.block]
        part.unflatten(1, (span.chunks, span.block)).unflatten(3, (self.groups, -1)).movedim(2, 4).copy_(value)

    def store_group(self, target: Tensor, value: Tensor, span: _Span) -> None:
        """Write (b, k, g, q, n) into (B, L, G, N)."""
        part = target[:, span.start : span.start + span.chunks * span.block]
        part.unflatten(1, (span.chunks, span.block)).movedim(2, 3).copy_(value)

    def decays(self, span: _Span) -> "_Decays":
        step = self.per_head(self.step, span)
        cum = (step.to(self.wide) * self.rate).cumsum(-1)
        return _Decays(self, span, step, cum)


class _Decays:
    """exp of the sums of `a` from the chunk's start, to its end and over all of it, zero across sequence borders."""

    def __init__(self, problem: _Problem, span: _Span, step: Tensor, cum: Tensor):
        self.step, self.cum, self.dtype = step, cum, problem.dtype
        self.segments = None
        from_start, to_end, total = cum, cum[..., -1:] - cum, cum[..., -1]
        if problem.segments is not None:
            stop = span.start + span.chunks * span.block
            # (b, k, 1, 1, q)
            self.segments = problem.segments[:, span.start : stop].unflatten(1, (span.chunks, span.block))
            self.segments = self.segments[:, :, None, None]
            entering = torch.nn.functional.pad(problem.segments, (1, 0))[:, span.start : stop : span.block]
            entering = entering[:, :, None, None, None]
            last = self.segments[..., -1:]
            from_start = from_start.masked_fill(self.segments != entering, -math.inf)
            to_end = to_end.masked_fill(self.segments != last, -math.inf)
            total = total.masked_fill((entering != last)[..., 0], -math.inf)
        # (b, k, g, r, q), (b, k, g, r, q), (b, k, g, r, 1, 1)
        self.from_start = from_start.exp().to(self.dtype)
        self.to_end = to_end.exp().to(self.dtype)
        self.total = total.exp().to(self.dtype)[..., None, None]

    def inside(self) -> Tensor:
        """exp(cum[q] - cum[s]) for s ≤ q in one sequence, else 0: (b, k, g, r, q, s)."""
        block = self.cum.shape[-1]
        # -inf is added before the exponential: above the diagonal the differences are positive and might overflow
        mask = self.cum.new_full((block, block), -math.inf, dtype=self.dtype).triu_(1)
        if self.segments is not None:
            mask = mask.masked_fill(self.segments[..., :, None] != self.segments[..., None, :], -math.inf)
        difference = (self.cum[..., :, None] - self.cum[..., None, :]).to(self.dtype)
        return difference.add_(mask).exp_()


class _Carry:
    """How the state passes from chunk to chunk, and where it is loaded and kept when sequences begin and end.

    enter (chunks,): the row of `initial` that a chunk starts from, or -1 for the state of the chunk before. leave (chunks,):
    the row of the final states that a chunk's state is, or n for none. Both None: one sequence a batch row.
    """

    def __init__(self, enter: Tensor | None, leave: Tensor | None):
        self.enter, self.leave = enter, leave

    def load(self, state: Tensor, initial: Tensor, chunk: int) -> Tensor:
        if self.enter is None:
            return state
        row = self.enter[chunk : chunk + 1]
        return torch.where(row[:, None, None, None, None] >= 0, initial.index_select(0, row.clamp(min=0)), state)

    def keep(self, finals: Tensor | None, state: Tensor, chunk: int) -> None:
        if self.leave is not None and finals is not None:
            finals.index_copy_(0, self.leave[chunk : chunk + 1], state)

    def load_backward(self, dstate: Tensor, dinitial: Tensor, chunk: int) -> Tensor:
        if self.enter is None:
            return dstate
        row = self.enter[chunk : chunk + 1]
        loaded = row[:, None, None, None, None] >= 0
        dinitial.index_add_(0, row.clamp(min=0), torch.where(loaded, dstate, 0.0))
        return torch.where(loaded, 0.0, dstate)

    def keep_backward(self, dfinals: Tensor, dstate: Tensor, chunk: int) -> Tensor:
        if self.leave is None:
            return dstate
        return dstate + dfinals.index_select(0, self.leave[chunk : chunk + 1])


def _pass_states(
    problem: _Problem,
    span: _Span,
    decays: _Decays,
    carry: _Carry,
    state: Tensor,
    initial: Tensor,
    finals: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """States entering the chunks of a span (b, k, g, r, p, n), and the state after it (b, g, r, p, n)."""
    weighted = problem.per_head(problem.x, span) * (decays.step * decays.to_end)[..., None]
    added = weighted.mT @ problem.per_group(problem.B, span)
    entering = []
    for k in range(span.chunks):
        state = carry.load(state, initial, span.first_chunk + k)
        entering.append(state)
        state = added[:, k].addcmul_(decays.total[:, k], state)
        carry.keep(finals, state, span.first_chunk + k)
    return _stack(entering), state


def _stack(states: list[Tensor]) -> Tensor:
    """States chunk by chunk, (b, k, g, r, p, n); a single one, as usual on a CPU, is not copied."""
    return states[0].unsqueeze(1) if len(states) == 1 else torch.stack(states, dim=1)


class SSDChunkScanFunction(torch.autograd.Function):
    """The scan with step sizes ready for use.

    x, z (B, L, H, P); step (B, L, H); A (H,); B, C (B, L, G, N); D (H,), (H, P) or None; initial (S, H, P, N); segments (B, L)
    or None; enter, leave as in `_Carry`. Returns y in x.dtype and the final states (S, H, P, N).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial: Tensor,
        segments: Tensor | None,
        enter: Tensor | None,
        leave: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            problem = _Problem(x, step, A, B, C, D, segments)
            carry = _Carry(enter, leave)
            start_states, finals = _start(problem, initial, carry)
            state = start_states if enter is None else torch.zeros_like(start_states[:1])
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            # the gate's gradient needs the value before the gate
            ungated = None if z is None else torch.empty(x.shape, dtype=problem.dtype, device=x.device)
            for span in _spans(x):
                decays = problem.decays(span)
                entering, state = _pass_states(problem, span, decays, carry, state, start_states, finals)
                value = _output(problem, span, decays, entering)
                if z is not None and ungated is not None:
                    problem.store(ungated, value, span)
                    value = value * torch.nn.functional.silu(problem.per_head(z, span))
                problem.store(y, value, span)
            if finals is not None:
                state = finals[:-1]
            # a scan without tokens hands its input on; an output must not be an input
            final = state.flatten(1, 2).clone() if state is start_states else state.flatten(1, 2)
        ctx.save_for_backward(x, step, A, B, C, D, z, initial, segments, enter, leave, ungated)
        return y, final

    @staticmethod
    @first_order_only("ssd_chunk_scan")
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, step, A, B, C, D, z, initial, segments, enter, leave, ungated = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            problem = _Problem(x, step, A, B, C, D, segments)
            carry = _Carry(enter, leave)
            start_states, _ = _start(problem, initial, carry)
            state = start_states if enter is None else torch.zeros_like(start_states[:1])
            spans = _spans(x)
            entering, all_decays = [], []
            for span in spans:
                decays = problem.decays(span)
                all_decays.append(decays)
                states, state = _pass_states(problem, span, decays, carry, state, start_states, None)
                entering.append(states)
            dfinals = dfinal.to(problem.dtype).unflatten(1, (problem.groups, -1))
            dinitial = torch.zeros_like(start_states)
            if leave is not None:
                dfinals = torch.cat([dfinals, torch.zeros_like(dfinals[:1])])
                # what no chunk has written is still the initial state
                dinitial = dfinals.index_fill(0, leave, 0.0)[:-1]
            dstate = dfinals if enter is None else torch.zeros_like(state)
            dx, dstep, dB, dC = (torch.empty_like(value) for value in (x, step, B, C))
            dz = None if z is None else torch.empty_like(z)
            dA = torch.zeros_like(problem.rate[..., 0])
            dD = None
            for span in reversed(spans):
                decays = all_decays.pop()
                dout = problem.per_head(dy, span)
                if z is not None and ungated is not None and dz is not None:
                    gate = problem.per_head(z, span)
                    dgate = dout * problem.per_head(ungated, span)
                    problem.store(dz, torch.ops.aten.silu_backward(dgate, gate), span)
                    dout = dout * torch.nn.functional.silu(gate)
                dout_decayed = dout * decays.from_start[..., None]
                from_output = dout_decayed.mT @ problem.per_group(C, span)
                leaving = []
                for k in reversed(range(span.chunks)):
                    chunk = span.first_chunk + k
                    dstate = carry.keep_backward(dfinals, dstate, chunk)
                    leaving.append(dstate)
                    dstate = from_output[:, k].addcmul_(decays.total[:, k], dstate)
                    dstate = carry.load_backward(dstate, dinitial, chunk)
                gradients = _chunk_backward(
                    problem, span, decays, dout, dout_decayed, entering.pop(), _stack(leaving[::-1])
                )
                problem.store(dx, gradients.dx, span)
                problem.store(dstep, gradients.dstep, span)
                problem.store_group(dB, gradients.dB, span)
                problem.store_group(dC, gradients.dC, span)
                dA += gradients.dA
                if gradients.dD is not None:
                    dD = gradients.dD if dD is None else dD + gradients.dD
            if enter is None:
                dinitial = dstate
            if D is not None:
                dD = torch.zeros_like(D) if dD is None else (dD.sum(-1) if D.dim() == 1 else dD).flatten(0, 1)
                dD = dD.to(D.dtype)
            dinitial = dinitial.flatten(1, 2).to(initial.dtype)
        return dx, dstep, dA.flatten().to(A.dtype), dB, dC, dD, dz, dinitial, None, None, None


def _start(problem: _Problem, initial: Tensor, carry: _Carry) -> tuple[Tensor, Tensor | None]:
    """Initial states (S, g, r, p, n), and room for the final ones and one to discard where sequences share a row."""
    states = initial.to(problem.dtype).unflatten(1, (problem.groups, -1))
    if carry.leave is None:
        return states, None
    # an empty sequence has no chunk to write its final state, so that it ends as it began
    return states, torch.cat([states, torch.zeros_like(states[:1])])


def _output(problem: _Problem, span: _Span, decays: _Decays, entering: Tensor) -> Tensor:
    """y (b, k, g, r, q, p) before the gate."""
    x = problem.per_head(problem.x, span)
    B, C = problem.per_group(problem.B, span), problem.per_group(problem.C, span)
    scores = decays.inside().mul_(C @ B.mT)
    y = scores @ (x * decays.step[..., None])
    y.addcmul_(C @ entering.mT, decays.from_start[..., None])
    if problem.skip is not None:
        y.addcmul_(x, problem.skip)
    return y


class _Gradients(NamedTuple):
    dx: Tensor
    dstep: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None


def _chunk_backward(
    problem: _Problem,
    span: _Span,
    decays: _Decays,
    dy: Tensor,
    dy_decayed: Tensor,
    entering: Tensor,
    dleaving: Tensor,
) -> _Gradients:
    """Gradients of one span from dy (b, k, g, r, q, p), also times the decay from the chunk's start, the states that enter
    the chunks and the gradients of those that leave them (b, k, g, r, p, n)."""
    x = problem.per_head(problem.x, span)
    B, C = problem.per_group(problem.B, span), problem.per_group(problem.C, span)
    u = x * decays.step[..., None]
    inside = decays.inside()
    similarity = C @ B.mT
    # scores[q, s] = similarity · inside; its gradient times inside belongs to the similarity, times both to the exponent
    dsimilarity = (dy @ u.mT).mul_(inside)
    dexponent = dsimilarity * similarity
    dsimilarity = dsimilarity.sum(3)
    scores = inside.mul_(similarity)
    through_state = (B @ dleaving.mT).mul_(decays.to_end[..., None])
    du = (scores.mT @ dy).add_(through_state)
    dC_heads = dy_decayed @ entering
    # a[t] stands in the exponent of every pair s < t ≤ q, of every output q ≥ t, of every input s < t, and of the state;
    # sums over just these, unlike a difference of longer sums, lose nothing where they are small
    pairs = dexponent.cumsum(-1).tril_(-1).sum(-2)[..., :-1]
    inputs = (u * through_state).sum(-1)[..., :-1].cumsum(-1)
    da = torch.nn.functional.pad(pairs + inputs, (1, 0))
    da += (dC_heads * C).sum(-1).flip(-1).cumsum(-1).flip(-1)
    da += ((entering * dleaving).sum((-1, -2), keepdim=True) * decays.total)[..., 0]
    # heads of a group are summed by the product over r and p together
    u_end = (u * decays.to_end[..., None]).movedim(3, 4).flatten(-2)
    dB = u_end @ dleaving.flatten(3, 4) + dsimilarity.mT @ C.squeeze(3)
    dC = dC_heads.sum(3) + dsimilarity @ B.squeeze(3)
    dstep = (du * x).sum(-1) + da * problem.rate.to(problem.dtype)
    dA = (da.to(problem.wide) * decays.step).sum((0, 1, 4))
    dx = du.mul_(decays.step[..., None])
    dD = None
    if problem.skip is not None:
        dx.addcmul_(dy, problem.skip)
        dD = (dy * x).sum((0, 1, 4))
    return _Gradients(dx, dstep, dA, dB, dC, dD)


def ssd_chunk_scan_eager(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_chunk_scan` without its argument checks; it works in chunks of its own length, whatever `chunk_size` is."""
    batch, length, heads, head_dim = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    segments = enter = leave = valid = places = None
    if seq_idx is not None:
        segments, valid = segments_and_valid(seq_idx)
    if valid is not None:
        # whatever lies in padding, even an infinity, must not reach a product
        x, B, C = (value.masked_fill(~valid[..., None, None], 0.0) for value in (x, B, C))
        dt = dt.masked_fill(~valid[..., None], 0.0)
        z = None if z is None else z.masked_fill(~valid[..., None, None], 0.0)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    if tuple(dt_limit) != (-math.inf, math.inf) and not (dt_softplus and tuple(dt_limit) == (0.0, math.inf)):
        step = step.clamp(*dt_limit)
    if valid is not None:
        step = step.masked_fill(~valid[..., None], 0.0)
    n_states = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    initial = initial_states
    if initial is None:
        initial = torch.zeros(n_states, heads, head_dim, B.shape[3], dtype=dtype, device=x.device)
    if cu_seqlens is not None and length:
        if initial_states is None and not return_final_states:
            segments = cu_seqlens_to_seq_idx(cu_seqlens, length)
            initial = initial[:1]
        else:
            # chunks that begin where a sequence begins, so that each can load and keep its own state
            grid = chunk_grid(cu_seqlens, length, BLOCK)
            enter, leave, places = grid.enter, grid.leave, grid.places
            step, x, B, C = (grid.gather(value) for value in (step, x, B, C))
            z = None if z is None else grid.gather(z)
    y, final = SSDChunkScanFunction.apply(x, step, A, B, C, D, z, initial, segments, enter, leave)
    if places is not None:
        y = y[:, places]
    if valid is not None:
        y = y.masked_fill(~valid[..., None, None], 0.0)
    return (y, final) if return_final_states else y
