"""The de-facto Mamba-2 ops of the CUDA packages, against formulas written out here in fp64."""

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, linear, pad, silu, softplus

from mamba_kernels.compat import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

from .comparison import assert_matches
from .oracle import Tensors, compare_with_oracle, randn

BATCH, LENGTH, SIZE, MODEL = 2, 20, 3, 5
INF = math.inf
HEADS, HEAD_DIM, GROUPS = 4, 5, 2


def heads_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    starts: tuple[int, ...] = (),
    ends: tuple[int, ...] = (),
) -> Any:
    """SSD token by token: y, the last state, and the states after the tokens `ends`; zero again at the tokens `starts`."""
    step = dt if dt_bias is None else dt + dt_bias
    step = (softplus(step) if dt_softplus else step).clamp(*dt_limit)
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_states is None else initial_states
    ys, kept = [], []
    for t in range(x.shape[1]):
        if t in starts:
            state = torch.zeros_like(state)
        decay = torch.exp(step[:, t] * A)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", step[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
        if t + 1 in ends:
            kept.append(state)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * silu(z)
    return (y, state, torch.cat(kept)) if ends else (y, state)


def heads_tensors(batch: int, *options: str, D: str = "(H,)") -> Tensors:
    tensors: Tensors = {
        "x": randn(batch, LENGTH, HEADS, HEAD_DIM),
        "dt": randn(batch, LENGTH, HEADS).abs(),
        "A": -randn(HEADS).abs(),
        "B": randn(batch, LENGTH, GROUPS, SIZE),
        "C": randn(batch, LENGTH, GROUPS, SIZE, seed=1),
    }
    if "D" in options:
        tensors["D"] = randn(HEADS) if D == "(H,)" else randn(HEADS, HEAD_DIM)
    if "z" in options:
        tensors["z"] = randn(batch, LENGTH, HEADS, HEAD_DIM, seed=2)
    if "dt_bias" in options:
        tensors["dt_bias"] = randn(HEADS, seed=3)
    if "initial_states" in options:
        tensors["initial_states"] = randn(batch, HEADS, HEAD_DIM, SIZE)
    return tensors


@pytest.mark.parametrize("D", ["(H,)", "(H, P)"], ids=lambda d: f"D {d}")
@pytest.mark.parametrize(
    "softplus_limit", [(False, (0.0, INF)), (True, (0.3, 0.8))], ids=["plain", "softplus, limits"]
)
def test_mamba_chunk_scan_combined(softplus_limit: tuple[bool, tuple[float, float]], D: str) -> None:
    tensors = heads_tensors(BATCH, "D", "z", "dt_bias", "initial_states", D=D)
    kwargs: dict[str, Any] = {"dt_softplus": softplus_limit[0], "dt_limit": softplus_limit[1]}

    def run(**arguments: Any) -> Any:
        return mamba_chunk_scan_combined(**arguments, chunk_size=8, return_final_states=True)

    compare_with_oracle(run, heads_scan, tensors, torch.float32, **kwargs)


@pytest.mark.parametrize("bounds", [(0, 20), (0, 3, 12, 20), (0, 19, 20)], ids=str)
@pytest.mark.parametrize("with_seq_idx", [False, True], ids=["cu_seqlens", "both"])
def test_varlen_states_with_initial_state_in_the_first_chunk(bounds: tuple[int, ...], with_seq_idx: bool) -> None:
    tensors = heads_tensors(1, "D", "initial_states")
    kwargs: dict[str, Any] = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    if with_seq_idx:
        counts = torch.tensor(bounds).diff()
        kwargs["seq_idx"] = torch.repeat_interleave(torch.arange(len(counts)), counts)[None].int()

    def run(**arguments: Any) -> Any:
        return mamba_chunk_scan_combined(
            **arguments, **kwargs, chunk_size=256, return_final_states=True, return_varlen_states=True
        )

    def oracle(**arguments: Any) -> Any:
        return heads_scan(**arguments, starts=bounds[1:-1], ends=bounds[1:])

    compare_with_oracle(run, oracle, tensors, torch.float32)


