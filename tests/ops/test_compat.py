"""The de-facto names, signatures and layouts of the CUDA packages, against formulas written out here in fp64."""

import doctest
import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, linear, pad, silu, softplus

from mamba_kernels import compat
from mamba_kernels.compat import (
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)

from .comparison import assert_matches
from .oracle import Tensors, compare_with_oracle, randn, rms

BATCH, WIDTH, LENGTH, SIZE, RANK, MODEL = 2, 6, 20, 3, 2, 5

SIGNATURES = {
    "selective_scan_fn": "u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False",
    "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B=None "
    "C=None D=None delta_bias=None B_proj_bias=None C_proj_bias=None delta_softplus=True checkpoint_lvl=1 "
    "b_rms_weight=None c_rms_weight=None dt_rms_weight=None b_c_dt_rms_eps=1e-06",
    "selective_state_update": "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D=None z=None dt_bias=None initial_states=None seq_idx=None "
    "cu_seqlens=None dt_softplus=False dt_limit=(0.0,inf) return_final_states=False return_varlen_states=False "
    "state_dtype=None",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states=None "
    "seq_idx=None dt_limit=(0.0,inf) return_final_states=False activation='silu' rmsnorm_weight=None rmsnorm_eps=1e-06 "
    "outproj_weight=None outproj_bias=None headdim=None ngroups=1 norm_before_gate=True state_dtype=None",
    "causal_conv1d_fn": "x weight bias=None seq_idx=None initial_states=None return_final_states=False "
    "final_states_out=None activation=None",
    "causal_conv1d_update": "x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None",
    "causal_conv1d_varlen_states": "x cu_seqlens state_len",
    "rmsnorm_fn": "x weight bias z=None eps=1e-06 group_size=None norm_before_gate=True",
    "rms_norm_fn": "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None "
    "prenorm=False residual_in_fp32=False return_dropout_mask=False",
    "layer_norm_fn": "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None "
    "prenorm=False residual_in_fp32=False is_rms_norm=False return_dropout_mask=False",
}


