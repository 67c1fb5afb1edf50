"""The MoE dialect of mamba_ssm (repository garrett361/mamba, trained with foundation-model-stack/fms-fsdp, IBM).

mamba_ssm's names and configuration, with `moe_layer_idx` and `moe_cfg`: in the layers named there, routed and shared experts
take the place of the gated MLP. Each layer of theirs becomes two of `MoeMambaForCausalLM`: the mixer, then the experts or MLP.
The experts' tensors come in three generations: `experts.{e}.fc1.weight`, `experts.fc1_weights`, `experts.fc1.weight`; in all of
them, and in the shared experts, fc1 has the value's rows before the gate's.

Symbols: d model width, E experts, k experts per token, F expert width.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConversionError
from .base import ConversionPlan, Format, FormatOption, TensorRule, config_count, config_value, make_config
from .mamba_ssm import plan_mamba_ssm, reference_mamba_ssm
from .plain_mamba import Getter, linear, need
from .plain_model import routed
from .rules import copy_rule, stack_rule, swapped_rule

if TYPE_CHECKING:
    from hf_mamba import MoeMambaConfig

    from ..source import CheckpointSource

__all__ = ["MambaSsmMoeFormat"]

GATE_KEY = re.compile(r"backbone\.layers\.(\d+)\.mlp\.gate\.lin\.weight")
MOE_FIELDS = ("moe_layer_idx", "moe_cfg")

# arguments of their MoE that the weights and the outputs do not depend on, or that only make sizes, which shapes show
WITHOUT_EFFECT = {"moe_impl", "multiple_of"}
MOE_ARGUMENTS = {
    "n_routed_experts",
    "n_activated_experts",
    "n_shared_experts",
    "d_intermediate",
    "hidden_features",
    "n_expert_groups",
    "n_limited_groups",
    "score_func",
    "route_scale",
    "gate_bias",
}


class MambaSsmMoeFormat(Format):
    """IBM's mixture-of-experts fork of mamba_ssm → `MoeMambaForCausalLM`."""

    name = "mamba_ssm_moe"
    title = "mamba_ssm with experts (garrett361/mamba, fms-fsdp)"
    options = {
        "layer_order": FormatOption(
            ("string", "numeric"),
            "Order in which the layers run. The fork sorts their numbers as strings (0, 1, 10, 11, …, 2), which shows from "
            "eleven layers on; choose numeric for a revision that counts as one would expect.",
        ),
    }

    def recognises(self, source: "CheckpointSource") -> bool:
        if "backbone.embedding.weight" not in source or "model_type" in (source.config or {}):
            return False
        return bool((source.config or {}).get("moe_layer_idx")) or any(map(GATE_KEY.fullmatch, source.infos))

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        from hf_mamba import MoeMambaConfig

        given = source.config
        if given is None or "moe_cfg" not in given:
            raise ConversionError(
                f"{source.location} has experts as in IBM's fork of mamba_ssm, but no config.json with a `moe_cfg`: how many "
                "experts a token goes to, and how they are weighted, is written there. Put it beside the weights."
            )
        moe_layers = expert_layers(source, given)
        plain = plan_mamba_ssm(source, {k: v for k, v in given.items() if k not in MOE_FIELDS}, prefix="")
        if not config_value(given, "d_intermediate", int, 0):
            # their blocks then have no feed-forward part at all
            note = "`moe_layer_idx` has no effect without `d_intermediate`; the model has mixers alone."
            return replace(plain, notes=[*plain.notes, note], options=dict(options))
        order = layer_order(given, options["layer_order"])
        first = moe_layers[0]
        fields = moe_fields(source, config_value(given, "moe_cfg", dict), first)
        kinds = [kind for index in order for kind in ("mamba", "moe" if index in moe_layers else "mlp")]
        base = plain.config.to_dict()
        config: Any = make_config(
            MoeMambaConfig.from_dict,
            base | fields | {"layers_block_type": kinds, "num_hidden_layers": len(kinds)},
        )
        place = {index: position for position, index in enumerate(order)}
        rules = []
        for rule in plain.rules:
            match = re.match(r"backbone\.layers\.(\d+)\.", rule.target)
            if match is None:
                rules.append(rule)
                continue
            index, half = divmod(int(match[1]), 2)
            name = rule.target[match.end() :]
            if index in moe_layers and name.startswith("mlp."):
                continue
            rules.append(replace(rule, target=f"backbone.layers.{2 * place[index] + half}.{name}"))
        for index in moe_layers:
            target = f"backbone.layers.{2 * place[index] + 1}.moe."
            rules += moe_rules(config, source, target, f"backbone.layers.{index}.mlp.")
        return replace(
            plain,
            config=config,
            rules=rules,
            notes=[*plain.notes, *notes(given, options)],
            options=dict(options),
        )

    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        given = source.config
        assert given is not None
        names = [str(index) for index in range(given["n_layer"])]
        return reference_mamba_ssm(
            source,
            given,
            input_ids,
            prefix="",
            order=map(int, sorted(names) if plan.options["layer_order"] == "string" else names),
            feed_forward=partial(reference_feed_forward, given["moe_cfg"]),
        )


