"""Mamba (Gu & Dao, arXiv 2312.00752): the backbone and its heads.

Parameter names are those of transformers' native classes, so checkpoints load either way.
"""

from torch import nn

from ...layers import SelectiveScanMixer
from ..classifiers import RecurrentForSequenceClassification, RecurrentForTokenClassification
from ..heads import RecurrentForCausalLM
from ..pretrained import RecurrentPreTrainedModel
from ..recurrent import RecurrentBlock, RecurrentModel
from .configuration_mamba import MambaConfig

__all__ = [
    "MambaForCausalLM",
    "MambaForSequenceClassification",
    "MambaForTokenClassification",
    "MambaModel",
    "MambaPreTrainedModel",
]


class MambaBlock(RecurrentBlock):
    """`x + mixer(norm(x))` with the selective-scan mixer."""

    def make_mixer(self, config: MambaConfig, layer_idx: int) -> nn.Module:
        return SelectiveScanMixer(config, layer_idx)


class MambaPreTrainedModel(RecurrentPreTrainedModel):
    """Configuration class and placement rules."""

    config: MambaConfig
    config_class = MambaConfig
    _no_split_modules = ["MambaBlock"]


class MambaModel(MambaPreTrainedModel, RecurrentModel):
    """The backbone: embedding, blocks, final norm."""

    block_class = MambaBlock


class MambaForCausalLM(MambaPreTrainedModel, RecurrentForCausalLM):
    """Mamba as a language model."""

    model_class = MambaModel


class MambaForSequenceClassification(MambaPreTrainedModel, RecurrentForSequenceClassification):
    """Mamba as a classifier of texts, pooled at the last real token of each row."""

    model_class = MambaModel


class MambaForTokenClassification(MambaPreTrainedModel, RecurrentForTokenClassification):
    """Mamba as a classifier of tokens."""

    model_class = MambaModel
