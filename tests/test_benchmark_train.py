"""`python -m benchmarks train` at toy size on the CPU: every contender checked, then timed; what is not run says why."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.checkout

benchmark = pytest.importorskip("benchmarks.train", reason="benchmarks/ is not in the wheel")
bench = pytest.importorskip("benchmarks.train_bench", reason="benchmarks/ is not in the wheel")

SIZES = ["--sizes", "small", "--layers", "1", "--batch", "2", "--length", "16", "--cell-seconds", "0"]


def run(file: Path, *arguments: str) -> tuple[Result, dict[str, dict]]:
    """The result, and the rows of the record by contender; of one kind of model."""
    from benchmarks.__main__ import app

    options = ["train", *SIZES, "--backend", "eager", "--out", str(file), *arguments]
    result = CliRunner().invoke(app, options)
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return result, {row["contender"]: row for row in rows}


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_every_contender_is_checked_and_timed(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    options = "skip_logits,skip_logits+checkpointing,compile"
    result, rows = run(file, "--models", kind, "--options", options, "--against", "transformers")
    assert result.exit_code == 0, result.output
    # plain is what the others are compared with, asked for or not
    names = ["hf_mamba", "hf_mamba + skip_logits", "hf_mamba + skip_logits + checkpointing", "hf_mamba + compile"]
    assert list(rows) == [*names, "transformers"]
    for name, row in rows.items():
        assert row["status"] == "measured", (name, row["status"])
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(1000 * 2 * 16 / row["p50_ms"])
        assert (row["error"] is None) if name == "hf_mamba" else row["error"] < 1e-4
        assert row["target_ms"] is None
    summary = json.loads(file.read_text())["summary"]
    assert [entry["contender"] for entry in summary] == names
    assert summary[0]["times plain"] == 1 and summary[3]["times plain"] == pytest.approx(
        rows["hf_mamba + compile"]["tokens_per_s"] / rows["hf_mamba"]["tokens_per_s"]
    )


def test_adapters_have_losses_of_their_own(tmp_path: Path) -> None:
    """transformers' own class with the same adapters beside ours, and as if no package were installed."""
    options = "skip_logits+lora,lora_16bit+part_checkpointing"
    arguments = ["--models", "mamba", "--options", options, "--against", "transformers"]
    result, rows = run(tmp_path / "record.json", *arguments)
    assert result.exit_code == 0, result.output
    assert list(rows) == [
        "hf_mamba",
        "hf_mamba + skip_logits + lora",
        "hf_mamba + lora_16bit + part_checkpointing",
        "transformers",
        "transformers + lora",
    ]
    assert {row["status"] for row in rows.values()} == {"measured"}
    first = rows["hf_mamba + skip_logits + lora"]
    assert first["error"] is None and rows["transformers + lora"]["error"] < 1e-4
    # no gradient of frozen weights
    assert 4 / 6 < first["flops"] / rows["hf_mamba"]["flops"] < 0.8


def test_transformers_as_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = pytest.importorskip("benchmarks.contenders")
    module = type(sys)("mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", module)
    contenders.native_without_packages.cache_clear()
    for kind in contenders.KINDS:
        bare = contenders.native_without_packages(kind)
        assert (
            bare.__name__ == contenders.CLASSES[kind].native.__name__ and bare is not contenders.CLASSES[kind].native
        )
    assert sys.modules["mamba_ssm"] is module


