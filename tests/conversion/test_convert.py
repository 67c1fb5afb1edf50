"""The pipeline around the formats: dtypes, shards, tokenizers, warnings, destination, card, dry run."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mamba import demo_checkpoint
from hf_mamba_conversion import ConversionError, convert, detect
from hf_mamba_conversion.formats.mamba_ssm import MambaSsmFormat
from hf_mamba_conversion.writer import BinWriter, SafetensorsWriter, TensorSpec, parse_size

from .checkpoints import mamba_ssm_config, mamba_ssm_tensors, write_bin

CONFIG = mamba_ssm_config("Mamba2")
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_bin(tmp_path / "source", mamba_ssm_tensors(CONFIG), CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16], ids=str)
def test_a_cast_keeps_the_recurrence_in_fp32_and_is_verified_before(dtype, source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "result", dtype=dtype, verify=True)
    assert report.verified is not None and report.verified.before_cast and report.verified.max_difference <= 1e-5
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    original, result = mamba_ssm_tensors(CONFIG), load_file(tmp_path / "result" / "model.safetensors")
    for name, value in result.items():
        exact = original[name.replace("embeddings", "embedding")]
        kept = name.endswith(("A_log", "mixer.D", "dt_bias"))
        assert value.dtype == (torch.float32 if kept else wanted)
        assert torch.equal(value, exact.to(value.dtype))
    assert json.loads((tmp_path / "result" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "result").dtype == wanted
    assert "before they were cast" in (tmp_path / "result" / "README.md").read_text()


def test_half_precision_sources_keep_their_dtype(tmp_path: Path) -> None:
    tensors = {name: value.half() for name, value in mamba_ssm_tensors(CONFIG).items()}
    source = write_bin(tmp_path / "source", tensors, CONFIG)
    report = convert(source, tmp_path / "result", verify=True)
    assert set(report.dtypes) == {"float16"} and report.verified is not None and not report.verified.before_cast
    convert(tmp_path / "result", tmp_path / "back", to="mamba_ssm")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())


def test_a_cast_that_overflows_is_an_error(tmp_path: Path) -> None:
    tensors = mamba_ssm_tensors(CONFIG)
    tensors["backbone.layers.0.mixer.in_proj.weight"][0, 0] = 1e6
    source = write_bin(tmp_path / "source", tensors, CONFIG)
    with pytest.raises(ConversionError, match=r"in_proj\.weight.*range"):
        convert(source, tmp_path / "result", dtype="float16")
    assert not (tmp_path / "result").exists()


def test_values_that_are_not_finite_are_warned_of(tmp_path: Path) -> None:
    tensors = mamba_ssm_tensors(CONFIG)
    tensors["backbone.layers.1.norm.weight"][3] = float("nan")
    source = write_bin(tmp_path / "source", tensors, CONFIG)
    report = convert(source, tmp_path / "result")
    assert len(report.warnings) == 1 and "layers.1.norm.weight" in report.warnings[0] and "NaN" in report.warnings[0]
    assert report.warnings[0] in (tmp_path / "result" / "README.md").read_text()
    with pytest.raises(ConversionError, match="verification failed"):
        convert(source, tmp_path / "verified", verify=True)
    assert not (tmp_path / "verified").exists()


def test_shards_have_at_most_the_size_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "result", max_shard_size=20_000, verify=True)
    index = json.loads((tmp_path / "result" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "result").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {file.name for file in files}
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_wrong_conversion_does_not_pass_verification(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MambaSsmFormat.plan

    def wrong(self, opened, options):
        made = plan(self, opened, options)
        # two vectors of one shape change places: every check of names and shapes passes
        a, b = (i for i, rule in enumerate(made.rules) if rule.target.endswith(("0.mixer.D", "0.mixer.A_log")))
        first, second = made.rules[a], made.rules[b]
        made.rules[a] = type(first)(first.target, second.sources, first.shape, second.source_shapes)
        made.rules[b] = type(first)(second.target, first.sources, second.shape, first.source_shapes)
        return made

    monkeypatch.setattr(MambaSsmFormat, "plan", wrong)
    with pytest.raises(ConversionError, match="verification failed"):
        convert(source, tmp_path / "result", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rounding_of_large_logits_is_told_from_an_error_in_fp64(tmp_path: Path) -> None:
    tensors = mamba_ssm_tensors(CONFIG)
    tensors["backbone.norm_f.weight"].mul_(1000)
    report = convert(write_bin(tmp_path / "source", tensors, CONFIG), tmp_path / "result", verify=True)
    assert report.verified is not None and report.verified.dtype == "float64"
    # far below the rounding of fp32: what is left is that of exp(A_log), the one thing that mixers compute in fp32
    assert report.verified.max_logit > 1000
    assert report.verified.max_difference <= report.verified.max_logit * 2e-8
    assert "in float64 on the CPU" in (tmp_path / "result" / "README.md").read_text()


def test_experts_are_verified_in_fp64_too(tmp_path: Path) -> None:
    checkpoint = torch.load(FIXTURES / "llmrandom_moe_mamba_current.ckpt.pt", weights_only=True)
    checkpoint["model"]["head.weight"].mul_(10_000)
    torch.save(checkpoint, tmp_path / "1.pt")
    report = convert(tmp_path / "1.pt", tmp_path / "result", verify=True)
    assert report.verified is not None and report.verified.dtype == "float64"
    assert report.verified.max_difference <= report.verified.max_logit * 2e-8


def test_a_dry_run_writes_nothing_and_reads_no_weights(source: Path, tmp_path: Path) -> None:
    report = convert(source, dry_run=True)
    assert report.parameters > 0 and report.destination is None and report.config.model_type == "mamba2"
    convert(source, tmp_path / "result", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "gguf"}, "hf, mamba_ssm"),
        ({"dtype": "int8"}, "float32"),
        ({"max_shard_size": "many"}, "5GB"),
        ({"max_shard_size": 0}, "5GB"),
        ({"max_shard_size": "1GB", "to": "mamba_ssm"}, "single file"),
        ({"private": True}, "push_to_hub"),
        ({"options": {"activation": "gelu"}}, "no option 'activation'"),
        ({"revision": "main"}, "Hub only"),
        ({"tokenizer": "./nowhere"}, "nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_wrong_arguments_are_refused(arguments: dict, words: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "result", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_options_reach_the_format(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(FIXTURES / f"blackmamba_published_style.{name}", source / name)
    assert detect(source).name == "blackmamba"
    plain = convert(source, tmp_path / "gelu", verify=True)
    other = convert(source, tmp_path / "silu", verify=True, options={"activation": "silu"})
    assert plain.options["activation"] == "gelu" and other.options["activation"] == "silu"
    assert plain.config.moe_hidden_act != other.config.moe_hidden_act
    assert "--option activation=silu" in other.command
    with pytest.raises(ConversionError, match="gelu, silu"):
        convert(source, tmp_path / "result", options={"activation": "relu"})


def test_fixtures_go_through_the_whole_pipeline(tmp_path: Path) -> None:
    golden = torch.load(FIXTURES / "llmrandom_moe_mamba_current.golden.pt", weights_only=True)
    report = convert(FIXTURES / "llmrandom_moe_mamba_current.ckpt.pt", tmp_path / "result", verify=True)
    assert report.format == "llm_random"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result").eval()
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert (logits - golden["logits_capacity_factor_4"]).abs().max().item() <= 1e-5


def test_a_folder_needs_one_set_of_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="has no weights"):
        detect(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(dict(mamba_ssm_tensors(CONFIG)), tmp_path / name)
    with pytest.raises(ConversionError, match=r"several weight files.*a\.pt, b\.pt"):
        detect(tmp_path)


def test_the_format_from_before_torch_1_6_is_read_with_a_warning(source: Path, tmp_path: Path) -> None:
    tensors = dict(mamba_ssm_tensors(CONFIG))
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    report = convert(source, tmp_path / "result", verify=True)
    assert len(report.warnings) == 1 and "before torch 1.6" in report.warnings[0]


class TestDestination:
    def test_an_empty_folder_is_taken(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "result").mkdir()
        convert(source, tmp_path / "result")
        assert (tmp_path / "result" / "config.json").is_file()

    def test_a_folder_with_content_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "result").mkdir()
        (tmp_path / "result" / "notes.txt").write_text("mine")
        with pytest.raises(ConversionError, match="not empty; remove it or give another name"):
            convert(source, tmp_path / "result")
        assert [path.name for path in (tmp_path / "result").iterdir()] == ["notes.txt"]

    def test_a_file_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "result").write_text("mine")
        with pytest.raises(ConversionError, match="is a file"):
            convert(source, tmp_path / "result")

    def test_a_place_inside_the_source_is_refused(self, source: Path) -> None:
        with pytest.raises(ConversionError, match="never changed"):
            convert(source, source / "result")

    def test_it_may_not_be_left_out(self, source: Path) -> None:
        with pytest.raises(ConversionError, match="`dest` is missing"):
            convert(source)

    def test_it_is_as_readable_as_any_new_folder(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "result")
        (tmp_path / "plain").mkdir()
        assert (tmp_path / "result").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestTokenizer:
    @pytest.fixture
    def wide_source(self, tmp_path: Path) -> Path:
        config = CONFIG | {"vocab_size": 4096}
        return write_bin(tmp_path / "wide", mamba_ssm_tensors(config), config)

    def test_the_one_beside_the_weights_is_carried_along(self, wide_source: Path, tmp_path: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(Path(demo_checkpoint()) / name, wide_source / name)
        report = convert(wide_source, tmp_path / "result", verify=True)
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= report.outputs.keys()
        loaded, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "result", demo_checkpoint()))
        assert loaded("The ship")["input_ids"] == original("The ship")["input_ids"]
        assert report.config.eos_token_id == original.eos_token_id

    @pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
    def test_one_that_is_given_is_copied(self, as_file: bool, wide_source: Path, tmp_path: Path) -> None:
        given = Path(demo_checkpoint()) / "tokenizer.json" if as_file else demo_checkpoint()
        convert(wide_source, tmp_path / "result", tokenizer=given)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "result")("The ship")["input_ids"]) > 0
        assert not (tmp_path / "result" / "generation_config.json").exists()

    def test_one_with_more_tokens_than_the_model_is_refused(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="tokens, but the model's vocabulary only 96"):
            convert(source, tmp_path / "result", tokenizer=demo_checkpoint())
        assert not (tmp_path / "result").exists()

    def test_a_broken_one_beside_the_weights_is_warned_of(self, source: Path, tmp_path: Path) -> None:
        (source / "tokenizer.json").write_text("{}")
        report = convert(source, tmp_path / "result")
        assert any("tokenizer beside the weights" in warning for warning in report.warnings)

    def test_code_of_its_own_is_not_run_and_nobody_is_asked(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run code"))
        settings = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["other.Other", None]}}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        (source / "other.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
        report = convert(source, tmp_path / "result")
        assert any("trust_remote_code" in warning or "cannot be used" in warning for warning in report.warnings)
        assert not (tmp_path / "executed").exists() and not (tmp_path / "result" / "other.py").exists()

    def test_a_folder_without_one_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConversionError, match="no tokenizer files"):
            convert(source, tmp_path / "result", tokenizer=tmp_path / "empty")


def test_the_card_says_where_it_comes_from_and_how_it_was_made(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "result", verify=True)
    card = ModelCard.load(tmp_path / "result" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    text = card.text
    for part in (report.title, f"{report.parameters:,}", report.command, "| dtype | float32", '"num_heads": 4'):
        assert part in text
    assert f"{report.verified.max_difference:.2g}" in text
    assert report.inputs.keys() == {"pytorch_model.bin", "config.json"}
    assert report.outputs.keys() == {"model.safetensors", "config.json"}
    for folder, digests in ((source, report.inputs), (tmp_path / "result", report.outputs)):
        for name, digest in digests.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            assert f"| `{name}` | `{digest}` |" in text
    # the card goes to others: of paths of this machine the last part alone
    assert report.command == f"hf-mamba convert {source.name} result --verify"


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 MiB") == 3 * 2**19 and parse_size(7) == 7


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_the_pickled_file_is_an_ordinary_one(mmap: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()}
    writer = BinWriter(tmp_path, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {"c": "a"})
    for spec in writer.order:
        writer.write(tensors[spec.name])
    writer.close()
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, mmap=mmap)
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items()
    )
    assert loaded["c"].data_ptr() == loaded["a"].data_ptr()
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        assert archive.testzip() is None


def test_tensors_of_several_dtypes_lie_at_multiples_of_their_width(tmp_path: Path) -> None:
    tensors = {"half": torch.ones(3).half(), "wide": torch.ones(3).double(), "single": torch.ones(5)}
    writer = SafetensorsWriter(
        tmp_path, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], max_shard_size=1000
    )
    assert [spec.name for spec in writer.order] == ["wide", "single", "half"]
    for spec in writer.order:
        writer.write(tensors[spec.name])
    writer.close()
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
