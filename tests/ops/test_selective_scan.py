"""`selective_scan` against the token by token oracle: values, gradients, packing, extremes, tracing and errors."""

import doctest
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import backend, selective_scan
from mamba_kernels.selective_scan import eager as scan_eager
from mamba_kernels.selective_scan import recurrence, selective_scan_eager, selective_scan_ref

from .comparison import LENGTHS, assert_matches
from .oracle import Tensors, compare_with_oracle, outputs_and_gradients, saved_bytes

CHANNELS, SIZE = 8, 5
ALL = ("D", "z", "dt_bias", "initial_states")
PER_TOKEN = ("x", "dt", "B", "C", "z")


def make(
    batch: int = 2,
    length: int = 70,
    groups: int | None = None,
    options: tuple[str, ...] = (),
    states: int | None = None,
    channels: int = CHANNELS,
    size: int = SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Random inputs with the given options; parameters and states stay fp32 for half precision."""
    generator = torch.Generator().manual_seed(length * 31 + batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    middle = () if groups is None else (groups,)
    tensors: Tensors = {
        "x": randn(batch, length, channels),
        "dt": randn(batch, length, channels),
        "A": -0.1 - randn(channels, size, dtype=wide).abs(),
        "B": randn(batch, length, *middle, size),
        "C": randn(batch, length, *middle, size),
        "D": randn(channels, dtype=wide),
        "z": randn(batch, length, channels),
        "dt_bias": randn(channels, dtype=wide),
        "initial_states": randn(states or batch, channels, size, dtype=wide),
    }
    return {name: value for name, value in tensors.items() if name not in ALL or name in options}


def compare(tensors: Tensors, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {"return_final_states": True, **options}
    compare_with_oracle(selective_scan, selective_scan_ref, tensors, dtype, **options)


def test_oracle_is_the_written_out_sum() -> None:
    tensors = make(batch=1, length=6, dtype=torch.float64)
    x, dt, A, B, C = (tensors[name][0] if name != "A" else tensors[name] for name in "x dt A B C".split())
    y = selective_scan_ref(**tensors, dt_softplus=False)
    for t in range(6):
        expected = torch.zeros(CHANNELS, dtype=torch.float64)
        for s in range(t + 1):
            decay = torch.exp(dt[s + 1 : t + 1].sum(0)[:, None] * A)
            expected += ((decay * B[s] * C[t]).sum(1)) * dt[s] * x[s]
        torch.testing.assert_close(y[0, t], expected)


@pytest.mark.parametrize("length", [0, *LENGTHS])
def test_lengths(length: int) -> None:
    compare(make(length=length, options=ALL))


@pytest.mark.parametrize("final", [False, True], ids=["y", "y+states"])
@pytest.mark.parametrize("groups", [None, 1, 2, 8], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
@pytest.mark.parametrize("options", [(), *((name,) for name in ALL), ALL], ids="+".join)
def test_options(options: tuple[str, ...], softplus: bool, groups: int | None, final: bool) -> None:
    tensors = make(length=20, groups=groups, options=options)
    if not softplus:
        # a negative step would let the state grow
        tensors["dt"] = tensors["dt"].abs()
        if "dt_bias" in tensors:
            tensors["dt_bias"] = tensors["dt_bias"].abs()
    compare(tensors, dt_softplus=softplus, return_final_states=final)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = make(length=100, groups=2, options=ALL, dtype=dtype)
    compare(tensors, dtype)
    y, states = selective_scan(**tensors, return_final_states=True)
    assert y.dtype == dtype
    assert states.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_x_decides_the_dtype() -> None:
    tensors = make(length=20, options=("dt_bias", "D"))
    low = {name: value.to(torch.bfloat16) for name, value in tensors.items() if name in ("dt", "B", "C")}
    y, states = selective_scan(**{**tensors, **low}, return_final_states=True)
    assert y.dtype == states.dtype == torch.float32
    wide = {name: value.double() for name, value in {**tensors, **low}.items()}
    assert_matches(y, selective_scan_ref(**wide))
    assert selective_scan(**{**wide, "x": tensors["x"]}).dtype == torch.float32


@pytest.mark.parametrize("tile", [1, 2, 7, 64])
@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_any_tile_length(packing: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_eager, "_tile_length", lambda ops, saves: min(tile, ops.x.shape[0]))
    batch = 1 if packing == "cu_seqlens" else 2
    packings: dict[str, dict[str, Any]] = {
        "none": {},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 7 + [1] * 3 + [-1] * 4 + [2] * 6, [-1] * 9 + [0] * 11])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 7, 14, 14, 20])},
    }
    tensors = make(batch, 20, options=ALL, states=4 if batch == 1 else None, dtype=torch.float64)
    compare(tensors, torch.float64, **packings[packing])


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("groups", [None, 2], ids=lambda g: f"G{g}")
def test_channels_added_to_occupy_two_threads(
    packing: str, groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = 1 if packing == "cu_seqlens" else 2
    monkeypatch.setattr(recurrence, "GRAIN", batch * SIZE * CHANNELS)
    monkeypatch.setattr(scan_eager, "TILE_ELEMENTS", 20 * batch * SIZE * CHANNELS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shape = (20, batch, groups or 1, SIZE, CHANNELS // (groups or 1))
    buffer = recurrence.StateBuffer(shape, torch.float32, torch.device("cpu"))
    assert buffer.tile.shape == shape
    assert buffer.tokens[0].numel() > recurrence.GRAIN
    packed: dict[str, Any] = {
        "none": {},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 30 + [1] * 40, [0] * 45 + [-1] * 25])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 30, 30, 70])},
    }[packing]
    compare(make(batch=batch, groups=groups, options=ALL, states=3 if packing == "cu_seqlens" else None), **packed)


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 64, 300])
def test_log_depth_path_of_other_devices(length: int, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recurrence, scan_eager):
        monkeypatch.setattr(module, "walks", lambda device: False)
    generator = torch.Generator().manual_seed(length)
    options: dict[str, Any] = {}
    if packing == "seq_idx":
        options["seq_idx"] = torch.randint(-1, 3, (2, length), generator=generator).sort(dim=1).values
    if packing == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length])
    batch = 1 if packing == "cu_seqlens" else 2
    tensors = make(batch, length, options=ALL, states=3 if batch == 1 else None, dtype=torch.float64)
    compare(tensors, torch.float64, **options)


def test_strided_views_as_in_proj_makes_them() -> None:
    row = torch.randn(2, 65, 3 * CHANNELS + 4 * SIZE + 3, generator=torch.Generator().manual_seed(0))[..., 3:]
    z, x, dt, B, C = row.split([CHANNELS, CHANNELS, CHANNELS, 2 * SIZE, 2 * SIZE], dim=-1)
    tensors: Tensors = {
        "x": x,
        "dt": dt,
        "A": -torch.rand(2 * CHANNELS, SIZE)[::2],
        "B": B.unflatten(-1, (2, SIZE)),
        "C": C.unflatten(-1, (2, SIZE)),
        "z": z,
        "D": torch.ones(1).expand(CHANNELS),
        "initial_states": torch.randn(2, SIZE, CHANNELS).mT,
    }
    assert not x.is_contiguous()
    compare(tensors)
    # time or batch as the fastest dimension, and B shared by the whole batch
    tensors["x"] = torch.randn(CHANNELS, 2, 65).permute(1, 2, 0)
    tensors["z"] = torch.randn(65, CHANNELS, 2).permute(2, 0, 1)
    tensors["B"] = torch.randn(1, 65, 2, SIZE).expand(2, -1, -1, -1)
    compare(tensors)


SEQ_IDX = {
    "two": [[0] * 30 + [1] * 40, [0] * 64 + [1] * 6],
    "many, returning numbers": [[i // 7 % 2 for i in range(70)], list(range(70))],
    "padding behind": [[0] * 50 + [-1] * 20, [0] * 30 + [1] * 10 + [-1] * 30],
    "padding in front": [[-1] * 20 + [0] * 50, [-1] * 66 + [0] * 4],
    "padding inside": [[0] * 10 + [-1] * 5 + [0] * 15 + [-1] * 5 + [1] * 35, [3] * 64 + [-1] * 3 + [3] * 3],
    "all padding": [[-1] * 70, [2] * 70],
}


@pytest.mark.parametrize("name", SEQ_IDX)
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
def test_seq_idx(name: str, options: tuple[str, ...]) -> None:
    seq_idx = torch.tensor(SEQ_IDX[name], dtype=torch.int32)
    compare(make(length=70, options=options), seq_idx=seq_idx)


CU_SEQLENS = {
    "one": [0, 70],
    "several": [0, 1, 20, 64, 70],
    "empty ones": [0, 0, 20, 20, 20, 70, 70],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("name", CU_SEQLENS)
@pytest.mark.parametrize("options", [(), ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("final", [False, True], ids=["y", "y+states"])
def test_cu_seqlens(name: str, options: tuple[str, ...], final: bool) -> None:
    bounds = torch.tensor(CU_SEQLENS[name])
    tensors = make(batch=1, length=int(bounds[-1]), groups=2, options=options, states=len(bounds) - 1)
    compare(tensors, cu_seqlens=bounds, return_final_states=final)


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_equals_alone(how: str) -> None:
    bounds = [0, 40, 41, 110]
    tensors = make(batch=1, length=110, options=("D", "z", "dt_bias"), dtype=torch.float64)
    packing = (
        {"cu_seqlens": torch.tensor(bounds)}
        if how == "cu_seqlens"
        else {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(bounds).diff())[None]}
    )

    def alone(**t: Tensor) -> Tensor:
        parts = [
            selective_scan(**{k: v[:, a:b] if k in PER_TOKEN else v for k, v in t.items()})
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)

    packed = outputs_and_gradients(selective_scan, tensors, **packing)
    expected = outputs_and_gradients(alone, tensors)
    for name, value in packed.items():
        assert_matches(value, expected[name], torch.float64, name)


def test_continuation_by_initial_states() -> None:
    tensors = make(length=150, options=("D", "z", "dt_bias"), dtype=torch.float64)

    def chunked(**t: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = [], None
        for a, b in ((0, 1), (1, 70), (70, 70), (70, 134), (134, 150)):
            part = {k: v[:, a:b] if k in PER_TOKEN else v for k, v in t.items()}
            y, state = selective_scan(**part, initial_states=state, return_final_states=True)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = outputs_and_gradients(selective_scan, tensors, return_final_states=True)
    for name, value in outputs_and_gradients(chunked, tensors).items():
        assert_matches(value, whole[name], torch.float64, name)


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_gradcheck(packing: str) -> None:
    states = 2 if packing == "cu_seqlens" else None
    tensors = make(1, 5, options=ALL, states=states, channels=3, size=2, dtype=torch.float64)
    kwargs: dict[str, Any] = {"return_final_states": True}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor([[0, 0, -1, 1, 1]])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 2, 5])
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *v: selective_scan(**dict(zip(tensors, v, strict=True)), **kwargs), leaves)


@pytest.mark.parametrize("case", ["large", "small", "mixed", "decay exp(-80)"])
def test_extreme_steps(case: str) -> None:
    tensors = make(length=130, options=("D", "initial_states"))
    choice = torch.randint(0, 4, tensors["dt"].shape, generator=torch.Generator().manual_seed(3))
    values = {
        "large": torch.full_like(tensors["dt"], 20.0),
        "small": torch.full_like(tensors["dt"], -20.0),
        "mixed": torch.tensor([-20.0, -5.0, 5.0, 20.0])[choice],
        "decay exp(-80)": torch.full_like(tensors["dt"], 5.0),
    }
    tensors["dt"] = values[case]
    tensors["A"] = -torch.tensor([0.01, 0.3, 1.0, 4.0, 16.0]).expand(CHANNELS, SIZE)
    compare(tensors)


def test_padding_may_hold_anything() -> None:
    tensors = make(options=("D", "z", "dt_bias"))
    seq_idx = torch.tensor([[-1] * 5 + [0] * 30 + [-1] * 35, [0] * 70])
    clean = outputs_and_gradients(selective_scan, tensors, seq_idx=seq_idx, return_final_states=True)
    poisoned = {}
    for name, value in tensors.items():
        poisoned[name] = value.clone()
        if name in PER_TOKEN:
            poisoned[name][seq_idx < 0] = math.nan if name != "B" else math.inf
    found = outputs_and_gradients(selective_scan, poisoned, seq_idx=seq_idx, return_final_states=True)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    for name in ("output 0", *(f"gradient of {n}" for n in PER_TOKEN)):
        assert (found[name][seq_idx < 0] == 0).all(), name


def test_nothing_leaks_into_an_earlier_sequence() -> None:
    tensors = make(batch=1, length=100, states=3, options=("initial_states",))
    bounds = torch.tensor([0, 30, 60, 100])
    y, states = selective_scan(**tensors, cu_seqlens=bounds, return_final_states=True)
    tensors["x"][:, 60:] = math.inf
    spoiled, spoiled_states = selective_scan(**tensors, cu_seqlens=bounds, return_final_states=True)
    assert torch.equal(y[:, :60], spoiled[:, :60]) and torch.equal(states[:2], spoiled_states[:2])


def test_buffers_are_written_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # those kept from call to call: test_selective_scan_scratch.py
    monkeypatch.setattr(recurrence, "_kept", recurrence._Kept())
    monkeypatch.setattr(recurrence, "KEPT_BYTES", 0)
    tensors = make(length=65, options=ALL, groups=2)
    expected = outputs_and_gradients(selective_scan, tensors, return_final_states=True)
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, **k: _f(*a, **k).fill_(math.nan))
    found = outputs_and_gradients(selective_scan, tensors, return_final_states=True)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_inputs_are_left_alone() -> None:
    tensors = make(length=65, options=ALL)
    copies = {name: value.clone() for name, value in tensors.items()}
    outputs_and_gradients(selective_scan, tensors, return_final_states=True)
    for name, value in tensors.items():
        assert torch.equal(value, copies[name]), name


def test_no_output_shares_memory_with_an_input() -> None:
    tensors = make(length=0, options=("initial_states",))
    _, states = selective_scan(**tensors, return_final_states=True)
    assert torch.equal(states, tensors["initial_states"])
    states.zero_()
    assert (tensors["initial_states"] != 0).all()


def test_saved_memory_is_linear_and_small() -> None:
    shape = {"batch": 1, "channels": 256, "size": 16, "options": ("D", "z", "dt_bias")}
    sizes = [saved_bytes(selective_scan, make(length=n, **shape)) for n in (512, 1024)]
    assert sizes[1] <= 2.05 * sizes[0]
    tensors = make(length=1024, **shape)
    inputs = sum(t.numel() * t.element_size() for t in tensors.values())
    # the inputs, softplus(dt), and at most one state for every N tokens
    assert sizes[1] <= inputs + 2 * tensors["x"].numel() * 4 + tensors["A"].numel() * 4


def test_frozen_A_gets_no_gradient() -> None:
    tensors = make(length=20, options=ALL)
    leaves = {name: value.requires_grad_(name != "A") for name, value in tensors.items()}
    selective_scan(**leaves).sum().backward()
    assert leaves["A"].grad is None and all(v.grad is not None for n, v in leaves.items() if n != "A")


def test_gradient_of_the_final_states_alone() -> None:
    tensors = make(length=20, options=ALL, dtype=torch.float64)
    found = []
    for op in (selective_scan, selective_scan_ref):
        leaves = [value.detach().requires_grad_() for value in tensors.values()]
        _, states = op(**dict(zip(tensors, leaves, strict=True)), return_final_states=True)
        found.append(torch.autograd.grad(states.square().sum(), leaves, allow_unused=True, materialize_grads=True))
    for name, actual, expected in zip(tensors, *found, strict=True):
        assert_matches(actual, expected, torch.float64, name)


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_compile_fullgraph(packing: str) -> None:
    batch = 1 if packing == "cu_seqlens" else 2
    tensors = make(batch=batch, length=70, options=ALL, states=2)
    kwargs: dict[str, Any] = {"return_final_states": True}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor(SEQ_IDX["padding inside"])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 33, 70])
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(selective_scan, tensors, **kwargs)
    for name, value in outputs_and_gradients(compiled, tensors, **kwargs).items():
        assert_matches(value, expected[name], torch.float32, name)


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = make(length=70, options=ALL)
    expected = outputs_and_gradients(selective_scan, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(selective_scan, tensors)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_second_derivative_raises() -> None:
    tensors = {name: t.requires_grad_() for name, t in make(length=5).items()}
    (gradient,) = torch.autograd.grad(selective_scan(**tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan can be differentiated only once"):
        gradient.square().sum().backward()


def test_empty_batch() -> None:
    y, states = selective_scan(**make(batch=0, length=5), return_final_states=True)
    assert y.shape == (0, 5, CHANNELS) and states.shape == (0, CHANNELS, SIZE)


def test_backend_choice() -> None:
    tensors = make(length=5)
    with backend("reference"):
        assert torch.equal(selective_scan(**tensors), selective_scan_ref(**tensors))
    with backend("eager"):
        assert torch.equal(selective_scan(**tensors), selective_scan_eager(**tensors))


def test_docstring_example() -> None:
    (example,) = doctest.DocTestFinder().find(selective_scan, "selective_scan", globs={})
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))


def _replace(**changes: Any) -> Tensors:
    return {**make(batch=2, length=5), **changes}


ERRORS = {
    "no tensor": (_replace(x=[1.0]), TypeError, "`x` must be a torch.Tensor, got list"),
    "missing C": (_replace(C=None), TypeError, "`C` must be a torch.Tensor, got NoneType"),
    "integer x": (_replace(x=torch.ones(2, 5, 8).long()), TypeError, "`x` must have dtype"),
    "complex A": (_replace(A=torch.ones(8, 5).cfloat()), TypeError, "`A` must have dtype .* got complex64"),
    "2-D x": (_replace(x=torch.ones(5, 8)), ValueError, r"`x` must have shape \(B, L, D\), got \(5, 8\)"),
    "dt": (_replace(dt=torch.ones(2, 5, 1)), ValueError, r"`dt` must have shape \(B, L, D\) = \(2, 5, 8\)"),
    "A": (_replace(A=torch.ones(8)), ValueError, r"`A` must have shape \(D, N\) = \(8, any\)"),
    "B": (_replace(B=torch.ones(2, 5, 4)), ValueError, r"`B` must have shape \(B, L, N\) = \(2, 5, 5\)"),
    "C": (_replace(C=torch.ones(2, 5, 2, 5)), ValueError, r"`C` must have shape \(B, L, N\)"),
    "groups": (
        _replace(B=torch.ones(2, 5, 3, 5), C=torch.ones(2, 5, 3, 5)),
        ValueError,
        "must divide the number of channels, got 3 groups in `B` and 8 channels in `x`",
    ),
    "C's groups": (
        _replace(B=torch.ones(2, 5, 2, 5), C=torch.ones(2, 5, 1, 5)),
        ValueError,
        r"`C` must have shape \(B, L, G, N\) = \(2, 5, 2, 5\)",
    ),
    "D": (_replace(D=torch.ones(5)), ValueError, r"`D` must have shape \(D,\) = \(8\)"),
    "D no tensor": (_replace(D=1.0), TypeError, "`D` must be a torch.Tensor, got float"),
    "dt_bias": (_replace(dt_bias=torch.ones(1, 8)), ValueError, r"`dt_bias` must have shape \(D,\)"),
    "z": (_replace(z=torch.ones(2, 4, 8)), ValueError, r"`z` must have shape \(B, L, D\)"),
    "z's dtype": (
        _replace(z=torch.ones(2, 5, 8).bfloat16()),
        TypeError,
        r"`z` must have dtype float32, got bfloat16",
    ),
    "initial_states": (
        _replace(initial_states=torch.ones(1, 8, 5)),
        ValueError,
        r"`initial_states` must have shape \(B, D, N\) = \(2, 8, 5\)",
    ),
    "initial_states of sequences": (
        {
            **make(batch=1, length=5),
            "cu_seqlens": torch.tensor([0, 2, 5]),
            "initial_states": torch.ones(1, 8, 5),
        },
        ValueError,
        r"`initial_states` must have shape \(n, D, N\) = \(2, 8, 5\)",
    ),
    "both packings": (
        _replace(seq_idx=torch.zeros(2, 5).int(), cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        "give only one of them",
    ),
    "device": (_replace(D=torch.ones(8, device="meta")), ValueError, "`D` is on meta but `x` is on cpu"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        selective_scan(**arguments)
