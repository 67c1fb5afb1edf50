"""The training example end to end on a small text, and its parts against hand-made oracles."""

import copy
import itertools
import json
import math
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import debian_texts  # noqa: E402
import demo  # noqa: E402
import language_modeling  # noqa: E402
import prepare_text  # noqa: E402
import train_demo  # noqa: E402
import train_language_model  # noqa: E402
from debian_texts import Document  # noqa: E402
from language_modeling import EvaluationWindows, TimeBudget, TrainingWindows  # noqa: E402

import hf_mamba  # noqa: E402
from hf_mamba.integrations.cards import state_bytes  # noqa: E402

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 8,
    "vocab_size": 400,
    "context_length": 32,
    "batch_size": 2,
    "steps": 6,
    "eval_steps": 3,
    "warmup_steps": 1,
    "sample_tokens": 4,
    "prompts": ["And the LORD said"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder made of the fixture text by prepare_text.py."""
    folder = tmp_path_factory.mktemp("text")
    text = (ROOT / "tests/fixtures/held_out_excerpt.txt").read_text(encoding="utf-8")
    (folder / "book.txt").write_text(text.replace(f"{prepare_text.SEPARATOR}\n", ""), encoding="utf-8")
    arguments = prepare_text.PrepareArguments(
        output_dir=str(folder / "data"), texts=[str(folder / "book.txt")], excerpt_bytes=1500
    )
    prepare_text.prepare(arguments)
    return folder / "data"


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished tiny run: its arguments and its report."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = train_language_model.Arguments(data_dir=str(data), output_dir=str(output), head_dim=8, **TINY)
    return arguments, train_language_model.train(arguments, "python examples/train_language_model.py")


# --- preparing text ---------------------------------------------------------------------------------------------------


def test_prepared_splits_are_disjoint_and_complete(data):
    texts = {split: language_modeling.read_documents(data / f"{split}.txt") for split in ("train", "valid", "test")}
    lines = [line for documents in texts.values() for document in documents for line in document.split("\n")]
    original = (ROOT / "tests/fixtures/held_out_excerpt.txt").read_text(encoding="utf-8").split("\n")
    assert sorted(lines) == sorted(line for line in original if line and line != prepare_text.SEPARATOR)
    assert all(texts.values())
    report = json.loads((data / "sources.json").read_text())
    for name, entry in report["files"].items():
        assert (data / name).stat().st_size == entry["bytes"]
    assert len(report["test_documents"]) == len(texts["test"])


def test_hold_out_takes_runs_of_every_work_and_their_comments():
    documents = [
        Document(source, "work", part, "word " * (10 + part))
        for source in ("book", "comment")
        for part in range(1, 41)
    ]
    documents += [Document("short", "short", part, "word") for part in range(9)]
    splits = prepare_text.hold_out(documents, 0.1)
    assert sum(map(len, splits.values())) == len(documents)
    assert not [document for split in ("valid", "test") for document in splits[split] if document.work == "short"]
    for split, first in (("valid", 14), ("test", 27)):
        parts = {source: [d.part for d in splits[split] if d.source == source] for source in ("book", "comment")}
        assert parts["book"] == parts["comment"] == list(range(first, first + len(parts["book"])))
        size = sum(len(document.text) for document in splits[split])
        assert 0.05 < size / sum(len(d.text) for d in documents if d.work == "work") <= 0.1


def test_hold_out_of_short_works_is_refused():
    with pytest.raises(ValueError, match="shorter than 10 parts"):
        prepare_text.hold_out([Document("a", "a", 1, "text")], 0.1)


def test_word_overlap_counts_runs():
    def one(text):
        return [Document("a", "a", 1, text)]

    # of the 4 runs of 3 words "a b c", "b c d", "c d e", "d e f" the first two occur
    assert prepare_text.word_overlap(one("x a b c d y"), one("a b c d e f"), length=3) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.txt", "does not exist"),
        (lambda folder: folder, "holds no \\*.txt"),
        (lambda folder: (folder / "latin.txt", (folder / "latin.txt").write_bytes(b"caf\xe9"))[0], "not UTF-8"),
        (lambda folder: (folder / "empty.txt", (folder / "empty.txt").write_text(" \n"))[0], "hold no text"),
    ],
    ids=["absent", "empty folder", "not utf-8", "no text"],
)
def test_read_texts_refuses(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        prepare_text.read_texts([str(make(tmp_path))])


def test_read_texts_joins_lines_of_a_paragraph(tmp_path):
    (tmp_path / "book.txt").write_text("One\nline.\n\nAn “other”  —\nend.\n", encoding="utf-8")
    (document,) = prepare_text.read_texts([str(tmp_path)])
    assert document.text == 'One line.\nAn "other" -- end.'


def test_prepare_arguments_refuse_unknown_source():
    with pytest.raises(ValueError, match="unknown source 'koran'"):
        prepare_text.PrepareArguments(sources=["koran"])


def test_r_character_vectors():
    def record(text):
        return b"\x00\x04\x00\x09" + struct.pack(">i", len(text)) + text

    chunks = [b"X\n\x00\x00" + record(b"It is a truth") + record(b"") + record("café".encode()), record(b"second")]
    database = b"".join(struct.pack(">I", len(chunk)) + zlib.compress(chunk) for chunk in chunks)
    assert list(debian_texts._r_character_vectors(database)) == [["It is a truth", "", "café"], ["second"]]


def test_sword_blocks_and_prose(tmp_path):
    osis = (
        '<title>Chapter 1</title><table><row><cell>outline</cell></row></table><div type="x-p"/> '
        '<hi type="bold">Verses 1-2</hi> He called it "light, "as <hi type="italic">day</hi> &amp; night.<div/>Next.'
    )
    blocks = ["first", osis]
    packed = [zlib.compress(block.encode()) for block in blocks]
    index, offset = b"", 0
    for block, data in zip(blocks, packed, strict=True):
        index += struct.pack("<III", offset, len(data), len(block.encode()))
        offset += len(data)
    (tmp_path / "ot.bzs").write_bytes(index + struct.pack("<III", 0, 0, 0))
    (tmp_path / "ot.bzz").write_bytes(b"".join(packed))
    read = list(debian_texts._sword_blocks(tmp_path, "ot", "b"))
    assert read == blocks
    assert debian_texts._prose(read[1]) == 'He called it "light," as day & night.\nNext.'


def test_unwrap_drops_everything_but_prose():
    chapter = "\n\nVOLUME II\n\nOne _fine_\nday.\n\n     * * * * *\n\n[At this point Volume 1 ends.]\n\nTwo.\n"
    assert debian_texts._unwrap(chapter) == "One fine day.\nTwo."


# --- data, evaluation and schedule ------------------------------------------------------------------------------------


def test_training_windows_cover_each_pass_once_and_repeat():
    tokens = np.arange(1000, dtype=np.int32)
    windows = TrainingWindows(tokens, context=16, total=200, seed=3)
    seen = [windows[i]["input_ids"] for i in range(windows.per_pass)]
    starts = sorted(int(window[0]) for window in seen)
    assert all(torch.equal(w, torch.arange(int(w[0]), int(w[0]) + 16)) for w in seen)
    assert all(b - a == 16 for a, b in itertools.pairwise(starts))
    # a resumed run begins in the middle of a later pass
    again = TrainingWindows(tokens, context=16, total=200, seed=3)
    for i in (190, 61, 62, 5):
        assert torch.equal(again[i]["input_ids"], windows[i]["input_ids"])
    offsets = {int(windows[i]["input_ids"][0]) % 16 for i in range(200)}
    assert len(offsets) > 1


def test_training_windows_refuse_short_text():
    with pytest.raises(ValueError, match="too few for windows of 64"):
        TrainingWindows(np.zeros(100, dtype=np.int32), context=64, total=1, seed=0)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 32, 47])
def test_evaluation_windows_predict_every_token_once(length):
    windows = EvaluationWindows(np.arange(length, dtype=np.int32), context=16)
    predicted = [int(token) for i in range(len(windows)) for token in windows[i]["input_ids"][1:]]
    predicted += list(range(len(windows) * 15 + 1, length))
    assert predicted == list(range(1, length))


def test_evaluate_equals_token_by_token_sum(finished, data):
    arguments, _ = finished
    model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    documents = [line for line in language_modeling.read_documents(data / "test.txt")[0].split("\n")[:3]]
    got = language_modeling.evaluate(model, tokenizer, documents, context=20, batch_size=3)
    stream = [0]
    for document in documents:
        stream += [*tokenizer(document)["input_ids"], 0]
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(stream)):
            start = (i - 1) // 19 * 19
            logits = model(torch.tensor([stream[start:i]])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[stream[i]].item()
    assert got["tokens"] == len(stream) - 1
    assert got["bytes"] == sum(len(document.encode()) for document in documents)
    assert got["perplexity"] == pytest.approx(math.exp(total / got["tokens"]), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / got["bytes"], rel=1e-5)


def test_time_budget_ends_the_schedule_with_the_time():
    budget = TimeBudget(max_minutes=1)
    assert budget.fraction(30, 100) == 0.3
    budget.seconds = 45
    assert budget.fraction(30, 100) == 0.75
    assert TimeBudget(None).fraction(30, 100) == 0.3


def test_training_stops_when_the_time_is_used_up(data, tmp_path):
    arguments = train_language_model.Arguments(
        data_dir=str(data), output_dir=str(tmp_path / "out"), max_minutes=1e-6, head_dim=8, **TINY
    )
    report = train_language_model.train(arguments, "python")
    assert report["steps"] == report["best_step"] == 1
    state = json.loads((tmp_path / "out-checkpoints/checkpoint-1/trainer_state.json").read_text())
    assert state["log_history"][0]["elapsed_seconds"] > 0


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])
def test_every_model_type_can_be_built_and_decays_matrices_only(finished, model_type):
    tokenizer = AutoTokenizer.from_pretrained(finished[0].output_dir)
    overrides = '{"num_experts": 4, "num_hidden_layers": 2}' if model_type == "moe_mamba" else "{}"
    own = {"head_dim": 8} if model_type == "mamba2" else {}
    arguments = train_language_model.Arguments(model_type=model_type, config_overrides=overrides, **(TINY | own))
    config = train_language_model.build_config(arguments, tokenizer)
    assert config.model_type == model_type and config.vocab_size == len(tokenizer) and config.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__.startswith("hf_mamba.")
    decayed = language_modeling.LanguageModelTrainer.get_decay_parameter_names(None, model)
    kept = {name for name, _ in model.named_parameters()} - set(decayed)
    endings = {re.sub(r".*\.", "", name) for name in kept}
    assert {"A_log", "D", "weight", "bias"} <= endings <= {"A_log", "D", "dt_bias", "weight", "bias"}
    assert not [name for name in kept if name.endswith("weight") and "norm" not in name]
    assert not [name for name in decayed if "norm" in name or name.endswith(("bias", "A_log", "D"))]


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip_and_special_tokens():
    text = "In the beginning was the word, and the word was short.\n" * 20
    tokenizer = language_modeling.train_tokenizer([text], 300)
    for awkward in ("  two  spaces\n\n", "“quotes” — 東京 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(awkward)["input_ids"]) == awkward
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == tokenizer.eos_token_id
    assert language_modeling.encode(tokenizer, ["ab", "c"]).tolist()[0] == tokenizer.eos_token_id
    assert len(language_modeling.encode(tokenizer, ["q", "z"])) == 5


def test_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 258"):
        language_modeling.train_tokenizer(["text"], 100)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_finished_folder_is_complete_and_measured_on_the_saved_files(finished, data):
    arguments, report = finished
    output = Path(arguments.output_dir)
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "training_report.json"}
    assert {file.name for file in output.iterdir()} == expected
    weights = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
    assert all((t.dtype == torch.float32) == n.endswith(("A_log", ".D", "dt_bias")) for n, t in weights.items())
    assert "lm_head.weight" not in weights
    model = AutoModelForCausalLM.from_pretrained(output)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.use_cache and report["parameters"] == sum(p.numel() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(output)
    again = language_modeling.evaluate(model, tokenizer, language_modeling.read_documents(data / "test.txt"), 32, 2)
    assert again == report["results"]["test"]
    assert again["perplexity"] < report["test_before_training"]["perplexity"]
    state = json.loads((Path(arguments.checkpoint_dir) / "checkpoint-6/trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert set(losses) == {3, 6} and report["best_step"] == min(losses, key=losses.get)


def test_card_states_what_was_measured(finished):
    arguments, report = finished
    card = ModelCard.load(Path(arguments.output_dir) / "README.md")
    values = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    for split, figures in report["results"].items():
        for metric in ("perplexity", "bits_per_byte"):
            assert values[split, metric] == pytest.approx(figures[metric], abs=1e-4)
    assert f"{report['parameters']:,} parameters" in card.text
    assert report["command"] in card.text and report["samples"][0].split("\n")[0] in card.text
    assert "{{" not in card.content and "{%" not in card.content


def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(finished, tmp_path):
    arguments, _ = finished
    again = copy.copy(arguments)
    again.resume = True
    again.output_dir, again.checkpoint_dir = str(tmp_path / "out"), str(tmp_path / "checkpoints")
    shutil.copytree(arguments.checkpoint_dir, again.checkpoint_dir)
    shutil.rmtree(Path(again.checkpoint_dir) / "checkpoint-6")
    report = train_language_model.train(again, "python")
    assert report["steps"] == 6
    first = load_file(Path(arguments.checkpoint_dir) / "checkpoint-6/model.safetensors")
    second = load_file(tmp_path / "checkpoints/checkpoint-6/model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_earlier_checkpoints_are_not_mixed_or_invented(finished, tmp_path):
    arguments = copy.copy(finished[0])
    with pytest.raises(ValueError, match="--resume, replace them with --overwrite"):
        train_language_model.train(arguments, "python")
    arguments.resume, arguments.checkpoint_dir = True, str(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train_language_model.train(arguments, "python")


def test_wrong_options_end_the_scripts_with_a_message(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prepare_text.py", "--texts", str(tmp_path / "absent.txt")])
    with pytest.raises(SystemExit, match=r"error: --texts: .* does not exist"):
        prepare_text.main()
    command = ["train_language_model.py", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--bf16", "false", "--prompts", "one", "two"])
    with pytest.raises(SystemExit, match=r"error: .*train.txt does not exist: run `python examples/prepare_text.py`"):
        train_language_model.main()


def test_packages_that_cannot_be_had_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(debian_texts.shutil, "which", lambda name: None if name == "apt-get" else f"/usr/bin/{name}")
    with pytest.raises(RuntimeError, match=r"bible-kjv_\*.deb into a folder and name it with --packages_dir"):
        debian_texts.unpack("bible-kjv", tmp_path)
    monkeypatch.setattr(debian_texts.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="give text files of your own with --texts"):
        debian_texts.unpack("bible-kjv", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gpt2"}, "--model_type must be one of"),
        ({"weights_dtype": "int4"}, "--weights_dtype must be"),
        ({"steps": 0}, "--steps must be a positive number, got 0"),
        ({"max_minutes": 0.0}, "--max_minutes must be positive"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
    ids=["model type", "dtype", "steps", "minutes", "resume and overwrite"],
)
def test_arguments_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        train_language_model.Arguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "mamba", "head_dim": 8}, "--head_dim is an option of mamba2"),
        ({"head_dim": 7}, "--head_dim 7 does not divide"),
        ({"config_overrides": "{"}, "not JSON"),
        ({"config_overrides": "[1]"}, "must be a JSON object"),
        ({"config_overrides": '{"colour": 1}'}, "no field 'colour'"),
    ],
    ids=["option of another type", "head_dim", "not JSON", "not an object", "unknown field"],
)
def test_build_config_refuses(finished, options, message):
    tokenizer = AutoTokenizer.from_pretrained(finished[0].output_dir)
    with pytest.raises(ValueError, match=message):
        train_language_model.build_config(train_language_model.Arguments(**options), tokenizer)


def test_demo_shows_the_checkpoints_side_by_side(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["demo.py", "My dear", "--max-new-tokens", "12"])
    demo.main()
    printed = capsys.readouterr().out
    for words in ("My dear", "12 new tokens", "perplexity", "bits/byte", "whatever the length"):
        assert printed.count(words) == 3, (words, printed)
    assert re.search(r"mamba .*mamba2 .*moe_mamba", printed) and "per token" in printed


def test_demo_shows_another_model(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    place = hf_mamba.demo_checkpoint("moe_mamba")
    monkeypatch.setattr(sys, "argv", ["demo.py", "My dear", "--max-new-tokens", "3", "--model", place])
    demo.main()
    printed = capsys.readouterr().out
    assert printed.count("3 new tokens") == 1 and "parameters" in printed


def test_what_the_demo_measures_is_as_evaluate_says():
    """The paragraph is one of the held-out text, and its figures are those of the evaluation that the cards use."""
    assert demo.PARAGRAPH in (ROOT / "tests/fixtures/held_out_excerpt.txt").read_text(encoding="utf-8").split("\n")
    place = hf_mamba.demo_checkpoint("mamba2")
    shown = demo.show(place, "it", "My dear", max_new_tokens=2, seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(demo.PARAGRAPH)["input_ids"]]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert shown.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    assert shown.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / len(demo.PARAGRAPH), rel=1e-4)
    assert shown.state_bytes == state_bytes(model) and shown.new_tokens == 2


# options from a file, dropout, and the run that makes the demo checkpoints


def test_options_come_from_a_file_and_those_after_it_take_precedence(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"model_type": "mamba", "dropout": 0.25, "prompts": ["a b", "c"]}')
    arguments = train_language_model.parse([str(file), "--dropout", "0.5"])
    assert (arguments.model_type, arguments.dropout, arguments.prompts) == ("mamba", 0.5, ["a b", "c"])
    assert train_language_model.parse(["--dropout", "0.5"]).model_type == "mamba2"
    file.write_text('{"droput": 0.25}')
    with pytest.raises(ValueError, match="unknown: \\['droput'\\]"):
        train_language_model.parse([str(file)])
    with pytest.raises(ValueError, match="cannot be read"):
        train_language_model.parse([str(tmp_path / "missing.json")])


@pytest.mark.parametrize("name", train_demo.NAMES)
def test_demo_checkpoints_were_trained_with_the_options_that_lie_here(name):
    """The sizes in the committed options are those of the packaged checkpoint."""
    arguments = train_language_model.parse([str(ROOT / f"examples/demo_checkpoints/{name}.json")])
    tokenizer = AutoTokenizer.from_pretrained(hf_mamba.demo_checkpoint(name))
    asked = train_language_model.build_config(arguments, tokenizer).to_dict()
    made = AutoModelForCausalLM.from_pretrained(hf_mamba.demo_checkpoint(name)).config.to_dict()
    for key in ("hidden_size", "num_hidden_layers", "state_size", "vocab_size", "layers_block_type", "num_experts"):
        assert asked.get(key) == made.get(key), key
    assert arguments.model_name == f"hf-mamba-demo-{name.replace('_', '-')}"


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "moe_mamba"])
def test_dropout_reaches_every_update_of_the_residual_stream_in_training_only(model_type):
    """At a rate of almost 1 the stream is the embedding; in evaluation nothing changes."""
    arguments = train_language_model.Arguments(
        model_type=model_type, **{"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    )
    if model_type == "mamba2":
        arguments.head_dim = 8
    tokenizer = AutoTokenizer.from_pretrained(hf_mamba.demo_checkpoint())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(train_language_model.build_config(arguments, tokenizer))
    ids = torch.arange(12)[None]

    def stream(model):
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[1].float()

    embedded = model.get_input_embeddings()(ids).detach()
    before = stream(model.eval())
    assert not torch.equal(before, embedded)
    language_modeling.drop_residual_updates(model, 0.999999)
    assert torch.equal(stream(model.eval()), before)
    assert torch.equal(stream(model.train()), embedded)


def test_steps_of_the_demo_run_follow_from_the_slowest_model():
    report = {
        "curves": [
            {"step": 1, "loss": 9.0, "elapsed_seconds": 20.0},
            {"step": 50, "loss": 7.0, "elapsed_seconds": 25.0},
            {"step": 75, "eval_loss": 6.5, "elapsed_seconds": 26.0},
            {"step": 100, "loss": 6.0, "eval_loss": 6.0, "elapsed_seconds": 27.5},
        ]
    }
    assert train_demo.seconds_per_step(report) == pytest.approx(0.05)
    assert train_demo.steps_that_fit(107.01, 0.05, most=8000) == 2000
    assert train_demo.steps_that_fit(107.01, 0.05, most=300) == 300
