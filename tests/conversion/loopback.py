"""The Hub on this machine, shared with the tests of uploading."""

from ..loopback_hub import Hub, serve

__all__ = ["Hub", "serve"]
