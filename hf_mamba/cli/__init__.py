"""The command `hf-mamba`. Each command has its own module and imports torch and transformers only when it runs."""

from hf_mamba.cli.main import app

__all__ = ["app"]
