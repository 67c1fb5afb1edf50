"""Configuration of Falcon-Mamba: transformers' own fields, checked when built."""

import transformers

from ...cache_names import CACHE_NAMES
from ..generation_parameters import generation_parameters
from ..sharding import FSDP_PLAN
from ..validation import check_choice, check_common_fields, check_finite, check_positive, plain_errors

__all__ = ["FalconMambaConfig"]


@plain_errors
class FalconMambaConfig(transformers.FalconMambaConfig):
    """Configuration of a Falcon-Mamba model (arXiv 2410.05355): Mamba with norms on dt, B and C.

    Fields and `config.json` are those of `transformers.FalconMambaConfig`. Two defaults differ, both read only when a model
    is initialised from scratch: `initializer_range` is 0.02 and `rescale_prenorm_residual` is True, as in Mamba's code.

    Raises:
        ValueError: a size that is not positive, an unknown activation or scheme, `time_step_min` above `time_step_max`.

    Example:
        >>> from hf_mamba import FalconMambaConfig
        >>> FalconMambaConfig(hidden_size=64, num_hidden_layers=2).mixer_rms_eps
        1e-06
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
        check_finite(self, "mixer_rms_eps", minimum=0.0, above=True)
