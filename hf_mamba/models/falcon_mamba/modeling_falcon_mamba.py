"""Falcon-Mamba (arXiv 2410.05355): the backbone and its heads.

Parameter names are those of transformers' native classes, so checkpoints load either way.
"""

from torch import nn

from ...layers import SelectiveScanMixer
from ..classifiers import RecurrentForSequenceClassification, RecurrentForTokenClassification
from ..heads import RecurrentForCausalLM
from ..pretrained import RecurrentPreTrainedModel
from ..recurrent import RecurrentBlock, RecurrentModel
from .configuration_falcon_mamba import FalconMambaConfig

__all__ = [
    "FalconMambaForCausalLM",
    "FalconMambaForSequenceClassification",
    "FalconMambaForTokenClassification",
    "FalconMambaModel",
    "FalconMambaPreTrainedModel",
]


class FalconMambaBlock(RecurrentBlock):
    """`x + mixer(norm(x))` with the selective-scan mixer."""

    def make_mixer(self, config: FalconMambaConfig, layer_idx: int) -> nn.Module:
        return SelectiveScanMixer(config, layer_idx, parameter_norm_eps=config.mixer_rms_eps)


class FalconMambaPreTrainedModel(RecurrentPreTrainedModel):
    """Configuration class and placement rules."""

    config: FalconMambaConfig
    config_class = FalconMambaConfig
    _no_split_modules = ["FalconMambaBlock"]


class FalconMambaModel(FalconMambaPreTrainedModel, RecurrentModel):
    """The backbone: embedding, blocks, final norm."""

    block_class = FalconMambaBlock


class FalconMambaForCausalLM(FalconMambaPreTrainedModel, RecurrentForCausalLM):
    """FalconMamba as a language model."""

    model_class = FalconMambaModel


class FalconMambaForSequenceClassification(FalconMambaPreTrainedModel, RecurrentForSequenceClassification):
    """FalconMamba as a classifier of texts, pooled at the last real token of each row."""

    model_class = FalconMambaModel


class FalconMambaForTokenClassification(FalconMambaPreTrainedModel, RecurrentForTokenClassification):
    """FalconMamba as a classifier of tokens."""

    model_class = FalconMambaModel
