"""`ssd_chunk_scan` against the token by token oracle: values, gradients, packing, extremes, tracing and errors."""

import doctest
import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import backend, ssd_chunk_scan
from mamba_kernels.ssd import eager as ssd_eager
from mamba_kernels.ssd import ssd_chunk_scan_eager, ssd_chunk_scan_ref

from .comparison import LENGTHS, assert_matches
from .oracle import Tensors, compare_with_oracle, outputs_and_gradients, saved_bytes

HEADS, HEAD_DIM, SIZE = 4, 5, 6
INF = math.inf


def make(
    batch: int = 2,
    length: int = 70,
    heads: int = HEADS,
    groups: int = 2,
    D: str = "none",
    options: tuple[str, ...] = (),
    states: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Random inputs; `options` out of z, dt_bias and initial_states; parameters stay fp32 for half precision."""
    generator = torch.Generator().manual_seed(length * 31 + batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors: Tensors = {
        "x": randn(batch, length, heads, HEAD_DIM),
        "dt": randn(batch, length, heads),
        "A": -0.1 - randn(heads, dtype=wide).abs(),
        "B": randn(batch, length, groups, SIZE),
        "C": randn(batch, length, groups, SIZE),
    }
    if D != "none":
        tensors["D"] = randn(*((heads,) if D == "(H,)" else (heads, HEAD_DIM)), dtype=wide)
    if "z" in options:
        tensors["z"] = randn(batch, length, heads, HEAD_DIM)
    if "dt_bias" in options:
        tensors["dt_bias"] = randn(heads, dtype=wide)
    if "initial_states" in options:
        tensors["initial_states"] = randn(states or batch, heads, HEAD_DIM, SIZE, dtype=wide)
    return tensors


ALL = ("z", "dt_bias", "initial_states")


def test_oracle_is_the_semiseparable_matrix() -> None:
    tensors = make(batch=1, length=9, heads=2, groups=1, dtype=torch.float64)
    x, dt, A, B, C = (tensors[name] for name in "x dt A B C".split())
    y = ssd_chunk_scan_ref(x, dt, A, B, C, dt_softplus=False, dt_limit=(-INF, INF))
    for h in range(2):
        for t in range(9):
            expected = torch.zeros(HEAD_DIM, dtype=torch.float64)
            for s in range(t + 1):
                decay = math.exp(sum(float(dt[0, r, h] * A[h]) for r in range(s + 1, t + 1)))
                expected += float(C[0, t, 0] @ B[0, s, 0]) * decay * dt[0, s, h] * x[0, s, h]
            torch.testing.assert_close(y[0, t, h], expected)


@pytest.mark.parametrize("length", [0, *LENGTHS])
def test_lengths(length: int) -> None:
    compare_with_oracle(
        ssd_chunk_scan,
        ssd_chunk_scan_ref,
        make(length=length, D="(H,)", options=ALL),
        torch.float32,
        return_final_states=True,
    )


@pytest.mark.parametrize("final", [False, True], ids=["y", "y+states"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("D", ["none", "(H,)", "(H, P)"], ids=lambda d: f"D {d}")
@pytest.mark.parametrize("options", [(), ("z",), ("dt_bias",), ("initial_states",), ALL], ids="+".join)
def test_options(options: tuple[str, ...], D: str, groups: int, final: bool) -> None:
    tensors = make(length=70, D=D, groups=groups, options=options)
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32, return_final_states=final)


@pytest.mark.parametrize("limit", [(0.0, INF), (0.2, 0.9), (0.5, 0.5), (-INF, INF)], ids=str)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_step_size(softplus: bool, limit: tuple[float, float]) -> None:
    tensors = make(length=20, options=("dt_bias",))
    if not softplus:
        # a negative step would let the state grow without bound
        tensors["dt"] = tensors["dt"].abs()
        tensors["dt_bias"] = tensors["dt_bias"].abs()
    options: dict[str, Any] = {"dt_softplus": softplus, "dt_limit": limit}
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32, **options)
    step = tensors["dt"] + tensors["dt_bias"]
    step = torch.nn.functional.softplus(step) if softplus else step
    outside = (step < limit[0]) | (step > limit[1])
    assert (outputs_and_gradients(ssd_chunk_scan, tensors, **options)["gradient of dt"][outside] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = make(length=130, D="(H,)", options=ALL, dtype=dtype)
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, dtype, return_final_states=True)
    y, states = ssd_chunk_scan(**tensors, return_final_states=True)
    assert y.dtype == dtype
    assert states.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_several_heads_and_chunks_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(length=200, D="(H, P)", options=ALL, dtype=torch.float64)
    found = []
    for elements in (1, 2**26):
        monkeypatch.setattr(ssd_eager, "CPU_ELEMENTS", elements)
        found.append(outputs_and_gradients(ssd_chunk_scan, tensors, return_final_states=True))
    for name, value in found[0].items():
        assert_matches(value, found[1][name], torch.float64, name)


def test_chunk_size_does_not_change_the_result() -> None:
    tensors = make(length=100)
    results = [ssd_chunk_scan(**tensors, chunk_size=size) for size in (1, 16, 256)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_views_as_in_proj_makes_them() -> None:
    widths = [HEADS * HEAD_DIM, HEADS * HEAD_DIM, 2 * SIZE, 2 * SIZE, HEADS]
    row = torch.randn(2, 70, sum(widths) + 3, generator=torch.Generator().manual_seed(0))[..., 3:]
    z, x, B, C, dt = row.split(widths, dim=-1)
    tensors: Tensors = {
        "x": x.unflatten(-1, (HEADS, HEAD_DIM)),
        "dt": dt,
        "A": -torch.rand(2 * HEADS)[::2],
        "B": B.unflatten(-1, (2, SIZE)),
        "C": C.unflatten(-1, (2, SIZE)),
        "z": z.unflatten(-1, (HEADS, HEAD_DIM)),
        "D": torch.ones(1).expand(HEADS),
    }
    assert not tensors["x"].is_contiguous()
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32)
    # time or batch as the fastest dimension, and B shared by the whole batch
    tensors["x"] = torch.randn(HEAD_DIM, HEADS, 2, 70).permute(2, 3, 1, 0)
    tensors["B"] = torch.randn(1, 70, 2, SIZE).expand(2, -1, -1, -1)
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32)


SEQ_IDX = {
    "two": [[0] * 30 + [1] * 40, [0] * 64 + [1] * 6],
    "many, returning numbers": [[i // 7 % 2 for i in range(70)], [i for i in range(70)]],
    "right padding": [[0] * 50 + [-1] * 20, [0] * 30 + [1] * 10 + [-1] * 30],
    "left padding": [[-1] * 20 + [0] * 50, [-1] * 66 + [0] * 4],
    "padding inside": [[0] * 10 + [-1] * 5 + [0] * 15 + [-1] * 5 + [1] * 35, [3] * 64 + [-1] * 3 + [3] * 3],
    "all padding": [[-1] * 70, [2] * 70],
}


@pytest.mark.parametrize("name", SEQ_IDX)
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
def test_seq_idx(name: str, options: tuple[str, ...]) -> None:
    tensors = make(length=70, D="(H,)", options=options)
    seq_idx = torch.tensor(SEQ_IDX[name], dtype=torch.int32)
    compare_with_oracle(
        ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32, seq_idx=seq_idx, return_final_states=True
    )


CU_SEQLENS = {
    "one": [0, 150],
    "several": [0, 1, 20, 84, 150],
    "empty ones": [0, 0, 20, 20, 20, 150, 150],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("name", CU_SEQLENS)
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("final", [False, True], ids=["y", "y+states"])
def test_cu_seqlens(name: str, options: tuple[str, ...], final: bool) -> None:
    cu_seqlens = torch.tensor(CU_SEQLENS[name])
    length, states = CU_SEQLENS[name][-1], len(cu_seqlens) - 1
    tensors = make(batch=1, length=length, D="(H,)", options=options, states=states)
    compare_with_oracle(
        ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32, cu_seqlens=cu_seqlens, return_final_states=final
    )


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_equals_alone(how: str) -> None:
    bounds = [0, 40, 41, 110]
    tensors = make(batch=1, length=110, D="(H,)", options=("z", "dt_bias"), dtype=torch.float64)
    packing = (
        {"cu_seqlens": torch.tensor(bounds)}
        if how == "cu_seqlens"
        else {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(bounds).diff())[None]}
    )
    # one cotangent for all of y, so that gradients of the parts add up to those of the whole
    per_token = ("x", "dt", "B", "C", "z")

    def alone(**t: Tensor) -> Tensor:
        parts = [
            ssd_chunk_scan(**{k: v[:, a:b] if k in per_token else v for k, v in t.items()})
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)

    packed = outputs_and_gradients(ssd_chunk_scan, tensors, **packing)
    expected = outputs_and_gradients(alone, tensors)
    for name, value in packed.items():
        assert_matches(value, expected[name], torch.float64, name)


def test_continuation_by_initial_states() -> None:
    tensors = make(length=150, D="(H,)", options=("z", "dt_bias"), dtype=torch.float64)
    per_token = ("x", "dt", "B", "C", "z")

    def chunked(**t: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = [], None
        for a, b in ((0, 1), (1, 70), (70, 70), (70, 134), (134, 150)):
            part = {k: v[:, a:b] if k in per_token else v for k, v in t.items()}
            y, state = ssd_chunk_scan(**part, initial_states=state, return_final_states=True)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = outputs_and_gradients(ssd_chunk_scan, tensors, return_final_states=True)
    pieces = outputs_and_gradients(chunked, tensors)
    for name, value in pieces.items():
        assert_matches(value, whole[name], torch.float64, name)


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_gradcheck(packing: str) -> None:
    tensors = make(batch=1, length=5, heads=2, groups=1, D="(H, P)", options=ALL, dtype=torch.float64)
    tensors = {k: v[..., :2].contiguous() if k in ("B", "C", "initial_states") else v for k, v in tensors.items()}
    kwargs: dict[str, Any] = {"return_final_states": True}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor([[0, 0, -1, 1, 1]])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 2, 5])
        tensors["initial_states"] = tensors["initial_states"].repeat(2, 1, 1, 1)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *v: ssd_chunk_scan(**dict(zip(tensors, v, strict=True)), **kwargs), leaves)


@pytest.mark.parametrize("case", ["large", "small", "mixed", "large then tiny"])
def test_extreme_steps(case: str) -> None:
    tensors = make(length=130, D="(H,)", options=("initial_states",))
    generator = torch.Generator().manual_seed(3)
    choice = torch.randint(0, 4, tensors["dt"].shape, generator=generator)
    values = {
        "large": torch.full_like(tensors["dt"], 80.0),
        "small": torch.full_like(tensors["dt"], -40.0),
        "mixed": torch.tensor([-90.0, -5.0, 0.0, 90.0])[choice],
        # sums over a chunk grow to 1e5 while the decays that matter are near 1
        "large then tiny": torch.where(choice == 0, 200.0, -6.0),
    }
    tensors["dt"] = values[case]
    tensors["A"] = -torch.tensor([0.01, 1.0, 16.0, 100.0])
    compare_with_oracle(ssd_chunk_scan, ssd_chunk_scan_ref, tensors, torch.float32, return_final_states=True)


def test_padding_may_hold_anything() -> None:
    tensors = make(length=70, options=("z",))
    seq_idx = torch.tensor([[-1] * 5 + [0] * 30 + [-1] * 35, [0] * 70])
    clean = outputs_and_gradients(ssd_chunk_scan, tensors, seq_idx=seq_idx, return_final_states=True)
    poisoned = {}
    for name, value in tensors.items():
        poisoned[name] = value
        if name in ("x", "dt", "B", "C", "z"):
            poisoned[name] = value.clone()
            poisoned[name][seq_idx < 0] = math.nan if name != "B" else INF
    found = outputs_and_gradients(ssd_chunk_scan, poisoned, seq_idx=seq_idx, return_final_states=True)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert (found["output 0"][seq_idx < 0] == 0).all()
    assert (found["gradient of x"][seq_idx < 0] == 0).all()


def test_nothing_leaks_between_packed_sequences() -> None:
    tensors = make(batch=1, length=100, states=3, options=("initial_states",))
    cu_seqlens = torch.tensor([0, 30, 60, 100])
    y, states = ssd_chunk_scan(**tensors, cu_seqlens=cu_seqlens, return_final_states=True)
    tensors["x"][:, 60:] = INF
    spoiled, spoiled_states = ssd_chunk_scan(**tensors, cu_seqlens=cu_seqlens, return_final_states=True)
    assert torch.equal(y[:, :60], spoiled[:, :60]) and torch.equal(states[:2], spoiled_states[:2])


def test_saved_memory_is_linear_and_small() -> None:
    sizes = [saved_bytes(ssd_chunk_scan, make(length=n, options=("dt_bias",))) for n in (256, 512)]
    assert sizes[1] <= 2.05 * sizes[0]
    inputs = sum(t.numel() * t.element_size() for t in make(length=512, options=("dt_bias",)).values())
    # the inputs, and the step sizes on their way through bias, softplus and limit
    assert sizes[1] <= 1.5 * inputs


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_compile_fullgraph(packing: str) -> None:
    batch = 1 if packing == "cu_seqlens" else 2
    tensors = make(batch=batch, length=70, D="(H,)", options=ALL, states=2)
    kwargs: dict[str, Any] = {"return_final_states": True}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor(SEQ_IDX["padding inside"])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 33, 70])
    torch._dynamo.reset()
    compiled = torch.compile(ssd_chunk_scan, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(ssd_chunk_scan, tensors, **kwargs)
    for name, value in outputs_and_gradients(compiled, tensors, **kwargs).items():
        assert_matches(value, expected[name], torch.float32, name)


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = make(length=70, options=ALL)
    expected = ssd_chunk_scan(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd_chunk_scan(**tensors), expected)


def test_second_derivative_raises() -> None:
    tensors = {name: t.requires_grad_() for name, t in make(length=5).items()}
    (gradient,) = torch.autograd.grad(ssd_chunk_scan(**tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="ssd_chunk_scan can be differentiated only once"):
        gradient.square().sum().backward()


def test_empty_batch() -> None:
    y, states = ssd_chunk_scan(**make(batch=0, length=5), return_final_states=True)
    assert y.shape == (0, 5, HEADS, HEAD_DIM) and states.shape == (0, HEADS, HEAD_DIM, SIZE)


def test_backend_choice() -> None:
    tensors = make(length=5)
    with backend("reference"):
        assert torch.equal(ssd_chunk_scan(**tensors), ssd_chunk_scan_ref(**tensors))
    with backend("eager"):
        assert torch.equal(ssd_chunk_scan(**tensors), ssd_chunk_scan_eager(**tensors))


def _replace(**changes: Any) -> Tensors:
    return {**make(batch=2, length=5), **changes}


ERRORS = {
    "no tensor": (_replace(x=[1.0]), TypeError, "`x` must be a torch.Tensor, got list"),
    "missing B": (_replace(B=None), TypeError, "`B` must be a torch.Tensor, got NoneType"),
    "integer x": (_replace(x=torch.ones(2, 5, 4, 5).long()), TypeError, "`x` must have dtype"),
    "complex A": (_replace(A=torch.ones(4).cfloat()), TypeError, "`A` must have dtype .* got complex64"),
    "3-D x": (_replace(x=torch.ones(2, 5, 20)), ValueError, r"`x` must have shape \(B, L, H, P\)"),
    "dt": (_replace(dt=torch.ones(2, 4, 5)), ValueError, r"`dt` must have shape \(B, L, H\) = \(2, 5, 4\)"),
    "A per channel": (_replace(A=torch.ones(4, 5)), ValueError, r"`A` must have shape \(H,\)"),
    "C's groups": (_replace(C=torch.ones(2, 5, 1, 6)), ValueError, "`C` must have shape"),
    "groups": (
        _replace(B=torch.ones(2, 5, 3, 6), C=torch.ones(2, 5, 3, 6)),
        ValueError,
        "must divide the number of heads of `x`, got 3 groups and 4 heads",
    ),
    "D": (_replace(D=torch.ones(5)), ValueError, r"`D` must have shape \(H,\) or \(H, P\) = \(4\)"),
    "D 2-D": (_replace(D=torch.ones(5, 4)), ValueError, r"`D` must have shape \(H,\) or \(H, P\) = \(4, 5\)"),
    "z": (_replace(z=torch.ones(2, 5, 20)), ValueError, "`z` must have shape"),
    "dt_bias": (_replace(dt_bias=torch.ones(5)), ValueError, "`dt_bias` must have shape"),
    "chunk_size": (_replace(chunk_size=0), ValueError, "`chunk_size` must be a positive integer, got 0"),
    "dt_limit": (_replace(dt_limit=(1.0, 0.5)), ValueError, "`dt_limit` must be"),
    "initial_states": (
        _replace(initial_states=torch.ones(1, 4, 5, 6)),
        ValueError,
        r"\(B, H, P, N\) = \(2, 4, 5, 6\)",
    ),
    "both packings": (
        _replace(seq_idx=torch.zeros(2, 5).int(), cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        "give only one of them",
    ),
    "cu_seqlens and batch": (
        _replace(cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        "a batch of one, got a batch of 2",
    ),
    "device": (_replace(D=torch.ones(4, device="meta")), ValueError, "`D` is on meta but `x` is on cpu"),
}


def test_docstring_examples() -> None:
    failed, attempted = doctest.testmod(importlib.import_module("mamba_kernels.ssd.interface"))
    assert attempted and not failed


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        ssd_chunk_scan(**arguments)
