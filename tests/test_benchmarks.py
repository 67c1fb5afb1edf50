"""The measuring tools: percentiles, the gate before the clock, predictions, and one run of each command."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytestmark = pytest.mark.checkout

timing = pytest.importorskip("benchmarks.timing", reason="benchmarks/ is not in the wheel")

CPU = torch.device("cpu")


def contender(name: str, value: float, calls: list[str]) -> "timing.Contender":
    return timing.Contender(name, lambda: calls.append(name), lambda: [torch.tensor([1.0, value])])


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (20, 1.8), (50, 3.0), (80, 4.2), (100, 5.0)])
def test_percentile_interpolates(percent: float, expected: float) -> None:
    assert timing.percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent) == pytest.approx(expected)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        timing.percentile([], 50)


def test_disagreement_is_relative_to_the_largest_value() -> None:
    expected = [torch.tensor([0.0, 4.0]), torch.tensor([100.0])]
    assert timing.disagreement([torch.tensor([0.2, 4.0]), torch.tensor([101.0])], expected) == pytest.approx(0.05)
    assert timing.disagreement([torch.tensor([0.0, math.nan]), torch.tensor([100.0])], expected) == math.inf


def test_disagreement_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="same shapes"):
        timing.disagreement([torch.ones(2)], [torch.ones(3)])


def test_a_contender_that_disagrees_is_not_timed() -> None:
    calls: list[str] = []
    contenders = [contender("right", 2.0, calls), contender("wrong", 2.1, calls), contender("close", 2.00001, calls)]
    outcomes = {item.name: item for item in timing.compare(contenders, CPU, tolerance=1e-3, seconds=0.0)}
    assert outcomes["right"].timing is not None and outcomes["close"].timing is not None
    assert outcomes["wrong"].timing is None
    assert "differ by 5.0e-02" in outcomes["wrong"].refusal
    assert "wrong" not in calls


def test_a_reference_judges_all_contenders() -> None:
    calls: list[str] = []
    contenders = [contender("wrong", 3.0, calls), contender("right", 2.0, calls)]
    outcomes = timing.compare(contenders, CPU, 1e-3, 0.0, reference=lambda: [torch.tensor([1.0, 2.0])])
    assert [outcome.timing is not None for outcome in outcomes] == [False, True]


def test_a_quick_function_runs_at_least_three_times() -> None:
    timings = timing.measure({"quick": lambda: None}, CPU, seconds=1e-3, max_rounds=3)
    assert len(timings["quick"].times_ms) == len(timings["quick"].cpu_ms) == 3


def test_rounds_alternate_between_contenders() -> None:
    calls: list[str] = []
    timing.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, seconds=0.0)
    assert calls == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("history", "expected"),
    [([], None), ([(128, 2.0)], 8.0), ([(128, 1.0), (256, 4.0)], 16.0), ([(128, 4.0), (256, 2.0)], 4.0)],
    ids=["nothing", "one point: linear", "quadratic", "never below linear"],
)
def test_prediction_carries_the_growth_on(history: list[tuple[int, float]], expected: float | None) -> None:
    assert timing.predict_seconds(history, 512) == (None if expected is None else pytest.approx(expected))


def run(tmp_path: Path, *arguments: str) -> tuple[str, dict]:
    from benchmarks.__main__ import app

    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "record.json")])
    assert result.exit_code == 0, result.output
    return result.output, json.loads((tmp_path / "record.json").read_text())


def test_cpu_training_writes_a_record(tmp_path: Path) -> None:
    arguments = ["--lengths", "8,16", "--layers", "1", "--seconds", "0", "--cap-seconds", "1e9"]
    output, record = run(tmp_path, "cpu-training", *arguments)
    rows = {(row["subject"], row["contender"], row["shape"]["L"]): row for row in record["rows"]}
    for kind in ("mamba", "mamba2"):
        for name in ("transformers", "hf_mamba"):
            for length in (8, 16):
                row = rows[kind, name, length]
                assert row["status"] == "measured"
                assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
                assert row["error"] < 1e-3
    assert {"mamba", "mamba2"} == {entry["model"] for entry in record["summary"]}
    assert all("16/8" in entry for entry in record["summary"])
    for key in ("device", "threads", "commit", "date", "command"):
        assert key in record["machine"]
    assert record["machine"]["packages"]["torch"] == torch.__version__
    assert "16/8" in output


def test_cpu_training_says_what_it_did_not_run(tmp_path: Path) -> None:
    arguments = ["--models", "mamba2", "--lengths", "8,16", "--layers", "1", "--seconds", "0", "--cap-seconds", "1e-9"]
    output, record = run(tmp_path, "cpu-training", *arguments)
    longer = [row for row in record["rows"] if row["shape"]["L"] == 16]
    assert longer and all(row["status"].startswith("not run: about") for row in longer)
    assert "not run" in output


def test_cpu_generate_writes_a_record(tmp_path: Path) -> None:
    arguments = ["--models", "mamba2", "--prompts", "8", "--layers", "1", "--new-tokens", "4", "--seconds", "0"]
    _, record = run(tmp_path, "cpu-generate", *arguments, "--rounds", "1")
    found = {(row["contender"], row["mode"]) for row in record["rows"] if row["status"] == "measured"}
    assert found == {(name, mode) for name in ("transformers", "hf_mamba") for mode in ("prefill", "decode")}
    decode = [row for row in record["rows"] if row["mode"] == "decode"]
    assert [row["runs"] for row in decode] == [3, 3]


GENERATE = ["generate", "--sizes", "130m", "--layers", "1", "--batches", "1", "--new-tokens", "3", "--rounds", "1"]


def test_generate_measures_ours_first_and_all_against_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import app

    arguments = [
        *GENERATE,
        "--prompts",
        "8,12",
        "--against",
        "stock-loop,transformers,transformer",
        "--models",
        "mamba",
    ]
    output, record = run(tmp_path, *arguments)
    rows = [row for row in record["rows"] if row["mode"] == "decode"]
    assert [(row["contender"], row["shape"]["L"]) for row in rows] == [
        (name, length) for name in ("hf_mamba", "stock-loop", "transformers", "transformer") for length in (8, 12)
    ]
    for row in record["rows"]:
        assert row["status"] == "measured", row
        assert row["error"] is None if row["contender"] in ("hf_mamba", "transformer") else row["error"] < 1e-3
    assert "mamba-130m" in output
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "record.json")])
    assert result.exit_code == 0, result.output


TOY = ["generate", "--sizes", "small", "--batches", "1,2", "--new-tokens", "8", "--rounds", "1"]


def test_generate_measures_one_transformer_for_all_models_of_a_size(tmp_path: Path) -> None:
    arguments = ["--prompts", "8,200", "--batches", "2", "--against", "transformer", "--models", "mamba,mamba2"]
    output, record = run(tmp_path, *TOY, *arguments)
    assert output.count("small, transformer\n") == 1
    rows = {kind: [row for row in record["rows"] if row["subject"] == f"{kind}-small"] for kind in ("mamba", "mamba2")}
    measured = {
        kind: [row | {"subject": None, "note": None} for row in found if row["contender"] == "transformer"]
        for kind, found in rows.items()
    }
    assert measured["mamba"] == measured["mamba2"]
    assert [row["status"] for row in measured["mamba"]] == ["measured"] * 4
    assert {row["note"] for row in rows["mamba2"]} == {None, "measured once, with mamba-small"}
    (one,) = [row for row in measured["mamba"] if row["mode"] == "decode" and row["shape"] == {"B": 2, "L": 200}]
    # two layers of 12 * 256**2 and their biases and norms, the last norm, embedding and head
    layer = 12 * 256**2 + 13 * 256
    assert one["parameters"] == 2 * layer + 2 * 256 + 2 * 512 * 256
    # the embedding is not read; keys and values are, of 200 tokens and the mean of the new ones
    read = 4 * (one["parameters"] - 512 * 256) + 4 * 2 * 2 * 256 * 2 * (200 + 4)
    assert one["floor_ms"] / 1000 * record["settings"]["copy_bytes_per_s"] == pytest.approx(read)
    (ours,) = {row["parameters"] for row in rows["mamba"] if row["contender"] == "hf_mamba"}
    assert 0.8 < ours / one["parameters"] < 1.2
    # a curve in the panel of every model
    curves = pytest.importorskip("benchmarks.plot").curves_of(record)
    for kind in ("mamba", "mamba2"):
        assert curves[f"{kind}-small B2", "decode"].keys() == {"hf_mamba", "transformer"}


@pytest.mark.parametrize("size", ["130m", "370m", "1.4b", "2.8b"])
def test_the_transformer_is_as_large_as_the_model_beside_it(size: str) -> None:
    contenders = pytest.importorskip("benchmarks.contenders")
    classes, fields = contenders.CLASSES["mamba"], contenders.SIZES[size]["mamba"]
    with torch.device("meta"):
        ours = classes.own(classes.own_config(**fields))
        transformer = contenders.make_transformer(size, 100_000)
        halved = contenders.make_transformer(size, 1, layers=6)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (ours, transformer)]
    # Pythia's head is not tied, which counts most in the smallest
    assert 0.9 < counts[1] / counts[0] < 1.3
    assert transformer.config.max_position_embeddings == 100_000 and halved.config.max_position_embeddings == 2048
    assert transformer.config._attn_implementation == "sdpa"
    assert halved.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("no"), "out of memory"), (ValueError("no"), "failed: ValueError: no")],
    ids=["memory", "failure"],
)
def test_generate_goes_on_after_a_peer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    import transformers

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "forward", fail)
    arguments = ["--prompts", "8", "--against", "transformer,stock-loop", "--models", "mamba,mamba2"]
    output, record = run(tmp_path, *TOY, *arguments, "--batches", "1", "--new-tokens", "2")
    found = {name: [] for name in ("hf_mamba", "transformer", "stock-loop")}
    for row in record["rows"]:
        found[row["contender"]].append(row["status"])
    assert found["transformer"] and set(found["transformer"]) == {status}
    assert set(found["hf_mamba"]) == set(found["stock-loop"]) == {"measured"}
    assert status.split(":")[0] in " ".join(output.split())


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])
def test_generate_times_drafts_of_a_text_that_repeats(tmp_path: Path, kind: str) -> None:
    arguments = ["--prompts", "40", "--against", "none", "--models", kind, "--drafted"]
    _, record = run(tmp_path, *TOY, *arguments)
    rows = [row for row in record["rows"] if row["mode"] == "decode" and row["contender"] != "hf_mamba"]
    assert [(row["contender"], row["shape"]["B"], row["status"], row["note"]) for row in rows] == [
        ("repeating", 1, "measured", "text repeats"),
        ("repeating-drafted", 1, "measured", "tokens equal"),
    ]
    plain, drafted = rows
    assert plain["floor_ms"] > 0 and drafted["floor_ms"] is None


def test_the_text_goes_on_at_the_largest_depth() -> None:
    """At the depth of the 2.8b checkpoints, too, the layers do not drown the embedding."""
    contenders = pytest.importorskip("benchmarks.contenders")
    torch.manual_seed(0)
    fields = contenders.SIZES["small"]["mamba"] | {"num_hidden_layers": 64}
    model = contenders.make_repeating("mamba", fields).eval()
    period = contenders.PERIOD
    ids = (period + torch.arange(3 * period) % period)[None]
    with torch.no_grad():
        said = model(ids).logits.argmax(-1)
    assert torch.equal(said[:, :-1], ids[:, 1:])


def test_generate_builds_moe_mamba_and_takes_no_peers(tmp_path: Path) -> None:
    arguments = ["--prompts", "8", "--against", "none", "--models", "moe_mamba"]
    _, record = run(tmp_path, *[part if part != "1" else "2" for part in GENERATE], *arguments)
    assert {(row["contender"], row["status"]) for row in record["rows"]} == {("hf_mamba", "measured")}
    (decode,) = [row for row in record["rows"] if row["mode"] == "decode"]
    # of the 8 experts of the layer, the two that two rows can choose: fp32, and a head that is tied
    read = 4 * (50280 * 768 + 2 * 2 * 768 * 3 * 768)
    floor_bytes = decode["floor_ms"] / 1000 * record["settings"]["copy_bytes_per_s"]
    assert read < floor_bytes < 1.2 * read


def test_generate_says_what_there_was_no_time_for(tmp_path: Path) -> None:
    _, record = run(tmp_path, *GENERATE, "--models", "mamba2", "--against", "stock-loop", "--seconds", "0")
    assert [row["status"] for row in record["rows"]] == ["out of time"] * 2


def test_generate_keeps_what_was_measured_before_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted at its second prompt has the first on the disk."""
    from benchmarks.__main__ import app

    module = importlib.import_module("benchmarks.generate")
    measured = module.Bench._cells

    def interrupted(self, name, run, length, *rest):
        if length == 12:
            raise KeyboardInterrupt
        return measured(self, name, run, length, *rest)

    monkeypatch.setattr(module.Bench, "_cells", interrupted)
    path = tmp_path / "record.json"
    arguments = [*GENERATE, "--prompts", "8,12", "--models", "mamba", "--against", "none", "--out", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mode"], row["status"]) for row in rows] == [("prefill", "measured"), ("decode", "measured")]


def toy_rows() -> list[Any]:
    """Every op at a size for a CPU; targets make a column."""
    rows = pytest.importorskip("benchmarks.op_rows")
    mamba2 = {"H": 2, "P": 4, "G": 1, "N": 3}
    shapes: dict[str, dict[str, int]] = {
        "selective_scan": {"B": 3, "L": 150, "D": 4, "N": 3},
        "ssd_chunk_scan": {"B": 2, "L": 140, **mamba2},
        "causal_conv1d": {"B": 1, "L": 20, "D": 4, "W": 4},
        "selective_state_update": {"B": 2, "D": 4, "N": 3},
        "ssd_state_update": {"B": 2, **mamba2},
        "causal_conv1d_update": {"B": 2, "D": 4, "W": 4},
        "rms_norm": {"B": 2, "L": 9, "D": 8},
        "add_rms_norm": {"B": 2, "L": 9, "D": 8},
        "rms_norm_gated": {"B": 2, "L": 9, "D": 8},
    }
    assert shapes.keys() == rows.OPS.keys()
    return [rows.OpRow(op, shape, 1e9, 1e-9) for op, shape in shapes.items()]


def test_ops_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ops.ROWS", toy_rows())
    monkeypatch.setattr("benchmarks.ops.CELL_SECONDS", 0.0)
    output, record = run(tmp_path, "ops", "--commit", "abc")
    assert record["machine"]["commit"] == "abc"
    found = {(row["subject"], row["contender"], row["mode"]) for row in record["rows"] if row["status"] == "measured"}
    parallel = {row.op for row in toy_rows() if "L" in row.shape}
    for row in toy_rows():
        for name in ("hf_mamba", "eager"):
            assert (row.op, name, "forward") in found
            assert ((row.op, name, "forward + backward") in found) == (row.op in parallel)
    assert "mamba_ssm" in record["settings"]["not installed"]
    for row in record["rows"]:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert 0 < row["floor_ms"] and row["error"] < 1e-2
    assert "✓" in output and "✗" in output


def test_ops_does_not_time_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.__main__ import app

    contenders = pytest.importorskip("benchmarks.op_contenders")
    monkeypatch.setattr("benchmarks.ops.ROWS", toy_rows())
    right = contenders.implementation

    def with_an_error(op: str, name: str) -> Any:
        item = right(op, name)
        return (
            item if name != contenders.OURS else contenders.Implementation(name, lambda o: (item.call(o)[0] * 1.02,))
        )

    monkeypatch.setattr("benchmarks.ops.implementation", with_an_error)
    path = tmp_path / "record.json"
    result = CliRunner().invoke(app, ["ops", "--op", "causal_conv1d", "--out", str(path)])
    assert result.exit_code == 1
    assert "the gate is red: causal_conv1d (hf_mamba)" in result.output
    rows = {(row["contender"], row["mode"]): row for row in json.loads(path.read_text())["rows"]}
    for mode in ("forward", "forward + backward"):
        assert rows["hf_mamba", mode]["status"].startswith("refused: ")
        assert rows["hf_mamba", mode]["p50_ms"] is None
        assert rows["eager", mode]["status"] == "measured"


def test_ops_leaves_out_what_there_is_no_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ops.ROWS", toy_rows())
    _, record = run(tmp_path, "ops", "--quick", "--seconds", "0", "--against", "eager")
    assert record["rows"]
    assert all(row["status"] == "not run: --seconds 0 were over" for row in record["rows"])


def test_first_calls_run_in_processes_of_their_own(tmp_path: Path) -> None:
    process = pytest.importorskip("benchmarks.op_process")
    rows = {row.op: row for row in toy_rows()}
    cells = [
        ([rows["causal_conv1d"], rows["causal_conv1d"]], "hf_mamba"),
        ([rows["rms_norm"]], "fla"),
        ([rows["ssd_state_update"]], "eager"),
    ]
    parallel, missing, update = process.first_calls(cells, tmp_path, at_once=2)
    assert parallel[0] > 0 and parallel[1] > 0
    assert missing == "ValueError: fla has no rms_norm."
    assert update[0] > 0 and update[1] is None


def test_variants_change_tunings_for_a_call_alone() -> None:
    pytest.importorskip("triton")
    variants = pytest.importorskip("benchmarks.op_variants")
    for op, choices in variants.VARIANTS.items():
        for name, settings in choices.items():
            item = variants.variant(op, f"hf_mamba: {name}")
            attributes = [(importlib.import_module(module), attribute) for module, attribute, _ in settings]
            before = [getattr(module, attribute) for module, attribute in attributes]
            with item.applied():
                during = [getattr(module, attribute) for module, attribute in attributes]
            assert [getattr(module, attribute) for module, attribute in attributes] == before
            assert during != before
            assert [type(value) for value in during] == [type(value) for value in before]
    assert variants.variant("rms_norm", "hf_mamba") is None


def test_a_curve_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import app

    arguments = ["--op", "causal_conv1d", "--lengths", "8,16", "--against", "eager"]
    run(tmp_path, "ops", *arguments)
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "record.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "record.png").stat().st_size > 10_000


def test_curves_need_two_lengths() -> None:
    plot = pytest.importorskip("benchmarks.plot")
    row = {"subject": "op", "mode": "forward", "contender": "a", "p50_ms": 1.0}
    rows = [row | {"shape": {"D": 4, "L": length}} for length in (16, 8)]
    rows += [row | {"contender": "b", "shape": {"D": 4, "L": 8}}, row | {"p50_ms": None, "shape": {"D": 4, "L": 32}}]
    assert plot.curves_of({"rows": rows}) == {("op D4", "forward"): {"a": [(8, 1.0), (16, 1.0)]}}
    assert plot.curves_of({"rows": rows[2:]}) == {}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["cpu-training", "--models", "gpt2"], "--models"),
        (["cpu-training", "--lengths", "128,x"], "--lengths"),
        (["cpu-generate", "--prompts", "0"], "--prompts"),
        (["generate", "--against", "jax"], "--against"),
        (["ops", "--op", "scan"], "--op"),
        (["ops", "--against", "jax"], "--against"),
        (["ops", "--rows", "L7"], "--rows"),
    ],
    ids=["models", "lengths", "prompts", "peers", "ops", "contenders", "rows"],
)
def test_bad_options_are_refused(arguments: list[str], part: str) -> None:
    from benchmarks.__main__ import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert part in result.output
