"""When a layer's weights may be read directly instead of calling the layer."""

from torch import nn

__all__ = ["is_plain_linear", "is_unhooked"]


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


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module`, forward and backward, runs the `forward` of its class and nothing else."""
    return "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
