"""Rules that several formats share: copies of mixers and norms, experts stacked, transposed or with their halves swapped.

Symbols: d model width, D inner width, N state size, R time-step rank, W convolution width, H heads, G groups, E experts, F expert
width.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import TensorRule

__all__ = [
    "copy_rule",
    "mixer_rules",
    "norm_rules",
    "stack_rule",
    "stack_transposed_rule",
    "swapped_rule",
    "transposed_rule",
]

Shape = tuple[int, ...]


def copy_rule(target: str, source: str, shape: Iterable[int]) -> TensorRule:
    """The source tensor `source` of this shape becomes `target` as it is."""
    shape = tuple(shape)
    return TensorRule(target=target, sources=(source,), shape=shape, source_shapes=(shape,))


def mixer_rules(config: Any, mixer_type: str, target: str, source: str) -> list[TensorRule]:
    """Copies of one mixer's tensors, which all formats store alike.

    Args:
        config: a configuration with transformers' field names.
        mixer_type: "mamba" or "mamba2".
        target, source: prefixes, with the final dot.
    """
    return [
        copy_rule(target + name, source + name, shape) for name, shape in _mixer_shapes(config, mixer_type).items()
    ]


def _mixer_shapes(config: Any, mixer_type: str) -> dict[str, Shape]:
    """Name below `mixer.` → shape, as mamba_ssm and transformers store it."""
    d, N, W = config.hidden_size, config.state_size, config.conv_kernel
    shapes: dict[str, Shape]
    if mixer_type == "mamba2":
        H = config.num_heads
        D = H * config.head_dim
        conv = D + 2 * config.n_groups * N
        projection = D + conv + H
        shapes = {"dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (D,)}
    else:
        D, R = config.intermediate_size, int(config.time_step_rank)
        conv, projection = D, 2 * D
        shapes = {
            "A_log": (D, N),
            "D": (D,),
            "x_proj.weight": (R + 2 * N, D),
            "dt_proj.weight": (D, R),
            "dt_proj.bias": (D,),
        }
    shapes |= {"in_proj.weight": (projection, d), "conv1d.weight": (conv, 1, W), "out_proj.weight": (d, D)}
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (conv,)
    if config.use_bias:
        shapes |= {"in_proj.bias": (projection,), "out_proj.bias": (d,)}
    return shapes


def norm_rules(
    norm_type: str, size: int, target: str, source: str, names: tuple[str, str] = ("weight", "bias")
) -> list[TensorRule]:
    """Copies of one norm's tensors, which the source calls `names`; a plain RMSNorm has no second one."""
    weight, bias = names
    rules = [copy_rule(target + "weight", source + weight, (size,))]
    if norm_type != "rmsnorm":
        rules.append(copy_rule(target + "bias", source + bias, (size,)))
    return rules


def swapped_rule(target: str, source: str, shape: Shape) -> TensorRule:
    """The source (…, 2F, d) with the halves of its rows in the other order: value first and gate first are both in use."""
    return TensorRule(target=target, sources=(source,), shape=shape, source_shapes=(shape,), build=_swap_halves)


def _swap_halves(x: Tensor, dim: int = -2) -> Tensor:
    return torch.cat(x.chunk(2, dim=dim)[::-1], dim=dim)


def stack_rule(target: str, sources: Iterable[str], shape: Iterable[int], swapped: bool = False) -> TensorRule:
    """One tensor of the experts' tensors, each of that shape; with `swapped`, the halves of their rows change places."""
    sources, shape = tuple(sources), tuple(shape)
    return TensorRule(
        target=target,
        sources=sources,
        shape=(len(sources), *shape),
        source_shapes=(shape,) * len(sources),
        build=partial(_stack, swapped=swapped),
    )


def _stack(*parts: Tensor, swapped: bool) -> Tensor:
    # filled in place: beside the result only one expert is held
    out = parts[0].new_empty(len(parts), *parts[0].shape)
    for index, part in enumerate(parts):
        # one row or many: biases are (2F,), matrices (2F, d)
        out[index] = _swap_halves(part, dim=0) if swapped else part
    return out


def transposed_rule(target: str, source: str, shape: tuple[int, ...]) -> TensorRule:
    """The source (…, m, n) with its last axes changed into `shape` (…, n, m)."""
    return stack_transposed_rule(target, (source,), shape)


def stack_transposed_rule(target: str, sources: Iterable[str], shape: tuple[int, ...]) -> TensorRule:
    """Sources (…, d, F), transposed and put one below the other, as `shape` (…, n·F, d)."""
    sources = tuple(sources)
    rows, columns = shape[-2:]
    each = (*shape[:-2], columns, rows // len(sources))
    return TensorRule(
        target=target,
        sources=sources,
        shape=shape,
        source_shapes=(each,) * len(sources),
        build=_stack_transposed,
    )


def _stack_transposed(*parts: Tensor) -> Tensor:
    rows = parts[0].shape[-1]
    out = parts[0].new_empty(*parts[0].shape[:-2], len(parts) * rows, parts[0].shape[-2])
    for index, part in enumerate(parts):
        out[..., index * rows : (index + 1) * rows, :] = part.mT
    return out
