"""Whatever a configuration says, a conversion ends with a result or with a `ConversionError`, never with a traceback."""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_mamba_conversion import ConversionError, convert

from . import test_blackmamba, test_mamba_ssm, test_mamba_ssm_moe
from .checkpoints import mamba_ssm_tensors, write_bin

WRONG = (None, [[]], "x", -1, math.nan, 10**30)
# answers that are right for some fields, and fields that have no effect
HARMLESS = 0.3


def mamba_ssm(name: str, folder: Path) -> Path:
    config = test_mamba_ssm.VARIANTS[name]
    return write_bin(folder, mamba_ssm_tensors(config), config)


def mamba_ssm_moe(folder: Path) -> Path:
    folder.mkdir()
    config = test_mamba_ssm_moe.make_config(moe_cfg={"gate_bias": False, "n_shared_experts": 1})
    return test_mamba_ssm_moe.write(folder, config)


def blackmamba(folder: Path) -> Path:
    folder.mkdir()
    return test_blackmamba.write(folder, test_blackmamba.make_config(["r", "4", "r2", "1"]))


MAKERS = {
    "mamba_every_argument": lambda folder: mamba_ssm("mamba_every_argument", folder),
    "mamba2_every_argument": lambda folder: mamba_ssm("mamba2_every_argument", folder),
    "mamba_gated_mlp": lambda folder: mamba_ssm("mamba_gated_mlp", folder),
    "mamba_ssm_moe": mamba_ssm_moe,
    "blackmamba": blackmamba,
    "codestral": test_mamba_ssm.make_codestral,
    "hf_mamba2": lambda folder: test_mamba_ssm.make_native_folder("mamba2", folder),
    "hf_falcon_mamba": lambda folder: test_mamba_ssm.make_native_folder("falcon_mamba", folder),
}


def fields(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path to every value, and to every dictionary of values."""
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from fields(value, (*above, key))


@pytest.mark.parametrize("name", MAKERS)
def test_a_value_that_makes_no_sense_is_a_clear_error(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path / "source")
    file = folder / ("params.json" if name == "codestral" else "config.json")
    config = json.loads(file.read_text())
    harmless = tried = 0
    for path in fields(config):
        for value in WRONG:
            changed = copy.deepcopy(config)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            file.write_text(json.dumps(changed))
            tried += 1
            try:
                convert(folder, dry_run=True)
                harmless += 1
            except ConversionError as error:
                assert len(str(error)) > 20
    assert harmless < HARMLESS * tried
