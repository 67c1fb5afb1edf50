"""Mamba-2 (Dao & Gu, arXiv 2405.21060): the backbone and its heads.

Parameter names are those of transformers' native classes, so checkpoints load either way.
"""

from torch import nn

from ...layers import SSDMixer
from ..classifiers import RecurrentForSequenceClassification, RecurrentForTokenClassification
from ..heads import RecurrentForCausalLM
from ..pretrained import RecurrentPreTrainedModel
from ..recurrent import RecurrentBlock, RecurrentModel
from .configuration_mamba2 import Mamba2Config

__all__ = [
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2ForTokenClassification",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
]


class Mamba2Block(RecurrentBlock):
    """`x + mixer(norm(x))` with the SSD mixer."""

    def make_mixer(self, config: Mamba2Config, layer_idx: int) -> nn.Module:
        return SSDMixer(config, layer_idx)


class Mamba2PreTrainedModel(RecurrentPreTrainedModel):
    """Configuration class and placement rules."""

    config: Mamba2Config
    config_class = Mamba2Config
    _no_split_modules = ["Mamba2Block"]


class Mamba2Model(Mamba2PreTrainedModel, RecurrentModel):
    """The backbone: embedding, blocks, final norm."""

    block_class = Mamba2Block


class Mamba2ForCausalLM(Mamba2PreTrainedModel, RecurrentForCausalLM):
    """Mamba2 as a language model."""

    model_class = Mamba2Model


class Mamba2ForSequenceClassification(Mamba2PreTrainedModel, RecurrentForSequenceClassification):
    """Mamba2 as a classifier of texts, pooled at the last real token of each row."""

    model_class = Mamba2Model


class Mamba2ForTokenClassification(Mamba2PreTrainedModel, RecurrentForTokenClassification):
    """Mamba2 as a classifier of tokens."""

    model_class = Mamba2Model