def test_chunk_scan_result_tuple() -> None:
    tensors = heads_tensors(1, "initial_states")
    cu_seqlens = torch.tensor([0, 5, 20, 20])
    full = mamba_chunk_scan_combined(
        **tensors, chunk_size=8, cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=True
    )
    out, final, varlen = full
    # the sequence that ends the row is the last with tokens, not the empty one after it
    assert torch.equal(final[0], varlen[1]) and not varlen[2].any()
    only = mamba_chunk_scan_combined(**tensors, chunk_size=8, cu_seqlens=cu_seqlens, return_varlen_states=True)
    assert len(only) == 2 and torch.equal(only[1], varlen)
    assert torch.equal(mamba_chunk_scan_combined(**tensors, chunk_size=8, cu_seqlens=cu_seqlens), out)
    half = mamba_chunk_scan_combined(
        **tensors, chunk_size=8, cu_seqlens=cu_seqlens, return_varlen_states=True, state_dtype=torch.bfloat16
    )
    assert half[1].dtype == torch.bfloat16 and final.dtype == varlen.dtype == torch.float32


def test_chunk_scan_errors() -> None:
    tensors = heads_tensors(1)
    for changes, error, message in (
        ({"A": tensors["A"].cfloat()}, TypeError, "`A` is complex"),
        ({"return_varlen_states": True}, ValueError, "`return_varlen_states` needs `cu_seqlens`"),
        ({"state_dtype": torch.int8}, TypeError, "`state_dtype` must be a floating dtype or None"),
        (
            {"initial_states": torch.ones(2, HEADS, HEAD_DIM, SIZE)},
            ValueError,
            r"`initial_states` must have shape \(B, H",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 20]), "seq_idx": torch.zeros(1, LENGTH).int()},
            ValueError,
            "`seq_idx` and `cu_seqlens` describe different sequences",
        ),
    ):
        with pytest.raises(error, match=message):
            mamba_chunk_scan_combined(**(tensors | changes), chunk_size=8)


def split_oracle(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None = None,
    rmsnorm_weight: Tensor | None = None,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    norm_before_gate: bool = True,
    activation: str | None = "silu",
    border: int | None = None,
    dt_limit: tuple[float, float] = (0.0, INF),
) -> Any:
    """A Mamba-2 block from its parts; the sequence starts anew at the token `border`."""
    width, channels = HEADS * HEAD_DIM, conv1d_weight.shape[0]
    mlp = (zxbcdt.shape[2] - width - channels - HEADS) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([mlp, mlp, width, channels, HEADS], dim=-1)
    taps = conv1d_weight.shape[1]
    pieces = [xBC] if border is None else [xBC[:, :border], xBC[:, border:]]
    xBC = torch.cat(
        [
            conv1d(pad(p.transpose(1, 2), (taps - 1, 0)), conv1d_weight[:, None], conv1d_bias, groups=channels)
            for p in pieces
        ],
        dim=-1,
    ).transpose(1, 2)
    xBC = xBC if activation is None else silu(xBC)
    x, B, C = xBC.split([width, GROUPS * SIZE, GROUPS * SIZE], dim=-1)
    y, state = heads_scan(
        x.unflatten(-1, (HEADS, HEAD_DIM)),
        dt,
        A,
        B.unflatten(-1, (GROUPS, SIZE)),
        C.unflatten(-1, (GROUPS, SIZE)),
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        starts=() if border is None else (border,),
    )
    y = y.flatten(2)
    if rmsnorm_weight is None:
        y = y * silu(z)
    else:
        y = y if norm_before_gate else y * silu(z)
        grouped = y.unflatten(-1, (GROUPS, -1))
        y = (grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + 1e-3)).flatten(2) * rmsnorm_weight
        y = y * silu(z) if norm_before_gate else y
    y = torch.cat([silu(z0) * x0, y], dim=-1)
    return (y if outproj_weight is None else linear(y, outproj_weight, outproj_bias)), state


def split_tensors(*options: str, mlp: int = 0) -> Tensors:
    width = HEADS * HEAD_DIM
    channels = width + 2 * GROUPS * SIZE
    tensors: Tensors = {
        "zxbcdt": randn(BATCH, LENGTH, 2 * mlp + width + channels + HEADS),
        "conv1d_weight": randn(channels, 4),
        "conv1d_bias": randn(channels) if "conv1d_bias" in options else None,
        "dt_bias": randn(HEADS) if "dt_bias" in options else None,
        "A": -randn(HEADS).abs(),
        "D": None if "no D" in options else randn(HEADS, HEAD_DIM) if "D (H, P)" in options else randn(HEADS),
    }
    if "rmsnorm_weight" in options:
        tensors["rmsnorm_weight"] = randn(width)
    if "outproj" in options:
        tensors |= {"outproj_weight": randn(MODEL, mlp + width), "outproj_bias": randn(MODEL)}
    if "initial_states" in options:
        tensors["initial_states"] = randn(BATCH, HEADS, HEAD_DIM, SIZE)
    return tensors


