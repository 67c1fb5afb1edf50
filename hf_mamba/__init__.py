"""Mamba, Mamba-2, Falcon-Mamba and MoE-Mamba for Hugging Face transformers.

Importing this package makes `AutoModelForCausalLM`, `pipeline()`, `Trainer` and PEFT use its models for the model types
`mamba`, `mamba2`, `falcon_mamba` and `moe_mamba`. Set `HF_MAMBA_REGISTER=0` to import without that, and call `register()`
and `unregister()` by hand.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from .cache import RecurrentCache
from .demo_checkpoint import demo_checkpoint
from .models.falcon_mamba.configuration_falcon_mamba import FalconMambaConfig
from .models.mamba.configuration_mamba import MambaConfig
from .models.mamba2.configuration_mamba2 import Mamba2Config
from .models.moe_mamba.configuration_moe_mamba import MoeMambaConfig
from .registration import is_registered, register, unregister
from .version import __version__

if TYPE_CHECKING:
    from .models.falcon_mamba.modeling_falcon_mamba import (
        FalconMambaForCausalLM,
        FalconMambaForSequenceClassification,
        FalconMambaForTokenClassification,
        FalconMambaModel,
    )
    from .models.mamba.modeling_mamba import (
        MambaForCausalLM,
        MambaForSequenceClassification,
        MambaForTokenClassification,
        MambaModel,
    )
    from .models.mamba2.modeling_mamba2 import (
        Mamba2ForCausalLM,
        Mamba2ForSequenceClassification,
        Mamba2ForTokenClassification,
        Mamba2Model,
    )
    from .models.moe_mamba.modeling_moe_mamba import (
        MoeMambaForCausalLM,
        MoeMambaForSequenceClassification,
        MoeMambaForTokenClassification,
        MoeMambaModel,
    )

__all__ = [
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    "FalconMambaForSequenceClassification",
    "FalconMambaForTokenClassification",
    "FalconMambaModel",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2ForTokenClassification",
    "Mamba2Model",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaForSequenceClassification",
    "MambaForTokenClassification",
    "MambaModel",
    "MoeMambaConfig",
    "MoeMambaForCausalLM",
    "MoeMambaForSequenceClassification",
    "MoeMambaForTokenClassification",
    "MoeMambaModel",
    "RecurrentCache",
    "__version__",
    "demo_checkpoint",
    "is_registered",
    "register",
    "unregister",
]

# model classes are imported when first used: transformers' modeling code takes seconds to import
_MODEL_MODULES = {
    prefix + suffix: f"{__name__}.models.{model_type}.modeling_{model_type}"
    for prefix, model_type in (
        ("Mamba", "mamba"),
        ("Mamba2", "mamba2"),
        ("FalconMamba", "falcon_mamba"),
        ("MoeMamba", "moe_mamba"),
    )
    for suffix in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
}


def __getattr__(name: str) -> Any:
    if name not in _MODEL_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODEL_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if os.environ.get("HF_MAMBA_REGISTER", "1").strip().lower() not in ("0", "false", "no", "off"):
    register()
