"""Configuration of MoE-Mamba: a Mamba or Mamba-2 model in which feed-forward layers alternate with the mixers."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...cache_names import CACHE_NAMES
from ..generation_parameters import generation_parameters
from ..mamba2.configuration_mamba2 import check_ssd_fields
from ..sharding import FSDP_PLAN
from ..validation import check_choice, check_common_fields, check_finite, check_positive, plain_errors

__all__ = ["LAYER_KINDS", "MoeMambaConfig"]

# what an entry of `layers_block_type` may be
LAYER_KINDS = ("mamba", "moe", "mlp", "parallel_moe", "parallel_mlp")

NORM_TYPES = ("layernorm", "rmsnorm", "biased_rmsnorm")

DEFAULT_NUM_LAYERS = 16


@plain_errors
@strict
class MoeMambaConfig(PreTrainedConfig):
    """Configuration of a MoE-Mamba model (arXiv 2401.04081).

    The defaults are the paper's MoE-Mamba-25M: 8 Mamba layers alternating with 8 Switch layers of 42 experts, LayerNorm
    before each, no final norm, an untied head. Fields of the mixer have the names of `MambaConfig` and `Mamba2Config`.

    Layers:
        num_hidden_layers: residual layers of any kind; by default the length of `layers_block_type`, else 16.
        layers_block_type: the kind of each layer: "mamba" (the mixer alone), "moe" (routed experts), "mlp" (a dense
            feed-forward layer), "parallel_moe" or "parallel_mlp" (mixer and feed-forward layer side by side, outputs
            added). By default "moe" where `i % expert_layer_period == expert_layer_offset`, else "mamba".
        parallel_norm: "shared", one norm for both sides of a parallel layer, or "separate".
        mixer_type: "mamba" or "mamba2"; the latter reads `num_heads` (default: inner width / `head_dim`), `head_dim`,
            `n_groups`, `chunk_size` and `time_step_limit`. `state_size` is 16 or 128 by default.
        expand: the mixer's inner width is expand * hidden_size; it is kept as `intermediate_size`, as in `MambaConfig`,
            and is not the width of any feed-forward layer.
        norm_type, final_norm_type: "layernorm" (with bias), "rmsnorm" or "biased_rmsnorm"; the latter is `norm_type` by
            default.
        final_norm: whether there is a norm after the last layer.
        lm_head_bias: whether the language model's head has a bias.

    Experts:
        num_experts, num_experts_per_tok: E experts, of which each token goes to the k with the highest scores.
        layers_num_experts: E of each layer, where layers differ: a list as long as there are layers, 0 for those without
            experts. `num_experts` is then the greatest of them. By default every layer has `num_experts`.
        moe_intermediate_size: F, the width of one expert; by default 3 * hidden_size.
        moe_hidden_act, moe_gated, moe_bias: an expert is `down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`.
        num_shared_experts, shared_expert_intermediate_size: experts that every token passes, added with weight 1; the
            width of one is `moe_intermediate_size` by default.
        mlp_intermediate_size, mlp_hidden_act, mlp_gated, mlp_bias: the dense layers; width 3 * hidden_size, activation
            and gating of the experts, and biases, by default.

    Router:
        router_scoring: "softmax" or "sigmoid" of the logits, in fp32.
        router_bias: whether the logits have a bias.
        norm_topk_prob: divide the k weights of a token by their sum. With k = 1 the weight is then 1 and the router
            learns from its auxiliary losses alone.
        router_scaling_factor: the weights are multiplied by it, after they are divided.
        router_selection_bias: keep a bias of the scores that counts when experts are chosen, but not in their weights
            (DeepSeek-V3, arXiv 2412.19437). It comes from the checkpoint; training leaves it as it is.
        router_num_groups, router_topk_groups: the experts form that many groups of neighbours; those of the best
            `router_topk_groups` can be chosen, judged by their best expert, or two best with a selection bias.
        router_jitter_noise: in training, multiply the router's input by a uniform draw from 1 ± this value.
        capacity_factor: in training, an expert takes at most `int(capacity_factor * tokens * k / E)` tokens of a batch,
            the first ones in sequence order, row by row; for the others its output is 0. None: no limit. In evaluation
            and over a cache there never is one, so decoding agrees with prefill. Padding takes no capacity.

    Losses (added to the loss in training, and whenever `output_router_logits` is set):
        router_aux_loss_coef: weight of the load-balancing loss.
        router_aux_loss_reduction: "sum", one loss for each layer, added up, as in the paper; or "pooled", one loss of
            the statistics averaged over layers, as in Mixtral.
        router_z_loss_coef: weight of the z-loss, the mean of logsumexp(logits) squared, summed over layers.
        output_router_logits: return router logits and losses.

    Initialisation:
        initializer_scale: s; router, experts, dense layers, embedding and heads are drawn from a normal distribution with
            variance s / fan_in, truncated at ±2 s. The mixers have their own rules.

    Raises:
        ValueError: a size that is not positive, an unknown kind or option, a list of layers of the wrong length or without
            any mixer, more experts per token than experts.

    Example:
        >>> from hf_mamba import MoeMambaConfig
        >>> MoeMambaConfig(hidden_size=64, num_hidden_layers=4, num_experts=8).layers_block_type
        ['mamba', 'moe', 'mamba', 'moe']
    """

    model_type = "moe_mamba"
    attribute_map = {"num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = [*CACHE_NAMES, "aux_loss", "z_loss", "router_logits"]
    base_model_fsdp_plan = FSDP_PLAN
    _get_generation_parameters = generation_parameters

    vocab_size: int = 50257
    hidden_size: int = 512
    num_hidden_layers: int | None = None
    layers_block_type: list[str] | None = None
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    parallel_norm: str = "shared"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    use_cache: bool = True

    norm_type: str = "layernorm"
    final_norm: bool = False
    final_norm_type: str | None = None
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True

    mixer_type: str = "mamba"
    state_size: int | None = None
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    time_step_rank: str | int = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    num_heads: int | None = None
    head_dim: int = 64
    n_groups: int = 1
    chunk_size: int = 256
    time_step_limit: list[float] | tuple[float, ...] = (0.0, float("inf"))

    num_experts: int = 42
    num_experts_per_tok: int = 1
    layers_num_experts: list[int] | None = None
    moe_intermediate_size: int | None = None
    moe_hidden_act: str = "relu"
    moe_gated: bool = False
    moe_bias: bool = False
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    mlp_intermediate_size: int | None = None
    mlp_hidden_act: str | None = None
    mlp_gated: bool | None = None
    mlp_bias: bool = True

    router_scoring: str = "softmax"
    router_bias: bool = False
    norm_topk_prob: bool = False
    router_scaling_factor: float | int = 1.0
    router_selection_bias: bool = False
    router_num_groups: int = 1
    router_topk_groups: int = 1
    router_jitter_noise: float | int = 0.0
    capacity_factor: float | int | None = None
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_reduction: str = "sum"
    router_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False

    initializer_scale: float = 0.1
    rescale_prenorm_residual: bool = False

    def __post_init__(self, **kwargs):
        self._check_options()
        self._fill_in_sizes(kwargs.pop("intermediate_size", None))
        self._fill_in_layers()
        self._check_expert_counts()
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()
        check_common_fields(self)
        if self.mixer_type == "mamba2":
            check_ssd_fields(self)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches allocate for each layer: recurrent states."""
        return ["linear_attention"] * (self.num_hidden_layers or 0)

    def _tensor_parallel_plan(self) -> dict[str, str] | None:
        """Which sub-modules tensor parallelism splits, if any: the feed-forward layers; mixers, norms and routers are on every rank.

        Experts with biases stay whole, since transformers would add the second bias once for each rank.
        """
        kinds = self.layers_block_type or []
        plan: dict[str, str] = {}
        if any(kind.endswith("moe") for kind in kinds):
            if not self.moe_bias:
                plan |= _split_width("layers.*.moe.experts", self.moe_gated, bias=False)
                plan["layers.*.moe.experts"] = "moe_tp_experts"
            if self.num_shared_experts:
                plan |= _split_width("layers.*.moe.shared_experts", self.moe_gated, self.moe_bias)
        if any(kind.endswith("mlp") for kind in kinds):
            plan |= _split_width("layers.*.mlp", bool(self.mlp_gated), self.mlp_bias)
        return plan or None

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """Whole experts on different ranks, in the words that this version of transformers has for Mixtral's."""
        from transformers import MixtralConfig

        styles = MixtralConfig.base_model_ep_plan
        if not any(kind.endswith("moe") for kind in self.layers_block_type or []):
            return None
        name = "gate_up_proj" if self.moe_gated else "up_proj"
        names = [name, "down_proj", *((f"{name}_bias", "down_proj_bias") if self.moe_bias else ())]
        plan = {f"layers.*.moe.experts.{name}": styles["layers.*.mlp.experts.down_proj"] for name in names}
        # before 5.21 the router's outputs were masked, since then the experts' inputs are
        if "layers.*.mlp.gate" in styles:
            plan["layers.*.moe.router"] = styles["layers.*.mlp.gate"]
        return plan | {"layers.*.moe.experts": styles["layers.*.mlp.experts"]}

    def _fill_in_sizes(self, intermediate_size: int | None) -> None:
        """Resolve the sizes that depend on others."""
        check_positive(self, "hidden_size", "expand", "head_dim")
        inner = self.expand * self.hidden_size
        if intermediate_size not in (None, inner):
            raise ValueError(
                f"MoeMambaConfig: `intermediate_size` is the mixer's inner width expand * hidden_size = {inner}, got "
                f"{intermediate_size}. Set `expand` for the mixer, `moe_intermediate_size` for the experts and "
                "`mlp_intermediate_size` for dense layers."
            )
        self.intermediate_size = inner
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if self.state_size is None:
            self.state_size = 128 if self.mixer_type == "mamba2" else 16
        if self.num_heads is None and self.mixer_type == "mamba2":
            self.num_heads = inner // self.head_dim
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = 3 * self.hidden_size
        if self.mlp_intermediate_size is None:
            self.mlp_intermediate_size = 3 * self.hidden_size
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        self.mlp_hidden_act = self.moe_hidden_act if self.mlp_hidden_act is None else self.mlp_hidden_act
        self.mlp_gated = self.moe_gated if self.mlp_gated is None else self.mlp_gated
        self.final_norm_type = self.norm_type if self.final_norm_type is None else self.final_norm_type
        check_positive(
            self,
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "mlp_intermediate_size",
            "shared_expert_intermediate_size",
        )

    def _fill_in_layers(self) -> None:
        """Resolve the kinds of the layers and their number."""
        check_positive(self, "expert_layer_period")
        if not 0 <= self.expert_layer_offset < self.expert_layer_period:
            raise ValueError(
                "MoeMambaConfig: `expert_layer_offset` must be at least 0 and below `expert_layer_period` "
                f"{self.expert_layer_period}, got {self.expert_layer_offset}."
            )
        if self.num_hidden_layers is None:
            self.num_hidden_layers = (
                DEFAULT_NUM_LAYERS if self.layers_block_type is None else len(self.layers_block_type)
            )
        check_positive(self, "num_hidden_layers")
        if self.layers_block_type is None:
            self.layers_block_type = [
                "moe" if i % self.expert_layer_period == self.expert_layer_offset else "mamba"
                for i in range(self.num_hidden_layers)
            ]
        kinds = self.layers_block_type
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"MoeMambaConfig: `layers_block_type` names {len(kinds)} layers, but `num_hidden_layers` is "
                f"{self.num_hidden_layers}; leave one of the two out."
            )
        unknown = sorted(set(kinds) - set(LAYER_KINDS))
        if unknown:
            raise ValueError(
                f"MoeMambaConfig: entries of `layers_block_type` must be among {', '.join(map(repr, LAYER_KINDS))}, got "
                f"{', '.join(map(repr, unknown))}."
            )
        if not any(kind == "mamba" or kind.startswith("parallel") for kind in kinds):
            raise ValueError(
                "MoeMambaConfig: no layer has a mixer, so no token would see another one; put 'mamba' or a parallel "
                "kind into `layers_block_type`, or raise `expert_layer_period`."
            )

    def _check_expert_counts(self) -> None:
        """Resolve `layers_num_experts`, and hold every layer's number of experts against the router's options."""
        counts = self.layers_num_experts
        kinds = self.layers_block_type or []
        if counts is not None:
            if len(counts) != len(kinds):
                raise ValueError(
                    f"MoeMambaConfig: `layers_num_experts` has {len(counts)} entries for {len(kinds)} layers; give one for "
                    "each layer, 0 for those without experts."
                )
            for index, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
                if isinstance(count, bool) or (count < 1 if kind.endswith("moe") else count != 0):
                    wanted = "a positive integer" if kind.endswith("moe") else "0"
                    raise ValueError(
                        f"MoeMambaConfig: `layers_num_experts` must be {wanted} at layer {index}, which is of the kind "
                        f"{kind!r}, got {count}."
                    )
            if len({count for count in counts if count}) > 1 and self.router_aux_loss_reduction == "pooled":
                raise ValueError(
                    "MoeMambaConfig: `router_aux_loss_reduction` 'pooled' averages over layers with the same number of "
                    "experts, but those of `layers_num_experts` differ; use 'sum'."
                )
            self.num_experts = max(counts) or self.num_experts
        check_positive(self, "router_num_groups", "router_topk_groups")
        groups, chosen = self.router_num_groups, self.router_topk_groups
        if chosen > groups:
            raise ValueError(
                f"MoeMambaConfig: `router_topk_groups` must not exceed `router_num_groups` {groups}, got {chosen}."
            )
        for count in sorted({count for count in counts if count} if counts is not None else {self.num_experts}):
            if count % groups:
                raise ValueError(
                    f"MoeMambaConfig: `router_num_groups` must divide the number of experts {count}, got {groups}."
                )
            size = count // groups
            if self.num_experts_per_tok > chosen * size:
                raise ValueError(
                    f"MoeMambaConfig: `num_experts_per_tok` must not exceed `num_experts` {chosen * size}"
                    f"{'' if groups == 1 else f' that {chosen} of {groups} groups hold'}, got {self.num_experts_per_tok}."
                )
            if groups > 1 and self.router_selection_bias and size < 2:
                raise ValueError(
                    "MoeMambaConfig: with `router_selection_bias` a group is judged by its two best experts, but "
                    f"`router_num_groups` {groups} leaves {size} of {count} to a group."
                )

    def _check_options(self) -> None:
        # importing the table of activations pulls in all of transformers' modeling code
        from transformers.activations import ACT2FN

        check_choice(self, "mixer_type", ("mamba", "mamba2"))
        check_choice(self, "parallel_norm", ("shared", "separate"))
        check_choice(self, "norm_type", NORM_TYPES)
        check_choice(self, "final_norm_type", (None, *NORM_TYPES))
        check_choice(self, "router_scoring", ("softmax", "sigmoid"))
        check_choice(self, "router_aux_loss_reduction", ("sum", "pooled"))
        check_choice(self, "time_step_init_scheme", ("random", "constant"))
        check_choice(self, "moe_hidden_act", tuple(ACT2FN))
        check_choice(self, "mlp_hidden_act", (None, *ACT2FN))
        check_finite(self, "router_scaling_factor", minimum=0.0, above=True)
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"MoeMambaConfig: `capacity_factor` must be positive, or None for no limit, got {self.capacity_factor}."
            )
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(
                f"MoeMambaConfig: `router_jitter_noise` must be at least 0 and below 1, got {self.router_jitter_noise}."
            )
        for name in ("num_shared_experts", "router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"MoeMambaConfig: `{name}` must not be negative, got {getattr(self, name)}.")
        if self.initializer_scale <= 0:
            raise ValueError(f"MoeMambaConfig: `initializer_scale` must be positive, got {self.initializer_scale}.")


def _split_width(module: str, gated: bool, bias: bool) -> dict[str, str]:
    """The plan that splits the inner width of a feed-forward layer.

    Empty for gate and value in one matrix with a bias: transformers would split that bias at other places than the matrix.
    """
    if gated and bias:
        return {}
    up = {f"{module}.gate_up_proj": "packed_colwise"} if gated else {f"{module}.up_proj": "colwise"}
    return up | {f"{module}.down_proj": "rowwise"}
