"""The implementations that `python -m benchmarks ops` compares: ours, ours in eager torch, and what else is installed.

A contender gets the operands of `op_rows` and brings them into the layout it likes best; that is not timed, the call is.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import mamba_kernels
from benchmarks.op_rows import OPS, Operands, call_op, softplus_steps

__all__ = ["EAGER", "OURS", "PEERS", "Implementation", "implementation", "is_installed", "offers"]

OURS, EAGER = "hf_mamba", "eager"
# importable module of each peer
PEERS = {"mamba_ssm": "mamba_ssm", "causal_conv1d": "causal_conv1d", "fla": "fla"}

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: as in the table.
        call: outputs from prepared operands, in the layout of `mamba_kernels` or one that `restore` turns into it.
        prepare: brings operands into the contender's layout; differentiable, so that gradients can be compared.
        restore: brings the outputs back.
        settings: module attributes that hold during the call: (module, attribute, value), see `op_variants`.
    """

    name: str
    call: Callable[[Operands], Outputs]
    prepare: Callable[[Operands], Operands] = dict
    restore: Callable[[Outputs], Outputs] = tuple
    settings: tuple[tuple[str, str, Any], ...] = field(default=())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The settings, for as long as the block lasts."""
        changed = [(importlib.import_module(module), name, value) for module, name, value in self.settings]
        previous = [getattr(module, name) for module, name, _ in changed]
        for (module, name, value), current in zip(changed, previous, strict=True):
            # a tuple is a tuning: of the kind that stands there
            setattr(module, name, type(current)(*value) if isinstance(value, tuple) else value)
        try:
            yield
        finally:
            for (module, name, _), value in zip(changed, previous, strict=True):
                setattr(module, name, value)


def is_installed(peer: str) -> bool:
    """Whether a peer can be imported, as far as its files tell."""
    return importlib.util.find_spec(PEERS[peer]) is not None


def offers(op: str, contender: str) -> bool:
    """Whether a contender has an op."""
    return contender in (OURS, EAGER) or (op, contender) in _MAKERS


def implementation(op: str, contender: str) -> Implementation | None:
    """What a contender has for an op; None if nothing.

    Raises:
        ImportError: the peer is there, but cannot be imported.
    """
    if contender == OURS:
        return Implementation(OURS, lambda operands: call_op(op, operands))
    if contender == EAGER:
        return Implementation(EAGER, lambda operands: _eager(op, operands))
    make = _MAKERS.get((op, contender))
    return None if make is None else make()


def _eager(op: str, operands: Operands) -> Outputs:
    with mamba_kernels.backend("eager"):
        return call_op(op, operands)


def _channel_first(operands: Operands) -> Operands:
    return {
        name: value.transpose(1, 2).contiguous() if name in OPS["selective_scan"].tokens else value
        for name, value in operands.items()
    }


def _mamba_ssm_selective_scan() -> Implementation:
    fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def call(o: Operands) -> Outputs:
        y = fn(
            o["x"],
            o["dt"],
            o["A"],
            o["B"],
            o["C"],
            D=o["D"],
            z=o["z"],
            delta_bias=o["dt_bias"],
            delta_softplus=True,
        )
        return (y,)

    return Implementation("mamba_ssm", call, _channel_first, lambda outputs: (outputs[0].transpose(1, 2),))


def _mamba_ssm_ssd() -> Implementation:
    fn = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(o: Operands) -> Outputs:
        y = fn(o["x"], o["dt"], o["A"], o["B"], o["C"], 256, D=o["D"], dt_bias=o["dt_bias"], dt_softplus=True)
        return (y,)

    return Implementation("mamba_ssm", call)


def _mamba_ssm_selective_update() -> Implementation:
    fn = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def call(o: Operands) -> Outputs:
        rest = {"D": o["D"], "z": o.get("z"), "dt_bias": o["dt_bias"], "dt_softplus": True}
        return (fn(o["state"], o["x"], o["dt"], o["A"], o["B"], o["C"], **rest),)

    return Implementation("mamba_ssm", call)


def _mamba_ssm_ssd_update() -> Implementation:
    """The same kernel as Mamba's: scalars of a head are expanded, which costs no memory."""

    def prepare(o: Operands) -> Operands:
        heads, head_dim, size = o["state"].shape[1:]
        return {
            **o,
            "dt": o["dt"][..., None].expand(-1, -1, head_dim),
            "A": o["A"][:, None, None].expand(heads, head_dim, size),
            "D": o["D"][:, None].expand(heads, head_dim),
            "dt_bias": o["dt_bias"][:, None].expand(heads, head_dim),
        }

    return Implementation("mamba_ssm", _mamba_ssm_selective_update().call, prepare)


def _mamba_ssm_gated_norm() -> Implementation:
    fn = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
    return Implementation(
        "mamba_ssm", lambda o: (fn(o["x"], o["weight"], None, z=o["z"], eps=1e-5, norm_before_gate=False),)
    )


def _causal_conv1d() -> Implementation:
    fn = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def prepare(o: Operands) -> Operands:
        # channel-last in memory, as Mamba-2 calls it
        return {**o, "x": o["x"].transpose(1, 2)}

    return Implementation(
        "causal_conv1d",
        lambda o: (fn(o["x"], o["weight"], o["bias"], activation="silu"),),
        prepare,
        lambda outputs: (outputs[0].transpose(1, 2),),
    )


def _causal_conv1d_update() -> Implementation:
    fn = importlib.import_module("causal_conv1d").causal_conv1d_update
    return Implementation(
        "causal_conv1d", lambda o: (fn(o["x"], o["conv_state"], o["weight"], o["bias"], activation="silu"),)
    )


def _fla_ssd() -> Implementation:
    """SSD as simple gated linear attention; fla has no step sizes or skip, so torch adds them inside the timed call."""
    fn = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def call(o: Operands) -> Outputs:
        steps = softplus_steps(o["dt"], o["dt_bias"])
        share = o["x"].shape[2] // o["B"].shape[2]
        y, _ = fn(
            o["C"].repeat_interleave(share, 2),
            o["B"].repeat_interleave(share, 2),
            (o["x"] * steps[..., None]).to(o["x"].dtype),
            steps * o["A"],
            scale=1.0,
        )
        return ((y + o["x"] * o["D"][:, None]).to(o["x"].dtype),)

    return Implementation("fla", call)


_MAKERS: dict[tuple[str, str], Callable[[], Implementation]] = {
    ("selective_scan", "mamba_ssm"): _mamba_ssm_selective_scan,
    ("ssd_chunk_scan", "mamba_ssm"): _mamba_ssm_ssd,
    ("ssd_chunk_scan", "fla"): _fla_ssd,
    ("selective_state_update", "mamba_ssm"): _mamba_ssm_selective_update,
    ("ssd_state_update", "mamba_ssm"): _mamba_ssm_ssd_update,
    ("rms_norm_gated", "mamba_ssm"): _mamba_ssm_gated_norm,
    ("causal_conv1d", "causal_conv1d"): _causal_conv1d,
    ("causal_conv1d_update", "causal_conv1d"): _causal_conv1d_update,
}
