"""Damaged weights and hostile configurations end in one clear error, and no memory is allocated for what they promise."""

import json
import resource
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from hf_mamba.cli import app

from ..loopback_hub import Hub
from ..models.builders import make_model

SHARD = "model-00001-of-"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("mamba2").save_pretrained(tmp_path / "tiny", max_shard_size="20KB")
    return tmp_path / "tiny"


def spoil(content: bytes, how: str) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    if how == "shape":
        header[first]["shape"] = [2**40]
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    return {
        "truncated": content[:-50],
        "extended": content + b"more",
        "empty": b"",
        "pickle": b"\x80\x04" + b"." * 200,
        "header size": (2**40).to_bytes(8, "little") + content[8:],
    }[how]


@pytest.mark.parametrize("how", ["truncated", "extended", "empty", "pickle", "header size", "shape"])
def test_a_damaged_shard_is_named(how: str, folder: Path) -> None:
    shard = next(folder.glob(SHARD + "*"))
    shard.write_bytes(spoil(shard.read_bytes(), how))
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_shard_from_the_hub(folder: Path, hub: Hub) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    shard = next(name for name in files if name.startswith(SHARD))
    hub.repositories["me/tiny"] = files | {shard: files[shard][:-50]}
    with pytest.raises(ValueError, match=r"weight file of 'me/tiny' is damaged"):
        AutoModelForCausalLM.from_pretrained("me/tiny")


def test_a_missing_shard(folder: Path) -> None:
    shard = next(folder.glob(SHARD + "*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"has no {shard.name}"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no index"),
        ('{"metadata": {}, "weight_map": {}}', "files of its own folder, got none"),
        ('{"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}', "files of its own folder"),
    ],
    ids=["broken", "empty", "outside"],
)
def test_a_damaged_index(content: str, words: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


HOSTILE = [
    ("mamba2", {"hidden_size": -1}, "`hidden_size` must be a positive integer"),
    ("mamba2", {"hidden_size": "32"}, "hidden_size"),
    ("mamba2", {"num_hidden_layers": 2**31 - 1}, "`num_hidden_layers` must be a positive integer below 2"),
    ("mamba2", {"num_hidden_layers": 10**6}, "`num_hidden_layers` must be a positive integer below 2"),
    ("mamba2", {"vocab_size": 2**40}, "`vocab_size` must be a positive integer"),
    ("mamba2", {"vocab_size": 2**31 - 1}, "size mismatch"),
    ("mamba2", {"state_size": 2**30}, "size mismatch"),
    ("mamba2", {"conv_kernel": 2**30}, "size mismatch"),
    ("mamba2", {"hidden_size": 2**20, "num_heads": 2**18}, "size mismatch"),
    ("moe_mamba", {"num_experts": 2**30}, "size mismatch"),
    ("moe_mamba", {"moe_intermediate_size": 2**30}, "size mismatch"),
    ("moe_mamba", {"layers_block_type": ["mamba"] * 10**5, "num_hidden_layers": 10**5}, "`num_hidden_layers`"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the address space and the peak as Linux counts them")
@pytest.mark.parametrize(("kind", "values", "words"), HOSTILE, ids=[f"{k}-{next(iter(v))}" for k, v, _ in HOSTILE])
def test_a_hostile_configuration_costs_no_memory(kind: str, values: dict, words: str, tmp_path: Path) -> None:
    """Each asks for 4 GiB to some petabytes."""
    make_model(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_the_command_says_what_is_wrong(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Configuration and weights that do not fit are a RuntimeError, which is one message too."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"state_size": 32}))
    result = CliRunner().invoke(app, ["generate", str(folder), "w3 w4"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    message = " ".join(result.stderr.split())
    assert "cannot be loaded: size mismatch" in message and "saved with the weights" in message
