"""What all models share: the residual stack, its inputs (masks, packing, caches) and the initialisation.

Symbols: B batch, L length, d model width, V vocabulary, n packed sequences.
"""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from mamba_kernels import add_rms_norm
from mamba_kernels.mixer import add_norm_linear, projections_are_fused

from ..cache import MAX_REPLAY, RecurrentCache
from ..cache_names import CACHE_NAMES
from ..integrations import peft as peft_integration
from ..integrations.bitsandbytes import avoid_packed_kernel
from ..integrations.cards import write_missing_card
from ..integrations.hub import PUSH_ARGUMENTS, push_model
from ..integrations.remote_code import published_config, write_shim
from ..integrations.weight_files import explain_loading_error
from ..layers import CausalConv1d, RMSNorm, SelectiveScanMixer, SSDMixer
from ..layers.cpu_steps import run_cpu_steps
from ..layers.fused_step import fused_step
from ..layers.linear import is_plain_linear, is_unhooked
from ..sequences import SequenceLayout, padding_mask, resolve_layout
from .inputs import (
    check_cache,
    check_metadata,
    check_token_inputs,
    embed_tokens,
    refuse_unknown,
    same_lengths,
    select_cache,
)
from .outputs import RecurrentModelOutput

__all__ = ["RecurrentBlock", "RecurrentModel", "RecurrentPreTrainedModel"]

logger = logging.get_logger(__name__)

# adapters on any projection are possible as soon as there can be a model
peft_integration.enable()

# the original mamba_ssm checkpoints call the embedding so
ORIGINAL_KEYS = {r"(^|\.)embedding\.weight$": r"\1embeddings.weight"}


class RecurrentBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: `x + mixer(norm(x))`.

    Subclasses give `make_mixer`.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.make_mixer(config, layer_idx)

    def make_mixer(self, config: PreTrainedConfig, layer_idx: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, seq_idx: Tensor | None = None) -> Tensor:
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        if cache is not None:
            out = fused_step(self.norm, self.mixer, residual, cache, seq_idx)
            if out is not None:
                return out
        return residual + self.mixer(self.norm(hidden_states), cache=cache, seq_idx=seq_idx)


def _has_forward_of_block(kind: type[nn.Module]) -> bool:
    """Whether blocks of a class run `RecurrentBlock.forward`, in which transformers may wrap a checkpoint for training."""
    return inspect.unwrap(kind.forward) is inspect.unwrap(RecurrentBlock.forward)


def _is_plain_norm(norm: Any, dtype: torch.dtype) -> bool:
    """Whether calling `norm` is an `rms_norm` with a result in `dtype`."""
    return type(norm) is RMSNorm and is_unhooked(norm) and norm.weight.dtype == dtype


def _projects_at_once(mixer: Any, update: Tensor, dtype: torch.dtype) -> bool:
    """Whether the first projection of a mixer is made together with the norm before it, which training on a GPU does."""
    if type(mixer) not in (SelectiveScanMixer, SSDMixer) or not is_unhooked(mixer):
        return False
    first = mixer.in_proj
    if not is_plain_linear(first) or not is_unhooked(first) or not first.weight.dtype == update.dtype == dtype:
        return False
    return projections_are_fused(update, first.weight)


class RecurrentPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: PreTrainedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    # states can be taken back by snapshot and replay, so assisted decoding is possible
    _is_stateful = False
    _skip_keys_device_placement = [*CACHE_NAMES]
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D", "mixer.dt_bias"]
    # what a checkpoint of another task is expected to lack
    _new_head: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        key_mapping=None,
        output_loading_info: bool = False,
        allow_missing: bool = False,
        **kwargs,
    ):
        """Load a model as transformers does; the original key `backbone.embedding.weight` is understood as well.

        Args:
            allow_missing: draw tensors that the checkpoint lacks at random, with a warning, as transformers does. The new
                head of a classifier always is; a backbone or a language model's head with gaps is refused by default.

        Raises:
            ValueError: the checkpoint lacks tensors, or a weight file is damaged.
            RuntimeError: the weights have other sizes than the configuration says.
        """
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                key_mapping=ORIGINAL_KEYS | (key_mapping or {}),
                output_loading_info=True,
                **kwargs,
            )
        except Exception as error:
            explained = explain_loading_error(error, str(pretrained_model_name_or_path))
            if explained is None:
                raise
            raise explained from error
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(cls._new_head))
        if missing and not allow_missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks {len(missing)} tensors of {cls.__name__}: "
                f"{shown}. They would have random values. Take a complete checkpoint of this architecture, map other key "
                "names with `key_mapping`, or pass `allow_missing=True` to train them from scratch."
            )
        avoid_packed_kernel(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *args,
        save_original_format: bool = False,
        **kwargs,
    ) -> None:
        """Save a model as transformers does, always under the standard key names, and with a model card.

        A README.md that is there already is left alone. MoE-Mamba, which transformers has no class for, gets the line of
        code that `trust_remote_code=True` runs.

        Args:
            push_to_hub: upload as `push_to_hub` does, with the keyword arguments of that, `repo_id` among them, after saving.
        """
        published = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        if push_to_hub and state_dict is not None:
            # saving empties the dictionary that it is given
            published["state_dict"] = dict(state_dict)
        with published_config(self.config):
            super().save_pretrained(
                save_directory,
                is_main_process,
                state_dict,
                False,
                max_shard_size,
                *args,
                save_original_format=save_original_format,
                **kwargs,
            )
        if is_main_process:
            write_shim(self.config, save_directory)
            write_missing_card(self, save_directory)
        if push_to_hub and is_main_process:
            repo_id = published.pop("repo_id", Path(save_directory).absolute().name)
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, **published)

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """Upload the model with its card as one commit; all keyword arguments are those of `hf_mamba.integrations.hub.push_model`.

        They are transformers' own and `license` and `facts` for the card. Files of an earlier upload in other shards are
        removed by the commit.

        Raises:
            ValueError: no licence is given, and none is known from a card; or metadata that the Hub would not take.
        """
        return push_model(self, repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Do nothing: a saved model refers to the installed package, so no code is to be copied beside it."""

    def set_lean_training(self, share: float = 1.0) -> None:
        """Whether layers compute again in backward what takes little time, in place of keeping it: the convolution's output
        and, in Mamba, the steps.

        Has an effect where the kernels run. Gradient checkpointing keeps less still and computes whole layers twice.

        Args:
            share: of the layers, from 0 (none) to 1 (all).

        Raises:
            ValueError: another share.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"set_lean_training: `share` must be between 0 and 1, got {share}.")
        mixers = [module for module in self.modules() if isinstance(module, SelectiveScanMixer | SSDMixer)]
        for index, mixer in enumerate(mixers):
            # spread evenly
            mixer.is_lean = int((index + 1) * share) > int(index * share)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | CausalConv1d):
            # torch's own default, which the Mamba code keeps for projections and convolution
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None and isinstance(module, nn.Linear):
                init.zeros_(module.bias)
            elif module.bias is not None:
                bound = 1 / math.sqrt(module.kernel_size[0])
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SelectiveScanMixer | SSDMixer):
            module.init_ssm_parameters()
            if self.config.rescale_prenorm_residual:
                self._rescale_residual(module.out_proj.weight)
        elif getattr(module, "weight", None) is not None and "Norm" in type(module).__name__:
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def _rescale_residual(self, weight: Tensor) -> None:
        """Redraw a projection into the residual stream, 1 / sqrt(layers) smaller (GPT-2, §2.3)."""
        bound = 1 / math.sqrt(weight.shape[-1] * self.config.num_hidden_layers)
        init.uniform_(weight, -bound, bound)


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, blocks and final norm.

    Subclasses give `block_class`.
    """

    block_class: type[nn.Module]
    output_class = RecurrentModelOutput

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layers(config))
        self.gradient_checkpointing = False
        self.norm_f = self.make_final_norm(config)
        self.post_init()

    def make_layers(self, config: PreTrainedConfig) -> list[nn.Module]:
        return [self.block_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]

    def make_final_norm(self, config: PreTrainedConfig) -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def take_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the arguments of `forward` that only this model has out of `kwargs`; they go to `run_layers`."""
        return {}

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> tuple | RecurrentModelOutput:
        """Run the stack.

        Args:
            input_ids: (B, L) integer; exactly one of this and `inputs_embeds`.
            attention_mask: (B, L), or (B, seen + L) over a cache; 0 = padding, on either side or in between. A padding
                token changes neither the states nor any other token's output.
            inputs_embeds: (B, L, d).
            cache: the states to continue from, which are updated in place; a `RecurrentCache`, or a transformers cache made
                for this configuration. Any number of tokens may follow.
            past_key_values, cache_params: other names for `cache`, from before transformers 5.24.
            use_cache: return a cache; by default `config.use_cache`, in training False.
            position_ids: (B, L); a sequence begins wherever a position does not follow the one before it. Positions as
                such have no effect on a recurrent model.
            seq_idx: (B, L) integer; a sequence begins wherever the number changes; negative = padding.
            cu_seq_lens_q, cu_seq_lens_k: (n + 1,) integer, cumulative lengths of the sequences packed into a batch of one.
            max_length_q, max_length_k: accepted because collators emit them; the lengths say the same.
            output_hidden_states: return the embeddings and the output of each layer.
            return_dict: False returns a tuple without the missing entries.
            layout: how the tokens are grouped, for callers that know; nothing is looked at then that would wait for the
                device. Instead of masks and packing, and not over a cache with tokens to replay.

        Raises:
            TypeError: an unknown argument, or one of the wrong type.
            ValueError: a wrong shape, inputs that contradict each other, or an unknown option.
        """
        options = self.take_options(kwargs)
        refuse_unknown(type(self).__name__, {"output_attentions": self.config.output_attentions, **kwargs})
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        check_token_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        cache = self._prepare_cache(select_cache(cache, past_key_values, cache_params), use_cache)
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(self.embeddings, input_ids)
        check_metadata(
            inputs_embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
        )
        batch, length, _ = inputs_embeds.shape
        replayed = 0
        if layout is None:
            seen = 0 if cache is None else cache.get_seq_length() if isinstance(cache, RecurrentCache) else None
            padding = padding_mask(attention_mask, batch, length, seen)
            if isinstance(cache, RecurrentCache):
                if cache.pending_length > MAX_REPLAY:
                    self._advance(cache)
                inputs_embeds, padding, replayed = cache.begin(inputs_embeds, padding)
            layout = self._layout(
                inputs_embeds, padding, replayed, position_ids, seq_idx, same_lengths(cu_seq_lens_q, cu_seq_lens_k)
            )
        elif isinstance(cache, RecurrentCache):
            cache.begin(inputs_embeds, None)
        grouped: SequenceLayout = layout

        def finish(values: Tensor) -> Tensor:
            return grouped.restore(values)[:, replayed:]

        hidden_states, all_hidden_states, extras = self.run_layers(
            grouped.align(inputs_embeds), cache, grouped, output_hidden_states, finish, **options
        )
        if isinstance(cache, RecurrentCache):
            cache.end(length)

        output = self.output_class(
            last_hidden_state=finish(hidden_states),
            hidden_states=None if all_hidden_states is None else tuple(map(finish, all_hidden_states)),
            cache=cache,
            **extras,
        )
        if return_dict:
            return output
        names = ("last_hidden_state", "cache", "hidden_states", *extras)
        return tuple(output[name] for name in names if name in output)

    def run_layers(
        self,
        hidden_states: Tensor,
        cache: Cache | None,
        layout: SequenceLayout,
        output_hidden_states: bool,
        finish: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor] | None, dict[str, Any]]:
        """Blocks and final norm on aligned tokens; also the hidden states if wanted, and fields for the output.

        `finish` brings aligned values (B, L, …) into input order, without the replayed tokens; fields need it, hidden states
        do not.
        """
        if not output_hidden_states and self._streams(hidden_states, cache):
            return self._run_stream(hidden_states, cache, layout), None, {}
        stepped = None if output_hidden_states else self._run_cpu_steps(hidden_states, cache, layout)
        if stepped is not None:
            return self.norm_f(stepped), None, {}
        collected: list[Tensor] | None = [] if output_hidden_states else None
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden_states)
            hidden_states = layer(hidden_states, cache=cache, seq_idx=layout.seq_idx)
        hidden_states = self.norm_f(hidden_states)
        if collected is not None:
            collected.append(hidden_states)
        return hidden_states, collected, {}

    def _streams(self, hidden_states: Tensor, cache: Cache | None) -> bool:
        """Whether several tokens go through plain blocks.

        Steps of one token and those of a draft have ways of their own, inside of the blocks.
        """
        if torch.compiler.is_compiling() or hidden_states.shape[1] < 2:
            return False
        # a checkpoint computes whole blocks again
        if self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            return False
        if getattr(cache, "recording", False) or getattr(cache, "verifying", False):
            return False
        return self._has_plain_blocks(hidden_states.dtype, hidden_states.device)

    def _run_cpu_steps(self, hidden_states: Tensor, cache: Cache | None, layout: SequenceLayout) -> Tensor | None:
        """The blocks on a single token on a CPU, without calling them; None where they have to be called."""
        if torch.compiler.is_compiling() or hidden_states.shape[1] != 1 or layout.seq_idx is not None:
            return None
        return run_cpu_steps(self.layers, hidden_states, cache) if self._has_stock_blocks() else None

    def _has_stock_blocks(self) -> bool:
        """Whether the classes of the blocks run `RecurrentBlock.forward`."""
        return all(map(_has_forward_of_block, {type(layer) for layer in self.layers}))

    def _has_plain_blocks(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the blocks do nothing but norm, mixer and sum, in one dtype."""
        return (
            # in fp64, the blocks take the norm of more digits than the residual stream keeps
            dtype != torch.float64
            and not torch.is_autocast_enabled(device.type)
            and _is_plain_norm(self.norm_f, dtype)
            and self._has_stock_blocks()
            and all(is_unhooked(layer) and _is_plain_norm(layer.norm, dtype) for layer in self.layers)
        )

    def pads_in_front(self) -> bool:
        """Whether a `layout` may have padding in front of rows that have no state yet, and say so in `real`.

        That takes the same kernels as rows without padding; `seq_idx` takes others, and more of them.
        """
        weight: Any = getattr(self.embeddings, "weight", None)
        return (
            weight is not None
            and type(self).run_layers is RecurrentModel.run_layers
            and self._has_plain_blocks(weight.dtype, weight.device)
            and all(getattr(layer.mixer, "pads_in_front", False) for layer in self.layers)
        )

    def _decays(self) -> Sequence[Tensor] | None:
        """`-exp(A_log)` of all layers in two launches in place of two for each; None where mixers have to do it."""
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        if torch.is_grad_enabled() or any(type(mixer) not in (SelectiveScanMixer, SSDMixer) for mixer in mixers):
            return None
        logs = [mixer.A_log for mixer in mixers]
        if any(log.dtype != torch.float32 or type(log) is not nn.Parameter for log in logs):
            return None
        return torch._foreach_neg(torch._foreach_exp(logs))

    def _run_stream(self, hidden_states: Tensor, cache: Cache | None, layout: SequenceLayout) -> Tensor:
        """Blocks and final norm, where each norm adds what the mixer before it has made: one launch in place of three."""
        residual: Tensor | None = None
        update, plain = hidden_states, hidden_states.dtype
        real = getattr(layout, "real", None)
        options: dict[str, Any] = {} if real is None else {"real": real[..., None].to(plain)}
        decays = self._decays()
        for index, layer in enumerate(self.layers):
            block: Any = layer
            if decays is not None:
                options["A"] = decays[index]
            dtype = torch.float32 if block.residual_in_fp32 else update.dtype if residual is None else residual.dtype
            if cache is None and _projects_at_once(block.mixer, update, plain):
                projected, residual = add_norm_linear(
                    update,
                    residual,
                    block.norm.weight,
                    block.mixer.in_proj.weight,
                    block.mixer.in_proj.bias,
                    eps=block.norm.variance_epsilon,
                    residual_dtype=dtype,
                )
                update = block.mixer(None, seq_idx=layout.seq_idx, projected=projected, **options)
                continue
            normed, residual = add_rms_norm(
                update, residual, block.norm.weight, eps=block.norm.variance_epsilon, residual_dtype=dtype
            )
            # a projection that is no plain one may have a dtype of its own
            normed = normed if normed.dtype == plain else normed.to(plain)
            update = block.mixer(normed, cache=cache, seq_idx=layout.seq_idx, **options)
        norm: Any = self.norm_f
        return add_rms_norm(update, residual, norm.weight, eps=norm.variance_epsilon)[0].to(plain)

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        recomputing = self.gradient_checkpointing and self.training
        if cache is not None:
            if recomputing:
                raise ValueError(
                    "A cache cannot be used while gradient checkpointing recomputes the layers, which would update its "
                    "states twice; pass no cache, or call model.eval() or model.gradient_checkpointing_disable()."
                )
            if use_cache is False:
                raise ValueError("A cache was given together with use_cache=False; drop one of the two.")
            check_cache(cache, self.layers)
            return cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and recomputing:
            logger.warning_once(
                "`use_cache=True` has no effect with gradient checkpointing in training; no cache is made."
            )
            return None
        return RecurrentCache(self.config) if use_cache else None

    @torch.no_grad()
    def _advance(self, cache: RecurrentCache) -> None:
        """Move the states past the pending tokens with a forward of their own."""
        inputs_embeds, padding = cache.take_pending()
        recording, cache.recording = cache.recording, False
        self(inputs_embeds=inputs_embeds, attention_mask=padding, cache=cache)
        cache.recording = recording

    @staticmethod
    def _layout(
        inputs_embeds: Tensor,
        padding: Tensor | None,
        replayed: int,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> SequenceLayout:
        batch, length, _ = inputs_embeds.shape
        if replayed and (seq_idx is not None or cu_seqlens is not None):
            raise ValueError(
                f"The cache has {replayed} tokens to replay after crop(), which cannot be combined with `seq_idx` or "
                "`cu_seq_lens_q`; run them without packing first."
            )
        if replayed and position_ids is not None:
            # the replayed tokens directly precede the new ones
            positions = position_ids.expand(batch, -1)
            before = torch.arange(-replayed, 0, device=positions.device)
            position_ids = torch.cat([positions[:, :1] + before, positions], dim=1)
        return resolve_layout(
            batch, length, padding=padding, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens
        )
