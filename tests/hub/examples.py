"""What the tests upload: tiny models and a tokenizer with their vocabulary; and processes that download it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..loopback_hub import TOKEN, Hub
from ..models.builders import VOCAB

__all__ = ["IDS", "logits", "make_tokenizer", "run_python"]

IDS = torch.tensor([[5, 9, 17, 33, 4]])


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each of the tiny models' ids: the words w3, w4, … after the special ones."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{index}" for index in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", unk_token="<eos>"
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def run_python(code: str, hub: Hub, home: Path, without: str | None = None) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, whose Hub is `hub`.

    Args:
        without: a package that cannot be imported there.
    """
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    if without is not None:
        code = BLOCKER.format(package=without) + code
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=home.parent
    )


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
"""
