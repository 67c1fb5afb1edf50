"""`hf-mamba card` and `hf-mamba push`: one message for each mistake, and nothing sent before all is checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from hf_mamba import demo_checkpoint
from hf_mamba.cli import app

from ..loopback_hub import Hub
from ..models.builders import make_model
from .examples import logits


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    message = " ".join(result.stderr.split())
    assert "Error: " in message and "Traceback" not in message
    for part in parts:
        assert part in message


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    make_model("moe_mamba").save_pretrained(tmp_path / "tiny", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_push_uploads_what_loads(folder: Path, hub: Hub) -> None:
    for name in ("training_args.bin", "optimizer.pt", ".hidden"):
        (folder / name).write_bytes(b"not for others")
    for name in ("checkpoint-10", "runs", "__pycache__"):
        (folder / name).mkdir()
    (folder / "runs" / "events.out.tfevents").write_bytes(b"not for others")
    (folder / "__pycache__" / "modeling_hf_mamba.pyc").write_bytes(b"not for others")
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"not for others")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    listed = run("push", folder, "me/tiny", "--dry-run").stdout.split()
    assert hub.requests == []
    result = run("push", folder, "tiny", "--license", "apache-2.0", "--dataset", "someone/words", "--private")
    assert result.exit_code == 0, result.output
    assert f"Uploaded to {hub.endpoint}/me/tiny/commit/" in result.stdout and hub.private == {"me/tiny"}
    files = hub.repositories["me/tiny"]
    assert set(files) == set(listed) | {"README.md"}
    assert not any(b"not for others" in content for content in files.values())
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert ModelCard.load("me/tiny").data.datasets == ["someone/words"]
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), expected)


def test_push_completes_a_folder_without_shim_and_card(folder: Path, hub: Hub) -> None:
    shim = (folder / "modeling_hf_mamba.py").read_bytes()
    (folder / "modeling_hf_mamba.py").unlink()
    (folder / "README.md").unlink()
    config = json.loads((folder / "config.json").read_text())
    names = config.pop("auto_map")
    (folder / "config.json").write_text(json.dumps(config))
    assert run("push", folder, "me/tiny", "--license", "mit", "--message", "First").exit_code == 0
    files = hub.repositories["me/tiny"]
    assert files["modeling_hf_mamba.py"] == shim and json.loads(files["config.json"])["auto_map"] == names
    assert b"# tiny" in files["README.md"]


def test_push_to_a_branch(folder: Path, hub: Hub) -> None:
    result = run("push", folder, "me/tiny", "--license", "mit", "--revision", "next")
    assert result.exit_code == 0, result.output
    assert hub.repositories["me/tiny"] == {} and "config.json" in hub.branches["me/tiny", "next"]


def test_push_proposes_a_change_to_a_foreign_repository(folder: Path, hub: Hub) -> None:
    hub.repositories["you/tiny"] = {"notes.md": b"yours"}
    result = run("push", folder, "you/tiny", "--license", "mit", "--create-pr")
    assert result.exit_code == 0, result.output
    assert f"Uploaded to {hub.endpoint}/you/tiny/discussions/1" in result.stdout
    assert hub.repositories["you/tiny"] == {"notes.md": b"yours"}
    assert {"notes.md", "config.json", "README.md"} <= set(hub.branches["you/tiny", "refs/pr/1"])


def test_push_proposes_a_change_to_a_branch_of_a_foreign_repository(folder: Path, hub: Hub) -> None:
    hub.repositories["you/tiny"] = {}
    hub.branches["you/tiny", "next"] = {"notes.md": b"yours"}
    result = run("push", folder, "you/tiny", "--license", "mit", "--create-pr", "--revision", "next")
    assert result.exit_code == 0, result.output
    assert hub.branches["you/tiny", "next"] == {"notes.md": b"yours"}
    # nobody makes branches in a foreign repository
    assert hub.count("POST", "/branch/") == 0


def test_push_an_adapter_that_peft_saved(hub: Hub, tmp_path: Path) -> None:
    """PEFT's own card names a folder of this machine as the base model, and says nothing else."""
    make_model("mamba").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    assert str(tmp_path) in (tmp_path / "lora" / "README.md").read_text()
    assert_refused(run("push", tmp_path / "lora", "me/lora", "--license", "mit"), "--base-model")
    result = run("push", tmp_path / "lora", "me/lora", "--license", "mit", "--base-model", "me/base")
    assert result.exit_code == 0, result.output
    assert not any(str(tmp_path).encode() in content for content in hub.repositories["me/lora"].values())
    assert "adapter with" in ModelCard.load("me/lora").text
    # a card without content is no card that somebody wrote
    assert run("card", tmp_path / "lora", "--license", "mit", "--base-model", "me/base").exit_code == 0
    assert "adapter with" in (tmp_path / "lora" / "README.md").read_text()


