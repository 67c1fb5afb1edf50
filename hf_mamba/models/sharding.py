"""How transformers' `DistributedConfig(fsdp_size=…)` shards a model: which modules form a group of parameters."""

__all__ = ["FSDP_PLAN", "HEAD_FSDP_PLAN"]

# of a backbone; the weights of the last modules in a forward are the first that backward needs, so they are kept
FSDP_PLAN = {"embeddings": "free_full_weight", "layers.*": "free_full_weight", "norm_f": "keep_full_weight"}
HEAD_FSDP_PLAN = {"lm_head": "keep_full_weight"}
