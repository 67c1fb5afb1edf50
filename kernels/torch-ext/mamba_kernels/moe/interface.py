"""The public ops of routed experts: argument checks and dispatch."""

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import MOST_ROWS, left_to_eager, on_device, select, unfit_for_kernels
from ..signatures import once_per_signature
from .eager import experts_step_eager, route_eager, routed_experts_eager
from .reference import experts_step_ref, route_ref, routed_experts_ref

__all__ = ["ACTIVATIONS", "experts_step", "grouped_mm_fits", "route", "routed_experts"]

ACTIVATIONS = ("relu", "silu", "gelu")
INDEX_DTYPES = (torch.int64, torch.int32)
# experts that the router's tile holds, and whose scores stay in registers
MOST_EXPERTS = 512


def _check_floats(op: str, first: str, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None:
            check_tensor(op, name, value)
            check_dtype(op, name, value)
    reference = values[first]
    assert reference is not None
    check_same_device(op, (first, reference), **values)


@once_per_signature
def _check_route(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scoring: str) -> bool:
    """Whether the kernel takes them, where there is one; raises if nothing does."""
    op = "route"
    _check_floats(op, "x", x=x, weight=weight, bias=bias)
    check_shape(op, "x", x, (None, None), "(N, d)")
    check_shape(op, "weight", weight, (None, x.shape[1]), "(E, d)")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "(E,)")
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"{op}: `top_k` must be from 1 to the {weight.shape[0]} experts, got {top_k}.")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: `scoring` must be 'softmax' or 'sigmoid', got {scoring!r}.")
    return weight.shape[0] <= MOST_EXPERTS and unfit_for_kernels(x, weight, bias) is None


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A router with token choice (Switch Transformer, arXiv 2101.03961, section 2.1): logits, scores and the k best experts.

    Args:
        x: (N, d).
        weight: (E, d), taken as fp32.
        bias: (E,).
        top_k: k.
        scoring: "softmax" or "sigmoid" of the logits.
        normalize: divide the k weights of a token by their sum.
        scale: the weights are multiplied by it.

    Returns:
        Router logits (N, E) fp32, weights (N, k) fp32 and indices (N, k) int64, best first. Of equal scores the first wins.

    Differentiable in `x`, `weight` and `bias`, through logits and weights, once.

    Raises:
        TypeError, ValueError: a dtype, shape or option that does not fit.

    Example:
        >>> import torch
        >>> from mamba_kernels.moe import route
        >>> logits, weights, indices = route(torch.eye(3), torch.eye(3), top_k=2, normalize=True)
        >>> indices[:, 0]
        tensor([0, 1, 2])
    """
    takes = _check_route(x, weight, bias, top_k, scoring)
    name = select("route", x.device)
    if name == "triton" and (takes or (weight.shape[0] <= MOST_EXPERTS and not left_to_eager(x, weight, bias))):
        from .triton_router import route_triton as run
    else:
        run = route_ref if name == "reference" else route_eager
    with on_device(x.device):
        return run(x, weight, bias, top_k, scoring, normalize, scale)


@once_per_signature
def _check_experts(
    op: str,
    x: Tensor,
    indices: Tensor | None,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> bool:
    """Whether the kernels of `routed_experts` take them, where there are any; raises if nothing does."""
    _check_floats(op, "x", x=x, weights=weights, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
    check_shape(op, "x", x, (None, None), "(N, d)")
    tokens, channels = x.shape
    check_shape(op, "down", down, (None, channels, None), "(E, d, F)")
    experts, _, inner = down.shape
    width = 2 * inner if gated else inner
    check_shape(op, "up", up, (experts, width, channels), "(E, 2 F, d)" if gated else "(E, F, d)")
    if up.dtype != down.dtype:
        raise TypeError(f"{op}: `up` and `down` must have one dtype, got {up.dtype} and {down.dtype}.")
    if indices is not None:
        check_tensor(op, "indices", indices)
        check_dtype(op, "indices", indices, INDEX_DTYPES)
        check_shape(op, "indices", indices, (tokens, None), "(N, k)")
        check_same_device(op, ("x", x), indices=indices)
        if weights is not None:
            check_shape(op, "weights", weights, tuple(indices.shape), "the shape of `indices`")
    if up_bias is not None:
        check_shape(op, "up_bias", up_bias, (experts, width), "(E, 2 F)" if gated else "(E, F)")
    if down_bias is not None:
        check_shape(op, "down_bias", down_bias, (experts, channels), "(E, d)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: `activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    fits = indices is not None and indices.shape[1] > 0 and grouped_mm_fits(up, down)
    return fits and unfit_for_kernels(x, weights, up, up_bias, down_bias) is None


def routed_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
) -> Tensor:
    """The weighted sum of the experts that each token goes to, without a limit to an expert's tokens.

    Args:
        x: (N, d), taken in the dtype of `up`.
        indices: (N, k) int64 or int32. Tokens are not sent to numbers that are no expert's.
        weights: (N, k).
        up: (E, F, d), or gated (E, 2 F, d) with the gate's rows first.
        down: (E, d, F).
        up_bias, down_bias: (E, F) or (E, 2 F), and (E, d).
        activation: "relu", "silu" or "gelu" (with erf).
        gated: an expert is `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.

    Returns:
        (N, d) in x.dtype.

    Differentiable in all but `indices`, once. The result and all gradients are the same bits every time.

    Raises:
        TypeError, ValueError: a dtype, shape or option that does not fit.

    Example:
        >>> import torch
        >>> from mamba_kernels.moe import routed_experts
        >>> x, up, down = torch.randn(5, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 16)
        >>> y = routed_experts(x, torch.tensor([[0], [2], [1], [0], [2]]), torch.ones(5, 1), up, down)
        >>> y.shape
        torch.Size([5, 8])
    """
    takes = _check_experts("routed_experts", x, indices, weights, up, down, up_bias, down_bias, activation, gated)
    name = select("routed_experts", x.device)
    fits = name == "triton" and (takes or (indices.shape[1] > 0 and grouped_mm_fits(up, down)))
    if fits and (takes or not left_to_eager(x, weights, up, up_bias, down_bias)):
        from .triton_experts import routed_experts_triton as run
    else:
        run = routed_experts_ref if name == "reference" else routed_experts_eager
    with on_device(x.device):
        return run(x, indices, weights, up, down, up_bias, down_bias, activation, gated)


def grouped_mm_fits(up: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes these experts: it wants rows of whole 16 bytes and knows no fp64."""
    size = up.element_size()
    return up.dtype != torch.float64 and up.shape[2] * size % 16 == 0 and down.shape[2] * size % 16 == 0


@once_per_signature
def _check_step(
    x: Tensor,
    experts: int,
    indices: Tensor | None,
    weights: Tensor | None,
    router_logits: Tensor | None,
    top_k: int,
    scoring: str,
    norm_weight: Tensor | None,
    residual: Tensor | None,
) -> None:
    op = "experts_step"
    if (indices is None) != (weights is None) or (indices is None) == (router_logits is None):
        raise ValueError(f"{op}: give either `indices` and `weights`, or `router_logits`.")
    _check_floats(op, "x", x=x, router_logits=router_logits, norm_weight=norm_weight, residual=residual)
    if router_logits is not None:
        check_shape(op, "router_logits", router_logits, (x.shape[0], experts), "(B, E)")
        if not 1 <= top_k <= experts:
            raise ValueError(f"{op}: `top_k` must be from 1 to the {experts} experts, got {top_k}.")
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"{op}: `scoring` must be 'softmax' or 'sigmoid', got {scoring!r}.")
    if norm_weight is not None:
        check_shape(op, "norm_weight", norm_weight, (x.shape[1],), "(d,)")
    if residual is not None:
        check_shape(op, "residual", residual, tuple(x.shape), "(B, d)")


def experts_step(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
    gated: bool = False,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`routed_experts` for a few tokens while decoding: nothing is read but the weights of the chosen experts. No gradients.

    Takes the choice of experts, or the router's logits and chooses as `route` does; nothing waits for the host, so that it can
    be captured in a CUDA graph.

    Args:
        x: (B, d); fast up to 4 tokens.
        up, down, activation, gated, up_bias, down_bias: as `routed_experts`.
        indices, weights: (B, k), the choice; or
        router_logits: (B, E), and with them top_k, scoring, normalize and scale as `route`.
        norm_weight: (d,), scales x divided by its root mean square, with `eps` added to the mean square; None = no norm.
            It is what the experts read that is normalised; logits have to come from normalised tokens already.
        residual: (B, d), added at the end; the result then has the wider one of its dtype and the experts'.

    Returns:
        (B, d) in the experts' dtype, or as said under `residual`; and indices and weights (B, k).

    Raises:
        TypeError, ValueError: a dtype, shape or option that does not fit.
        RuntimeError: an argument requires a gradient.

    Example:
        >>> import torch
        >>> from mamba_kernels.moe import experts_step
        >>> x, up, down = torch.randn(1, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 16)
        >>> y, indices, weights = experts_step(x, up, down, router_logits=torch.tensor([[0.0, 2.0, 1.0]]))
        >>> indices
        tensor([[1]])
    """
    _check_experts("experts_step", x, indices, weights, up, down, up_bias, down_bias, activation, gated)
    _check_step(x, up.shape[0], indices, weights, router_logits, top_k, scoring, norm_weight, residual)
    if torch.is_grad_enabled():
        for value in (x, weights, up, down, up_bias, down_bias, router_logits, norm_weight, residual):
            if value is not None and value.requires_grad:
                raise RuntimeError("experts_step is for decoding and has no gradient; run it under torch.no_grad().")
    name = select("experts_step", x.device)
    few = x.shape[0] <= MOST_ROWS and up.shape[0] <= MOST_EXPERTS
    if name == "triton" and few and not left_to_eager(x, weights, up, up_bias, down_bias, residual):
        from .triton_step import experts_step_triton as run
    else:
        run = experts_step_ref if name == "reference" else experts_step_eager
    with on_device(x.device):
        return run(
            x,
            up,
            down,
            activation,
            gated,
            indices=indices,
            weights=weights,
            up_bias=up_bias,
            down_bias=down_bias,
            router_logits=router_logits,
            top_k=top_k,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            norm_weight=norm_weight,
            eps=eps,
            residual=residual,
        )