def spoil(folder: Path, how: str) -> None:
    if how == "truncated":
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "shard missing":
        sorted(folder.glob("*.safetensors"))[0].unlink()
    elif how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif how == "token":
        (folder / "notes.txt").write_text("hf_" + "a" * 34)
    elif how == "path":
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(settings | {"source": "/home/me/data"}))
    elif how == "path with a space":
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(settings | {"source": f"{Path.home()}/my data"}))
    elif how == "no JSON":
        (folder / "generation_config.json").write_text("{")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "metadata":
        (folder / "README.md").write_text("---\n- a\n- list\n---\n")
    elif how == "yaml":
        (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("truncated", ["model-00001-of-", "is damaged"]),
        ("shard missing", ["has no model-00001-of-"]),
        ("pickle", ["pytorch_model.bin", "hf-mamba convert"]),
        ("token", ["notes.txt", "token"]),
        ("path", ["generation_config.json", "`source`", "/home/me/data"]),
        ("path with a space", ["generation_config.json", "`source`"]),
        ("no JSON", ["generation_config.json", "is no JSON file"]),
        ("no config", ["config.json"]),
        ("metadata", ["README.md", "metadata"]),
        ("yaml", ["README.md", "metadata"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_push_refuses_before_it_sends(how: str, parts: list[str], folder: Path, hub: Hub) -> None:
    spoil(folder, how)
    if how not in ("metadata", "yaml"):
        # which card is sent depends on the repository, which a dry run does not ask
        assert_refused(run("push", folder, "me/tiny", "--dry-run"), *parts)
        assert hub.requests == []
    assert_refused(run("push", folder, "me/tiny", "--license", "mit"), *parts)
    assert hub.repositories == {} and {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_push_refuses_a_card_that_names_the_home_folder(folder: Path, hub: Hub) -> None:
    with (folder / "README.md").open("a") as card:
        card.write(f"\nTrained on {Path.home()}/books.\n")
    assert_refused(run("push", folder, "me/tiny", "--license", "mit"), "README.md names your home folder")
    assert hub.repositories == {}


def test_push_refuses_its_own_token_of_any_form(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form-0123456789")
    (folder / "notes.txt").write_text("a-token-of-another-form-0123456789")
    result = run("push", folder, "me/tiny", "--dry-run")
    assert_refused(result, "notes.txt holds a token")
    assert "another-form" not in result.output


@pytest.mark.parametrize(("options", "private"), [([], None), (["--private"], True)], ids=["left open", "private"])
def test_push_leaves_open_whether_a_repository_is_private(
    options: list[str], private: bool | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False would make it public where an organisation's default is private."""
    given = {}

    def create_repo(api: HfApi, repo_id: str, **arguments: Any) -> None:
        given.update(arguments)
        raise RuntimeError("no further")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr("hf_mamba.integrations.hub._card_of", lambda *_: None)
    assert_refused(run("push", folder, "me/tiny", "--license", "mit", *options), "no further")
    assert given["private"] is private


def test_push_needs_a_licence(folder: Path, hub: Hub) -> None:
    assert_refused(run("push", folder, "me/tiny"), "`license` is missing", "--license")
    assert_refused(run("push", folder, "me/tiny", "--license", "mine"), "`license` must be one")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{missing}", "me/tiny"], ["there is no folder"]),
        (["{folder}", "a/b/c"], ["'a/b/c' is no name of a repository"]),
        (["{folder}", "you/tiny"], ["403", "may not write there"]),
    ],
    ids=["folder", "name", "foreign"],
)
def test_push_explains_mistakes(arguments: list[str], parts: list[str], folder: Path, hub: Hub) -> None:
    filled = [text.format(folder=folder, missing=folder / "nowhere") for text in arguments]
    assert_refused(run("push", *filled, "--license", "mit"), *parts)


def test_push_without_a_login(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(run("push", folder, "me/tiny", "--license", "mit"), "401", "hf auth login")


def test_card_writes_checks_and_never_overwrites_silently(folder: Path) -> None:
    (folder / "README.md").unlink()
    report = Path(demo_checkpoint()) / "training_report.json"
    result = run("card", folder, "--name", "Tiny", "--language", "en", "--report", report)
    assert result.exit_code == 0 and "states no licence" in " ".join(result.stderr.split())
    card = ModelCard.load(folder / "README.md")
    assert "# Tiny" in card.text and card.data.eval_results and json.loads(report.read_text())["hardware"] in card.text
    assert_refused(run("card", folder), "exists", "--overwrite")
    assert_refused(run("card", folder, "--check"), "`license` is missing")
    assert run("card", folder, "--overwrite", "--license", "mit").exit_code == 0
    card = ModelCard.load(folder / "README.md")
    # carried over from the card before
    assert card.data.language == ["en"] and card.data.eval_results and card.data.license == "mit"
    assert "can be uploaded" in " ".join(run("card", folder, "--check").stdout.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ("{}", "not one of"), ("[]", "not one of")],
    ids=["broken", "empty", "list"],
)
def test_card_refuses_what_is_no_report(content: str, words: str, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").unlink()
    (tmp_path / "report.json").write_text(content)
    assert_refused(run("card", folder, "--report", tmp_path / "report.json"), words)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "adapter_config.json is no JSON file"), ("{}", "has no adapter_model.safetensors")],
    ids=["broken", "without weights"],
)
def test_card_refuses_a_damaged_adapter(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    assert_refused(run("card", tmp_path), words)


def test_card_refuses_a_folder_of_another_kind(tmp_path: Path) -> None:
    assert_refused(run("card", tmp_path), "no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert_refused(run("card", tmp_path), "'gpt2'", "no model of hf_mamba")