def expert_layers(source: "CheckpointSource", given: Mapping[str, Any]) -> list[int]:
    """The layers with experts, which configuration and tensors must agree on.

    Raises:
        ConversionError: they do not, or a number is out of range.
    """
    listed = config_value(given, "moe_layer_idx", list, [])
    layers = config_count(given, "n_layer")
    for index in listed:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < layers:
            raise ConversionError(
                f"config.json: `moe_layer_idx` must list layers from 0 to {layers - 1}, got {index!r}."
            )
    found = {int(match[1]) for match in map(GATE_KEY.fullmatch, source.infos) if match}
    if config_value(given, "d_intermediate", int, 0) and found != set(listed):
        odd = min(found ^ set(listed))
        state = "has a router but is not listed" if odd in found else "is listed but has no router"
        raise ConversionError(f"config.json and tensors disagree: layer {odd} {state} in `moe_layer_idx`.")
    return sorted(set(listed))


def layer_order(given: Mapping[str, Any], order: str) -> list[int]:
    """Their layers' numbers in the order in which they run."""
    layers = list(range(config_count(given, "n_layer")))
    return sorted(layers, key=str) if order == "string" else layers


def expert_keys(source: "CheckpointSource", prefix: str, count: int) -> tuple[list[str], list[str], bool]:
    """Keys of fc1 and of fc2 in this file's generation, and whether they are one tensor each for all experts."""
    for one, two in (("fc1_weights", "fc2_weights"), ("fc1.weight", "fc2.weight")):
        if f"{prefix}experts.{one}" in source:
            return [f"{prefix}experts.{one}"], [f"{prefix}experts.{two}"], True
    return (
        [f"{prefix}experts.{expert}.fc1.weight" for expert in range(count)],
        [f"{prefix}experts.{expert}.fc2.weight" for expert in range(count)],
        False,
    )


