"""`python -m benchmarks moe` at toy size on the CPU: every contender measured, checked, and set against the floor."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytestmark = pytest.mark.checkout

moe = pytest.importorskip("benchmarks.moe", reason="benchmarks/ is not in the wheel")

SIZES = ["--tokens", "24", "--hidden-size", "16", "--expert-size", "24", "--batch", "2", "--length", "8"]


def run(*arguments: str):
    from benchmarks.__main__ import app

    return CliRunner().invoke(app, ["moe", *SIZES, "--seconds", "0", "--device", "cpu", *arguments])


@pytest.mark.parametrize("top_k", [1, 2])
def test_moe_writes_a_record(tmp_path: Path, top_k: int) -> None:
    file = tmp_path / "record.json"
    blocks = "1" if top_k == 1 else "0"
    result = run(
        "--experts", "2,4", "--top-k", str(top_k), "--blocks", blocks, "--output", str(file), "--commit", "abc"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    assert record["machine"]["commit"] == "abc"
    layers = [row for row in record["rows"] if row["subject"] == "layer"]
    names = {f"{owner} {backend}" for owner in ("hf_mamba", "transformers Mixtral") for backend in moe.BACKENDS[:1]}
    names |= {"hf_mamba grouped_mm", "hf_mamba fused", "transformers Mixtral batched_mm", moe.DENSE, moe.FLOOR}
    for count in (2, 4):
        for mode in set(moe.MODES) - {moe.IN_GRAPH}:
            found = {row["contender"]: row for row in layers if row["shape"]["E"] == count and row["mode"] == mode}
            assert names <= set(found)
            for name, row in found.items():
                assert row["status"] == "measured", (name, row["status"])
                assert row["tokens_per_s"] > 0 and row["floor_ms"] == found[moe.FLOOR]["p50_ms"]
                assert row["error"] is None if name in (moe.DENSE, moe.FLOOR) else row["error"] < 1e-4
    fractions = record["summary"][0]
    expected = layers[0]["floor_ms"] / layers[0]["p50_ms"]
    assert fractions[layers[0]["contender"]] == pytest.approx(expected)
    models = {row["contender"] for row in record["rows"] if row["subject"] == "model" and row["p50_ms"]}
    wanted = {"hf_mamba eager", "hf_mamba grouped_mm", "hf_mamba fused", "hf_mamba Mamba-MLP, same active width"}
    assert models == (wanted if blocks == "1" else set())


def test_contenders_with_wrong_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import moe_contenders

    right = moe_contenders._mixtral
    monkeypatch.setattr(moe_contenders, "_mixtral", lambda *args: lambda x: 1.01 * right(*args)(x))
    file = tmp_path / "record.json"
    options = ["--experts", "2", "--blocks", "0", "--modes", "forward", "--output", str(file)]
    assert run(*options, "--backends", "eager").exit_code == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["transformers Mixtral eager"]["status"].startswith("refused")
    assert rows["hf_mamba eager"]["status"] == "measured"


def test_copies_of_all_weights_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "GATHER_LIMIT_GIB", 1e-9)
    file = tmp_path / "record.json"
    options = ["--experts", "2", "--blocks", "0", "--modes", "forward", "--output", str(file)]
    assert run(*options, "--backends", "eager,batched_mm").exit_code == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert "would copy" in rows["hf_mamba batched_mm"]["status"]


def test_tokens_choose_clearly_and_evenly() -> None:
    from benchmarks.moe_contenders import MoeShape, tokens_with_clear_choices

    shape = MoeShape(hidden_size=256, expert_size=8, num_experts=16, top_k=2)
    layer = shape.make(torch.float32, torch.device("cpu"))
    x = tokens_with_clear_choices(layer, 2048, torch.float32)
    logits = x @ layer.router.weight.T
    best = logits.topk(3, dim=-1).values
    assert (best[:, 1] - best[:, 2]).min() > 2
    load = logits.topk(2, dim=-1).indices.flatten().bincount(minlength=16)
    assert load.min() > 0.75 * 256 and load.max() < 1.25 * 256


def test_tokens_of_a_graph_share_no_expert() -> None:
    for experts, top_k, count in ((16, 1, 8), (6, 2, 3), (4, 1, 4)):
        shape = moe.MoeShape(hidden_size=64, expert_size=8, num_experts=experts, top_k=top_k)
        layer = shape.make(torch.float32, torch.device("cpu"))
        tokens = moe._tokens_apart(layer, torch.float32)
        chosen = layer.router(tokens)[2].flatten().tolist()
        assert len(chosen) == len(set(chosen)) and 1 < tokens.shape[0] <= count


@pytest.mark.gpu
def test_one_token_in_a_graph_on_gpu(tmp_path: Path) -> None:
    from benchmarks.__main__ import app

    file = tmp_path / "record.json"
    sizes = ["--hidden-size", "64", "--expert-size", "96", "--experts", "4", "--blocks", "0", "--seconds", "0.01"]
    result = CliRunner().invoke(app, ["moe", *sizes, "--modes", moe.IN_GRAPH, "--output", str(file)])
    assert result.exit_code == 0, result.output
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["hf_mamba eager"]["status"].startswith("not captured")
    for name in ("hf_mamba fused", "hf_mamba batched_mm", "transformers Mixtral fused", moe.DENSE, moe.FLOOR):
        assert rows[name]["status"] == "measured" and rows[name]["floor_ms"] > 0, name


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--experts", "x"], "--experts"),
        (["--modes", "backward"], "--modes"),
        (["--backends", "cuda"], "--backends"),
        (["--dtype", "float16"], "--dtype"),
        (["--experts", "2", "--top-k", "3"], "--top-k"),
    ],
    ids=["experts", "modes", "backends", "dtype", "top-k"],
)
def test_bad_options_are_refused(arguments: list[str], part: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert part in result.output
