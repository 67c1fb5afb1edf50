"""When a linear layer's weight may be read directly instead of calling the layer."""

from torch import nn

__all__ = ["is_plain_linear"]


def is_plain_linear(module: nn.Module) -> bool:
    """True if calling `module` does nothing but `x @ weight.T + bias`.

    False for LoRA and quantised layers (other types, of the layer or, from torchao and of distributed ones, of its weight), for
    offloaded ones (accelerate replaces `forward` on the instance) and for layers with forward hooks: those must be called.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
