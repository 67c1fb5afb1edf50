"""Launches with few Python instructions: `launch(kernel, grid, *args, **meta)` in place of `kernel[grid](*args, **meta)`.

Triton finds the compiled kernel of a call anew each time, in 20 to 40 µs. Here a call is a key of everything that decides over
the kernel, and a key that was met before goes to the driver straight away. The key is finer than Triton's own: data types,
alignment and device of tensors, type and value of every integer, all of `meta`. Another length is another key, whose first
launch takes the ordinary way.

How to call the driver is not assumed but seen: the second launch of a kernel takes the ordinary way too, and what Triton hands to
the driver is noted. Where that does not look as it should (another version, scratch memory, no NVIDIA GPU), where somebody listens
to launches, inside of `torch.compile` and under the interpreter, every launch is an ordinary one.
"""

from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import compiling

__all__ = ["launch"]

# in place of a key: the compiled kernel that ran last
LAST = "last"
# a program meets few; one that meets endless lengths starts again
MAX_KEYS = 1024

TENSORS = (Tensor, torch.nn.Parameter)
# what may stand beside tensors: a float in `meta` would have to be told from its negative if it is 0
POSITIONAL = (*TENSORS, int, bool, float, type(None))
NAMED = (int, bool, str, type(None), tl.dtype)


class Call(NamedTuple):
    """How a compiled kernel is handed to the driver: `run(*grid, stream, *middle, *arguments, *constants)`."""

    run: Callable[..., object]
    middle: tuple[Any, ...]
    constants: tuple[Any, ...]
    # whether the driver takes the arguments as one tuple
    packed: bool
    # keeps the binary loaded
    compiled: Any


class Layout(NamedTuple):
    """Calls whose arguments have the same types."""

    tensors: tuple[int, ...]
    scalars: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    # how to launch a kernel, or the compiled kernel where that is not known
    calls: dict[Hashable, Any]


_layouts: dict[Hashable, Layout | None] = {}
# how to launch each compiled kernel
_known: dict[Any, Call | None] = {}
# every kernel by its id, kept so that no other gets it
_kernels: dict[int, Any] = {}

