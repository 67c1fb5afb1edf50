"""The S6 recurrence of Mamba over whole sequences."""

from .eager import selective_scan_eager
from .interface import selective_scan
from .reference import selective_scan_ref

__all__ = ["selective_scan", "selective_scan_eager", "selective_scan_ref"]
