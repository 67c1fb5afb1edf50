"""Configuration of Mamba: transformers' own fields, checked when built."""

import transformers

from ...cache_names import CACHE_NAMES
from ..generation_parameters import generation_parameters
from ..sharding import FSDP_PLAN
from ..validation import check_choice, check_common_fields, check_positive, plain_errors

__all__ = ["MambaConfig"]


@plain_errors
class MambaConfig(transformers.MambaConfig):
    """Configuration of a Mamba model (arXiv 2312.00752).

    Fields and `config.json` are those of `transformers.MambaConfig`. Two defaults differ, both read only when a model is
    initialised from scratch, and both as in the original code: `initializer_range` is 0.02, the standard deviation of the
    embedding (all other weights have their own rules), and `rescale_prenorm_residual` is True.

    Raises:
        ValueError: a size that is not positive, an unknown activation or scheme, `time_step_min` above `time_step_max`.

    Example:
        >>> from hf_mamba import MambaConfig
        >>> MambaConfig(hidden_size=768, num_hidden_layers=24).intermediate_size
        1536
    """

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    keys_to_ignore_at_inference = [*CACHE_NAMES]
    base_model_fsdp_plan = FSDP_PLAN
    _get_generation_parameters = generation_parameters

    def __post_init__(self, **kwargs):
        # transformers builds a list of this length
        check_positive(self, "num_hidden_layers")
        super().__post_init__(**kwargs)
        check_common_fields(self)
        check_choice(self, "time_step_init_scheme", ("random", "constant"))
