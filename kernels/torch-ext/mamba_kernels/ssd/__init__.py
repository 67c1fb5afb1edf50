"""Mamba-2's structured state-space dual (SSD) scan."""

from .eager import ssd_chunk_scan_eager
from .interface import ssd_chunk_scan
from .reference import ssd_chunk_scan_ref

__all__ = ["ssd_chunk_scan", "ssd_chunk_scan_eager", "ssd_chunk_scan_ref"]