@pytest.mark.parametrize("name", compat.__all__)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", "") for p in parameters]
    assert found == SIGNATURES[name].split()


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The recurrence of Mamba, channel-first."""
    batch, channels, length = u.shape

    def at(value: Tensor, t: int) -> Tensor:
        if value.dim() == 2:
            return value
        grouped = value[:, None] if value.dim() == 3 else value
        return grouped[..., t].repeat_interleave(channels // grouped.shape[1], dim=1)

    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = softplus(step) if delta_softplus else step
    state = u.new_zeros(batch, channels, A.shape[1])
    ys = []
    for t in range(length):
        state = torch.exp(step[..., t, None] * A) * state + (step[..., t] * u[..., t])[..., None] * at(B, t)
        ys.append((state * at(C, t)).sum(-1))
    y = torch.stack(ys, -1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * silu(z)
    return (y, state) if return_last_state else y


def scan_tensors(B: str = "(B, N, L)", C: str = "(B, N, L)", options: bool = True) -> Tensors:
    shapes = {"(D, N)": (WIDTH, SIZE), "(B, N, L)": (BATCH, SIZE, LENGTH), "(B, G, N, L)": (BATCH, 2, SIZE, LENGTH)}
    tensors: Tensors = {
        "u": randn(BATCH, WIDTH, LENGTH),
        "delta": randn(BATCH, WIDTH, LENGTH, seed=1).abs(),
        "A": -randn(WIDTH, SIZE).abs(),
        "B": randn(*shapes[B], seed=2),
        "C": randn(*shapes[C], seed=3),
    }
    if options:
        tensors |= {"D": randn(WIDTH), "z": randn(BATCH, WIDTH, LENGTH, seed=4), "delta_bias": randn(WIDTH, seed=5)}
    return tensors


@pytest.mark.parametrize("options", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize(
    ("B", "C"),
    [
        ("(B, N, L)", "(B, N, L)"),
        ("(B, G, N, L)", "(B, G, N, L)"),
        ("(D, N)", "(D, N)"),
        ("(D, N)", "(B, N, L)"),
        ("(B, G, N, L)", "(D, N)"),
    ],
)
def test_selective_scan_fn(B: str, C: str, options: bool) -> None:
    kwargs = {"delta_softplus": options, "return_last_state": options}
    compare_with_oracle(selective_scan_fn, scan, scan_tensors(B, C, options), torch.float32, **kwargs)


def test_selective_scan_fn_keeps_the_layout_of_delta() -> None:
    tensors = scan_tensors()
    assert selective_scan_fn(**tensors).is_contiguous()
    tensors["delta"] = tensors["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    assert selective_scan_fn(**tensors).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_is_refused(name: str) -> None:
    tensors = scan_tensors("(D, N)", "(D, N)")
    tensors[name] = tensors[name].cfloat()
    with pytest.raises(TypeError, match=f"`{name}` is complex .complex64., which is not supported"):
        selective_scan_fn(**tensors)


def inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block as its modules would compute it one after the other, with Falcon-Mamba's norms where inference has them."""
    x, z = xz.chunk(2, dim=1)
    taps = conv1d_weight.shape[-1]
    x = silu(conv1d(pad(x, (taps - 1, 0)), conv1d_weight, conv1d_bias, groups=x.shape[1]))
    projected = linear(x.transpose(1, 2), x_proj_weight)
    dt, rest = projected[..., :RANK], projected[..., RANK:]
    if dt_rms_weight is not None:
        dt = rms(dt, dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B, rest = rest[..., :SIZE], rest[..., SIZE:]
        B = B if B_proj_bias is None else B + B_proj_bias
        B = (B if b_rms_weight is None else rms(B, b_rms_weight, b_c_dt_rms_eps)).transpose(1, 2)
    if C is None:
        C = rest if C_proj_bias is None else rest + C_proj_bias
        C = (C if c_rms_weight is None else rms(C, c_rms_weight, b_c_dt_rms_eps)).transpose(1, 2)
    delta = linear(dt, delta_proj_weight).transpose(1, 2)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def inner_tensors(*options: str) -> Tensors:
    rows = RANK + SIZE * (("B" not in options) + ("C" not in options))
    tensors: Tensors = {
        "xz": randn(BATCH, 2 * WIDTH, LENGTH),
        "conv1d_weight": randn(WIDTH, 1, 4),
        "conv1d_bias": None,
        "x_proj_weight": randn(rows, WIDTH),
        "delta_proj_weight": randn(WIDTH, RANK),
        "out_proj_weight": randn(MODEL, WIDTH),
        "out_proj_bias": None,
        "A": -randn(WIDTH, SIZE).abs(),
    }
    shapes = {
        "conv1d_bias": (WIDTH,),
        "out_proj_bias": (MODEL,),
        "B": (WIDTH, SIZE),
        "C": (WIDTH, SIZE),
        "D": (WIDTH,),
        "delta_bias": (WIDTH,),
        "B_proj_bias": (SIZE,),
        "C_proj_bias": (SIZE,),
        "b_rms_weight": (SIZE,),
        "c_rms_weight": (SIZE,),
        "dt_rms_weight": (RANK,),
    }
    return tensors | {name: randn(*shapes[name], seed=seed) for seed, name in enumerate(options)}


INNER = {
    "plain": (),
    "biases": ("conv1d_bias", "out_proj_bias", "D", "delta_bias", "B_proj_bias", "C_proj_bias"),
    "falcon": ("conv1d_bias", "D", "delta_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight"),
    "norms after biases": ("B_proj_bias", "C_proj_bias", "b_rms_weight", "c_rms_weight"),
    "only dt norm": ("dt_rms_weight",),
    "constant B": ("B", "C_proj_bias", "c_rms_weight"),
    "constant C": ("C", "D", "b_rms_weight"),
    "constant both": ("B", "C", "D", "delta_bias"),
}


@pytest.mark.parametrize("name", INNER)
def test_mamba_inner_fn(name: str) -> None:
    compare_with_oracle(mamba_inner_fn, inner, inner_tensors(*INNER[name]), torch.float32, b_c_dt_rms_eps=1e-3)


def test_mamba_inner_fn_checkpoint_level() -> None:
    tensors = inner_tensors(*INNER["falcon"])
    assert torch.equal(mamba_inner_fn(**tensors, checkpoint_lvl=0), mamba_inner_fn(**tensors, checkpoint_lvl=1))


def test_mamba_inner_fn_takes_transformers_ones_for_dt() -> None:
    tensors = inner_tensors("b_rms_weight", "c_rms_weight")
    expected = mamba_inner_fn(**tensors, dt_rms_weight=torch.ones(RANK))
    assert torch.equal(mamba_inner_fn(**tensors, dt_rms_weight=torch.ones(WIDTH)), expected)
    assert not torch.allclose(mamba_inner_fn(**tensors), expected)


def test_mamba_inner_fn_under_autocast() -> None:
    tensors = inner_tensors(*INNER["falcon"])
    expected = mamba_inner_fn(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mamba_inner_fn(**tensors)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


INNER_ERRORS = {
    "complex A": ({"A": torch.ones(WIDTH, SIZE).cfloat()}, (), TypeError, "`A` is complex"),
    "xz": (
        {"xz": randn(BATCH, WIDTH, LENGTH)},
        (),
        ValueError,
        r"`xz` must have shape \(B, 2 D, L\) = \(any, 12, any\)",
    ),
    "x_proj rows": (
        {"B": torch.ones(WIDTH, SIZE)},
        (),
        ValueError,
        r"`x_proj_weight` must have shape \(R \+ N rows for each of B, C not given, D\) = \(5, 6\), got \(8, 6\)",
    ),
    "checkpoint_lvl": ({"checkpoint_lvl": 2}, (), ValueError, "`checkpoint_lvl` must be 0 or 1, got 2"),
    "norm of a given B": (
        {"b_rms_weight": torch.ones(SIZE)},
        ("B",),
        ValueError,
        "`b_rms_weight` applies to the projected B",
    ),
    "bias of a given C": (
        {"C_proj_bias": torch.ones(SIZE)},
        ("C",),
        ValueError,
        "`C_proj_bias` applies to the projected C",
    ),
    "wide dt norm": (
        {"dt_rms_weight": torch.full((WIDTH,), 2.0)},
        (),
        ValueError,
        r"`dt_rms_weight` of shape \(6,\) must be a constant of ones.* pass a weight of shape \(2,\)",
    ),
    "wide dt norm that learns": (
        {"dt_rms_weight": torch.ones(WIDTH, requires_grad=True)},
        (),
        ValueError,
        "must be a constant of ones",
    ),
    "dt norm": ({"dt_rms_weight": torch.ones(4)}, (), ValueError, r"`dt_rms_weight` must have shape \(R,\) = \(2,\)"),
}


@pytest.mark.parametrize("name", INNER_ERRORS)
def test_mamba_inner_fn_errors(name: str) -> None:
    changes, options, error, message = INNER_ERRORS[name]
    with pytest.raises(error, match=message):
        mamba_inner_fn(**(inner_tensors(*options) | changes))


HEADS, HEAD_DIM, GROUPS = 4, 5, 2


def step_tensors(heads: bool) -> Tensors:
    channel = (HEADS, HEAD_DIM) if heads else (WIDTH,)
    per_token = (BATCH, GROUPS, SIZE) if heads else (BATCH, SIZE)
    return {
        "state": randn(BATCH, *channel, SIZE),
        "x": randn(BATCH, *channel),
        "dt": randn(BATCH, *channel, seed=1).abs(),
        "A": -randn(*channel, SIZE, seed=2).abs(),
        "B": randn(*per_token, seed=3),
        "C": randn(*per_token, seed=4),
        "D": randn(*channel, seed=5),
        "z": randn(BATCH, *channel, seed=6),
        "dt_bias": randn(*channel, seed=7),
    }


def step_oracle(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    step = dt if dt_bias is None else dt + dt_bias
    step = softplus(step) if dt_softplus else step
    if x.dim() == 3:
        B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1)[:, :, None] for v in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    state = torch.exp(step[..., None] * A) * state + (step * x)[..., None] * B
    y = (state * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * silu(z)), state


@pytest.mark.parametrize("without", [(), ("D",), ("dt_bias",), ("z",), ("D", "z", "dt_bias")], ids="-".join)
@pytest.mark.parametrize("dt_softplus", [False, True], ids=["plain", "softplus"])
@pytest.mark.parametrize("layout", ["no heads", "heads", "tied heads"])
def test_selective_state_update(layout: str, dt_softplus: bool, without: tuple[str, ...]) -> None:
    tensors = step_tensors(layout != "no heads")
    if layout == "tied heads":
        tensors["A"] = tensors["A"][:, :1, :1].expand(-1, HEAD_DIM, SIZE)
        tensors["dt"] = tensors["dt"][..., :1].expand(-1, -1, HEAD_DIM)
        tensors["dt_bias"] = tensors["dt_bias"][..., :1].expand(-1, HEAD_DIM)
    tensors |= dict.fromkeys(without)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    y, state = step_oracle(**wide, dt_softplus=dt_softplus)
    assert_matches(selective_state_update(**tensors, dt_softplus=dt_softplus), y)
    assert_matches(tensors["state"], state, name="state")


@pytest.mark.parametrize("layout", ["no heads", "heads", "strided heads"])
def test_selective_state_update_rows(layout: str) -> None:
    tensors = step_tensors(layout != "no heads")
    pool = randn(5, *tensors["state"].shape[1:])
    if layout == "strided heads":
        # heads and channels cannot be merged into one dimension by a view
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
    before = pool.clone()
    tensors["state"] = before[torch.tensor([3, 0])].double()
    wide = {name: t.double() for name, t in tensors.items()}
    y, state = step_oracle(**wide, dt_softplus=True)
    tensors["state"] = pool
    indices = torch.tensor([3, -1], dtype=torch.int32)
    out = selective_state_update(**tensors, dt_softplus=True, state_batch_indices=indices)
    assert_matches(out[0], y[0])
    assert not out[1].any()
    assert_matches(pool[3], state[0])
    others = [0, 1, 2, 4]
    assert torch.equal(pool[others], before[others])


def test_very_negative_step_agrees_with_the_parallel_op() -> None:
    tensors = step_tensors(False)
    tensors["state"] = torch.zeros_like(tensors["state"])
    tensors["dt"] = torch.full_like(tensors["dt"], -20.0)
    tensors |= {"dt_bias": None, "D": None, "z": None}
    y = selective_state_update(**tensors, dt_softplus=True)
    assert y.abs().max() > 1e-10
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    wide["state"] = torch.zeros_like(wide["state"])
    assert_matches(y, step_oracle(**wide, dt_softplus=True)[0])


def test_selective_state_update_errors() -> None:
    tensors = step_tensors(True)
    for changes, error, message in (
        ({"A": tensors["A"].cfloat()}, TypeError, "`A` is complex"),
        ({"state": tensors["state"][0, 0]}, ValueError, r"`state` must have shape \(S, D, N\) or \(S, H, P, N\)"),
        ({"x": tensors["x"][:, 0]}, ValueError, r"`x` must have shape \(B, H, P\) = \(any, 4, 5\)"),
        ({"A": tensors["A"][:, 0]}, ValueError, r"`A` must have shape \(H, P, N\)"),
        ({"D": torch.ones(HEADS)}, ValueError, r"`D` must have shape \(H, P\) = \(4, 5\), got \(4,\)"),
        ({"x": tensors["x"].clone().requires_grad_()}, RuntimeError, "`x` requires one"),
    ):
        with pytest.raises(error, match=message):
            selective_state_update(**(tensors | changes))


@pytest.mark.parametrize("module", ["convolution", "mamba", "normalisation", "step"])
def test_docstring_examples(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"mamba_kernels.compat.{module}"))
    assert attempted and not failed
