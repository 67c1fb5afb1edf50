"""Checkpoint converters between the dialects of Mamba checkpoints and Hugging Face's format."""
