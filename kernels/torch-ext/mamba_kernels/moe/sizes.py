"""Sizes of grids and blocks in plain Python: Triton's own functions for it may be called in kernels too, and take microseconds."""

__all__ = ["ceil_div", "power_of_2"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
