"""`hf-mamba inspect-experts` on a tiny random MoE-Mamba with one token per byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_mamba

from .test_cli import assert_user_error, run
from .test_cli import checkpoint as mamba2_checkpoint  # noqa: F401  (a fixture)

TEXT = "a small [word]"


@pytest.fixture(scope="module")
def checkpoint(mamba2_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    folder = tmp_path_factory.mktemp("moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(mamba2_checkpoint) / name, folder)
    torch.manual_seed(0)
    config = hf_mamba.MoeMambaConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=4,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        capacity_factor=0.1,
    )
    hf_mamba.MoeMambaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_json_is_what_the_routers_choose(checkpoint: str) -> None:
    result = run("inspect-experts", checkpoint, TEXT, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == list(TEXT)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        router_logits = model(ids, output_router_logits=True).router_logits
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    for layer, logits in zip(found["layers"], router_logits, strict=True):
        best = logits.softmax(dim=-1).topk(2)
        assert layer["num_experts"] == 5 and layer["experts"] == best.indices.tolist()
        expected = best.values / best.values.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(torch.tensor(layer["weights"]), expected, atol=1e-4, rtol=0)
        counts = best.indices.flatten().bincount(minlength=5) / best.indices.numel()
        torch.testing.assert_close(torch.tensor(layer["load"]), counts, atol=1e-4, rtol=0)


def test_tables_show_every_token_and_layer(checkpoint: str) -> None:
    as_json = json.loads(run("inspect-experts", checkpoint, TEXT, "--json", "--device", "cpu").stdout)
    result = run("inspect-experts", checkpoint, TEXT, "--device", "cpu", "--layers", "3")
    assert result.exit_code == 0, result.output
    assert "layer 3" in result.stdout and "layer 1" not in result.stdout
    rows = [line for line in result.stdout.splitlines() if '"' in line]
    assert len(rows) == len(TEXT)
    for row, token, experts in zip(rows, TEXT, as_json["layers"][1]["experts"], strict=True):
        assert f'"{token}"' in row and ", ".join(map(str, experts)) in row
    assert "without a token" in result.stdout
    shown = run("inspect-experts", checkpoint, TEXT, "--device", "cpu", "--layers", "3", "--weights").stdout
    assert f"({as_json['layers'][1]['weights'][0][0]:.2f})" in shown


def test_text_from_standard_input(checkpoint: str) -> None:
    result = run("inspect-experts", checkpoint, "-", "--json", "--device", "cpu", stdin=TEXT + "\n")
    assert json.loads(result.stdout)["tokens"] == list(TEXT)


def test_help_shows_examples() -> None:
    result = run("inspect-experts", "--help")
    assert result.exit_code == 0 and "Examples:" in result.stdout


def test_a_model_without_experts_is_refused(mamba2_checkpoint: str) -> None:  # noqa: F811
    assert_user_error(run("inspect-experts", mamba2_checkpoint, TEXT, "--device", "cpu"), "mamba2", "no experts")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([TEXT, "--layers", "2"], ["layer 2 has no experts", "1, 3"]),
        ([TEXT, "--layers", "x"], ["--layers", "'x'", "1, 3"]),
        ([TEXT, "--dtype", "float8"], ["--dtype", "float8"]),
        ([" "], ["text is empty"]),
    ],
    ids=["layer", "no-number", "dtype", "empty"],
)
def test_bad_arguments_are_refused(checkpoint: str, arguments: list[str], parts: list[str]) -> None:
    assert_user_error(run("inspect-experts", checkpoint, *arguments, "--device", "cpu"), *parts)
