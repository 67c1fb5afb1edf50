"""Short launches: the kernel that Triton itself would take, with the same arguments, or Triton itself.

Without a GPU the driver is a stand-in that notes what it is called with; kernels are compiled for sm_90 as ever.
"""

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

launching = pytest.importorskip("mamba_kernels.launch")
launch = launching.launch

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

STREAM = 7


@triton.jit(do_not_specialize=["length"])
def _kernel(x, y, length, stride, scale, W: tl.constexpr, FLAG: tl.constexpr):
    o = tl.arange(0, W)
    value = tl.load(x + o * stride, mask=o < length, other=0.0)
    if FLAG:
        value += scale
    tl.store(y + o, value.to(y.dtype.element_ty), mask=o < length)


@triton.jit
def _mixed_kernel(length, x, scale, y, W: tl.constexpr, LAST: tl.constexpr = 3):
    o = tl.arange(0, W)
    tl.store(y + o, tl.load(x + o, mask=o < length, other=0.0) * scale + LAST, mask=o < length)


KERNELS = (_kernel, _mixed_kernel)


class Launcher:
    """As Triton's: an object that adds what it knows of the kernel and calls `launch`."""

    packed = False
    scratch: Any = None

    def __init__(self, src: Any, metadata: Any) -> None:
        self.cooperative = False
        self.calls: list[tuple[Any, ...]] = []
        self.launch = self.note

    def note(self, *given: Any) -> None:
        CALLS.append(given)

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *rest: Any) -> None:
        told, args = rest[:4], rest[4:]
        end = (args,) if self.packed else args
        self.launch(x, y, z, stream, function, self.cooperative, self.scratch, *told, *end)


CALLS: list[tuple[Any, ...]] = []


