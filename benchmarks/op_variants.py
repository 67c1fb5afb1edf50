"""Settings of our kernels to compare with the shipped ones: `python -m benchmarks ops --variants`.

A setting that wins on the rows of its op goes into the tuning table of the kernel, and its line here goes.
"""

from typing import Any

from benchmarks.op_contenders import OURS, Implementation, implementation

__all__ = ["VARIANTS", "variant", "variants_of"]

Settings = tuple[tuple[str, str, Any], ...]

CONV = "mamba_kernels.causal_conv1d.triton_conv"
SCAN_FORWARD = "mamba_kernels.selective_scan.triton_forward"
SSD = "mamba_kernels.ssd.triton_"

# op: what differs, and the module attributes that make it so: (module, attribute, value). A tuple becomes a tuning like the one
# that it replaces. Chosen by the registers that ptxas reports for sm_90
VARIANTS: dict[str, dict[str, Settings]] = {
    "selective_scan": {
        # exponentials twice in place of once, but more programs
        "forward in chunks": ((SCAN_FORWARD, "MOST_WAVEFRONTS", 0),),
    },
    "ssd_chunk_scan": {
        # 97 to 116 registers in place of 174 to 242
        "states 8 warps": ((SSD + "states", "STATES", (8, 2)),),
        "forward 8 warps": ((SSD + "forward", "FORWARD", (8, 2)),),
        # 244 registers and no spills in place of 255 with 250 bytes
        "projections 64 states": ((SSD + "projections", "LARGEST_PART", 64),),
    },
    "causal_conv1d": {
        "longer runs": ((CONV, "FORWARD", (256, 8, 8)), (CONV, "BACKWARD", (128, 8, 32))),
        "shorter runs": ((CONV, "FORWARD", (256, 8, 2)), (CONV, "BACKWARD", (128, 8, 8))),
        "fewer channels": ((CONV, "FORWARD", (128, 8, 4)), (CONV, "BACKWARD", (64, 8, 16))),
    },
}


def variants_of(op: str) -> list[str]:
    """Contender names of the variants of an op."""
    return [f"{OURS}: {name}" for name in VARIANTS.get(op, {})]


def variant(op: str, contender: str) -> Implementation | None:
    """Our implementation with the settings of one of `variants_of(op)`; None for another contender."""
    settings = VARIANTS.get(op, {}).get(contender.removeprefix(f"{OURS}: "))
    ours = implementation(op, OURS)
    if settings is None or ours is None:
        return None
    return Implementation(contender, ours.call, settings=settings)
