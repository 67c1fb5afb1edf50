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
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConversionError, UnsupportedFormatError
from .base import ConversionPlan, Format, FormatOption, TensorRule, make_config
from .llm_random_layout import EMBEDDING, GATES, Layout, Sublayer, expert_sizes, is_llm_random, read_layout
from .plain_mamba import ACTIVATIONS, Getter, layer_norm, linear, mamba1_mixer, need, rms_norm
from .plain_model import getter, routed
from .rules import copy_rule, mixer_rules, norm_rules, stack_transposed_rule, transposed_rule

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["LlmRandomFormat"]

HEAD = "head.weight"
POWER = "moe_values_exp"


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
        return is_llm_random(source)

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
        config: Any = make_config(
            MoeMambaConfig,
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
        top = getter(source, "")
        top_k, choice = int(plan.options["experts_per_token"]), plan.options["activation"]
        # block number and name of each sublayer, in the order of the file, which within a block is that of the modules
        sublayers: dict[str, tuple[int, str]] = {}
        for key in source.infos:
            match = re.match(r"encoder\.blocks\.block_(\d+)\.block\.residual_(\w+)\.layer\.", key)
            if match is not None:
                sublayers[match[0]] = int(match[1]), match[2]
        hidden = need(top, EMBEDDING)[input_ids]
        # a stable sort: within a block the order stays
        for prefix, (_, name) in sorted(sublayers.items(), key=lambda item: item[1][0]):
            normed = reference_norm(getter(source, prefix), hidden)
            for part in ("parallel.layers.0.", "parallel.layers.1.") if name == "parallel" else (f"{name}.",):
                hidden = hidden + reference_part(getter(source, prefix + part), normed, top_k, choice)
        return hidden @ need(top, HEAD).T


def reference_norm(get: Getter, x: Tensor) -> Tensor:
    """The norm before a sublayer."""
    if get("pre_norm.g") is not None:
        return rms_norm(x, get("pre_norm.g"), get("pre_norm.b"))
    return layer_norm(x, need(get, "pre_norm.weight"), get("pre_norm.bias"))


def reference_part(get: Getter, x: Tensor, top_k: int, choice: str) -> Tensor:
    """A mixer, experts or a dense layer, told apart by the tensors it has: (B, L, d) → (B, L, d)."""
    if get("A_log") is not None:
        return mamba1_mixer(get, x)
    if get("gating.gate") is not None or get("router.gate") is not None:
        return reference_experts(get, x, top_k, choice)
    if get("w1_gate.weight") is not None:
        first, second = linear(get, "w1_gate", x).chunk(2, dim=-1)
        return linear(get, "w2", ACTIVATIONS["silu"](first) * second)
    return linear(get, "logging_ff_post_relu", linear(get, "logging_ff_pre_relu", x).clamp(min=0))


def reference_experts(get: Getter, x: Tensor, top_k: int, choice: str) -> Tensor:
    """Experts stored as (E, in, out), of any generation; `choice` is the option `activation`."""
    tokens = x.reshape(-1, x.shape[-1])
    gate = get("gating.gate")
    logits = tokens @ (need(get, "router.gate") if gate is None else gate)
    probabilities = torch.exp(logits - logits.logsumexp(dim=1, keepdim=True))
    order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    prefix = "" if get("lin1_weight") is not None else "expert_inner_function."
    lin1, lin2 = need(get, f"{prefix}lin1_weight"), need(get, f"{prefix}lin2_weight")
    new_gate, old_gate = get(f"{prefix}gate_weight"), get(f"{prefix}swi_glu_gate_weight")
    plain = new_gate is None and old_gate is None
    activation = ACTIVATIONS[("relu" if plain else "silu") if choice == "auto" else choice]

    def run(expert: int, part: Tensor) -> Tensor:
        inner = part @ lin1[expert]
        if new_gate is not None:
            inner = activation(part @ new_gate[expert]) * inner
        elif old_gate is not None:
            inner = activation(inner) * (part @ old_gate[expert])
        else:
            inner = activation(inner)
        return inner @ lin2[expert]

    return routed(tokens, order, probabilities.gather(1, order), run).view_as(x)


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


def sublayer_rules(config: Any, source: "CheckpointSource", index: int, sublayer: Sublayer) -> list[TensorRule]:
    """The rules of one residual layer."""
    target = f"backbone.layers.{index}."
    hidden = config.hidden_size
    names = ("g", "b") if config.norm_type == "biased_rmsnorm" else ("weight", "bias")
    rules = norm_rules(config.norm_type, hidden, target + "norm.", sublayer.prefix + "pre_norm.", names)
    if sublayer.mixer:
        rules += mixer_rules(config, "mamba", target + "mixer.", sublayer.mixer)
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


def notes(source: "CheckpointSource", layout: Layout, activation: str, top_k: int) -> Iterator[str]:
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
