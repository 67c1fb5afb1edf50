"""What the tensors of an llm-random checkpoint say about the model: its layers, and their sizes.

Nothing but names and shapes is read. Symbols: d model width, E experts, F width.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError, UnsupportedFormatError

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["EMBEDDING", "GATES", "Layout", "Sublayer", "expert_sizes", "is_llm_random", "read_layout"]

EMBEDDING = "embedding_layer.layers.0.weight"
BLOCK_KEY = re.compile(r"encoder\.blocks\.block_(\d+)\.block\.residual_(\w+)\.layer\.(.+)")
ANY_BLOCK_KEY = re.compile(r"encoder\.blocks\.block_\d+\.block\.residual_(\w+?)\.(.+)")
# names that llm-random gives sublayers with a plain mixer, and the feed-forward one
MIXERS = ("mamba", "vanilla_mamba")
FEED_FORWARD = "feedforward"
PARALLEL = "parallel"

ROUTERS = ("gating.gate", "router.gate")
EXPERT_PREFIXES = ("expert_inner_function.", "")
# a gated expert's second matrix: its name, and whether it is the one that passes the activation
GATES = {"gate_weight": True, "swi_glu_gate_weight": False}

# parts of sublayers that `MoeMambaForCausalLM` has no counterpart of, and why
UNSUPPORTED = {
    r"^\w*attention\w*\|": "it has attention layers, so it is a Transformer; only the Mamba models are convertible",
    r"\|.*\bin_proj\.(conv_proj|gate_proj|expert_inner_function|router|gating)\b": "it has inner experts in place of a "
    "mixer's in_proj (Inner MoE, arXiv 2401.04081 v2, §5), which no layer of MoE-Mamba has",
    r"\|.*\bout_proj\.(expert_inner_function|router|gating)\b": "it has inner experts in place of a mixer's out_proj (Inner "
    "MoE, arXiv 2401.04081 v2, §5), which no layer of MoE-Mamba has",
    r"\|.*\bpost_norm\.": "its norms follow the sublayers (post-norm), but MoE-Mamba's precede them",
    r"\|.*\brezero_g$": "its sublayers are scaled (ReZero), which MoE-Mamba's are not",
    r"\|.*\bexpert_gating\.": "its experts choose their tokens (expert choice), which cannot generate: a token's output "
    "would depend on later tokens",
}


@dataclass
class Sublayer:
    """One residual layer of the source.

    Attributes:
        prefix: of its tensors, up to and with "layer.".
        kind: entry of `MoeMambaConfig.layers_block_type`.
        mixer, feed_forward: prefixes of its parts, "" if it has none.
        experts: prefix of the experts' tensors; router: key of the gate; both "" without experts.
        gate: name of a gated expert's second matrix, "" if it is not gated.
    """

    prefix: str
    kind: str = ""
    mixer: str = ""
    feed_forward: str = ""
    experts: str = ""
    router: str = ""
    gate: str = ""


@dataclass
class Layout:
    """What the tensors say about the model."""

    sublayers: list[Sublayer]
    norm_type: str
    sizes: dict[str, Any] = field(default_factory=dict)


def is_llm_random(source: "CheckpointSource") -> bool:
    """Whether the names are llm-random's, of any of its models."""
    return EMBEDDING in source.infos and any(ANY_BLOCK_KEY.fullmatch(key) for key in source.infos)


def read_layout(source: "CheckpointSource") -> Layout:
    """Layers and sizes, from names and shapes.

    Raises:
        ConversionError: tensors are missing, or layers do not agree with each other.
        UnsupportedFormatError: a kind of layer that MoE-Mamba does not have.
    """
    refuse_other_models(source)
    parts: dict[str, tuple[int, str, list[str]]] = {}
    for key in source.infos:
        match = BLOCK_KEY.fullmatch(key)
        if match is not None:
            prefix = key.removesuffix(match[3])
            parts.setdefault(prefix, (int(match[1]), match[2], []))[2].append(match[3])
    numbers = sorted({number for number, _, _ in parts.values()})
    if numbers != list(range(len(numbers))):
        raise ConversionError(f"{source.location} has the blocks {numbers}; those between are missing.")
    # a stable sort: within a block the file's order is that of the modules
    ordered = sorted(parts, key=lambda prefix: parts[prefix][0])
    sublayers = [read_sublayer(source, prefix, *parts[prefix][1:]) for prefix in ordered]
    norm_types = {norm_type(source, sublayer.prefix) for sublayer in sublayers}
    if len(norm_types) > 1:
        raise ConversionError(f"{source.location} mixes norms of several types: {', '.join(sorted(norm_types))}.")
    return Layout(sublayers, norm_types.pop(), read_sizes(source, sublayers))


