"""The models that are compared: ours, transformers' own class, mamba_ssm's and mambapy, all with the same weights.

Beside them a transformer of the same size, which has weights of its own.
"""

import importlib
import importlib.util
import sys
from functools import cache
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
    "OWN_KINDS",
    "PERIOD",
    "PYTHIA",
    "SIZES",
    "TRANSFORMER",
    "MambapyForCausalLM",
    "has_mambapy",
    "make_mamba_ssm",
    "make_models",
    "make_repeating",
    "make_transformer",
    "native_without_packages",
    "parse_names",
    "parse_numbers",
    "parse_peers",
]

KINDS = ("mamba", "mamba2")
# with MoE-Mamba, which transformers and mamba_ssm have no class for
OWN_KINDS = (*KINDS, "moe_mamba")
# what `--against` takes for no peer at all
NOBODY = "none"
TRANSFORMER = "transformer"
# tokens after which the text of `make_repeating` begins again
PERIOD = 16


class Classes(NamedTuple):
    """transformers' and our configuration and language model of one kind; None where there is no class."""

    native_config: Any
    native: Any
    own_config: Any
    own: Any


CLASSES = {
    "mamba": Classes(transformers.MambaConfig, NativeMamba, hf_mamba.MambaConfig, hf_mamba.MambaForCausalLM),
    "mamba2": Classes(transformers.Mamba2Config, NativeMamba2, hf_mamba.Mamba2Config, hf_mamba.Mamba2ForCausalLM),
    "moe_mamba": Classes(None, None, hf_mamba.MoeMambaConfig, hf_mamba.MoeMambaForCausalLM),
}


def _published(hidden_size: int, num_hidden_layers: int) -> dict[str, dict[str, Any]]:
    """The shapes of the published checkpoints of one size, by kind.

    MoE-Mamba's are those of Mamba with every second layer made a Switch layer of 8 experts, three times as wide as the model
    (arXiv 2401.04081, which has 42 of them): the weights that a token passes stay about as many.
    """
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
        "moe_mamba": {
            "vocab_size": 50280,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "state_size": 16,
            "num_experts": 8,
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
        "moe_mamba": {
            "vocab_size": 512,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "state_size": 16,
            "num_experts": 4,
        },
    },
}

# transformers of the same sizes: the shapes of Pythia (arXiv 2304.01373, table 1; the smallest is called 160m, the next 410m), which
# Mamba's paper compares with
PYTHIA: dict[str, dict[str, int]] = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 512,
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


@cache
def native_without_packages(kind: str) -> Any:
    """transformers' own language model as it is where neither mamba_ssm nor causal_conv1d is installed.

    transformers looks for the packages when it imports a model's module, so the module is imported a second time with both
    hidden.
    """
    module = sys.modules[CLASSES[kind].native.__module__]
    name = f"{module.__name__}_without_packages"
    spec: Any = importlib.util.spec_from_file_location(name, module.__file__)
    hidden = {package: sys.modules.get(package) for package in ("mamba_ssm", "causal_conv1d")}
    copy = importlib.util.module_from_spec(spec)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        sys.modules[name] = copy
        spec.loader.exec_module(copy)
    finally:
        for package, previous in hidden.items():
            if previous is None:
                del sys.modules[package]
            else:
                sys.modules[package] = previous
    return getattr(copy, CLASSES[kind].native.__name__)


def make_mamba_ssm(
    kind: str,
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """mamba_ssm's own language model with the weights of ours.

    Args:
        kind: "mamba" or "mamba2".
        fields: of our configuration, as in `SIZES`.
        weights: the state of our model.

    Raises:
        ImportError: mamba_ssm, or what it needs, cannot be imported.
    """
    state = {"d_state": fields["state_size"]}
    if kind == "mamba2":
        state = {"layer": "Mamba2", "headdim": fields["head_dim"], "ngroups": fields["n_groups"], **state}
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=fields["hidden_size"],
        n_layer=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        ssm_cfg=state,
        pad_vocab_size_multiple=8,
        tie_embeddings=torch.equal(weights["lm_head.weight"], weights["backbone.embeddings.weight"]),
    )
    classes = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    model = classes.MambaLMHeadModel(config, device=device, dtype=dtype)
    model.load_state_dict(
        {key.replace("backbone.embeddings.", "backbone.embedding."): value for key, value in weights.items()}
    )
    return model


def make_transformer(size: str, positions: int, layers: int | None = None) -> Any:
    """transformers' GPTNeoX, which is Pythia's architecture, with random weights and SDPA.

    Args:
        size: out of `PYTHIA`.
        positions: that it has to have room for; Pythia's own 2,048 are the least.
        layers: of the Mamba model beside it, which has two for each of a transformer of the same size; those of the size if None.
    """
    shape = {"vocab_size": 50304} | PYTHIA[size]
    if layers is not None:
        shape["num_hidden_layers"] = max(1, layers // 2)
    config = transformers.GPTNeoXConfig(max_position_embeddings=max(2048, positions), **shape)
    return transformers.AutoModelForCausalLM.from_config(
        config,
        attn_implementation="sdpa",
        dtype=torch.get_default_dtype(),
    )


def make_repeating(kind: str, fields: dict[str, Any]) -> Any:
    """Our model with random layers, but a head by which every token is followed by the next one, and 2 * PERIOD - 1 by PERIOD.

    It goes on with a text of these tokens as the text has begun, which random weights would not do. The head is not tied, so the
    weights that a step reads are as many as ever.
    """
    classes = CLASSES[kind]
    model = classes.own(classes.own_config(**fields | {"tie_word_embeddings": False}))
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        # large beside what the layers add to the residual
        embeddings.normal_()
        head.copy_(embeddings.roll(1, 0))
        head[[PERIOD, 2 * PERIOD]] = head[[2 * PERIOD, PERIOD]]
    return model


def parse_peers(text: str, allowed: tuple[str, ...]) -> list[str]:
    """The names in `--against`; none of them if it is empty or says so.

    Raises:
        ValueError: one of them is not allowed.
    """
    if text.strip() in ("", NOBODY):
        return []
    names = parse_names(text, "--against", (*allowed, NOBODY))
    if NOBODY in names:
        raise ValueError(f"--against takes {NOBODY} alone or names out of {', '.join(allowed)}, got {text!r}.")
    return names


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