@pytest.fixture(params=[False, True], ids=["flat", "packed"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU that runs nothing."""
    runtime = triton.runtime.driver
    fake = SimpleNamespace(
        device=0,
        launcher_cls=type("Ours", (Launcher,), {"packed": request.param}),
        utils=SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 10, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        ),
        get_current_device=lambda: fake.device,
        get_current_stream=lambda _: STREAM,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(runtime, "_active", fake)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    for name in ("_layouts", "_known", "_kernels"):
        monkeypatch.setattr(launching, name, {})
    monkeypatch.setattr(launching, "_current_device", lambda: fake.device)
    monkeypatch.setattr(launching, "_current_stream", lambda _: STREAM)
    monkeypatch.setattr(torch.version, "hip", None)
    yield fake
    # kernels are unloaded by the driver that loaded them
    CALLS.clear()
    for name in ("_layouts", "_known", "_kernels"):
        getattr(launching, name).clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    gc.collect()


def handed_over(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Grid, stream and function, and the arguments with tensors as addresses."""
    args = given[-1] if isinstance(given[-1], tuple) and not isinstance(given[-1], str) else given[11:]
    return (*given[:5], *(value.data_ptr() if isinstance(value, Tensor) else value for value in args))


def both_ways(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> bool:
    """Launch by Triton, then by `launch` until it has learned; whether the last launch was direct."""
    kernel[grid](*args, **meta)
    for _ in range(3):
        launch(kernel, grid, *args, **meta)
        assert handed_over(CALLS[-1]) == handed_over(CALLS[0])
    direct = not any(isinstance(value, Tensor) for value in CALLS[-1] + CALLS[-1][-1:])
    direct = direct and not (isinstance(CALLS[-1][-1], tuple) and any(isinstance(v, Tensor) for v in CALLS[-1][-1]))
    CALLS.clear()
    return direct


def buffers(offset: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    storage = torch.zeros(64, dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    return storage[offset:], torch.zeros(64, dtype=dtype)


# id: positional arguments behind the tensors, and the constants
SCALARS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "base": ((5, 2, 0.5), {}),
    "stride-1": ((5, 1, 0.5), {}),
    "stride-true": ((5, True, 0.5), {}),
    "stride-16": ((5, 16, 0.5), {}),
    "stride-0": ((5, 0, 0.5), {}),
    "stride-negative": ((5, -3, 0.5), {}),
    "stride-wide": ((5, 2**31, 0.5), {}),
    "stride-wide-16": ((5, 2**40, 0.5), {}),
    "length-1": ((1, 2, 0.5), {}),
    "length-16": ((16, 2, 0.5), {}),
    "length-wide": ((2**33, 2, 0.5), {}),
    "scale-integer": ((5, 2, 1), {}),
    "scale-1.0": ((5, 2, 1.0), {}),
    "constant": ((5, 2, 0.5), {"W": 16}),
    "flag": ((5, 2, 0.5), {"FLAG": True}),
    "flag-as-integer": ((5, 2, 0.5), {"FLAG": 1}),
    "warps": ((5, 2, 0.5), {"num_warps": 2}),
}


def test_every_kind_of_call_gets_its_own_kernel(driver: Any) -> None:
    """One after the other with the same caches, so that one key for two kernels would show."""
    for offset in (0, 1, 4):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = buffers(offset, dtype)
            for scalars, meta in SCALARS.values():
                meta = {"W": 8, "FLAG": False, "num_warps": 1} | meta
                assert both_ways(_kernel, (2, 3), x, y, *scalars, **meta)
    # and again, now that all are known
    x, y = buffers(1)
    for scalars, meta in SCALARS.values():
        assert both_ways(_kernel, (2,), x, y, *scalars, **({"W": 8, "FLAG": False, "num_warps": 1} | meta))


def test_order_of_constants_does_not_confuse(driver: Any) -> None:
    x, y = buffers()
    assert both_ways(_kernel, (1,), x, y, 5, 2, 0.5, W=1, FLAG=8)
    assert both_ways(_kernel, (1,), x, y, 5, 2, 0.5, FLAG=1, W=8)


def test_tensors_behind_numbers_and_defaults(driver: Any) -> None:
    x, y = buffers()
    for length in (1, 5, 16, 5):
        assert both_ways(_mixed_kernel, (1, 2, 3), length, x, 0.5, y, W=8)
        assert both_ways(_mixed_kernel, (1,), length, x, 0.5, y, W=8, LAST=2)


def test_devices_have_their_own_kernels(driver: Any) -> None:
    x, y = buffers()
    for device in (0, 1, 0, 1):
        driver.device = device
        assert both_ways(_kernel, (1,), x, y, 5, 2, 0.5, W=8, FLAG=False)


def test_the_present_tensors_are_used(driver: Any) -> None:
    for _ in range(4):
        x, y = buffers()
        launch(_kernel, (1,), x, y, 5, 2, 0.5, W=8, FLAG=False)
        assert handed_over(CALLS[-1])[5:7] == (x.data_ptr(), y.data_ptr())
    assert not any(isinstance(value, Tensor) for value in CALLS[-1])


@pytest.mark.parametrize(
    "reason", ["scratch", "listener", "compiling", "no launcher", "subclass", "hook of the kernel"]
)
def test_ordinary_launches_where_that_is_safer(driver: Any, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    x, y = buffers()
    if reason == "scratch":
        monkeypatch.setattr(driver.launcher_cls, "scratch", torch.zeros(1))
    elif reason == "listener":
        monkeypatch.setattr(launching, "_enter", [print])
    elif reason == "compiling":
        monkeypatch.setattr(launching.compiling, "_only_compiling", True)
    elif reason == "no launcher":
        monkeypatch.setattr(
            driver, "launcher_cls", lambda *_: lambda *given: CALLS.append((*given[:5], 0, 0, *given[5:]))
        )
    elif reason == "subclass":
        x = x.as_subclass(type("Special", (Tensor,), {}))
    else:
        monkeypatch.setattr(_kernel, "pre_run_hooks", [lambda *_, **__: None])
    assert not both_ways(_kernel, (1,), x, y, 5, 2, 0.5, W=8, FLAG=False)


@pytest.mark.parametrize("order", ["reversed", "first two exchanged", "constants first"])
def test_a_launcher_of_another_kind_is_left_alone(driver: Any, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Arguments in another order, as a future version may have them."""

    def call(self: Launcher, *given: Any) -> None:
        args = given[9:]
        if order == "reversed":
            args = args[::-1]
        elif order == "first two exchanged":
            args = (args[1], args[0], *args[2:])
        else:
            args = args[5:] + args[:5]
        self.launch(*given[:5], False, None, *given[5:9], *args)

    monkeypatch.setattr(driver.launcher_cls, "__call__", call)
    x, y = buffers()
    for _ in range(4):
        launch(_kernel, (1,), x, y, 5, 2, 0.5, W=8, FLAG=False)
        assert any(isinstance(value, Tensor) for value in CALLS[-1])


def test_keys_are_forgotten_before_they_fill_the_memory(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MAX_KEYS", 4)
    x, y = buffers()
    for length in range(20):
        launch(_kernel, (1,), x, y, length, 2, 0.5, W=8, FLAG=False)
    (layout,) = launching._layouts.values()
    assert 1 <= len(layout.calls) <= 4
    # one kernel, known after two launches: a new length needs one ordinary launch
    launch(_kernel, (1,), x, y, 100, 2, 0.5, W=8, FLAG=False)
    launch(_kernel, (1,), x, y, 100, 2, 0.5, W=8, FLAG=False)
    assert not any(isinstance(value, Tensor) for value in CALLS[-1])


@pytest.mark.gpu
def test_results_streams_and_graphs_on_gpu() -> None:
    launching._layouts.clear()
    launching._known.clear()
    base = torch.randn(65, device="cuda")
    for offset in (0, 1):
        x, y = base[offset:], torch.empty(64, device="cuda")
        for length in (64, 1, 16, 17):
            for stride in (1, 2, 16):
                for _ in range(3):
                    y.fill_(float("nan"))
                    launch(_kernel, (1,), x, y, min(length, 64 // stride), stride, 0.5, W=64, FLAG=True)
                    n = min(length, 64 // stride)
                    assert torch.equal(y[:n], x[: n * stride : stride] + 0.5)
                    assert y[n:].isnan().all()
    assert any(isinstance(call, launching.Call) for call in launching._known.values()), "nothing is launched directly"
    y = torch.empty(64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        launch(_kernel, (1,), base, y, 64, 1, 0.5, W=64, FLAG=True)
        assert not side.query(), "the launch is not on the current stream"
    side.synchronize()
    assert torch.equal(y, base[:64] + 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(_kernel, (1,), base, y, 64, 1, 0.25, W=64, FLAG=True)
    base.fill_(1.0)
    graph.replay()
    assert torch.equal(y, torch.full_like(y, 1.25))


@pytest.mark.gpu
def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for _ in range(3):
        for device in (0, 1):
            with torch.cuda.device(device):
                x = torch.randn(64, device="cuda")
                y = torch.empty_like(x)
                launch(_kernel, (1,), x, y, 64, 1, 0.5, W=64, FLAG=True)
                assert torch.equal(y, x + 0.5)
