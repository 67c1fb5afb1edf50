"""Argument checks that are made once for arguments of the same kind, since in decoding they cost as much as the work."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["once_per_signature"]

# a program meets a handful of signatures; one that meets endless ones checks again and keeps little
MAX_SIGNATURES = 4096

Check = Callable[..., Any]

# classes that are told by their type, without asking for their bases
_TENSORS = (Tensor, torch.nn.Parameter)
_UNKNOWN = object()


def once_per_signature(check: Check) -> Check:
    """Decorator for a check that reads nothing of its tensors but type, shape, dtype, device and `requires_grad`.

    Arguments go by position. The check runs in full until it has passed for such arguments; everything that is no tensor
    counts by its value. Whether gradients are enabled is part of the signature. What the check returns, if anything, is
    returned again for arguments of the same signature.
    """
    passed: dict[Any, Any] = {}

    @wraps(check)
    def wrapper(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(*arguments)
        kinds: list[Any] = [torch.is_grad_enabled()]
        for value in arguments:
            if value is None:
                kinds.append(None)
            elif type(value) in _TENSORS or isinstance(value, Tensor):
                kinds += (value.shape, value.dtype, value.device, value.requires_grad)
            else:
                # the type too: 1, 1.0 and True are equal
                kinds += (type(value), value)
        signature = tuple(kinds)
        try:
            result = passed.get(signature, _UNKNOWN)
        except TypeError:
            # something unhashable, such as a list
            return check(*arguments)
        if result is not _UNKNOWN:
            return result
        result = check(*arguments)
        if len(passed) >= MAX_SIGNATURES:
            passed.clear()
        passed[signature] = result
        return result

    return wrapper