def test_every_kind_and_length_ours_first(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    arguments = ["--options", "plain", "--against", "transformers", "--lengths", "16,24"]
    result, _ = run(file, *arguments, "--layers", "2", "--seconds", "1000")
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [(row["subject"], row["shape"]["L"], row["contender"]) for row in rows] == [
        (f"{kind}-small", length, contender)
        for kind in ("mamba", "mamba2", "moe_mamba")
        for length in (16, 24)
        for contender in (["hf_mamba", "transformers"] if kind != "moe_mamba" else ["hf_mamba"])
    ]
    assert {row["status"] for row in rows} == {"measured"}


def test_operations_of_a_step() -> None:
    """Counted by hand for one layer of each kind, with all weights trained."""
    contenders = pytest.importorskip("benchmarks.contenders")

    def flops(kind: str, **fields) -> float:
        classes = contenders.CLASSES[kind]
        return bench.step_flops(classes.own(classes.own_config(**contenders.SIZES["small"][kind] | fields)))

    d, inner, vocab, rank = 256, 512, 512, 16
    mixer = d * 2 * inner + inner * (rank + 2 * 16) + rank * inner + inner * d + 4 * inner
    mamba = 6 * mixer + 15 * inner * 16
    assert flops("mamba", num_hidden_layers=1) == 6 * d * vocab + mamba
    mixer = d * (2 * inner + 2 * 64 + 8) + inner * d + 4 * (inner + 2 * 64)
    assert flops("mamba2", num_hidden_layers=1) == 6 * (d * vocab + mixer) + 15 * inner * 64
    # one expert of four, and the router
    experts = 2 * d * 3 * d + 4 * d
    assert flops("moe_mamba", num_hidden_layers=2) == pytest.approx(6 * (d * vocab + experts) + mamba)


def test_what_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender whose first loss is right but that learns something else; and one whose loss is no number."""
    right = bench.Step._loss

    def without_embeddings(self, ids: Tensor) -> Tensor:
        if type(self.model).__module__.startswith("transformers"):
            self.model.backbone.embeddings.requires_grad_(False)
        return right(self, ids)

    monkeypatch.setattr(bench.Step, "_loss", without_embeddings)
    result, rows = run(tmp_path / "a.json", "--models", "mamba2", "--options", "plain", "--against", "transformers")
    assert result.exit_code == 1 and "the gate is red: mamba2-small (transformers)" in result.output
    assert rows["transformers"]["status"].startswith("refused") and rows["transformers"]["p50_ms"] is None
    assert rows["hf_mamba"]["status"] == "measured"

    monkeypatch.setattr(bench.Step, "_loss", lambda self, ids: right(self, ids) * float("nan"))
    _, rows = run(tmp_path / "b.json", "--models", "mamba2", "--options", "plain", "--against", "transformers")
    assert rows["transformers"]["status"].startswith("refused")


def test_a_step_that_takes_too_long_is_not_run(tmp_path: Path) -> None:
    arguments = ["--models", "mamba2", "--length", "128", "--options", "plain", "--against", "transformers"]
    result, rows = run(tmp_path / "record.json", *arguments, "--cap-seconds", "1e-9")
    assert result.exit_code == 0, result.output
    assert rows["transformers"]["status"].startswith("not run: about")
    assert rows["hf_mamba"]["status"] == "measured"


def test_failures_and_lack_of_time_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--models", "mamba2", "--options", "skip_logits", "--against", "none"]
    _, rows = run(tmp_path / "a.json", *arguments, "--seconds", "0")
    assert {row["status"] for row in rows.values()} == {"out of time"}

    def exhausted(self, ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(bench.Step, "_loss", exhausted)
    result, rows = run(tmp_path / "b.json", *arguments)
    assert result.exit_code == 0 and {row["status"] for row in rows.values()} == {"out of memory"}


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_lower_precision(precision: str, tmp_path: Path) -> None:
    arguments = ["--models", "mamba", "--options", "skip_logits", "--against", "transformers"]
    result, rows = run(tmp_path / "record.json", *arguments, "--precision", precision)
    assert result.exit_code == 0, result.output
    assert {row["dtype"] for row in rows.values()} == {precision}
    assert {row["status"] for row in rows.values()} == {"measured"}


class StandIn(nn.Module):
    """mamba_ssm's language model as far as the benchmark uses it, with our layers: its key names, logits alone."""

    def __init__(self, config, device: torch.device, dtype: torch.dtype):
        super().__init__()
        import hf_mamba

        assert config.ssm_cfg == {"layer": "Mamba2", "headdim": 64, "ngroups": 1, "d_state": 64}
        fields = bench.SIZES["small"]["mamba2"] | {"num_hidden_layers": config.n_layer}
        assert (config.d_model, config.vocab_size) == (fields["hidden_size"], fields["vocab_size"])
        assert config.tie_embeddings == hf_mamba.Mamba2Config(**fields).tie_word_embeddings
        self.inner = hf_mamba.Mamba2ForCausalLM(hf_mamba.Mamba2Config(**fields)).to(device, dtype)

    def load_state_dict(self, state, *args, **kwargs):
        assert "backbone.embedding.weight" in state
        renamed = {key.replace("backbone.embedding.", "backbone.embeddings."): value for key, value in state.items()}
        return self.inner.load_state_dict(renamed)

    def forward(self, ids: Tensor):
        return self.inner(ids)


def test_mamba_ssm_is_run_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--models", "mamba2", "--options", "plain", "--against", "mamba_ssm"]
    monkeypatch.setattr(benchmark, "is_installed", lambda peer: False)
    result, rows = run(tmp_path / "a.json", *arguments)
    assert "mamba_ssm is not installed" in result.output and list(rows) == ["hf_mamba"]

    class Config:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    for name, content in (
        ("config_mamba", {"MambaConfig": Config}),
        ("mixer_seq_simple", {"MambaLMHeadModel": StandIn}),
    ):
        module = type(sys)(f"mamba_ssm.models.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(benchmark, "is_installed", lambda peer: True)
    _, rows = run(tmp_path / "b.json", *arguments)
    assert rows["mamba_ssm"]["status"] == "measured" and rows["mamba_ssm"]["error"] < 1e-4


def test_targets_are_set_against_speed_and_memory() -> None:
    from benchmarks.record import Record, Row, table_console

    shape = {"B": 8, "L": 2048}
    quick = Row("mamba-130m", "hf_mamba", shape, "bfloat16", "step", p20_ms=40, p50_ms=50, p80_ms=60)
    quick.tokens_per_s, quick.peak_memory_mib = 8 * 2048 / 0.05, 9000.0
    record = Record("train", rows=[quick], settings={"layers": None})
    console = table_console(200)
    with console.capture() as printed:
        benchmark.print_table(console, record)
    line = next(line for line in printed.get().splitlines() if "hf_mamba" in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    # the slowest steps have the fewest tokens a second
    assert cells[1:5] == ["273,067", "327,680", "409,600", "300,000 ✓"]
    assert cells[6:9] == ["9.44", "8 ✗", "-"]
    assert benchmark.target_of(quick, "cuda", layers=2) is None
    quick.contender = "hf_mamba + lora"
    assert benchmark.target_of(quick, "cuda", layers=None) is None


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--models", "gpt2"], "--models"),
        (["--options", "fast"], "--options"),
        (["--against", "jax"], "--against"),
        (["--against", "none,transformers"], "--against"),
        (["--lengths", "1"], "--lengths"),
        (["--precision", "fp8"], "--precision"),
        (["--precision", "float32,autocast"], "--precision"),
    ],
    ids=["models", "options", "peers", "none and a peer", "lengths", "precision", "two precisions"],
)
def test_bad_options_are_refused(arguments: list[str], part: str, tmp_path: Path) -> None:
    result, _ = run(tmp_path / "record.json", *arguments)
    assert result.exit_code == 2
    assert part in result.output
