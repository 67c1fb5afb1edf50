"""What the commands that run a model share: its name, its files and the device, each with one message for a mistake."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mamba.cli.console import fail, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEVICE_HELP",
    "DTYPE_HELP",
    "check_options",
    "choose_device",
    "load_model",
    "load_tokenizer",
    "resolve",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = f"One of {', '.join(DTYPES)}; auto is the checkpoint's."
DEVICE_HELP = "Such as cpu, cuda, cuda:1; auto is a GPU where there is one."
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_options(model: str, dtype: str) -> None:
    """Refuse a dtype of another name, and what can be neither a folder nor an id on the Hub, before anything heavy is imported."""
    if dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    path = Path(model).expanduser()
    if path.is_dir() or model.startswith("demo:"):
        return
    if path.is_file():
        fail(f"{model} is a file; give the folder that holds config.json and the weights.")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if looks_like_path or HUB_ID.fullmatch(model) is None:
        fail(f"there is no folder {model!r}; give a model folder, an id on the Hub such as owner/name, or demo.")


def resolve(model: str) -> str:
    """The folder or Hub id to load."""
    if model == "demo" or model.startswith("demo:"):
        from hf_mamba import demo_checkpoint

        _, named, name = model.partition(":")
        try:
            return demo_checkpoint(name) if named else demo_checkpoint()
        except (FileNotFoundError, ValueError) as error:
            fail(str(error))
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            fail(f"{model} holds a PEFT adapter, not a model; merge it into its base model first and save that.")
        fail(f"the folder {model!r} has no config.json; give the folder that save_pretrained() wrote.")
    return str(path)


def choose_device(name: str) -> "torch.device":
    """The device of that name, tried out; for `auto` a GPU where there is one."""
    import torch

    if name == "auto":
        for kind, available in (("cuda", torch.cuda.is_available), ("xpu", torch.xpu.is_available)):
            if available():
                return torch.device(kind)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} cannot be used: {first_line(error)}. Leave it out, or run `hf-mamba env`.")
    return device


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"the tokenizer of {path} cannot be loaded: {first_line(error)}")


def load_model(path: str, dtype: str, device: "torch.device") -> "PreTrainedModel":
    """The language model of a folder or Hub id, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import hf_mamba  # noqa: F401  (registers the Auto classes)

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    # a RuntimeError says that configuration and weights do not fit, an ImportError which package quantised weights need
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        fail(f"{path} cannot be loaded: {first_line(error)}")
    return model.eval().to(device)