SPLIT: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    "plain gate": ((), 0, {}),
    "norm first": (("rmsnorm_weight", "dt_bias"), 0, {}),
    "gate first": (("rmsnorm_weight", "conv1d_bias", "D (H, P)"), 0, {"norm_before_gate": False}),
    "out projection": (("rmsnorm_weight", "outproj"), 0, {}),
    "gated MLP beside": (("rmsnorm_weight", "outproj"), 3, {}),
    "gated MLP, no projection": ((), 3, {}),
    "no D, no activation": (("no D",), 0, {"activation": None}),
    "initial state": (("initial_states", "dt_bias"), 0, {}),
    "packed": (("initial_states", "conv1d_bias", "rmsnorm_weight"), 0, {"border": 7}),
    "limits": (("dt_bias",), 0, {"dt_limit": (0.3, 0.8)}),
}


@pytest.mark.parametrize("name", SPLIT)
def test_mamba_split_conv1d_scan_combined(name: str) -> None:
    options, mlp, kwargs = SPLIT[name]

    def run(border: int | None = None, **arguments: Any) -> Any:
        if border is not None:
            arguments["seq_idx"] = (torch.arange(LENGTH) >= border).int().expand(BATCH, -1)
        return mamba_split_conv1d_scan_combined(
            **arguments,
            chunk_size=8,
            headdim=HEAD_DIM,
            ngroups=GROUPS,
            rmsnorm_eps=1e-3,
            return_final_states=True,
        )

    compare_with_oracle(run, split_oracle, split_tensors(*options, mlp=mlp), torch.float32, **kwargs)


def test_split_without_states_returns_a_tensor() -> None:
    tensors = split_tensors()
    out = mamba_split_conv1d_scan_combined(**tensors, chunk_size=8, headdim=HEAD_DIM, ngroups=GROUPS)
    assert isinstance(out, Tensor) and out.shape == (BATCH, LENGTH, HEADS * HEAD_DIM)


def test_split_errors() -> None:
    tensors = split_tensors()
    for changes, error, message in (
        ({"A": tensors["A"].cfloat()}, TypeError, "`A` is complex"),
        ({"headdim": None}, ValueError, "`headdim` is needed unless `D` has shape"),
        ({"D": torch.ones(HEADS, 3)}, ValueError, r"`headdim` is 5 but `D` has shape \(4, 3\)"),
        ({"ngroups": 3}, ValueError, "with G a divisor of H; got 32 channels for H = 4, P = 5, G = 3"),
        ({"zxbcdt": tensors["zxbcdt"][..., 1:]}, ValueError, r"2 M \+ 20 \+ 32 \+ 4 .* with M >= 0, got 55"),
        ({"outproj_bias": torch.ones(MODEL)}, ValueError, "`outproj_bias` needs `outproj_weight`"),
        ({"rmsnorm_weight": torch.ones(3)}, ValueError, r"`rmsnorm_weight` must have shape \(D',\) = \(20\)"),
        ({"state_dtype": torch.int8}, TypeError, "`state_dtype` must be a floating dtype or None"),
    ):
        arguments = {"chunk_size": 8, "headdim": HEAD_DIM, "ngroups": GROUPS} | tensors | changes
        with pytest.raises(error, match=message):
            mamba_split_conv1d_scan_combined(**arguments)


def test_docstring_examples() -> None:
    failed, attempted = doctest.testmod(importlib.import_module("mamba_kernels.compat.mamba2"))
    assert attempted and not failed


def test_compile_fullgraph() -> None:
    tensors = split_tensors("rmsnorm_weight", "outproj")
    options = {"chunk_size": 8, "headdim": HEAD_DIM, "ngroups": GROUPS}
    torch._dynamo.reset()
    compiled = torch.compile(mamba_split_conv1d_scan_combined, fullgraph=True, backend="aot_eager")
    expected = mamba_split_conv1d_scan_combined(**tensors, **options)
    assert_matches(compiled(**tensors, **options), expected)
