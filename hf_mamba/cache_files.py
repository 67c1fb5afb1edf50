"""The states of a `RecurrentCache` in a file: "save the conversation", in constant size.

The file is safetensors: `layers.<i>.conv_state` and `layers.<i>.ssm_state` for every layer that has states, and in its
metadata the format's name and version, the number of layers and the number of tokens seen.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_states", "save_states"]

FORMAT, VERSION = "hf_mamba.RecurrentCache", "1"
NAMES = ("conv_state", "ssm_state")

# convolution state and SSM state of each layer; None for a layer without states
States = Sequence[tuple[Tensor, Tensor] | None]


def save_states(path: str | os.PathLike[str], states: States, seen: int) -> None:
    """Write the states of all layers and the number of tokens seen; under a temporary name, which is then renamed."""
    tensors = {
        f"layers.{index}.{name}": state.detach().cpu().contiguous()
        for index, pair in enumerate(states)
        if pair is not None
        for name, state in zip(NAMES, pair, strict=True)
    }
    metadata = {"format": FORMAT, "version": VERSION, "layers": str(len(states)), "seen": str(seen)}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_states(
    path: str | os.PathLike[str], num_layers: int, device: str | torch.device
) -> tuple[list[tuple[Tensor, Tensor] | None], int]:
    """Read what `save_states` wrote.

    Raises:
        ValueError: another kind of file, a damaged one, or one of a model with another number of layers.
    """
    name = os.fspath(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise ValueError(f"{name!r} was not written by RecurrentCache.save() of this version of hf_mamba.")
            if int(metadata["layers"]) != num_layers:
                raise ValueError(
                    f"{name!r} holds the states of a model of {metadata['layers']} layers, but `config` has {num_layers}."
                )
            found = set(file.keys())
            states: list[tuple[Tensor, Tensor] | None] = []
            for index in range(num_layers):
                conv_key, ssm_key = (f"layers.{index}.{name}" for name in NAMES)
                has_states = conv_key in found and ssm_key in found
                states.append((file.get_tensor(conv_key), file.get_tensor(ssm_key)) if has_states else None)
    except SafetensorError as error:
        raise ValueError(f"{name!r} is not a safetensors file, or a damaged one: {error}.") from error
    return states, int(metadata["seen"])
