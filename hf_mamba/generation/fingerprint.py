"""What a captured graph of a model depends on, and whether that is still as it was."""

import weakref
from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

__all__ = ["Watch", "fingerprint"]

MODULE_FIELDS = frozenset(vars(nn.Module()))
SIMPLE = frozenset((bool, int, float, str, type(None)))
CONTAINERS = (dict, list, set)


def fingerprint(model: nn.Module) -> Hashable | None:
    """Everything a graph of `model` depends on, to be compared; None if a graph of it would not be right.

    That is so in training mode, with hooks (they would run once, while capturing), with modules whose `forward` was replaced
    (offloading), with tensors of special types (quantised or distributed) or on several devices.
    """
    if model.training:
        return None
    entries: list[Any] = []
    devices = set()
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module.training:
            return None
        kind = type(module)
        entries.append(kind)
        if not kind.__module__.startswith("torch.nn."):
            # adapters that are active, scalings, flags
            for name, value in vars(module).items():
                if type(value) in SIMPLE:
                    entries.append((name, value))
                elif name not in MODULE_FIELDS and is_simple(value):
                    entries.append((name, repr(value)))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter):
                    return None
                devices.add(tensor.device)
                entries.append(place_of(tensor))
    return tuple(entries) if len(devices) == 1 else None


def is_simple(value: Any) -> bool:
    """Whether a module's attribute is a plain value or a container of those, and so has a `repr` that says all."""
    if isinstance(value, dict):
        return all(is_simple(key) and is_simple(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_simple, value))
    return type(value) in SIMPLE


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor is and how it is read."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Watch:
    """Whether a model has been left alone since its fingerprint was taken, found out in less than half the time of another.

    False means that something was touched, which need not make a difference: then a new fingerprint decides.
    """

    def __init__(self, model: nn.Module) -> None:
        # by weak references: what watches a model must not keep it
        self.modules = [_WatchedModule(module) for module in model.modules()]
        self.places = [place for watched in self.modules for place in watched.places]
        tensors = (tensor for module in model.modules() for tensor in _tensors_of(module))
        self.tensors = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]

    def readable(self) -> bool:
        """Whether all tensors are where they were, so that a graph may be replayed, even if its result is of no use."""
        for reference, pointer in self.tensors:
            tensor = reference()
            if tensor is None or tensor.data_ptr() != pointer:
                return False
        return True

    def unchanged(self) -> bool:
        """Whether nothing was touched."""
        places: list[tuple[Any, ...]] = []
        try:
            for watched in self.modules:
                # looked up and not called in a method of its own, because there are hundreds
                module = watched.module()
                if type(module) is not watched.kind:
                    return False
                fields = module.__dict__
                if (
                    len(fields) != watched.count
                    or watched.read(fields) != watched.values
                    or fields["_forward_hooks"]
                    or fields["_forward_pre_hooks"]
                    or (
                        (fields["_modules"] or watched.children)
                        and tuple(map(id, fields["_modules"].values())) != watched.children
                    )
                ):
                    return False
                for name, kept in watched.containers:
                    if _container(fields[name]) != kept:
                        return False
                if fields["_parameters"]:
                    places += [place_of(t) for t in fields["_parameters"].values() if t is not None]
                if fields["_buffers"]:
                    places += [place_of(t) for t in fields["_buffers"].values() if t is not None]
        except KeyError:
            return False
        return places == self.places


class _WatchedModule:
    """One module as it was.

    Attributes:
        read: the values of its plain attributes, out of its `__dict__`.
        containers: attributes that can change inside, and what is in them where that matters.
    """

    __slots__ = ("children", "containers", "count", "kind", "module", "places", "read", "values")

    def __init__(self, module: nn.Module) -> None:
        fields = vars(module)
        self.module, self.kind, self.count = weakref.ref(module), type(module), len(fields)
        names = [name for name, value in fields.items() if type(value) in SIMPLE or _is_fixed(value)]
        # with one name, it returns that value and no tuple; every module has `training`
        self.read: Callable[[dict[str, Any]], Any] = itemgetter(*names)
        self.values = self.read(fields)
        self.children = tuple(map(id, module._modules.values()))
        self.containers = [
            (name, _container(value))
            for name, value in fields.items()
            if name not in MODULE_FIELDS and isinstance(value, CONTAINERS)
        ]
        self.places = [place_of(tensor) for tensor in _tensors_of(module)]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _is_fixed(value: Any) -> bool:
    return type(value) in (tuple, frozenset) and is_simple(value)


def _container(value: Any) -> str | None:
    return repr(value) if is_simple(value) else None
