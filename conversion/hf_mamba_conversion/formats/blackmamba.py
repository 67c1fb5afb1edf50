"""BlackMamba (Anthony et al., arXiv 2402.01771; repository Zyphra/BlackMamba): the public 1.5B and 2.8B models.

`config.json` has no `model_type`; `pytorch_model.bin` holds the tensors under the key "model" (the release) or flat (what the
repository's own `save_pretrained` writes). `mamba_moe_layers` gives each layer's code: "r" a Mamba mixer, a digit from 2 to 9
that many experts, "1" a dense layer, "rN" a mixer and experts (or, "r1", a dense layer) side by side, with a norm each.

Symbols: H model width, F expert width, E experts, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConversionError
from .base import ConversionPlan, Format, FormatOption, TensorRule, config_count, config_value, make_config
from .plain_mamba import ACTIVATIONS, Getter, layer_norm, linear, mamba1_mixer, need, rms_norm
from .plain_model import getter, routed
from .rules import copy_rule, mixer_rules, norm_rules, stack_rule

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["BlackMambaFormat"]

EMBEDDING_KEYS = ("embedding.word_embeddings.weight", "embedding.weight")
HEAD_KEY = "output_layer.weight"
EPSILON = 1e-5

# what the released loader reads from config.json; it takes no notice of anything else
READ_KEYS = {
    "num_layers",
    "hidden_size",
    "state_size",
    "conv_dimension",
    "vocab_size",
    "expansion_factor",
    "mamba_moe_layers",
    "ffn_hidden_size",
    "add_bias_linear",
    "swiglu",
    "max_sequence_length",
}


class BlackMambaFormat(Format):
    """Zyphra's BlackMamba → `MoeMambaForCausalLM`."""

    name = "blackmamba"
    title = "BlackMamba (Zyphra/BlackMamba)"
    options = {
        "activation": FormatOption(
            ("gelu", "silu"),
            "Activation of experts and dense layers. The released code computes GELU whatever the configuration's `swiglu` "
            "suggests; the paper says SwiGLU.",
        ),
        "routing": FormatOption(
            ("sigmoid", "softmax"),
            "Scores of the router: sigmoid as in the released code, or softmax, its branch for a `routing_mode` other than "
            "sinkhorn.",
        ),
    }

    def recognises(self, source: "CheckpointSource") -> bool:
        config = source.config or {}
        if "model_type" in config:
            return False
        if "mamba_moe_layers" in config:
            return True
        keys = source.infos
        return "decoder.final_layernorm.weight" in keys and "decoder.layers.0.norm.weight" in keys

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        from hf_mamba import MoeMambaConfig

        given = read_config(source.config)
        codes = layer_codes(given)
        bias = config_value(given, "add_bias_linear", bool)
        gated = config_value(given, "swiglu", bool)
        width = config_value(given, "ffn_hidden_size", int)
        counts = [num_experts(code) for code in codes]
        config: Any = make_config(
            MoeMambaConfig,
            vocab_size=config_value(given, "vocab_size", int),
            hidden_size=config_value(given, "hidden_size", int),
            layers_block_type=[layer_kind(code) for code in codes],
            parallel_norm="separate",
            tie_word_embeddings=True,
            lm_head_bias=bias,
            norm_type="rmsnorm",
            final_norm=True,
            final_norm_type="layernorm",
            layer_norm_epsilon=EPSILON,
            state_size=config_value(given, "state_size", int),
            conv_kernel=config_value(given, "conv_dimension", int),
            expand=config_value(given, "expansion_factor", int),
            use_bias=bias,
            num_experts=max(counts) or 1,
            layers_num_experts=counts if len(set(counts) - {0}) > 1 else None,
            moe_intermediate_size=width,
            moe_hidden_act=options["activation"],
            moe_gated=gated,
            moe_bias=bias,
            mlp_intermediate_size=width,
            mlp_hidden_act=options["activation"],
            mlp_gated=gated,
            mlp_bias=bias,
            router_scoring=options["routing"],
            router_bias=True,
        )
        shapes = source.infos
        embedding = embedding_key(shapes)
        rules = [copy_rule("backbone.embeddings.weight", embedding, (config.vocab_size, config.hidden_size))]
        for index, code in enumerate(codes):
            rules += layer_rules(config, index, code)
        rules += norm_rules("layernorm", config.hidden_size, "backbone.norm_f.", "decoder.final_layernorm.")
        if bias:
            rules.append(copy_rule("lm_head.bias", "output_layer.bias", (config.vocab_size,)))
        copies = [key for key in (*EMBEDDING_KEYS, HEAD_KEY) if key in shapes and key != embedding]
        return ConversionPlan(
            config=config,
            rules=rules,
            derivable=dict.fromkeys(copies, embedding),
            notes=list(notes(given, options, any(code != "r" for code in codes))),
            options=dict(options),
        )

    @torch.no_grad()
    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        given = read_config(source.config)
        top = getter(source, "")
        forward = partial(
            reference_feed_forward,
            gated=given["swiglu"],
            activation=ACTIVATIONS[plan.options["activation"]],
            sigmoid=plan.options["routing"] == "sigmoid",
        )
        embedding = need(top, embedding_key(source.infos))
        residual = embedding[input_ids]
        for index in range(given["num_layers"]):
            prefix = f"decoder.layers.{index}."
            get, mixer = getter(source, prefix), getter(source, f"{prefix}mixer.")
            normed = rms_norm(residual, need(get, "norm.weight"), eps=EPSILON)
            code = given["mamba_moe_layers"][index] if given["mamba_moe_layers"] else "r"
            update = mamba1_mixer(mixer, normed) if code[0] == "r" else forward(mixer, normed)
            if len(code) == 2:
                normed = rms_norm(residual, need(get, "norm_moe.weight"), eps=EPSILON)
                update = update + forward(getter(source, f"{prefix}moe."), normed)
            residual = residual + update
        final = need(top, "decoder.final_layernorm.weight"), need(top, "decoder.final_layernorm.bias")
        logits = layer_norm(residual, *final) @ embedding.T
        bias = top("output_layer.bias")
        return logits if bias is None else logits + bias


