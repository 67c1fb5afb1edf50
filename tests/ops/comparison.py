"""How an op is compared with its fp64 oracle: one table of tolerances, RMS-relative and maximum error."""

import torch
from torch import Tensor

# RMS of the error over the RMS of the expected value; the maximum error may be ten times larger
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}

LENGTHS = [1, 2, 3, 63, 64, 65, 100, 257]


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to the root mean square of `expected`."""
    scale = expected.double().square().mean().sqrt().clamp(min=1e-30)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()


def assert_matches(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, name: str = "output") -> None:
    """Assert that `actual` has the shape of `expected`, is finite and lies within the tolerance of `dtype`."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    tolerance = TOLERANCES[dtype]
    error = rms_error(actual, expected)
    assert error <= tolerance, f"{name}: RMS-relative error {error:.2e} > {tolerance:.0e}"
    scale = expected.double().abs().max().clamp(min=1e-30)
    largest = ((actual.double() - expected.double()).abs().max() / scale).item()
    assert largest <= 10 * tolerance, (
        f"{name}: maximum error {largest:.2e} of the largest value > {10 * tolerance:.0e}"
    )