def moe_fields(source: "CheckpointSource", moe_cfg: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """`moe_cfg` as fields of `MoeMambaConfig`; widths, which their code rounds, from the tensors of `layer`.

    Raises:
        ConversionError: unknown or missing arguments, or widths that do not add up.
    """
    unknown = sorted(set(moe_cfg) - MOE_ARGUMENTS - WITHOUT_EFFECT)
    if unknown:
        raise ConversionError(
            f"config.json: `moe_cfg` has {', '.join(map(repr, unknown))}, which is not known here; known are "
            f"{', '.join(sorted(MOE_ARGUMENTS | WITHOUT_EFFECT))}."
        )
    prefix = f"backbone.layers.{layer}.mlp."
    count = config_count(moe_cfg, "n_routed_experts")
    shared = config_count(moe_cfg, "n_shared_experts", least=0, default=0)
    scoring = config_value(moe_cfg, "score_func", str, "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise ConversionError(f"config.json: `moe_cfg.score_func` must be softmax or sigmoid, got {scoring!r}.")
    bias = prefix + "gate.bias" in source
    if "gate_bias" in moe_cfg and bias != config_value(moe_cfg, "gate_bias", bool):
        raise ConversionError(
            f"config.json: `moe_cfg.gate_bias` is {moe_cfg['gate_bias']}, but {prefix}gate.bias is {'' if bias else 'not '}"
            "there."
        )
    second = expert_keys(source, prefix, count)[1][0]
    width = source.shape(second)[-1]
    wanted = next(
        (config_value(moe_cfg, key, int) for key in ("d_intermediate", "hidden_features") if key in moe_cfg), width
    )
    multiple = config_count(moe_cfg, "multiple_of", default=1)
    if width != -(-wanted // multiple) * multiple:
        raise ConversionError(f"{second} has experts of width {width}, but `moe_cfg` in config.json says {wanted}.")
    fields = {
        "num_experts": count,
        "num_experts_per_tok": config_value(moe_cfg, "n_activated_experts", int),
        "moe_intermediate_size": width,
        "moe_hidden_act": "silu",
        "moe_gated": True,
        "moe_bias": False,
        "num_shared_experts": shared,
        "router_scoring": scoring,
        # their sigmoid weights are divided by their sum, their softmax weights are not
        "norm_topk_prob": scoring == "sigmoid",
        "router_scaling_factor": config_value(moe_cfg, "route_scale", float, 1.0),
        "router_selection_bias": bias,
        "router_num_groups": config_value(moe_cfg, "n_expert_groups", int, 1),
        "router_topk_groups": config_value(moe_cfg, "n_limited_groups", int, 1),
    }
    # without groups the second number has no part in their code
    if fields["router_num_groups"] == 1:
        fields["router_topk_groups"] = 1
    if shared:
        total = source.shape(prefix + "shared_experts.fc2.weight")[-1]
        if total % shared:
            raise ConversionError(
                f"{prefix}shared_experts has the width {total}, which {shared} shared experts (`n_shared_experts`) cannot "
                "have."
            )
        fields["shared_expert_intermediate_size"] = total // shared
    return fields


def moe_rules(config: "MoeMambaConfig", source: "CheckpointSource", target: str, prefix: str) -> list[TensorRule]:
    """The rules of one layer's router and experts."""
    d, count, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    assert width is not None and config.shared_expert_intermediate_size is not None
    rules = [copy_rule(target + "router.weight", prefix + "gate.lin.weight", (count, d))]
    if config.router_selection_bias:
        rules.append(copy_rule(target + "router.selection_bias", prefix + "gate.bias", (count,)))
    ones, twos, stacked = expert_keys(source, prefix, count)
    if stacked:
        rules.append(swapped_rule(target + "experts.gate_up_proj", ones[0], (count, 2 * width, d)))
        rules.append(copy_rule(target + "experts.down_proj", twos[0], (count, d, width)))
    else:
        rules.append(stack_rule(target + "experts.gate_up_proj", ones, (2 * width, d), swapped=True))
        rules.append(stack_rule(target + "experts.down_proj", twos, (d, width)))
    if config.num_shared_experts:
        total = config.num_shared_experts * config.shared_expert_intermediate_size
        shared = "shared_experts."
        rules.append(
            swapped_rule(f"{target}{shared}gate_up_proj.weight", f"{prefix}{shared}fc1.weight", (2 * total, d))
        )
        rules.append(copy_rule(f"{target}{shared}down_proj.weight", f"{prefix}{shared}fc2.weight", (d, total)))
    return rules


def reference_feed_forward(moe_cfg: Mapping[str, Any], get: Getter, x: Tensor) -> Tensor:
    """What stands in the place of the gated MLP: experts in layers that have a router, else the MLP itself."""
    if get("mlp.gate.lin.weight") is None:
        return reference_gated(need(get, "mlp.fc1.weight"), need(get, "mlp.fc2.weight"), x)
    tokens = x.reshape(-1, x.shape[-1])
    indices, weights = reference_routing(moe_cfg, get, tokens)
    stacked = [
        value
        for one, two in (("fc1_weights", "fc2_weights"), ("fc1.weight", "fc2.weight"))
        for value in (get(f"mlp.experts.{one}"), get(f"mlp.experts.{two}"))
        if value is not None
    ]

    def run(expert: int, part: Tensor) -> Tensor:
        names = (f"mlp.experts.{expert}.{name}.weight" for name in ("fc1", "fc2"))
        fc1, fc2 = (value[expert] for value in stacked) if stacked else (need(get, name) for name in names)
        return reference_gated(fc1, fc2, part)

    out = routed(tokens, indices, weights, run)
    if get("mlp.shared_experts.fc1.weight") is not None:
        fc1, fc2 = (need(get, f"mlp.shared_experts.{name}.weight") for name in ("fc1", "fc2"))
        out = out + reference_gated(fc1, fc2, tokens)
    return out.view_as(x)


def reference_gated(fc1: Tensor, fc2: Tensor, x: Tensor) -> Tensor:
    """`fc2 · (value · silu(gate))`, value and gate being the two halves of `fc1 · x`."""
    value, gate = (x @ fc1.T).chunk(2, dim=-1)
    return (value * gate * torch.sigmoid(gate)) @ fc2.T


def reference_routing(moe_cfg: Mapping[str, Any], get: Getter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights (N, k) for tokens (N, d), found one token after another."""
    bias = get("mlp.gate.bias")
    groups, kept = moe_cfg.get("n_expert_groups", 1), moe_cfg.get("n_limited_groups", 1)
    sigmoid = moe_cfg.get("score_func", "softmax") == "sigmoid"
    chosen, weights = [], []
    for row in linear(get, "mlp.gate.lin", tokens):
        exact = row.sigmoid() if sigmoid else torch.exp(row - row.logsumexp(dim=0))
        ranking = (exact if bias is None else exact + bias).tolist()
        size = len(ranking) // groups
        # a group is as good as its best expert, or as its two best with a bias
        judged = 1 if bias is None else 2
        worth = [sum(sorted(ranking[g * size : (g + 1) * size], reverse=True)[:judged]) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda g: -worth[g])[: kept if groups > 1 else 1]
        eligible = [e for e in range(len(ranking)) if e // size in open_groups]
        best = sorted(eligible, key=lambda e: -ranking[e])[: moe_cfg["n_activated_experts"]]
        share = exact[best] / exact[best].sum() if sigmoid else exact[best]
        chosen.append(torch.tensor(best))
        weights.append(share * moe_cfg.get("route_scale", 1.0))
    return torch.stack(chosen), torch.stack(weights)


def notes(given: Mapping[str, Any], options: Mapping[str, str]) -> Iterator[str]:
    """What the user should know."""
    if given["n_layer"] > 10:
        other = "numeric" if options["layer_order"] == "string" else "string"
        yield (
            f"Warning: the layers run in {options['layer_order']} order of their numbers. IBM's fork sorts them as strings (0, "
            "1, 10, 11, …, 2), so a model trained by it needs that order; if the checkpoint comes from a revision that sorts "
            f"them otherwise, convert it again with --option layer_order={other}, and compare losses on real text."
        )
    if set(given["moe_cfg"]) & WITHOUT_EFFECT:
        yield "`moe_impl` and `multiple_of` of `moe_cfg` have no effect on the converted model."
