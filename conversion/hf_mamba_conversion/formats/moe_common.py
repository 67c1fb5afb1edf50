"""What the formats with experts share: rules for mixers and experts, and a plain routed layer for their reference forwards.

Symbols: N tokens, d model width, E experts, k experts per token, F expert width.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import TensorRule, copy_rule
from .mixer_shapes import mixer_shapes

if TYPE_CHECKING:
    from hf_mamba import MoeMambaConfig

__all__ = [
    "mixer_rules",
    "norm_rules",
    "routed",
    "stack_rule",
    "stack_transposed_rule",
    "swap_halves",
    "transposed_rule",
]

Run = Callable[[int, Tensor], Tensor]


def mixer_rules(config: "MoeMambaConfig", target: str, source: str) -> list[TensorRule]:
    """Copies of one mixer's tensors; all formats store them alike.

    Args:
        target, source: prefixes, with the final dot.
    """
    shapes = mixer_shapes(config, config.mixer_type)
    return [copy_rule(target + name, source + name, shape) for name, shape in shapes.items()]


def norm_rules(norm_type: str, size: int, target: str, source: str, names: tuple[str, str] = ("weight", "bias")):
    """Copies of one norm's tensors, which the source calls `names`; a plain RMSNorm has no second one."""
    weight, bias = names
    rules = [copy_rule(target + "weight", source + weight, (size,))]
    if norm_type != "rmsnorm":
        rules.append(copy_rule(target + "bias", source + bias, (size,)))
    return rules


def swap_halves(x: Tensor, dim: int = -2) -> Tensor:
    """[a, b] → [b, a] along an axis: value first and gate first are the two orders in use."""
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
        out[index] = swap_halves(part, dim=0) if swapped else part
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


def routed(tokens: Tensor, indices: Tensor, weights: Tensor, run: Run) -> Tensor:
    """Every token (N, d) through its experts: the sum over k of `weights` (N, k) times `run(expert, tokens)`."""
    out = torch.zeros_like(tokens)
    for expert in sorted(set(indices.flatten().tolist())):
        for slot in range(indices.shape[1]):
            chosen = (indices[:, slot] == expert).nonzero().flatten()
            if len(chosen):
                out[chosen] += weights[chosen, slot, None] * run(int(expert), tokens[chosen])
    return out
