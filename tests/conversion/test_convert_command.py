"""`hf-mamba convert`, and the Hub on both of its ends, served by this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from hf_mamba import demo_checkpoint
from hf_mamba.cli.main import app
from hf_mamba_conversion import pipeline
from hf_mamba_conversion.writer import SafetensorsWriter

from ..loopback_hub import Fault, Hub, serve
from .checkpoints import mamba_ssm_config, mamba_ssm_tensors, write_bin, write_shards

CONFIG = mamba_ssm_config("Mamba2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_bin(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)


# huggingface_hub reads its environment once, so commands that talk to the hub run in a process of their own
TERMINAL = """
import json, sys
from typer.testing import CliRunner
from hf_mamba.cli.main import app

for line in sys.stdin:
    outcome = CliRunner().invoke(app, ["convert", *json.loads(line)])
    print(json.dumps([outcome.exit_code, outcome.stdout, outcome.stderr]), flush=True)
"""


class Terminal:
    """A running hub, and a process whose commands take it for the Hub."""

    def __init__(self, hub: Hub, process: "subprocess.Popen[str]") -> None:
        self.hub, self.process = hub, process

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, output and error output, the latter on one line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self.process.stdin.flush()
        code, output, errors = json.loads(self.process.stdout.readline())
        return code, output, " ".join(errors.split())


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with serve() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        with subprocess.Popen(
            [sys.executable, "-c", TERMINAL],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            # leaving the block closes its input, which ends it
            yield Terminal(hub, process)


def test_it_prints_format_configuration_and_count(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "result", "--verify", "--max-shard-size", "20KB", "--dtype", "bfloat16")
    assert outcome.exit_code == 0, outcome.output
    for part in ("mamba_ssm (state-spaces/mamba)", "Mamba2ForCausalLM", "parameters", "num_heads", "bfloat16"):
        assert part in outcome.stdout
    assert "the largest difference of logits is" in outcome.stdout and "before the cast" in outcome.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in outcome.stdout
    assert model.dtype == torch.bfloat16 and (tmp_path / "result" / "model.safetensors.index.json").is_file()


def test_to_mamba_ssm(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "hf").exit_code == 0
    outcome = run(tmp_path / "hf", tmp_path / "result", "--to", "mamba_ssm", "--verify")
    assert outcome.exit_code == 0 and "MambaLMHeadModel" in outcome.stdout
    assert {path.name for path in (tmp_path / "result").iterdir()} == {"README.md", "config.json", "pytorch_model.bin"}


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    outcome = run(source, "--dry-run")
    assert outcome.exit_code == 0 and "Nothing was written" in outcome.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all", "result"], "there is no 'nowhere/at/all'"),
        (["{source}"], "`dest` is missing"),
        (["{source}", "{source}"], "not empty"),
        (["{source}", "result", "--dtype", "int4"], "float32, bfloat16, float16"),
        (["{source}", "result", "--option", "activation"], "NAME=VALUE"),
        (["{source}", "result", "--option", "a=1", "--option", "a=2"], "given twice"),
        (["{source}", "result", "--private"], "push_to_hub"),
    ],
    ids=["source", "no_dest", "dest", "dtype", "option", "option_twice", "private"],
)
def test_mistakes_end_with_one_message(arguments: list[str], words: str, source: Path, tmp_path: Path) -> None:
    filled = [text.format(source=source).replace("result", str(tmp_path / "result")) for text in arguments]
    outcome = run(*filled)
    assert outcome.exit_code == 1 and isinstance(outcome.exception, SystemExit)
    assert words in " ".join(outcome.stderr.split()) and outcome.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_bar_shows_each_stage_with_its_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, check = SafetensorsWriter.write, pipeline.verify

    def slow_write(self, tensor):
        time.sleep(0.02)
        return write(self, tensor)

    def slow_verify(*arguments, **options):
        time.sleep(0.3)
        return check(*arguments, **options)

    monkeypatch.setattr(SafetensorsWriter, "write", slow_write)
    monkeypatch.setattr(pipeline, "verify", slow_verify)
    # as on a terminal
    environment = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}
    arguments = ["convert", str(source), str(tmp_path / "result"), "--verify"]
    outcome = CliRunner().invoke(app, arguments, env=environment)
    assert outcome.exit_code == 0, outcome.output
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.stderr)
    assert re.search(r"Writing weights .*[0-9.]+/[0-9.]+ kB", text) and "Verifying" in text
    # results go to the other stream, so that they can be piped
    assert "Writing weights" not in outcome.stdout


@pytest.mark.parametrize(
    ("function", "words", "left"),
    [("verify", "interrupted; nothing was written", []), ("push", "interrupted while uploading", ["result"])],
)
def test_an_interruption_says_what_is_left(
    function: str, words: str, left: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, function, interrupt)
    monkeypatch.setattr(pipeline, "check_repository", lambda *arguments: "mit")
    outcome = run(source, tmp_path / "result", "--verify", "--push-to-hub", "me/mine")
    assert outcome.exit_code == 1 and words in " ".join(outcome.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "source"]


def test_the_formats_options_are_shown(tmp_path: Path) -> None:
    outcome = run(Path(__file__).parents[1] / "fixtures" / "llmrandom_moe_mamba_current.ckpt.pt", "--dry-run")
    text = " ".join(outcome.stdout.split())
    assert "option activation auto (of auto, relu, silu, gelu). Activation of the experts" in text
    assert "option experts_per_token 1" in text and "75,968" in text


def test_help_names_formats_and_options() -> None:
    text = " ".join(CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "120"}).stdout.split())
    for word in (
        "SOURCE",
        "DEST",
        "mamba_ssm",
        "Codestral",
        "llm-random",
        "BlackMamba",
        "activation=silu",
    ):
        assert word in text


def test_termination_leaves_nothing(tmp_path: Path) -> None:
    config = CONFIG | {"n_layer": 64}
    source = write_bin(tmp_path / "source", mamba_ssm_tensors(config), config)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "hf_mamba.cli", "convert", str(source), str(tmp_path / "result"), "--verify"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob(".result.incomplete-*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_repository_is_read_from_the_hub(terminal: Terminal, tmp_path: Path) -> None:
    hub = terminal.hub
    config = CONFIG | {"vocab_size": 4096}
    folder = write_shards(tmp_path / "repository", mamba_ssm_tensors(config), config)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories["someone/mamba"] = files | {"pytorch_model.bin": b"not needed", "notes.md": b"not needed"}
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = {name: (Path(demo_checkpoint()) / name).read_bytes() for name in names}
    hub.repositories["someone/words"] = tokenizer | {"model.safetensors": b"not needed"}
    arguments = ("someone/mamba", tmp_path / "result", "--verify", "--tokenizer", "someone/words")
    code, _, errors = terminal.run(*arguments)
    assert code == 0, errors
    assert {name: (tmp_path / "result" / name).read_bytes() for name in names} == tokenizer
    assert any(path.startswith("/someone/words/resolve/") for path in hub.requested)
    assert not any(re.fullmatch(r"/someone/words/resolve/.*/model\.safetensors", path) for path in hub.requested)
    assert not any(path.endswith(("pytorch_model.bin", "notes.md")) for path in hub.requested)
    card = (tmp_path / "result" / "README.md").read_text()
    assert "base_model: someone/mamba" in card and "hf-mamba convert someone/mamba" in card

    code, _, errors = terminal.run("someone/missing", tmp_path / "other")
    assert code == 1 and "cannot be had from the Hub" in errors
    assert not (tmp_path / "other").exists()


def test_the_result_is_pushed(terminal: Terminal, source: Path, tmp_path: Path) -> None:
    hub = terminal.hub
    arguments = (source, tmp_path / "result", "--push-to-hub", "me/mine", "--private", "--license", "mit")
    code, output, errors = terminal.run(*arguments)
    assert code == 0, errors
    assert f"Uploaded to {hub.endpoint}/me/mine/commit/" in output
    uploaded = hub.repositories["me/mine"]
    written = {file.name: file.read_bytes() for file in (tmp_path / "result").iterdir()}
    assert {name: uploaded[name] for name in written} == written and hub.private == {"me/mine"}
    assert b'from_pretrained("me/mine")' in uploaded["README.md"]
    assert json.loads(uploaded["config.json"])["model_type"] == "mamba2"
    card = ModelCard(uploaded["README.md"].decode())
    assert card.data.license == "mit" and {"hf_mamba", "mamba2", "converted"} <= set(card.data.tags)
    # the command in the card says nothing of this machine's folders
    assert str(tmp_path) not in card.content and "hf-mamba convert source result" in card.content


def test_experts_are_pushed_with_their_shim_and_replace_what_was_there(terminal: Terminal, tmp_path: Path) -> None:
    """As `hf-mamba push` does: one commit, with what trust_remote_code needs, and no weights of an earlier upload left."""
    hub = terminal.hub
    hub.repositories["me/experts"] = {
        "README.md": b"---\nlicense: mit\n---\n",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "notes.md": b"mine",
    }
    checkpoint = Path(__file__).parents[1] / "fixtures" / "llmrandom_moe_mamba_current.ckpt.pt"
    # the licence is that of the card in the repository
    code, _, errors = terminal.run(checkpoint, tmp_path / "result", "--push-to-hub", "me/experts")
    assert code == 0, errors
    uploaded = hub.repositories["me/experts"]
    assert set(uploaded) == {
        *(file.name for file in (tmp_path / "result").iterdir()),
        "modeling_hf_mamba.py",
        "notes.md",
    }
    assert json.loads(uploaded["config.json"])["auto_map"]["AutoModelForCausalLM"].endswith("MoeMambaForCausalLM")
    assert b"from hf_mamba import" in uploaded["modeling_hf_mamba.py"]
    assert ModelCard(uploaded["README.md"].decode()).data.license == "mit"


def test_the_licence_of_the_sources_card_goes_with_it(terminal: Terminal, source: Path, tmp_path: Path) -> None:
    hub = terminal.hub
    hub.repositories["someone/licensed"] = {file.name: file.read_bytes() for file in source.iterdir()} | {
        "README.md": b"---\nlicense: bsd-3-clause\n---\n# Theirs\n"
    }
    code, _, errors = terminal.run("someone/licensed", tmp_path / "result", "--push-to-hub", "me/licensed")
    assert code == 0, errors
    data = ModelCard(hub.repositories["me/licensed"]["README.md"].decode()).data
    assert (data.license, data.base_model) == ("bsd-3-clause", "someone/licensed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "without a licence"),
        (("--license", "made-up"), "made-up"),
        (("--license", "mit", "--to", "mamba_ssm"), "uploads safetensors only"),
    ],
    ids=["none", "unknown", "pickle"],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    options: tuple[str, ...], words: str, terminal: Terminal, source: Path, tmp_path: Path
) -> None:
    code, _, errors = terminal.run(source, tmp_path / "result", "--push-to-hub", "me/refused", *options)
    assert code == 1 and words in errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert "me/refused" not in terminal.hub.repositories


def test_a_failing_upload_keeps_the_folder_and_says_so(terminal: Terminal, source: Path, tmp_path: Path) -> None:
    # as when the token may not write there; an overloaded Hub is asked again and again
    terminal.hub.faults.append(Fault("POST", "/api/models/me/broken/commit", status=403))
    arguments = (source, tmp_path / "result", "--push-to-hub", "me/broken", "--license", "mit")
    code, _, errors = terminal.run(*arguments)
    assert code == 1 and "the conversion is complete" in errors
    assert f"hf-mamba push {tmp_path / 'result'} me/broken" in errors
    assert (tmp_path / "result" / "model.safetensors").is_file()


def test_a_bad_repository_name_is_found_before_any_work(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "result", "--push-to-hub", "a/b/c")
    assert outcome.exit_code == 1 and "no name of a repository" in " ".join(outcome.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
