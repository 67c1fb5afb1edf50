"""Synthetic checkpoints with the published names, scaled down (checkpoint_formats.md §1, §4, §5)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .moe_checkpoints import Tensors

# the published config.json of mamba-130m and mamba2-130m, without the sizes
PUBLISHED = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}


def mamba_ssm_config(layer: str = "Mamba1", **changes: Any) -> dict[str, Any]:
    """A small configuration with the published keys; Mamba-2's has the published multiple of 16."""
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 90, "ssm_cfg": {}, **PUBLISHED, "pad_vocab_size_multiple": 8}
    if layer == "Mamba2":
        config |= {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8}, "pad_vocab_size_multiple": 16}
    return config | changes


def mamba_ssm_tensors(config: Mapping[str, Any], prefix: str = "", embedding: str = "embedding") -> Tensors:
    """The state dict that mamba_ssm makes of `config`."""
    tensors = Tensors()
    d, ssm_cfg = config["d_model"], config["ssm_cfg"]
    multiple = config["pad_vocab_size_multiple"]
    V = multiple * math.ceil(config["vocab_size"] / multiple)
    names = ("weight",) if config.get("rms_norm", True) else ("weight", "bias")
    inner = ssm_cfg.get("expand", 2) * d
    bias = ssm_cfg.get("bias", False)
    tensors.add(f"{prefix}backbone.{embedding}.weight", V, d, std=0.1)
    for index in range(config["n_layer"]):
        layer = f"{prefix}backbone.layers.{index}."
        tensors.norm(f"{layer}norm.", d, names)
        width = ssm_cfg.get("d_conv", 4)
        if ssm_cfg.get("layer", "Mamba1") == "Mamba2":
            heads, groups = inner // ssm_cfg.get("headdim", 64), ssm_cfg.get("ngroups", 1)
            tensors.mamba2(f"{layer}mixer.", d, inner, ssm_cfg.get("d_state", 128), heads, groups, width)
        else:
            rank = ssm_cfg.get("dt_rank", "auto")
            rank = math.ceil(d / 16) if rank == "auto" else rank
            tensors.mamba1(f"{layer}mixer.", d, inner, ssm_cfg.get("d_state", 16), rank, width)
        if bias:
            tensors.add(f"{layer}mixer.in_proj.bias", tensors[f"{layer}mixer.in_proj.weight"].shape[0])
            tensors.add(f"{layer}mixer.out_proj.bias", d)
        if not ssm_cfg.get("conv_bias", True):
            del tensors[f"{layer}mixer.conv1d.bias"]
        if config.get("d_intermediate", 0):
            F = 128 * math.ceil(config["d_intermediate"] / 128)
            tensors.norm(f"{layer}norm2.", d, names)
            tensors.add(f"{layer}mlp.fc1.weight", 2 * F, d)
            tensors.add(f"{layer}mlp.fc2.weight", d, F)
    for name, value in tensors.items():
        if value.dim() == 2 and ".layers." in name and "A_log" not in name:
            # as a trained model's, so that logits are near 1 and rounding stays small
            value.mul_(5 * value.shape[1] ** -0.5)
    tensors.norm(f"{prefix}backbone.norm_f.", d, names)
    head = f"{prefix}lm_head.weight"
    if config.get("tie_embeddings", True):
        # mamba_ssm stores a tied head as well
        tensors[head] = tensors[f"{prefix}backbone.{embedding}.weight"]
    else:
        tensors.add(head, V, d, std=0.1)
    return tensors


def write_bin(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    """A folder as mamba_ssm writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    """The same in one safetensors file; tensors may not share storage there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, suffix: str = "safetensors"
) -> Path:
    """The same in three shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(3):
        part = {name: value.clone() for i, (name, value) in enumerate(tensors.items()) if i % 3 == number}
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
