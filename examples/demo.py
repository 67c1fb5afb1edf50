"""The main job in one file: text from Mamba, Mamba-2 and MoE-Mamba through `pipeline("text-generation")`, side by side.

    python examples/demo.py "It is a truth universally acknowledged"
    python examples/demo.py "My dear" --model path/or/hub-id --max-new-tokens 200 --seed 3

Below the text of each model stand its perplexity on a paragraph that it has not seen, its speed, and the size of the state
from which it goes on: as large after a million tokens as after one.
"""

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import pipeline, set_seed
from transformers.utils import logging

import hf_mamba  # from here on the Auto classes, and so pipelines, use hf_mamba
from hf_mamba.demo_checkpoint import DEMO_CHECKPOINTS
from hf_mamba.integrations.cards import state_bytes

__all__ = ["PARAGRAPH", "Shown", "main", "show"]

# from Emma, volume 2, chapter 19: held out from the training of the packaged checkpoints
PARAGRAPH = (
    "It soon appeared that London was not the place for her. She could not endure its noise. Her nerves were under continual "
    "irritation and suffering; and by the ten days' end, her nephew's letter to Randalls communicated a change of plan. They "
    "were going to remove immediately to Richmond. Mrs. Churchill had been recommended to the medical skill of an eminent "
    "person there, and had otherwise a fancy for the place. A ready-furnished house in a favourite spot was engaged, and much "
    "benefit expected from the change."
)


@dataclass
class Shown:
    """What is shown of one model."""

    name: str
    parameters: int
    active: int
    text: str
    new_tokens: int
    seconds: float
    perplexity: float
    bits_per_byte: float
    state_bytes: int


def show(place: str, name: str, prompt: str, max_new_tokens: int, seed: int) -> Shown:
    """Let the model in a folder, or of an id on the Hub, go on with `prompt`, and measure it, on the CPU."""
    generate: Any = pipeline("text-generation", model=place, device="cpu")
    model, tokenizer = generate.model, generate.tokenizer
    generate(prompt, max_new_tokens=2)  # the first text takes longer
    set_seed(seed)
    start = time.perf_counter()
    (result,) = generate(prompt, max_new_tokens=max_new_tokens, return_tensors=True)
    seconds = time.perf_counter() - start
    ids = result["generated_token_ids"]
    with torch.no_grad():
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        paragraph = torch.tensor([begin + tokenizer(PARAGRAPH)["input_ids"]])
        loss = model(input_ids=paragraph, labels=paragraph).loss.item()
    active = getattr(model, "num_active_parameters", model.num_parameters)
    return Shown(
        name=name,
        parameters=model.num_parameters(),
        active=active(),
        text=tokenizer.decode(ids, skip_special_tokens=True),
        new_tokens=len(ids) - len(tokenizer(prompt)["input_ids"]),
        seconds=seconds,
        perplexity=math.exp(loss),
        bits_per_byte=loss * (paragraph.shape[1] - 1) / math.log(2) / len(PARAGRAPH.encode()),
        state_bytes=state_bytes(model),
    )


def table(models: list[Shown]) -> Table:
    """A column for each model."""
    made = Table(expand=True, show_lines=True)
    made.add_column("", no_wrap=True)
    for model in models:
        made.add_column(escape(model.name), ratio=1, overflow="fold")

    def row(title: str, *cells: str) -> None:
        made.add_row(title, *map(escape, cells))

    row("text", *(model.text for model in models))
    row(
        "parameters",
        *(
            f"{model.parameters:,}" + (f", {model.active:,} per token" if model.active < model.parameters else "")
            for model in models
        ),
    )
    row(
        "held out",
        *(f"perplexity {model.perplexity:.2f}, {model.bits_per_byte:.3f} bits/byte" for model in models),
    )
    row(
        "speed",
        *(
            f"{model.new_tokens} new tokens in {model.seconds:.1f} s: {model.new_tokens / model.seconds:.0f} tokens/s"
            for model in models
        ),
    )
    row("state", *(f"{model.state_bytes:,} bytes, whatever the length" for model in models))
    return made


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prompt", nargs="?", default="It is a truth universally acknowledged")
    parser.add_argument(
        "--model", default=None, help="a folder or an id on the Hub (default: the packaged checkpoints, side by side)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    places = {name: hf_mamba.demo_checkpoint(name) for name in DEMO_CHECKPOINTS}
    if arguments.model is not None:
        places = {arguments.model: arguments.model}
    logging.disable_progress_bar()
    models = [
        show(place, name, arguments.prompt, arguments.max_new_tokens, arguments.seed) for name, place in places.items()
    ]
    Console().print(table(models))


if __name__ == "__main__":
    main()
