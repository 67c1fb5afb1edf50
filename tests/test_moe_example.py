"""examples/moe_mamba_vs_mamba: the smoke run of every model, going on after an interruption, and the verdicts."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from .test_examples import data  # noqa: F401  (a fixture)

pytestmark = pytest.mark.checkout

FOLDER = Path(__file__).resolve().parent.parent / "examples/moe_mamba_vs_mamba"
sys.path.insert(0, str(FOLDER))

import architectures  # noqa: E402
import report  # noqa: E402
import side_by_side  # noqa: E402
import train  # noqa: E402

NAMES = ["transformer", "mamba", "mamba-mlp", "transformer-moe", *(f"moe-mamba-{e}" for e in (1, 4, 8, 16, 32))]


def settings_file(folder: Path, **overrides) -> str:
    settings = json.loads((FOLDER / "cpu.json").read_text()) | overrides
    (folder / "settings-of-the-test.json").write_text(json.dumps(settings))
    return str(folder / "settings-of-the-test.json")


# the models


@pytest.mark.parametrize("config", ["gpu", "cpu"])
def test_active_parameters_are_equal(config: str) -> None:
    """Within what norms, convolutions and routers add to the matrices; the experts of the sweep do not change them."""
    settings = train.read_settings(config)
    assert architectures.architecture_names(settings) == NAMES
    with torch.device("meta"):
        models = {name: architectures.build_model(name, settings, 400) for name in NAMES}
    active = {name: model.num_active_parameters(exclude_embeddings=True) for name, model in models.items()}
    width, blocks = settings["hidden_size"], settings["blocks"]
    for name, count in active.items():
        if config == "gpu":
            assert 12 * width**2 * blocks <= count <= 1.16 * 12 * width**2 * blocks, name
        if name.startswith("moe-mamba"):
            experts = report.experts_of(name)
            assert count - active["moe-mamba-1"] == blocks * width * (experts - 1)
    assert models["moe-mamba-32"].num_parameters() > 8 * models["moe-mamba-1"].num_parameters() - 8 * 2 * 400 * width


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="no architecture 'rwkv'"):
        architectures.build_model("rwkv", train.read_settings("cpu"), 400)


def test_attention_is_softmax_over_the_past_with_rotated_pairs() -> None:
    """Against complex rotations and a loop over queries, in fp64."""
    torch.manual_seed(0)
    attention = architectures.CausalAttention(16, 2).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    out = attention(x)
    query, key, value = attention.qkv_proj(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    turn = torch.polar(torch.ones(5, 4).double(), torch.arange(5)[:, None] * 10000 ** (-torch.arange(4).double() / 4))
    query, key = (torch.complex(z[..., :4], z[..., 4:]) * turn for z in (query, key))
    expected = torch.zeros(2, 2, 5, 8, dtype=torch.float64)
    for i in range(5):
        scores = (query[:, :, i, None] * key[:, :, : i + 1].conj()).sum(-1).real / math.sqrt(8)
        expected[:, :, i] = (scores.softmax(-1)[..., None] * value[:, :, : i + 1]).sum(2)
    expected = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="no cache"):
        attention(x, seq_idx=torch.zeros(2, 5))


# the runs


def test_smoke_run_of_everything(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """All nine models train on the same windows; the report has every claim, both figures and the numbers."""
    pytest.importorskip("matplotlib")
    met: list[list[list[int]]] = []

    class Recorded(train.TrainingWindows):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            met.append([])

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            window = super().__getitem__(index)
            met[-1].append(window["input_ids"].tolist())
            return window

    monkeypatch.setattr(train, "TrainingWindows", Recorded)
    config = settings_file(tmp_path, steps=6, eval_steps=2, batch_size=4)
    arguments = train.Arguments(config=config, output_dir=str(tmp_path / "out"), data_dir=str(data))
    files = train.train_all(arguments)
    assert [file.name for file in files] == [f"{name}-seed0.json" for name in NAMES]
    assert len(met) == 9 and all(windows == met[0] for windows in met) and len(met[0]) >= 24
    for file in files:
        result = json.loads(file.read_text())
        evaluations = [entry for entry in result["log"] if "eval_loss" in entry]
        assert [entry["step"] for entry in evaluations] == [2, 4, 6] and result["tokens_seen"] == 6 * 4 * 32
        assert all(math.isfinite(entry["eval_loss"]) and entry["elapsed_seconds"] > 0 for entry in evaluations)
        routed = [entry for entry in result["log"] if "router_layers" in entry]
        assert bool(routed) == ("moe" in file.name)
    assert not list((tmp_path / "out/checkpoints").glob("*"))

    # everything is finished: nothing is trained again
    train.train_all(arguments)
    assert len(met) == 9

    claims = report.write_report(tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert len(claims) == 6 and all(claim.text in text and claim.verdict != report.MISSING for claim in claims)
    assert "smoke test of 6 steps" in text and "Seeds: 0." in text and "Hardware: " in text
    for figure in ("loss_against_step.png", "loss_against_time.png"):
        assert (tmp_path / "out" / figure).stat().st_size > 10_000

    arguments.config = settings_file(tmp_path, steps=7)
    with pytest.raises(ValueError, match="results of other settings"):
        train.train_all(arguments)


def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """From its checkpoint, to the losses of a run that was not interrupted."""
    config = settings_file(tmp_path, steps=8, eval_steps=1, batch_size=2)
    arguments = train.Arguments(config=config, data_dir=str(data), models=["moe-mamba-4"])
    arguments.output_dir = str(tmp_path / "whole")
    (whole,) = train.train_all(arguments)

    arguments.output_dir = str(tmp_path / "interrupted")
    log = train.LanguageModelTrainer.log

    def interrupted(self, logs, *args) -> None:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        log(self, logs, *args)

    monkeypatch.setattr(train.LanguageModelTrainer, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_all(arguments)
    monkeypatch.undo()
    assert (tmp_path / "interrupted/checkpoints/moe-mamba-4-seed0/checkpoint-5").is_dir()
    (resumed,) = train.train_all(arguments)
    losses = [
        {entry["step"]: entry["eval_loss"] for entry in json.loads(file.read_text())["log"] if "eval_loss" in entry}
        for file in (whole, resumed)
    ]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "tpu"}, "no file 'tpu'"),
        ({"models": ["mamba", "rwkv"]}, "'rwkv' is none of"),
        ({"data_dir": "/nowhere"}, "prepare_text.py"),
    ],
    ids=["config", "models", "data"],
)
def test_wrong_options_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    arguments = train.Arguments(**{"config": "cpu", "output_dir": str(tmp_path), **change})
    with pytest.raises(ValueError, match=message):
        train.train_all(arguments)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['colour'\]"):
        train.read_settings(settings_file(tmp_path, colour="red"))


# the verdicts


def curve(model: str, *losses: list[float]) -> report.Curve:
    """A model that was evaluated at steps 10, 20, …, one list of losses for each seed; a step takes a second."""
    runs = [
        {
            "model": model,
            "log": [
                {"step": 10 * (i + 1), "elapsed_seconds": 10.0 * (i + 1), "eval_loss": loss}
                for i, loss in enumerate(own)
            ],
        }
        for own in losses
    ]
    return report._curve(model, runs)


def verdicts(**models: list[list[float]]) -> dict[str, report.Claim]:
    curves = {}
    for name, losses in models.items():
        name = name.replace("_", "-")
        curves[name] = curve(name, *losses)
    keys = ("steps", "enough", "predictable", "mlp", "transformer-moe", "transformer")
    return dict(zip(keys, report.judge(curves), strict=True))


def test_claims_that_hold() -> None:
    found = verdicts(
        transformer=[[5.0, 4.5, 4.0]],
        mamba=[[4.0, 3.5, 3.0]],
        mamba_mlp=[[4.2, 3.7, 3.3]],
        transformer_moe=[[4.0, 3.6, 2.9]],
        moe_mamba_1=[[4.0, 3.7, 3.2]],
        moe_mamba_8=[[4.0, 3.5, 2.9]],
        moe_mamba_16=[[4.0, 3.0, 2.8]],
        moe_mamba_32=[[4.0, 2.5, 2.0]],
    )
    assert {claim.verdict for claim in found.values()} == {report.HOLDS}
    # between 4.0 at step 10 and 2.5 at step 20, 3.0 is reached after two thirds
    assert "at step 17: 56%" in found["steps"].evidence and "56% of the wall time" in found["steps"].evidence
    assert "E = 1: +0.2000, E = 8: -0.1000" in found["enough"].evidence


def test_claims_that_do_not_hold() -> None:
    found = verdicts(
        transformer=[[3.0, 2.5]],
        mamba=[[4.0, 3.0]],
        mamba_mlp=[[4.0, 2.9]],
        transformer_moe=[[4.0, 2.0]],
        moe_mamba_4=[[4.0, 3.3]],
        moe_mamba_8=[[4.0, 3.1]],
        moe_mamba_16=[[4.0, 3.2]],
    )
    assert {claim.verdict for claim in found.values()} == {report.FAILS}
    assert "does not reach 3.0000" in found["steps"].evidence


def test_a_difference_below_the_spread_of_the_seeds_decides_nothing() -> None:
    found = verdicts(mamba=[[3.0], [3.2]], mamba_mlp=[[3.15], [3.2]], moe_mamba_8=[[2.5], [2.6]])
    assert found["mlp"].verdict == report.OPEN
    assert found["enough"].verdict == report.HOLDS
    assert found["predictable"].verdict == found["transformer"].verdict == report.MISSING


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run train.py"):
        report.write_report(tmp_path)


# all models at once, by the clock


def test_as_many_steps_as_fit_and_then_seeds() -> None:
    settings = train.read_settings("gpu")
    assert settings["steps"] == 880
    some = side_by_side.fit(settings, seconds=53.01, slowest=0.1)
    assert (some["steps"], some["seeds"], some["max_minutes"]) == (500, [0], round(53.01 / 60, 3))
    all_steps = side_by_side.fit(settings, seconds=200.0, slowest=0.1)
    assert (all_steps["steps"], all_steps["seeds"]) == (880, [0, 1])
    assert all_steps["max_minutes"] == round(100 / 60, 3)
    assert side_by_side.fit(settings, seconds=1e4, slowest=0.1)["seeds"] == [0, 1, 2]


def test_all_models_side_by_side(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Two of them here: a probe, settings that follow from it, and finished runs of the same steps without checkpoints."""
    monkeypatch.setattr(side_by_side, "architecture_names", lambda settings: ["transformer", "moe-mamba-4"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = settings_file(tmp_path, steps=4, eval_steps=2, batch_size=2)
    words = ["--config", config, "--output_dir", str(tmp_path / "out"), "--data_dir", str(data)]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", *words, "--minutes", "10", "--probe_steps", "2"])
    side_by_side.main()
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["steps"] == 4 and settings["seeds"] == [0, 1, 2]
    for seed in settings["seeds"]:
        for name in ("transformer", "moe-mamba-4"):
            assert json.loads((tmp_path / f"out/{name}-seed{seed}.json").read_text())["steps"] == 4
    assert not list((tmp_path / "out").glob("checkpoints/*/checkpoint-*"))
    assert report.read_runs(tmp_path / "out").keys() == {"transformer", "moe-mamba-4"}
