"""Measure what transformers' native Mamba classes get wrong today, beside hf_mamba with the same weights.

The test-suite asserts only our side (tests/models/test_native_defects_*.py, test_packing.py), so that another transformers
version cannot turn it red; this prints both sides for the version that is installed, as a Markdown table of maximum absolute
errors of the logits against a forward over each sequence alone and at once. Toy models; logits are a few units large.

Run from the repository's root, with the test requirements installed:

    python -m scripts.native_defects
"""

import tempfile
import warnings
from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from tests.models.builders import NATIVE, make_model, make_native, random_ids

KINDS = ("mamba", "falcon_mamba", "mamba2", "mamba2-groups")
OK = 1e-4


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


def with_cache(model, parts, **kwargs) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, cache_params=cache, use_cache=True, **kwargs).logits for part in parts], dim=1)


def multi_token_continuation(model, reference) -> float:
    ids = random_ids(2, 12)
    return difference(with_cache(model, ids.split([6, 6], dim=1)), reference(ids).logits)


def full_mask_on_a_step(model, reference) -> float:
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], attention_mask=mask[:, :8], cache_params=cache, use_cache=True)
    logits = model(ids[:, 8:], attention_mask=mask, cache_params=cache, use_cache=True).logits
    return difference(logits[1, -1], reference(ids[1:, 4:]).logits[0, -1])


def left_padding_with_biases(model, reference) -> float:
    ids = random_ids(1, 10)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    return difference(model(ids, attention_mask=mask).logits[:, 4:], reference(ids[:, 4:]).logits)


def step_after_right_padding(model, reference) -> float:
    ids, mask = random_ids(1, 9), torch.ones(1, 9, dtype=torch.long)
    mask[:, 6:] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, cache_params=cache, use_cache=True)
    token = random_ids(1, 1, seed=4)
    logits = model(token, cache_params=cache, use_cache=True).logits
    return difference(logits[:, -1], reference(torch.cat([ids[:, :6], token], dim=1)).logits[:, -1])


def time_step_limit_in_a_step(model, reference) -> float:
    ids = random_ids(1, 9)
    return difference(with_cache(model, [ids[:, :8], ids[:, 8:]]), reference(ids).logits)


def packed_sequences(model, reference) -> float:
    ids = random_ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    expected = torch.cat([reference(part).logits for part in ids.split([5, 7], dim=1)], dim=1)
    return difference(model(ids, position_ids=positions).logits, expected)


def first_hidden_state(model, reference) -> float:
    ids = random_ids(1, 6)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    return difference(hidden_states[0], model.get_input_embeddings()(ids))


def reloaded(model, reference) -> float:
    """`rescale_prenorm_residual` on in the checkpoint: as configurations of models trained with native classes have it."""
    ids = random_ids(1, 6)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, rescale_prenorm_residual=True).eval()
    return difference(again(ids).logits, model(ids).logits)


def recurrence_parameters_in_bf16(model, reference) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    name = "backbone.layers.0.mixer.A_log"
    return difference(half.get_parameter(name).float(), model.get_parameter(name))


def merged_dt_proj_adapter(model, reference) -> float:
    ids = random_ids(1, 9)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj", "dt_proj"], init_lora_weights=False))
    expected = adapted.eval()(input_ids=ids).logits
    return difference(adapted.merge_and_unload()(ids).logits, expected)


def plain_forward(model, reference) -> float:
    ids = random_ids(1, 9)
    return difference(model(ids).logits, reference(ids).logits)


# row of the list of defects, what is asked, how it is measured, the kinds and the configuration it concerns
ROWS: list[tuple[str, str, Callable, tuple[str, ...], dict]] = [
    ("1", "two chunks over a cache", multi_token_continuation, KINDS[:3], {}),
    ("3", "mask of the whole sequence on a step", full_mask_on_a_step, KINDS[:3], {}),
    ("4", "left padding with `use_bias=True`", left_padding_with_biases, KINDS[:3], {"use_bias": True}),
    ("5", "step after a right-padded prompt", step_after_right_padding, KINDS[:3], {}),
    (
        "6",
        "step with `time_step_limit=(0, 0.05)`",
        time_step_limit_in_a_step,
        KINDS[2:3],
        {"time_step_limit": (0.0, 0.05)},
    ),
    ("7", "two packed sequences, by `position_ids`", packed_sequences, KINDS[:3], {}),
    ("8", "`hidden_states[0]` against the embeddings", first_hidden_state, KINDS[:3], {}),
    ("15", "A_log after loading in bf16", recurrence_parameters_in_bf16, KINDS[:3], {}),
    ("22", "forward with `n_groups=8`", plain_forward, KINDS[3:], {}),
    ("23", "merging LoRA on in_proj and dt_proj", merged_dt_proj_adapter, KINDS[:2], {}),
    ("24", "reloading with `rescale_prenorm_residual`", reloaded, KINDS[:3], {}),
]


def measure(run: Callable, model, reference) -> str:
    try:
        error = run(model, reference)
    except Exception as problem:
        return f"**{type(problem).__name__}**"
    return f"{error:.0e}" if error <= OK else f"**{error:.2g}**"


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| # | case | model | native | hf_mamba |")
    print("| --- | --- | --- | --- | --- |")
    for number, case, run, kinds, options in ROWS:
        for kind in kinds:
            reference = make_model(kind, **options)
            assert reference.config.model_type in NATIVE
            native, ours = (
                measure(run, model, reference) for model in (make_native(reference), make_model(kind, **options))
            )
            print(f"| {number} | {case} | {kind} | {native} | {ours} |")


if __name__ == "__main__":
    main()