def reference_feed_forward(
    get: Getter, x: Tensor, gated: bool, activation: Callable[[Tensor], Tensor], sigmoid: bool
) -> Tensor:
    """Their MLP, or their experts where there is a router: (B, L, H) → (B, L, H)."""

    def dense(prefix: str, part: Tensor) -> Tensor:
        inner = linear(get, f"{prefix}linear_fc1", part)
        if gated:
            # the activation is applied to the first half of the rows
            first, second = inner.split(inner.shape[-1] // 2, dim=-1)
            inner = activation(first) * second
        else:
            inner = activation(inner)
        return linear(get, f"{prefix}linear_fc2", inner)

    if get("router.weight") is None:
        return dense("", x)
    tokens = x.reshape(-1, x.shape[-1])
    route = tokens @ need(get, "router.weight").T + need(get, "router.bias")
    scores = 1 / (1 + torch.exp(-route)) if sigmoid else torch.exp(route - route.logsumexp(dim=1, keepdim=True))
    best, chosen = scores.max(dim=1)
    out = routed(tokens, chosen[:, None], best[:, None], lambda expert, part: dense(f"local_experts.{expert}.", part))
    return out.view_as(x)


def read_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The configuration, which this format cannot do without.

    Raises:
        ConversionError: there is none.
    """
    if config is None:
        raise ConversionError(
            "BlackMamba tensors without a config.json: the kinds of the layers, the biases and the widths are written there. "
            "Put the config.json of the release (Zyphra/BlackMamba-1.5B or -2.8B) beside the weights."
        )
    return config


def layer_codes(config: Mapping[str, Any]) -> list[str]:
    """The code of each layer; an empty `mamba_moe_layers` means Mamba throughout.

    Raises:
        ConversionError: a wrong number of entries, or one that the released code has no layer for.
    """
    layers = config_count(config, "num_layers")
    codes = config_value(config, "mamba_moe_layers", list)
    if not codes:
        return ["r"] * layers
    if len(codes) != layers:
        raise ConversionError(
            f"config.json: `mamba_moe_layers` has {len(codes)} entries, but `num_layers` is {layers}; it needs one for each "
            "layer."
        )
    for index, code in enumerate(codes):
        if not isinstance(code, str) or not re.fullmatch(r"r|[1-9]|r[1-9]", code):
            raise ConversionError(
                f"config.json: entry {index} of `mamba_moe_layers` must be 'r', a digit from 1 to 9, or 'r' and such a digit, "
                f"got {code!r}. The released code reads single digits only, so there is no layer of ten or more experts."
            )
    return codes


def num_experts(code: str) -> int:
    """E of a layer, 0 if it has no experts; "1" is a dense layer without a router."""
    return 0 if code[-1] in "r1" else int(code[-1])


def layer_kind(code: str) -> str:
    """The entry of `MoeMambaConfig.layers_block_type` for a code."""
    if code == "r":
        return "mamba"
    kind = "mlp" if code[-1] == "1" else "moe"
    return f"parallel_{kind}" if code[0] == "r" else kind


def embedding_key(shapes: Mapping[str, Any]) -> str:
    """The name of the embedding in this file.

    Raises:
        ConversionError: there is none.
    """
    for key in EMBEDDING_KEYS:
        if key in shapes:
            return key
    raise ConversionError(
        f"BlackMamba files hold the embedding as {EMBEDDING_KEYS[0]} or {EMBEDDING_KEYS[1]}; neither is there."
    )


def layer_rules(config: Any, index: int, code: str) -> list[TensorRule]:
    """The rules of one layer."""
    target, source = f"backbone.layers.{index}.", f"decoder.layers.{index}."
    rules = norm_rules("rmsnorm", config.hidden_size, target + "norm.", source + "norm.")
    if code[0] == "r":
        rules += mixer_rules(config, "mamba", target + "mixer.", source + "mixer.")
    if code == "r":
        return rules
    prefix = source + "mixer."
    if code[0] == "r":
        prefix = source + "moe."
        rules += norm_rules("rmsnorm", config.hidden_size, target + "feed_forward_norm.", source + "norm_moe.")
    width, hidden = config.moe_intermediate_size, config.hidden_size
    rows = 2 * width if config.moe_gated else width
    up = "gate_up_proj" if config.moe_gated else "up_proj"
    shapes = {("linear_fc1", up): (rows, hidden), ("linear_fc2", "down_proj"): (hidden, width)}
    count = num_experts(code)
    if count:
        rules.append(copy_rule(target + "moe.router.weight", prefix + "router.weight", (count, hidden)))
        rules.append(copy_rule(target + "moe.router.bias", prefix + "router.bias", (count,)))
    for (theirs, ours), shape in shapes.items():
        if count:
            experts = [f"{prefix}local_experts.{expert}.{theirs}." for expert in range(count)]
            rules.append(stack_rule(f"{target}moe.experts.{ours}", [key + "weight" for key in experts], shape))
            if config.moe_bias:
                rules.append(
                    stack_rule(f"{target}moe.experts.{ours}_bias", [key + "bias" for key in experts], shape[:1])
                )
        else:
            rules.append(copy_rule(f"{target}mlp.{ours}.weight", f"{prefix}{theirs}.weight", shape))
            if config.mlp_bias:
                rules.append(copy_rule(f"{target}mlp.{ours}.bias", f"{prefix}{theirs}.bias", shape[:1]))
    return rules


def notes(config: Mapping[str, Any], options: Mapping[str, str], feed_forward: bool) -> Iterator[str]:
    """What the user should know."""
    if feed_forward:
        yield (
            f"Experts use {options['activation']}. The released code computes GELU, the paper says SwiGLU; the other is "
            f"--option activation={'silu' if options['activation'] == 'gelu' else 'gelu'}."
        )
    if config.get("bias", config["add_bias_linear"]) != config["add_bias_linear"]:
        yield "`bias` in config.json has no effect: as in the released code, `add_bias_linear` decides on all biases."
    if "max_sequence_length" in config:
        yield f"Trained with up to {config['max_sequence_length']} tokens; the architecture sets no limit."
    unread = sorted(set(config) - READ_KEYS - {"bias"})
    if unread:
        yield f"Not read, as in the released code: {', '.join(unread)} of config.json."
