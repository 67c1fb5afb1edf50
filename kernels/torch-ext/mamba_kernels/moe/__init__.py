"""Routed experts: the router, the experts of many tokens with gradients, and those of a few tokens while decoding."""

from .interface import experts_step, grouped_mm_fits, route, routed_experts

__all__ = ["experts_step", "grouped_mm_fits", "route", "routed_experts"]
