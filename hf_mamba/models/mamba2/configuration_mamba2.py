"""Configuration of Mamba-2: transformers' own fields, checked when built."""

import transformers

from ...cache_names import CACHE_NAMES
from ..generation_parameters import generation_parameters
from ..sharding import FSDP_PLAN
from ..validation import check_common_fields, check_positive, plain_errors

__all__ = ["Mamba2Config", "check_ssd_fields"]


@plain_errors
class Mamba2Config(transformers.Mamba2Config):
    """Configuration of a Mamba-2 model (arXiv 2405.21060).

    Fields and `config.json` are those of `transformers.Mamba2Config`, whose defaults describe Mamba-Codestral-7B: for any
    other model set `hidden_size`, `num_heads`, `n_groups` and `vocab_size` too. Two defaults differ, both read only when a
    model is initialised from scratch, and both as in the original code: `initializer_range` is 0.02, the standard
    deviation of the embedding (all other weights have their own rules), and `rescale_prenorm_residual` is True.

    Raises:
        ValueError: a size that is not positive, `hidden_size * expand != num_heads * head_dim`, heads that `n_groups`
            does not divide, an unknown activation, or limits of the time step that are out of order.

    Example:
        >>> from hf_mamba import Mamba2Config
        >>> Mamba2Config(hidden_size=256, num_heads=8, head_dim=64, n_groups=1, num_hidden_layers=4).num_heads
        8
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
        check_ssd_fields(self)


def check_ssd_fields(config) -> None:
    """Check the fields of a Mamba-2 mixer."""
    check_positive(config, "num_heads", "head_dim", "n_groups", "chunk_size")
    name = type(config).__name__
    inner = config.hidden_size * config.expand
    if inner != config.num_heads * config.head_dim:
        raise ValueError(
            f"{name}: hidden_size * expand must equal num_heads * head_dim, got {config.hidden_size} * {config.expand} = "
            f"{inner} and {config.num_heads} * {config.head_dim} = {config.num_heads * config.head_dim}; "
            f"with `head_dim` {config.head_dim} set `num_heads` to {inner / config.head_dim:g}."
        )
    if config.num_heads % config.n_groups:
        raise ValueError(
            f"{name}: `n_groups` must divide `num_heads`, got {config.n_groups} groups for {config.num_heads} heads."
        )
    limit = config.time_step_limit
    if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
        raise ValueError(f"{name}: `time_step_limit` must be two numbers 0 <= low <= high, got {limit!r}.")
