"""llm-random, the code of the MoE-Mamba paper (Pióro et al., arXiv 2401.04081): MoE-Mamba, Mamba-MLP and vanilla Mamba.

A checkpoint `{step}.pt` holds the tensors under "model", beside optimizer, step and logger, which are left out. No configuration
travels with it: sizes and layers are inferred from names and shapes; what no tensor shows is an option. Experts are stored as
(E, in, out), and their names come in three generations:

| time | experts | router |
| --- | --- | --- |
| until 8 Feb 2024 | `lin1_weight`, `lin2_weight` | `router.gate` |
| until 13 Mar 2024 | `expert_inner_function.lin1_weight`, … | `router.gate` |
| since | `expert_inner_function.lin1_weight`, … | `gating.gate` |

Symbols: V vocabulary, d model width, D inner width, N state size, R time-step rank, W convolution width, E experts, F width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConversionError, UnsupportedFormatError
from .base import ConversionPlan, Format, FormatOption, TensorRule, copy_rule
from .moe_common import mixer_rules, norm_rules, routed, stack_transposed_rule, transposed_rule
from .plain_mamba import ACTIVATIONS, layer_norm, mamba1_mixer, precise, rms_norm
from .plain_model import getter

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["LlmRandomFormat"]

EMBEDDING = "embedding_layer.layers.0.weight"
HEAD = "head.weight"
BLOCK_KEY = re.compile(r"encoder\.blocks\.block_(\d+)\.block\.residual_(\w+)\.layer\.(.+)")
ANY_BLOCK_KEY = re.compile(r"encoder\.blocks\.block_\d+\.block\.residual_(\w+?)\.(.+)")
# names that llm-random gives sublayers with a plain mixer, and the feed-forward one
MIXERS = ("mamba", "vanilla_mamba")
FEED_FORWARD = "feedforward"
PARALLEL = "parallel"
POWER = "moe_values_exp"

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


class LlmRandomFormat(Format):
    """llm-random's MoE-Mamba, Mamba-MLP and Mamba → `MoeMambaForCausalLM`."""

    name = "llm_random"
    title = "llm-random (the MoE-Mamba paper's code)"
    options = {
        "activation": FormatOption(
            ("auto", "relu", "silu", "gelu"),
            "Activation of the experts (`activation_type` of the training run): auto is relu, silu where they are gated.",
        ),
        "experts_per_token": FormatOption(
            tuple(str(count) for count in range(1, 17)),
            "Experts that each token goes to (`routing_top_k` of the training run).",
        ),
    }

    def recognises(self, source: "CheckpointSource") -> bool:
        return EMBEDDING in source.infos and any(ANY_BLOCK_KEY.fullmatch(key) for key in source.infos)

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        from hf_mamba import MoeMambaConfig

        ignored = powers(source)
        layout = read_layout(source)
        sublayers = layout.sublayers
        top_k = int(options["experts_per_token"])
        gated = any(sublayer.gate for sublayer in sublayers)
        activation = expert_activation(options["activation"], gated)
        fewest = min((expert_sizes(source, sublayer)[0] for sublayer in sublayers if sublayer.router), default=1)
        if top_k > fewest:
            raise ConversionError(
                f"option 'experts_per_token' is {top_k}, but the layer with the fewest experts has {fewest}."
            )
        config = MoeMambaConfig(
            layers_block_type=[sublayer.kind for sublayer in sublayers],
            norm_type=layout.norm_type,
            moe_hidden_act=activation,
            moe_gated=gated,
            num_experts_per_tok=top_k,
            **layout.sizes,
        )
        vocabulary = (config.vocab_size, config.hidden_size)
        rules = [copy_rule("backbone.embeddings.weight", EMBEDDING, vocabulary)]
        for index, sublayer in enumerate(sublayers):
            rules += sublayer_rules(config, source, index, sublayer)
        rules.append(copy_rule("lm_head.weight", HEAD, vocabulary))
        return ConversionPlan(
            config=config,
            rules=rules,
            ignored=ignored,
            notes=list(notes(source, layout, activation, top_k)),
            options=dict(options),
        )

    @torch.no_grad()
    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        keys = list(source.infos)
        top_k = int(plan.options["experts_per_token"])

        get = getter(source, "")

        def need(key: str) -> Tensor:
            return precise(source.read(key))

        def norm(prefix: str, x: Tensor) -> Tensor:
            if prefix + "pre_norm.g" in source:
                return rms_norm(x, need(prefix + "pre_norm.g"), need(prefix + "pre_norm.b"))
            return layer_norm(x, need(prefix + "pre_norm.weight"), need(prefix + "pre_norm.bias"))

        def experts(gate_key: str, prefix: str, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            logits = tokens @ need(gate_key)
            probabilities = torch.exp(logits - logits.logsumexp(dim=1, keepdim=True))
            order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :top_k]
            choice = plan.options["activation"]

            def run(expert: int, part: Tensor) -> Tensor:
                inner = part @ precise(source.read(prefix + "lin1_weight")[expert])
                if prefix + "gate_weight" in source:
                    gate = part @ precise(source.read(prefix + "gate_weight")[expert])
                    inner = ACTIVATIONS["silu" if choice == "auto" else choice](gate) * inner
                elif prefix + "swi_glu_gate_weight" in source:
                    gate = part @ precise(source.read(prefix + "swi_glu_gate_weight")[expert])
                    inner = ACTIVATIONS["silu" if choice == "auto" else choice](inner) * gate
                else:
                    inner = ACTIVATIONS["relu" if choice == "auto" else choice](inner)
                return inner @ precise(source.read(prefix + "lin2_weight")[expert])

            return routed(tokens, order, probabilities.gather(1, order), run).view_as(x)

        def dense(prefix: str, x: Tensor) -> Tensor:
            if prefix + "w1_gate.weight" in source:
                first, second = (x @ need(prefix + "w1_gate.weight").T).chunk(2, dim=-1)
                return (ACTIVATIONS["silu"](first) * second) @ need(prefix + "w2.weight").T
            inner = x @ need(prefix + "logging_ff_pre_relu.weight").T
            bias = get(prefix + "logging_ff_pre_relu.bias")
            out = (inner if bias is None else inner + bias).clamp(min=0) @ need(
                prefix + "logging_ff_post_relu.weight"
            ).T
            bias = get(prefix + "logging_ff_post_relu.bias")
            return out if bias is None else out + bias

        def part(prefix: str, x: Tensor) -> Tensor:
            """A mixer, experts or a dense layer, told apart by the tensors it has."""
            if prefix + "A_log" in source:
                return mamba1_mixer(getter(source, prefix), x)
            for gate in ("gating.gate", "router.gate"):
                if prefix + gate in source:
                    inner = prefix + "expert_inner_function."
                    return experts(prefix + gate, inner if inner + "lin1_weight" in source else prefix, x)
            return dense(prefix, x)

        prefixes: dict[str, int] = {}
        for key in keys:
            match = BLOCK_KEY.fullmatch(key)
            if match is not None:
                prefixes.setdefault(key.removesuffix(match[3]), int(match[1]))
        hidden = need(EMBEDDING)[input_ids]
        # a stable sort: within a block in the order of the file
        for prefix in sorted(prefixes, key=lambda prefix: prefixes[prefix]):
            normed = norm(prefix, hidden)
            name = prefix.split(".residual_")[1].removesuffix(".layer.")
            if name == "parallel":
                hidden = (
                    hidden + part(prefix + "parallel.layers.0.", normed) + part(prefix + "parallel.layers.1.", normed)
                )
            else:
                hidden = hidden + part(f"{prefix}{name}.", normed)
        return hidden @ need(HEAD).T


