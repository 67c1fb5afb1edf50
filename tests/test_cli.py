"""`hf-mamba`: help, `env` and `generate`, run on a tiny random model with a byte-level tokenizer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import hf_mamba
from hf_mamba.cli import app

PROMPT = "a small word"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer Mamba-2 with one token per byte."""
    folder = tmp_path_factory.mktemp("checkpoint")
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = hf_mamba.Mamba2Config(
        vocab_size=len(symbols),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    hf_mamba.Mamba2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def assert_user_error(result: Result, *parts: str) -> None:
    """Exit code 1, one message with `parts` on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    assert "Error: " in message
    for part in parts:
        assert part in message


def expected_text(checkpoint: str, max_new_tokens: int, **sampling: object) -> str:
    """What `model.generate` of the loaded classes gives, decoded in one go."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=max_new_tokens, **sampling)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("command", [[], ["env"], ["generate"]], ids=lambda command: " ".join(command) or "top")
def test_help_shows_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"hf-mamba {' '.join(command)}".strip() in result.stdout
    assert "Examples:" in result.stdout or "Try:" in result.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == f"hf-mamba {hf_mamba.__version__}"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_mamba.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"hf-mamba {hf_mamba.__version__}"), done.stderr


def test_env_names_versions_backends_and_models() -> None:
    result = run("env")
    assert result.exit_code == 0, result.output
    for part in (torch.__version__, "transformers", "selective_scan", "ssd_chunk_scan", "falcon_mamba"):
        assert part in result.stdout


