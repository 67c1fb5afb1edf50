"""Kernels that are compiled side by side: `launch` runs once a signature, without running a kernel, and its errors do no harm."""

import threading
import warnings

import pytest

triton = pytest.importorskip("triton")
compiling = pytest.importorskip("mamba_kernels.compiling")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_seen", set())
    monkeypatch.setattr(compiling, "THREADS", 2)
    compiling.warn_once.cache_clear()


def test_launches_once_for_a_signature() -> None:
    seen = []
    for signature in ("a", "a", "b"):
        compiling.compile_together(signature, lambda: seen.append(compiling.is_only_compiling()))
    assert seen == [True, True]
    assert not compiling.is_only_compiling()


def test_errors_are_left_to_the_call_itself() -> None:
    def launch() -> None:
        raise ValueError("no such kernel")

    with pytest.warns(UserWarning, match="one after the other, because of ValueError: no such kernel"):
        compiling.compile_together("a", launch)
    assert not compiling.is_only_compiling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiling.compile_together("a", launch)


@pytest.mark.parametrize("where", ["outside", "inside", "in another thread"])
def test_a_kernel_is_only_compiled_inside(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    found = []
    parent = compiling.JITFunction
    monkeypatch.setattr(parent, "run", lambda self, *args, grid, warmup, **options: found.append((args, warmup)))

    def body(x, N: triton.language.constexpr):  # type: ignore[no-untyped-def]
        pass

    kernel = compiling.kernel(body, do_not_specialize=["x"])

    def launch() -> None:
        kernel[(1,)](3, N=4)

    def launch_elsewhere() -> None:
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()

    if where == "outside":
        launch()
    else:
        compiling.compile_together("a", launch if where == "inside" else launch_elsewhere)
    assert found == [((3,), where == "inside")]
