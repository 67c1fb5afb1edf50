"""Registration with transformers' Auto classes, so that `AutoModelForCausalLM`, `pipeline()` and `Trainer` use our classes.

A native model type is overridden by a configuration class of the same name; `config.json` files stay as they are. Model
classes are imported when they are first looked up: transformers' modeling code takes seconds to import.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .integrations import peft as peft_integration
from .models.falcon_mamba.configuration_falcon_mamba import FalconMambaConfig
from .models.mamba.configuration_mamba import MambaConfig
from .models.mamba2.configuration_mamba2 import Mamba2Config
from .models.moe_mamba.configuration_moe_mamba import MoeMambaConfig

__all__ = ["MODEL_TYPES", "is_registered", "register", "unregister"]

AUTO_CLASSES = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}


@dataclass(frozen=True)
class ModelType:
    """A registered model type: its configuration class and, if it overrides one, transformers' own."""

    config_class: type[PreTrainedConfig]
    native_config_class: type[PreTrainedConfig] | None


MODEL_TYPES: dict[str, ModelType] = {
    "mamba": ModelType(MambaConfig, transformers.MambaConfig),
    "mamba2": ModelType(Mamba2Config, transformers.Mamba2Config),
    "falcon_mamba": ModelType(FalconMambaConfig, transformers.FalconMambaConfig),
    "moe_mamba": ModelType(MoeMambaConfig, None),
}


@dataclass(frozen=True)
class _LazyClass:
    module: str
    name: str

    def load(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)


class _LazyContent(dict):
    """The user-registered part of an Auto mapping, importing a model class when it is first read."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, _LazyClass):
            value = self[key] = value.load()
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def copy(self) -> dict:
        return dict(self.items())

    def __iter__(self) -> Iterator:
        return iter(list(super().__iter__()))

    def values(self) -> list:  # type: ignore[override]
        return [self[key] for key in self]

    def items(self) -> list:  # type: ignore[override]
        return [(key, self[key]) for key in self]


def register() -> None:
    """Make the Auto classes use hf_mamba's models; safe to call again.

    `import hf_mamba` calls it unless the environment variable `HF_MAMBA_REGISTER` is 0.
    """
    for model_type, entry in MODEL_TYPES.items():
        AutoConfig.register(model_type, entry.config_class, exist_ok=True)
        module = f"{__package__}.models.{model_type}.modeling_{model_type}"
        prefix = entry.config_class.__name__.removesuffix("Config")
        for suffix, auto_class in AUTO_CLASSES.items():
            content = _registered_classes(auto_class)
            content[entry.config_class] = _LazyClass(module, prefix + suffix)
            # from_config() may be given an instance of the native configuration class
            if entry.native_config_class is not None:
                content[entry.native_config_class] = _LazyClass(module, prefix + suffix)
    # otherwise that module enables it when it is imported
    if f"{__package__}.models.recurrent" in sys.modules:
        peft_integration.enable()


def unregister() -> None:
    """Give the native model types back to transformers and forget `moe_mamba`; safe to call again."""
    for model_type, entry in MODEL_TYPES.items():
        for auto_class in AUTO_CLASSES.values():
            content = _registered_classes(auto_class)
            content.pop(entry.config_class, None)
            content.pop(entry.native_config_class, None)
        CONFIG_MAPPING._extra_content.pop(model_type, None)
    peft_integration.disable()


def is_registered(model_type: str) -> bool:
    """Whether the Auto classes use hf_mamba for `model_type`."""
    entry = MODEL_TYPES.get(model_type)
    return entry is not None and CONFIG_MAPPING._extra_content.get(model_type) is entry.config_class


def _registered_classes(auto_class: Any) -> _LazyContent:
    mapping = auto_class._model_mapping
    if not isinstance(mapping._extra_content, _LazyContent):
        mapping._extra_content = _LazyContent(mapping._extra_content)
    return mapping._extra_content
