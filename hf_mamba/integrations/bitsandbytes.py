"""4-bit layers of bitsandbytes on a CPU."""

from typing import Any

from torch import nn

__all__ = ["avoid_packed_kernel"]


def avoid_packed_kernel(model: nn.Module) -> None:
    """Let the 4-bit layers of `model` dequantise on a CPU, as they do on processors without AVX512-BF16.

    Where the processor has it, bitsandbytes 0.50 packs a weight for a kernel of its own at the first evaluation. That fails
    with an assertion unless outputs are a multiple of 32 and inputs of 64, which `x_proj`, `dt_proj` and Mamba-2's `in_proj`
    are not in most published models; and once packed, a layer passes no gradient on to its input, so that adapters below it
    silently stop learning. Nothing changes on a GPU.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
