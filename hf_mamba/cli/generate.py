"""`hf-mamba generate`: stream a continuation of a prompt to standard output, with a report on standard error."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_mamba.cli.console import fail, report_console
from hf_mamba.cli.loading import (
    DEVICE_HELP,
    DTYPE_HELP,
    check_options,
    choose_device,
    load_model,
    load_tokenizer,
    resolve,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate"]


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, an id on the Hub, [bold]demo[/], or [bold]demo:moe_mamba[/] and the like."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; standard input is read when it is left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 100,
    temperature: Annotated[
        float | None, typer.Option(help="Sample with this temperature, such as 0.8. Greedy when left out.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens that reach this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Make sampling repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
) -> None:
    """Continue PROMPT with MODEL, printing tokens as they come; speed and memory are reported on standard error."""
    sampling = _sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        fail(f"--max-new-tokens must be at least 1, got {max_new_tokens}.")
    check_options(model, dtype)
    text = _prompt(prompt)

    # a plain line, not a spinner: transformers and the Hub draw their own progress bars
    report_console().print(f"[dim]Loading {escape(model)}[/]", soft_wrap=True)
    import torch

    chosen = choose_device(device)
    path = resolve(model)
    tokenizer = load_tokenizer(path)
    encoded = tokenizer(text, return_tensors="pt")
    if encoded["input_ids"].shape[-1] == 0:
        # transformers builds an empty tokenizer, without a word, for a folder that has no tokenizer files
        fail(
            f"the tokenizer of {model} makes no tokens of this prompt: are its files (tokenizer.json) there? "
            "tokenizer.save_pretrained() writes them."
        )
    loaded: Any = load_model(path, dtype, chosen)

    if seed is not None:
        torch.manual_seed(seed)
    streamer = _timed_streamer(tokenizer, skip_prompt=not echo)
    _reset_peak_memory(chosen)
    started = time.perf_counter()
    try:
        loaded.generate(
            input_ids=encoded["input_ids"].to(chosen),
            attention_mask=encoded["attention_mask"].to(chosen),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=_pad_token_id(tokenizer, loaded),
            **sampling,
        )
    except torch.OutOfMemoryError as error:
        fail(f"out of memory on {chosen}: {error}. Try --dtype bfloat16, a shorter prompt or --device cpu.")
    _report(
        [
            ("model", f"{model} ({type(loaded).__name__}, {str(loaded.dtype).removeprefix('torch.')}, {chosen})"),
            ("prompt", f"{encoded['input_ids'].shape[-1]} tokens"),
            ("new", f"{streamer.tokens} tokens"),
            ("time to first token", f"{1000 * (streamer.first - started):.0f} ms"),
            ("decoding", _speed(streamer.tokens, streamer.last - streamer.first)),
            ("end to end", _speed(streamer.tokens + 1, streamer.last - started)),
            ("peak memory", _peak_memory(chosen)),
        ]
    )


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """The keyword arguments of `model.generate`; every option is honoured or refused."""
    if temperature is None:
        given = {"--top-k": top_k, "--top-p": top_p, "--seed": seed}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            fail(f"{unused[0]} only matters when sampling: add --temperature, for example --temperature 0.8.")
        return {"do_sample": False, "num_beams": 1}
    if not temperature > 0:
        fail(f"--temperature must be greater than 0, got {temperature}; leave it out for greedy decoding.")
    if top_k is not None and top_k < 1:
        fail(f"--top-k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        fail(f"--top-p must lie in (0, 1], got {top_p}.")
    # 0 and 1.0 switch the two filters off; left out, transformers would keep the 50 likeliest tokens
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
    }


def _prompt(prompt: str | None) -> str:
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            fail(
                'no prompt was given: hf-mamba generate MODEL "PROMPT", or pipe it: cat FILE | hf-mamba generate MODEL'
            )
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        fail("the prompt is empty; give a few words to continue.")
    return prompt


def _pad_token_id(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int | None:
    """Any id silences the question which one to pad with: a single prompt needs no padding."""
    candidates = (tokenizer.pad_token_id, model.generation_config.pad_token_id, tokenizer.eos_token_id)
    return next((candidate for candidate in candidates if candidate is not None), None)


def _timed_streamer(tokenizer: "PreTrainedTokenizerBase", skip_prompt: bool) -> Any:
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        """Prints like its parent and notes when the first and the last token came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
            self.tokens = 0
            self.first = self.last = 0.0
            self.prompt_seen = False

        def put(self, value: "torch.Tensor") -> None:
            if self.prompt_seen:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.tokens += value.numel()
            self.prompt_seen = True
            super().put(value)

    return TimedStreamer()


def _speed(tokens: int, seconds: float) -> str:
    """Tokens per second; the first token marks the start of the interval and is not counted."""
    return f"{(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else "too short to measure"


def _reset_peak_memory(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:
        return "unknown on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, Linux in KiB
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB of the process"


def _report(rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console = report_console()
    console.print()
    console.print(table)