def expert_activation(choice: str, gated: bool) -> str:
    """The option's value, or llm-random's default for plain and for gated experts."""
    if choice != "auto":
        return choice
    return "silu" if gated else "relu"


def powers(source: "CheckpointSource") -> dict[str, str]:
    """The scalars `moe_values_exp`, which may be ignored since they are 1.

    Raises:
        UnsupportedFormatError: one is another number.
    """
    found = [key for key in source.infos if key.rsplit(".", 1)[-1] == POWER]
    for key in found:
        value = source.read(key)
        if value.numel() != 1 or value.item() != 1.0:
            raise UnsupportedFormatError(
                f"{key} raises the routing probabilities to the power {value.tolist()}; MoE-Mamba's router has no such power, "
                "only checkpoints with 1 can be converted."
            )
    return dict.fromkeys(found, "a power of 1 changes no routing probability")


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


def sublayer_rules(config: Any, source: "CheckpointSource", index: int, sublayer: Sublayer) -> list[TensorRule]:
    """The rules of one residual layer."""
    target = f"backbone.layers.{index}."
    hidden = config.hidden_size
    names = ("g", "b") if config.norm_type == "biased_rmsnorm" else ("weight", "bias")
    rules = norm_rules(config.norm_type, hidden, target + "norm.", sublayer.prefix + "pre_norm.", names)
    if sublayer.mixer:
        rules += mixer_rules(config, target + "mixer.", sublayer.mixer)
    if sublayer.experts:
        count, width, _ = expert_sizes(source, sublayer)
        rules.append(transposed_rule(target + "moe.router.weight", sublayer.router, (count, hidden)))
        first = sublayer.experts + "lin1_weight"
        if sublayer.gate:
            gate = sublayer.experts + sublayer.gate
            pair = (gate, first) if GATES[sublayer.gate] else (first, gate)
            rules.append(stack_transposed_rule(target + "moe.experts.gate_up_proj", pair, (count, 2 * width, hidden)))
        else:
            rules.append(transposed_rule(target + "moe.experts.up_proj", first, (count, width, hidden)))
        second = sublayer.experts + "lin2_weight"
        rules.append(transposed_rule(target + "moe.experts.down_proj", second, (count, hidden, width)))
    elif sublayer.feed_forward:
        width, prefix = config.mlp_intermediate_size, sublayer.feed_forward
        if config.mlp_gated:
            rules.append(copy_rule(target + "mlp.gate_up_proj.weight", prefix + "w1_gate.weight", (2 * width, hidden)))
            rules.append(copy_rule(target + "mlp.down_proj.weight", prefix + "w2.weight", (hidden, width)))
            return rules
        for ours, theirs, shape in (
            ("up_proj", "logging_ff_pre_relu", (width, hidden)),
            ("down_proj", "logging_ff_post_relu", (hidden, width)),
        ):
            rules.append(copy_rule(f"{target}mlp.{ours}.weight", f"{prefix}{theirs}.weight", shape))
            if config.mlp_bias:
                rules.append(copy_rule(f"{target}mlp.{ours}.bias", f"{prefix}{theirs}.bias", shape[:1]))
    return rules


def notes(source: "CheckpointSource", layout: Layout, activation: str, top_k: int):
    """What the user should know."""
    yield "No configuration travels with llm-random checkpoints; sizes and layers were inferred from the tensors."
    if any(sublayer.experts for sublayer in layout.sublayers):
        yield (
            f"Not in the file, so assumed: experts use {activation}, and each token goes to {top_k} of them "
            "(--option activation=…, --option experts_per_token=…)."
        )
        yield (
            "Experts take every token. The training code's limit (capacity_factor) is an option of training here, and its "
            "choice of the tokens to drop differs."
        )
    beside = sorted(source.siblings)
    if beside:
        yield f"Left out, as they are no part of the model: {', '.join(beside)}."