_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_runtime = getattr(triton.knobs, "runtime", None) if hasattr(triton, "knobs") else None
_hooks = tuple(getattr(_runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
# chains of hooks, that are empty unless a profiler listens
_enter, _exit = (getattr(hook, "calls", None) for hook in _hooks)


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)` on the current device and stream; kernels that are not differentiable, as all of Triton.

    Args:
        kernel: made by `triton.jit` or `compiling.kernel`.
        grid: one to three integers.
        args: the kernel's first arguments.
        meta: its constants, and options of the compiler such as `num_warps`.
    """
    if torch.compiler.is_compiling():
        kernel[grid](*args, **meta)
        return
    types = (id(kernel), len(args), *map(type, args), *meta, *map(type, meta.values()))
    layout = _layouts.get(types)
    if layout is None and types not in _layouts:
        _kernels[id(kernel)] = kernel
        layout = _layouts[types] = _layout_of(kernel, args, meta)
    if layout is None or compiling._only_compiling or _enter or _exit:
        kernel[grid](*args, **meta)
        return
    values = list(args)
    device = _current_device()  # type: ignore[misc]
    kinds = []
    bits = 0
    for i in layout.tensors:
        tensor = values[i]
        kinds.append(tensor.dtype)
        kinds.append(tensor.get_device())
        values[i] = address = tensor.data_ptr()
        bits |= address
    aligned: Any = True if not bits & 15 else tuple([values[i] & 15 == 0 for i in layout.tensors])
    key = (device, aligned, *kinds, *layout.scalars(args), *meta.values())
    call = layout.calls.get(key)
    if type(call) is not Call:
        _ordinary_launch(kernel, grid, args, meta, layout, key)
        return
    run, middle, constants, packed, _ = call
    wide = (*grid, 1, 1) if len(grid) < 3 else grid
    stream = _current_stream(device)  # type: ignore[misc]
    if packed:
        run(wide[0], wide[1], wide[2], stream, *middle, (*values, *constants))
    else:
        run(wide[0], wide[1], wide[2], stream, *middle, *values, *constants)


def _layout_of(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Layout | None:
    """The layout of calls with arguments of such types; None where Triton launches them."""
    usual = (
        isinstance(kernel, JITFunction)
        and not getattr(kernel, "pre_run_hooks", None)
        and None not in (_current_device, _current_stream, _enter, _exit)
        and torch.version.hip is None
        and all(type(value) in POSITIONAL for value in args)
        and all(type(value) in NAMED for value in meta.values())
        # a constant that is a float would have to be told from its negative if it is 0
        and not any(i < len(args) and type(args[i]) is float for i in getattr(kernel, "constexprs", [0]))
    )
    if not usual:
        return None
    tensors = tuple(i for i, value in enumerate(args) if type(value) in TENSORS)
    others = tuple(i for i in range(len(args)) if i not in tensors)
    scalars: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    if tensors == tuple(range(len(tensors))):
        scalars = itemgetter(slice(len(tensors), None))
    else:
        scalars = lambda values: tuple([values[i] for i in others])  # noqa: E731
    return Layout(tensors, scalars, {})


def _ordinary_launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    meta: dict[str, Any],
    layout: Layout,
    key: Hashable,
) -> None:
    """Launch by Triton, and learn from it."""
    # what this launch will probably run
    guess = layout.calls.get(key) or layout.calls.get(LAST)
    if guess is None or guess in _known:
        compiled = kernel[grid](*args, **meta)
    else:
        compiled, seen = _watched_launch(guess, kernel, grid, args, meta)
        # several where another thread launched it as well
        if compiled is guess and len(seen) == 1:
            _known[guess] = _call_of(guess, kernel, grid, args, meta, *seen)
    if not hasattr(compiled, "packed_metadata"):
        return
    if len(layout.calls) >= MAX_KEYS:
        layout.calls.clear()
    layout.calls[key] = _known.get(compiled) or compiled
    layout.calls[LAST] = compiled


def _watched_launch(
    compiled: Any, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
) -> tuple[Any, list[tuple[Any, ...]]]:
    """Launch by Triton: the kernel that ran, and what the driver's launcher of `compiled` was called with."""
    launcher = compiled.run
    if "launch" not in getattr(launcher, "__dict__", {}):
        return kernel[grid](*args, **meta), [()]
    seen: list[tuple[Any, ...]] = []
    run = launcher.launch

    def watch(*given: Any) -> Any:
        seen.append(given)
        return run(*given)

    launcher.launch = watch
    try:
        return kernel[grid](*args, **meta), seen
    finally:
        launcher.launch = run


def _call_of(
    compiled: Any,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    meta: dict[str, Any],
    seen: tuple[Any, ...],
) -> Call | None:
    """The direct call for a kernel, from what Triton was `seen` to hand over; None where that is not understood."""
    names = kernel.arg_names
    if len(seen) < 5:
        return None
    packed = type(seen[-1]) is tuple and len(seen[-1]) == len(names) and seen[-1] is not compiled.packed_metadata
    head, arguments = (seen[:-1], seen[-1]) if packed else (seen[: -len(names)], seen[-len(names) :])
    if len(head) < 5 or tuple(head[:3]) != (*grid, 1, 1)[:3]:
        return None
    stream, middle = head[3], list(head[4:])
    if stream != _current_stream(_current_device()) or middle[0] is not compiled.function:  # type: ignore[misc]
        return None
    if any(have is not given for have, given in zip(arguments, args, strict=False)):
        return None
    constants = tuple(arguments[len(args) :])
    if any(name in meta and meta[name] is not have for name, have in zip(names[len(args) :], constants, strict=True)):
        return None
    launcher = compiled.run
    fixed = (compiled.function, compiled.packed_metadata, *vars(launcher).values())
    for i, value in enumerate(middle):
        if value is not None and (any(value is hook for hook in _hooks) or type(value).__name__ == "LazyDict"):
            # what is told to listeners, and there are none
            middle[i] = None
        elif value is not None and not any(value is known for known in fixed):
            return None
    return Call(launcher.launch, tuple(middle), constants, packed, compiled)
