"""The names of a cache in arguments and outputs. Imports nothing, because configurations need them."""

__all__ = ["CACHE_NAMES", "OLD_CACHE_NAMES"]

# before transformers 5.24: `past_key_values`, or `cache_params` in Mamba models
OLD_CACHE_NAMES = ("past_key_values", "cache_params")
CACHE_NAMES = ("cache", *OLD_CACHE_NAMES)
