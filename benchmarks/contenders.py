"""The models that are compared: ours, transformers' own class and mambapy, all with the same weights."""

import importlib.util
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaForCausalLM as NativeMamba
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM as NativeMamba2

import hf_mamba

__all__ = [
    "CLASSES",
    "KINDS",
    "SIZES",
    "MambapyForCausalLM",
    "has_mambapy",
    "make_models",
    "parse_names",
    "parse_numbers",
]

KINDS = ("mamba", "mamba2")


class Classes(NamedTuple):
    """transformers' and our configuration and language model of one kind."""

    native_config: Any
    native: Any
    own_config: Any
    own: Any


CLASSES = {
    "mamba": Classes(transformers.MambaConfig, NativeMamba, hf_mamba.MambaConfig, hf_mamba.MambaForCausalLM),
    "mamba2": Classes(transformers.Mamba2Config, NativeMamba2, hf_mamba.Mamba2Config, hf_mamba.Mamba2ForCausalLM),
}


def _published(hidden_size: int, num_hidden_layers: int) -> dict[str, dict[str, Any]]:
    """The shapes of the published checkpoints of one size, by kind."""
    return {
        "mamba": {
            "vocab_size": 50280,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "state_size": 16,
        },
        "mamba2": {
            "vocab_size": 50288,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "state_size": 128,
            "num_heads": 2 * hidden_size // 64,
            "head_dim": 64,
            "n_groups": 1,
            "tie_word_embeddings": True,
        },
    }


# the shapes of the published checkpoints (Mamba-2's largest two are called 1.3b and 2.7b), and a small model for training on a CPU
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "130m": _published(768, 24),
    "370m": _published(1024, 48),
    "1.4b": _published(2048, 48),
    "2.8b": _published(2560, 64),
    "small": {
        "mamba": {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "state_size": 16},
        "mamba2": {
            "vocab_size": 512,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "state_size": 64,
            "num_heads": 8,
            "head_dim": 64,
            "n_groups": 1,
        },
    },
}


def has_mambapy() -> bool:
    """Whether mambapy is installed (`pip install hf-mamba[bench]`)."""
    return importlib.util.find_spec("mambapy") is not None


class MambapyForCausalLM(nn.Module):
    """mambapy's Mamba-1 blocks between an embedding, a final norm and a head, under the key names of transformers."""

    def __init__(self, config: transformers.MambaConfig) -> None:
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        blocks = Mamba(
            MambaConfig(
                d_model=config.hidden_size,
                n_layers=config.num_hidden_layers,
                dt_rank=config.time_step_rank,
                d_state=config.state_size,
                expand_factor=config.expand,
                d_conv=config.conv_kernel,
                rms_norm_eps=config.layer_norm_epsilon,
                bias=config.use_bias,
                conv_bias=config.use_conv_bias,
            )
        )
        embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "layers": nn.Sequential(*blocks.layers),
                "norm_f": RMSNorm(config.hidden_size, config.layer_norm_epsilon, False),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary) of `input_ids` (B, L)."""
        hidden = self.backbone["layers"](self.backbone["embeddings"](input_ids))
        return self.lm_head(self.backbone["norm_f"](hidden))


def make_models(kind: str, size: str, layers: int | None = None, mambapy: bool = False) -> dict[str, nn.Module]:
    """Models of one shape with equal random weights, by contender name; transformers' own class comes first.

    Args:
        kind: "mamba" or "mamba2".
        size: a key of `SIZES`.
        layers: replaces the number of layers of that size.
        mambapy: add mambapy and transformers with `use_mambapy=True` (Mamba-1 only).
    """
    shape = dict(SIZES[size][kind])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    torch.manual_seed(0)
    native_config, native_class, own_config, own_class = CLASSES[kind]
    native = native_class(native_config(**shape))
    models: dict[str, nn.Module] = {"transformers": native}
    if mambapy and kind == "mamba":
        models["transformers, use_mambapy"] = native_class(native_config(**shape, use_mambapy=True))
        models["mambapy"] = MambapyForCausalLM(native_config(**shape))
    models["hf_mamba"] = own_class(own_config(**shape))
    for model in models.values():
        model.load_state_dict(native.state_dict())
    return models


def parse_names(text: str, option: str, allowed: tuple[str, ...]) -> list[str]:
    """The names in a comma-separated option.

    Raises:
        ValueError: one of them is not allowed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise ValueError(f"{option} takes names out of {', '.join(allowed)}, separated by commas, got {text!r}.")
    return names


def parse_numbers(text: str, option: str) -> list[int]:
    """The positive numbers in a comma-separated option, in ascending order.

    Raises:
        ValueError: something else stands there.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"{option} takes positive whole numbers, separated by commas, got {text!r}.")
    return numbers