def refuse_other_models(source: "CheckpointSource") -> None:
    """Name what makes this a model of llm-random that MoE-Mamba cannot hold.

    Raises:
        UnsupportedFormatError: there is such a thing.
    """
    for key in source.infos:
        if key.startswith("embedding_layer.layers.") and key != EMBEDDING:
            raise UnsupportedFormatError(
                f"{source.location} has a positional embedding ({key}), which Mamba models of llm-random do not have and "
                "MoE-Mamba has no place for."
            )
        match = ANY_BLOCK_KEY.fullmatch(key)
        for pattern, reason in UNSUPPORTED.items():
            if match is not None and re.search(pattern, f"{match[1]}|{match[2]}"):
                raise UnsupportedFormatError(f"{source.location} is an llm-random checkpoint, but {reason} ({key}).")


def norm_type(source: "CheckpointSource", prefix: str) -> str:
    """LayerNorm has `weight` and `bias`; llm-random's RMSNorm has `g` and `b`."""
    return "biased_rmsnorm" if prefix + "pre_norm.g" in source else "layernorm"


def read_sublayer(source: "CheckpointSource", prefix: str, name: str, suffixes: list[str]) -> Sublayer:
    """The parts of one residual layer."""
    sublayer = Sublayer(prefix)
    if name in MIXERS:
        sublayer.kind, sublayer.mixer = "mamba", f"{prefix}{name}."
        return sublayer
    if name == PARALLEL:
        sides = [f"{prefix}parallel.layers.{side}." for side in range(2)]
        extra = sorted(s for s in suffixes if not re.match(r"pre_norm\.|parallel\.layers\.[01]\.", s))
        mixers = [side for side in sides if side + "A_log" in source]
        if len(mixers) != 1 or extra:
            raise UnsupportedFormatError(
                f"{prefix}: a parallel layer of MoE-Mamba has one mixer and one feed-forward layer; here is something else"
                f"{f' ({extra[0]})' if extra else ''}."
            )
        sublayer.mixer = mixers[0]
        sublayer.feed_forward = sides[1 - sides.index(mixers[0])]
    elif name == FEED_FORWARD:
        sublayer.feed_forward = f"{prefix}{name}."
    else:
        raise UnsupportedFormatError(
            f"{source.location} has the sublayer {name!r} ({prefix}); MoE-Mamba has mixers (mamba), feedforward and parallel "
            "ones."
        )
    for router in ROUTERS:
        if sublayer.feed_forward + router in source:
            sublayer.router = sublayer.feed_forward + router
    for experts in EXPERT_PREFIXES:
        if sublayer.feed_forward + experts + "lin1_weight" in source:
            sublayer.experts = sublayer.feed_forward + experts
            break
    if sublayer.experts and not sublayer.router:
        raise UnsupportedFormatError(
            f"{sublayer.experts} has experts, but no gate ({' or '.join(ROUTERS)}): a router that computes its values from the "
            "experts' own weights has no counterpart in MoE-Mamba."
        )
    if sublayer.router and not sublayer.experts:
        raise ConversionError(
            f"{sublayer.router} is a router without experts; lin1_weight and lin2_weight are missing."
        )
    gates = [name for name in GATES if sublayer.experts + name in source]
    sublayer.gate = gates[0] if sublayer.experts and gates else ""
    parallel = "parallel_" if sublayer.mixer else ""
    sublayer.kind = parallel + ("moe" if sublayer.experts else "mlp")
    return sublayer


