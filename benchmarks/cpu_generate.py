"""Prefill and decoding on the CPU with the shapes of mamba-130m and mamba2-130m and random weights, ours and native."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks.contenders import KINDS, make_models, parse_names, parse_numbers
from benchmarks.record import Record, Row, table_console
from benchmarks.timing import Contender, Timing, compare, disagreement

__all__ = ["cpu_generate"]

CPU = torch.device("cpu")
# logits, relative to the largest one
TOLERANCE = 1e-3
# short enough for its prefill not to matter
DECODE_PROMPT = 16


class TokenClock(BaseStreamer):
    """Notes when each new token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps_ms(self) -> list[float]:
        """Milliseconds between one token and the next, without the prefill."""
        return [1000 * (b - a) for a, b in zip(self.times[1:-1], self.times[2:], strict=True)]


def cpu_generate(
    models: Annotated[str, typer.Option(help="mamba, mamba2 or both, separated by a comma.")] = "mamba,mamba2",
    prompts: Annotated[str, typer.Option(help="Prompt lengths of the prefill, separated by commas.")] = "512,2048",
    new_tokens: Annotated[int, typer.Option(help="Tokens per decoding run.", min=2)] = 24,
    rounds: Annotated[int, typer.Option(help="Decoding runs.", min=1)] = 2,
    layers: Annotated[int | None, typer.Option(help="Layers; the 24 of the checkpoints when left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; its own choice when left out.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each prefill cell.")] = 6.0,
    output: Annotated[Path | None, typer.Option(help="The JSON file; default: in benchmarks/results.")] = None,
) -> None:
    """Time prefill (tokens/s) and greedy decoding through generate() (ms a token) in fp32, batch 1."""
    console = table_console()
    try:
        kinds = parse_names(models, "--models", KINDS)
        lengths = parse_numbers(prompts, "--prompts")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads is not None:
        torch.set_num_threads(threads)
    record = Record("cpu-generate", settings={"new_tokens": new_tokens, "rounds": rounds})
    for kind in kinds:
        contenders: dict[str, Any] = {
            name: model.eval() for name, model in make_models(kind, "130m", layers=layers).items()
        }
        depth = next(iter(contenders.values())).config.num_hidden_layers
        for length in lengths:
            console.print(f"[dim]{kind}, prefill of {length} tokens[/]")
            tokens = torch.randint(3, 50000, (1, length), generator=torch.Generator().manual_seed(length))
            cells = [_prefill(name, model, tokens) for name, model in contenders.items()]
            for outcome in compare(cells, CPU, TOLERANCE, seconds):
                row = Row(f"{kind}-130m", outcome.name, {"B": 1, "L": length, "layers": depth}, "float32", "prefill")
                record.rows.append(row.fill(outcome, tokens=length))
        console.print(f"[dim]{kind}, decoding[/]")
        record.rows += _decode(kind, contenders, new_tokens, rounds, depth)
    record.print_rows(console)
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def _prefill(name: str, model: Any, tokens: Tensor) -> Contender:
    @torch.inference_mode()
    def run() -> Sequence[Tensor]:
        return [model(tokens, use_cache=True, logits_to_keep=1).logits]

    return Contender(name, run, run)


def _decode(kind: str, contenders: dict[str, Any], new_tokens: int, rounds: int, depth: int) -> list[Row]:
    """One row per contender: the time of each token after the first, over all rounds."""
    prompt = torch.randint(3, 50000, (1, DECODE_PROMPT), generator=torch.Generator().manual_seed(1))

    def generate(model: Any, count: int, **options: Any) -> Any:
        # no end-of-text token: every run has the same number of steps
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )

    logits: dict[str, list[Tensor]] = {}
    for name, model in contenders.items():
        found = generate(model, 4, return_dict_in_generate=True, output_logits=True)
        logits[name] = list(found.logits)
    errors = {name: disagreement(values, logits["transformers"]) for name, values in logits.items()}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, model in contenders.items():
            if errors[name] <= TOLERANCE:
                clock = TokenClock()
                generate(model, new_tokens, streamer=clock)
                steps[name] += clock.steps_ms()
    rows = []
    for name in contenders:
        row = Row(f"{kind}-130m", name, {"B": 1, "layers": depth}, "float32", "decode", error=errors[name])
        if steps[name]:
            row.fill_times(Timing(steps[name]), tokens=1)
        else:
            row.status = f"refused: logits differ by {errors[name]:.1e}, more than {TOLERANCE:.0e}"
        rows.append(row)
    return rows
