"""Tiny models of every kind, ours and transformers' own with the same weights."""

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaForCausalLM as NativeFalconMamba
from transformers.models.mamba.modeling_mamba import MambaForCausalLM as NativeMamba
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM as NativeMamba2

import hf_mamba

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SSD = {"num_heads": 8, "head_dim": 8, "state_size": 12, "chunk_size": 16}

CONFIGS: dict[str, Callable] = {
    "mamba": lambda **kw: hf_mamba.MambaConfig(**{**COMMON, "state_size": 5, **kw}),
    "mamba2": lambda **kw: hf_mamba.Mamba2Config(**{**COMMON, **SSD, "n_groups": 1, **kw}),
    "mamba2-groups": lambda **kw: hf_mamba.Mamba2Config(**{**COMMON, **SSD, "n_groups": 8, **kw}),
    "falcon_mamba": lambda **kw: hf_mamba.FalconMambaConfig(**{**COMMON, "state_size": 5, **kw}),
    "moe_mamba": lambda **kw: hf_mamba.MoeMambaConfig(
        **{**COMMON, "state_size": 5, "num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 24, **kw}
    ),
}
CLASSES = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba", "moe_mamba": "MoeMamba"}
NATIVE = {
    "mamba": (transformers.MambaConfig, NativeMamba),
    "mamba2": (transformers.Mamba2Config, NativeMamba2),
    "falcon_mamba": (transformers.FalconMambaConfig, NativeFalconMamba),
}

ALL_MODELS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2-groups", "falcon_mamba", "moe_mamba"])
NATIVE_MODELS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2-groups", "falcon_mamba"])


def make_model(kind: str, head: str = "ForCausalLM", seed: int = 0, **overrides):
    """A tiny model of ours with every parameter away from its neutral value, in eval mode."""
    torch.manual_seed(seed)
    config = CONFIGS[kind](**overrides)
    model = getattr(hf_mamba, CLASSES[config.model_type] + head)(config).eval()
    randomise(model)
    return model


def make_native(model):
    """transformers' own class with the configuration and the weights of `model`."""
    config_class, model_class = NATIVE[model.config.model_type]
    values = model.config.to_dict()
    values.pop("model_type")
    native = model_class(config_class(**values)).eval()
    native.load_state_dict(model.state_dict())
    return native


@torch.no_grad()
def randomise(model) -> None:
    """Move biases, norms, D and dt away from 0 and 1, so that a forgotten or doubled one shows."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "norm_f.weight", ".D")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "embeddings" in name or "lm_head" in name:
            parameter.normal_(std=0.5)


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