def test_env_json_is_one_object() -> None:
    result = run("env", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["hf_mamba"] == hf_mamba.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["registered"]["mamba"] is True
    if not report["devices"]:
        assert set(report["backends"].values()) == {report["forced_backend"] or "eager"}


def test_generate_streams_what_generate_returns(checkpoint: str) -> None:
    result = run("generate", checkpoint, PROMPT, "--max-new-tokens", "12", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected_text(checkpoint, 12, do_sample=False) + "\n"


def test_generate_without_echo_prints_the_continuation_alone(checkpoint: str) -> None:
    result = run("generate", checkpoint, PROMPT, "--max-new-tokens", "12", "--device", "cpu", "--no-echo")
    assert PROMPT + result.stdout == expected_text(checkpoint, 12, do_sample=False) + "\n"


def test_generate_reads_standard_input(checkpoint: str) -> None:
    arguments = ["generate", checkpoint, "--max-new-tokens", "12", "--device", "cpu"]
    piped = run(*arguments, stdin=PROMPT + "\n")
    assert piped.exit_code == 0, piped.output
    assert piped.stdout == expected_text(checkpoint, 12, do_sample=False) + "\n"


def test_generate_samples_without_hidden_filters(checkpoint: str) -> None:
    """The same draw as plain sampling from the whole distribution; transformers' own default would keep 50 tokens."""
    result = run(
        "generate",
        checkpoint,
        PROMPT,
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
        "--temperature",
        "1.5",
        "--seed",
        "3",
    )
    torch.manual_seed(3)
    expected = expected_text(checkpoint, 12, do_sample=True, temperature=1.5, top_k=0)
    assert result.stdout == expected + "\n"
    assert expected != expected_text(checkpoint, 12, do_sample=False)


def test_generate_honours_top_k_and_top_p(checkpoint: str) -> None:
    """One token to choose from is greedy decoding, whatever the temperature."""
    greedy = expected_text(checkpoint, 12, do_sample=False) + "\n"
    arguments = ["generate", checkpoint, PROMPT, "--max-new-tokens", "12", "--device", "cpu", "--temperature", "5"]
    assert run(*arguments, "--top-k", "1").stdout == greedy
    assert run(*arguments, "--top-p", "1e-6").stdout == greedy
    assert run(*arguments, "--seed", "1").stdout != greedy


def test_generate_honours_dtype(checkpoint: str) -> None:
    arguments = ["generate", checkpoint, PROMPT, "--max-new-tokens", "2", "--device", "cpu"]
    assert "float32" in run(*arguments).stderr
    assert "bfloat16" in run(*arguments, "--dtype", "bfloat16").stderr


def test_generate_reports_counts_and_speed_on_standard_error(checkpoint: str) -> None:
    result = run("generate", checkpoint, PROMPT, "--max-new-tokens", "12", "--device", "cpu")
    report = " ".join(result.stderr.split())
    assert f"prompt {len(PROMPT)} tokens" in report
    assert "new 12 tokens" in report
    assert "Mamba2ForCausalLM" in report
    for pattern in (r"time to first token \d+ ms", r"decoding [\d.]+ tokens/s", r"peak memory [\d.]+ GiB"):
        assert re.search(pattern, report), report
    assert "tokens/s" not in result.stdout


def test_generate_obeys_a_checkpoint_that_samples_by_default(checkpoint: str, tmp_path: Path) -> None:
    """A generation_config.json with do_sample does not make the command sample."""
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    result = run("generate", str(tmp_path), PROMPT, "--max-new-tokens", "12", "--device", "cpu")
    assert result.stdout == expected_text(checkpoint, 12, do_sample=False) + "\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["./no-such-folder", PROMPT], ["./no-such-folder", "no folder"]),
        (["a/b/c", PROMPT], ["a/b/c", "no folder"]),
        (["not a name", PROMPT], ["not a name", "no folder"]),
        (["demo:rwkv", PROMPT], ["no demo checkpoint 'rwkv'", "mamba, mamba2, moe_mamba"]),
        (["demo", ""], ["prompt is empty"]),
        (["demo", "  \n "], ["prompt is empty"]),
        (["demo", PROMPT, "--dtype", "float8"], ["--dtype", "bfloat16", "float8"]),
        (["demo", PROMPT, "--max-new-tokens", "0"], ["--max-new-tokens", "got 0"]),
        (["demo", PROMPT, "--temperature", "0"], ["--temperature", "greedy"]),
        (["demo", PROMPT, "--temperature", "-1"], ["--temperature", "-1"]),
        (["demo", PROMPT, "--temperature", "1", "--top-k", "0"], ["--top-k", "got 0"]),
        (["demo", PROMPT, "--temperature", "1", "--top-p", "1.5"], ["--top-p", "1.5"]),
        (["demo", PROMPT, "--top-k", "5"], ["--top-k", "--temperature"]),
        (["demo", PROMPT, "--top-p", "0.5"], ["--top-p", "--temperature"]),
        (["demo", PROMPT, "--seed", "1"], ["--seed", "--temperature"]),
        (["demo", PROMPT, "--device", "nowhere"], ["--device nowhere", "hf-mamba env"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("demo", "./no-such-folder", "a/b/c") else None,
)
def test_generate_refuses_bad_arguments(arguments: list[str], parts: list[str]) -> None:
    assert_user_error(run("generate", *arguments), *parts)


def test_generate_refuses_a_device_without_driver() -> None:
    if torch.cuda.is_available():
        device = f"cuda:{torch.cuda.device_count()}"
    else:
        device = "cuda"
    assert_user_error(run("generate", "demo", PROMPT, "--device", device), f"--device {device}")


def test_generate_refuses_an_empty_pipe(checkpoint: str) -> None:
    assert_user_error(run("generate", checkpoint, stdin=""), "prompt is empty")


def test_generate_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert_user_error(run("generate", str(file), PROMPT), "is a file", "folder")


def test_generate_refuses_a_folder_without_config(tmp_path: Path) -> None:
    assert_user_error(run("generate", str(tmp_path), PROMPT), "config.json", "save_pretrained")


def test_generate_explains_an_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert_user_error(run("generate", str(tmp_path), PROMPT), "PEFT adapter", "merge")


def test_generate_refuses_a_folder_without_tokenizer(checkpoint: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())
    assert_user_error(run("generate", str(tmp_path), PROMPT), "tokenizer")


def test_generate_refuses_a_folder_without_weights(checkpoint: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())
    assert_user_error(run("generate", str(tmp_path), PROMPT, "--device", "cpu"), "model.safetensors")


def test_generate_explains_a_missing_demo_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("The demo checkpoint is missing; reinstall hf-mamba.")

    monkeypatch.setattr(hf_mamba, "demo_checkpoint", missing)
    assert_user_error(run("generate", "demo", PROMPT, "--device", "cpu"), "reinstall hf-mamba")


def test_generate_refuses_an_unknown_model_type(checkpoint: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert_user_error(run("generate", str(tmp_path), PROMPT, "--device", "cpu"), "no_such_type")
