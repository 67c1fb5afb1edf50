"""Damaged and hostile files: a clear error each, exit code 1 of the command, nothing written, the source as it was."""

import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_mamba.cli.main import app
from hf_mamba_conversion import ConversionError, Progress, convert

from .checkpoints import mamba_ssm_config, mamba_ssm_tensors, write_bin, write_safetensors, write_shards

CONFIG = mamba_ssm_config()


class Payload:
    """Runs a command when unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = mamba_ssm_tensors(CONFIG)
    change(tensors)
    return write_bin(folder, tensors, CONFIG)


def shards(folder: Path) -> Path:
    return write_shards(folder, mamba_ssm_tensors(CONFIG), CONFIG)


def malicious(folder: Path) -> Path:
    write_bin(folder, mamba_ssm_tensors(CONFIG), CONFIG)
    tensors = dict(mamba_ssm_tensors(CONFIG)) | {"extra": Payload(f"touch {folder}/../executed")}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def malicious_old_format(folder: Path) -> Path:
    write_bin(folder, mamba_ssm_tensors(CONFIG), CONFIG)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(f"touch {folder}/../executed"), protocol=2))
    return folder


def truncated(file: str, write: Callable[..., Path]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder, mamba_ssm_tensors(CONFIG), CONFIG)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) - 1000])
        return folder

    return make


def missing_shard(folder: Path) -> Path:
    (shards(folder) / "model-00002-of-00003.safetensors").unlink()
    return folder


def duplicate_tensor(folder: Path) -> Path:
    shards(folder)
    second = folder / "model-00002-of-00003.safetensors"
    first = load_file(folder / "model-00001-of-00003.safetensors")
    save_file(load_file(second) | {"backbone.embedding.weight": first["backbone.embedding.weight"].clone()}, second)
    return folder


def duplicate_key(folder: Path) -> Path:
    file = shards(folder) / "model.safetensors.index.json"
    text = file.read_text()
    entry = '"backbone.embedding.weight": "model-00002-of-00003.safetensors", '
    file.write_text(text.replace('"weight_map": {', '"weight_map": {' + entry))
    return folder


def swap_shapes(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("in_proj", "out_proj"):
        key = f"backbone.layers.0.mixer.{name}.weight"
        tensors[key] = tensors[key].T.contiguous()


def outside(place: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_safetensors(folder.parent / "other", {"lm_head.weight": torch.zeros(96, 32)}, None)
        return edit_index(shards(folder), lambda weights: weights.update({"lm_head.weight": place}))

    return make


def without_index_entry(folder: Path) -> Path:
    return edit_index(shards(folder), lambda weights: weights.__delitem__("lm_head.weight"))


def index_of_an_absent_tensor(folder: Path) -> Path:
    return edit_index(shards(folder), lambda w: w.update({"more.weight": "model-00001-of-00003.safetensors"}))


A_LOG = "backbone.layers.0.mixer.A_log"
DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "malicious_pickle": (malicious, "could run code"),
    "malicious_old_pickle": (malicious_old_format, "could run code"),
    "truncated_bin": (truncated("pytorch_model.bin", write_bin), "truncated"),
    "truncated_safetensors": (truncated("model.safetensors", write_safetensors), "truncated"),
    "truncated_shard": (truncated("model-00002-of-00003.safetensors", write_shards), "truncated"),
    "missing_shard": (missing_shard, "model-00002-of-00003"),
    "extra_tensor": (
        lambda folder: edit_tensors(folder, lambda t: t.update({"backbone.extra": torch.zeros(3)})),
        r"backbone\.extra",
    ),
    "missing_tensor": (lambda folder: edit_tensors(folder, lambda t: t.__delitem__(A_LOG)), "A_log"),
    "swapped_shapes": (lambda folder: edit_tensors(folder, swap_shapes), r"in_proj\.weight"),
    "wrong_dtype": (
        lambda folder: edit_tensors(folder, lambda t: t.update({A_LOG: t[A_LOG].to(torch.int8)})),
        "A_log.*int8",
    ),
    "not_a_tensor": (lambda folder: edit_tensors(folder, lambda t: t.update({"step": 3})), "step"),
    "sparse": (lambda folder: edit_tensors(folder, lambda t: t.update({A_LOG: t[A_LOG].to_sparse()})), "sparse"),
    "index_parent": (outside("../other/model.safetensors"), "refused"),
    "index_absolute": (outside("/etc/passwd"), "refused"),
    "index_backslash": (outside("..\\other\\model.safetensors"), "refused"),
    "index_folder": (outside(".."), "refused"),
    "index_pickle": (outside("evil.bin"), "expected a .safetensors"),
    "index_not_a_name": (outside(7), "refused"),  # type: ignore[arg-type]
    "index_lacks_a_tensor": (without_index_entry, r"lm_head\.weight"),
    "index_lists_an_absent_tensor": (index_of_an_absent_tensor, r"more\.weight"),
    "duplicate_tensor": (duplicate_tensor, r"backbone\.embedding\.weight"),
    "duplicate_key": (duplicate_key, "twice"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_or_hostile_files(name: str, tmp_path: Path) -> None:
    make, words = DAMAGED[name]
    source = make(tmp_path / "source")
    before = fingerprint(tmp_path)
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "result")
    outcome = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "result")])
    assert outcome.exit_code == 1 and "Error:" in outcome.output and "Traceback" not in outcome.output
    assert fingerprint(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) in (["source"], ["other", "source"])


@pytest.mark.parametrize("kind", ["bin", "old_bin", "safetensors", "index"])
def test_random_damage_is_a_clear_error_or_harmless(kind: str, tmp_path: Path) -> None:
    tensors = mamba_ssm_tensors(CONFIG)
    folder = tmp_path / "source"
    if kind == "index":
        file = write_shards(folder, tensors, CONFIG) / "model.safetensors.index.json"
    elif kind == "safetensors":
        file = write_safetensors(folder, tensors, CONFIG) / "model.safetensors"
    else:
        file = write_bin(folder, tensors, CONFIG) / "pytorch_model.bin"
        torch.save(dict(tensors), file, _use_new_zipfile_serialization=kind == "bin")
    content = file.read_bytes()
    choose = random.Random(0)
    errors = 0
    for _ in range(40):
        damaged = bytearray(content)
        if choose.random() < 0.3:
            del damaged[choose.randrange(len(content)) :]
        for _ in range(choose.choice((1, 3, 30)) if len(damaged) == len(content) else 0):
            # names and shapes stand at the beginning or at the end
            place = choose.choice((choose.randrange(3000), -1 - choose.randrange(6000))) % len(content)
            damaged[place] = choose.randrange(256)
        file.write_bytes(damaged)
        try:
            convert(folder, tmp_path / "result")
            shutil.rmtree(tmp_path / "result")
        except ConversionError:
            errors += 1
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert errors > 10


STAGES = (
    "Opening",
    "Planning",
    "Comparing tied tensors",
    "Writing weights",
    "Writing configuration and tokenizer",
    "Verifying",
    "Computing checksums",
    "Writing the model card",
    "Putting the folder in place",
)


class Killer(Progress):
    """Raises when a stage begins, or after so many reports of bytes within it."""

    def __init__(self, stage: str, reports: int | None, error: type[BaseException]) -> None:
        self.wanted, self.reports, self.error = stage, reports, error
        self.current = ""
        self.seen: list[str] = []

    def stage(self, title: str, total: int = 0) -> None:
        self.current = title
        self.seen.append(title)
        if title == self.wanted and self.reports is None:
            raise self.error

    def advance(self, amount: int) -> None:
        if self.current == self.wanted and self.reports is not None:
            self.reports -= 1
            if self.reports <= 0:
                raise self.error


def assert_killed_without_trace(killer: Killer, to: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)
    before = fingerprint(tmp_path)
    with pytest.raises(killer.error):
        convert(source, tmp_path / "deep" / "result", to=to, verify=True, progress=killer)
    assert fingerprint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    report = convert(source, tmp_path / "deep" / "result", to=to, verify=True)
    assert report.destination is not None and report.destination.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result"]
    assert fingerprint(source) == {name.removeprefix("source/"): digest for name, digest in before.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
def test_killed_at_the_start_of_any_stage(stage: str, error: type[BaseException], tmp_path: Path) -> None:
    assert_killed_without_trace(Killer(stage, None, error), "hf", tmp_path)


@pytest.mark.parametrize("to", ["hf", "mamba_ssm"])
@pytest.mark.parametrize(
    ("stage", "reports"), [("Comparing tied tensors", 1), ("Writing weights", 7), ("Computing checksums", 2)]
)
def test_killed_within_a_stage(stage: str, reports: int, to: str, tmp_path: Path) -> None:
    assert_killed_without_trace(Killer(stage, reports, MemoryError), to, tmp_path)


class Killed(BaseException):
    pass


class KilledAtCall:
    """For `sys.setprofile`: counts the calls of functions of ours, and raises in one of them."""

    def __init__(self, number: int | None) -> None:
        self.number, self.count = number, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "hf_mamba_conversion" in frame.f_code.co_filename:
            self.count += 1
            if self.count == self.number:
                raise Killed


def calls_until_killed(number: int | None, *arguments: Any, **options: Any) -> int:
    """Convert, raising in the call of that number if it comes to it; how many calls there were."""
    counter = KilledAtCall(number)
    sys.setprofile(counter)
    try:
        convert(*arguments, **options)
    except Killed:
        pass
    finally:
        sys.setprofile(None)
    return counter.count


@pytest.mark.parametrize("to", ["hf", "mamba_ssm"])
def test_killed_in_any_function(to: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)
    before = fingerprint(source)
    total = calls_until_killed(None, source, tmp_path / "whole", to=to, verify=True)
    shutil.rmtree(tmp_path / "whole")
    assert total > 500
    points = [*range(2, total - 20, total // 25), *range(total - 20, total)]
    for number in points:
        assert calls_until_killed(number, source, tmp_path / "result", to=to, verify=True) == number
        if (tmp_path / "result").exists():
            # it was already in its place, and nothing was left to do but to close the source
            assert number > total - 10
            assert all((tmp_path / "result" / name).is_file() for name in ("README.md", "config.json"))
            shutil.rmtree(tmp_path / "result")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "result", to=to, verify=True)
    assert fingerprint(source) == before


def test_the_stages_are_all_there_are(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)
    listener = Killer("none", None, RuntimeError)
    convert(source, tmp_path / "result", verify=True, progress=listener)
    assert tuple(listener.seen) == STAGES


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_bin(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("hf_mamba_conversion.destination.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="GB free"):
        convert(source, tmp_path / "result")
    assert not (tmp_path / "result").exists()