def read_sizes(source: "CheckpointSource", sublayers: list[Sublayer]) -> dict[str, Any]:
    """The sizes in `MoeMambaConfig`, from shapes.

    Raises:
        ConversionError: layers do not agree, or shapes make no sense.
    """
    vocab_size, hidden_size = matrix(source, EMBEDDING)
    mixers = {mixer_sizes(source, sublayer.mixer, hidden_size) for sublayer in sublayers if sublayer.mixer}
    if not mixers:
        raise UnsupportedFormatError(f"{source.location} has no Mamba layer; it is another kind of llm-random model.")
    inner, state_size, rank, conv_kernel, use_bias, use_conv_bias = agreed(source, mixers, "its mixers")
    if inner % hidden_size:
        raise ConversionError(
            f"{source.location}: the mixers' inner width {inner} is no multiple of the model's width {hidden_size}."
        )
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "expand": inner // hidden_size,
        "state_size": state_size,
        "time_step_rank": rank,
        "conv_kernel": conv_kernel,
        "use_bias": use_bias,
        "use_conv_bias": use_conv_bias,
        "num_experts": 1,
        "layers_num_experts": None,
    }
    counts = [expert_sizes(source, sublayer)[0] if sublayer.router else 0 for sublayer in sublayers]
    if any(counts):
        widths = {expert_sizes(source, sublayer)[1:] for sublayer in sublayers if sublayer.router}
        sizes["moe_intermediate_size"], _ = agreed(source, widths, "its experts")
        sizes["num_experts"] = max(counts)
        sizes["layers_num_experts"] = counts if len(set(counts) - {0}) > 1 else None
    dense = {dense_sizes(source, sublayer) for sublayer in sublayers if sublayer.feed_forward and not sublayer.experts}
    if dense:
        width, gated, bias = agreed(source, dense, "its dense layers")
        act = "silu" if gated else "relu"
        sizes |= {"mlp_intermediate_size": width, "mlp_gated": gated, "mlp_bias": bias, "mlp_hidden_act": act}
    return sizes


def matrix(source: "CheckpointSource", key: str, dims: int = 2) -> tuple[int, ...]:
    """Shape of a tensor that must have so many axes."""
    shape = source.shape(key)
    if len(shape) != dims:
        raise ConversionError(f"{key} must have {dims} axes, got the shape {shape}.")
    return shape


def agreed(source: "CheckpointSource", found: set[tuple], what: str) -> tuple:
    """The only element."""
    if len(found) > 1:
        raise ConversionError(
            f"{source.location}: {what} differ in size or make ({' and '.join(map(str, sorted(found)))}); MoE-Mamba has one "
            "size for all."
        )
    return next(iter(found))


def mixer_sizes(source: "CheckpointSource", prefix: str, hidden_size: int) -> tuple[int, int, int, int, bool, bool]:
    """Inner width, state size, time-step rank, convolution width, and whether projections and convolution have biases."""
    inner, state_size = matrix(source, prefix + "A_log")
    rank = matrix(source, prefix + "dt_proj.weight")[1]
    width = matrix(source, prefix + "conv1d.weight", dims=3)[2]
    return inner, state_size, rank, width, prefix + "in_proj.bias" in source, prefix + "conv1d.bias" in source


def expert_sizes(source: "CheckpointSource", sublayer: Sublayer) -> tuple[int, int, str]:
    """E, F, and the name of the gate's matrix."""
    experts, _, width = matrix(source, sublayer.experts + "lin1_weight", dims=3)
    return experts, width, sublayer.gate


def dense_sizes(source: "CheckpointSource", sublayer: Sublayer) -> tuple[int, bool, bool]:
    """F, whether it is gated, whether it has biases."""
    prefix = sublayer.feed_forward
    if prefix + "w1_gate.weight" in source:
        return matrix(source, prefix + "w2.weight")[1], True, False
    biases = [f"{prefix}logging_ff_{side}_relu.bias" in source for side in ("pre", "post")]
    if biases[0] != biases[1]:
        raise UnsupportedFormatError(
            f"{prefix} has a bias on one of its two matrices only; dense layers of MoE-Mamba have both or none."
        )
    return matrix(source, prefix + "logging_ff_pre_relu.weight")[0], False, biases[0]
