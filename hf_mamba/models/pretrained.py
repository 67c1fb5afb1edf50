"""What all models share before they run: loading, saving and initialisation."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from ..cache_names import CACHE_NAMES
from ..integrations import peft as peft_integration
from ..integrations.bitsandbytes import avoid_packed_kernel
from ..integrations.cards import write_missing_card
from ..integrations.hub import PUSH_ARGUMENTS, push_model
from ..integrations.remote_code import published_config, write_shim
from ..integrations.weight_files import explain_loading_error
from ..layers import CausalConv1d, SelectiveScanMixer, SSDMixer

__all__ = ["RecurrentPreTrainedModel"]

logger = logging.get_logger(__name__)

# adapters on any projection are possible as soon as there can be a model
peft_integration.enable()

# the original mamba_ssm checkpoints call the embedding so
ORIGINAL_KEYS = {r"(^|\.)embedding\.weight$": r"\1embeddings.weight"}


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
