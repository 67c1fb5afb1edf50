"""What SSM states in bf16 cost in accuracy: `python -m benchmarks.state_precision`.

The packaged checkpoint reads held-out text a token at a time, so that the states are rounded after every token, and the mean
cross-entropy is compared with that of states in fp32. The text is the excerpt of the tests.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

import hf_mamba

TEXT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "held_out_excerpt.txt"


@torch.inference_mode()
def cross_entropy(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Nats a token of `ids` (1, L), with states kept in `dtype`."""
    cache = hf_mamba.RecurrentCache(model.config, ssm_dtype=dtype)
    logits = torch.cat([model(token, cache=cache).logits for token in ids[:, :-1].split(1, dim=1)], dim=1)
    return float(F.cross_entropy(logits[0].double(), ids[0, 1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=hf_mamba.demo_checkpoint(), help="a checkpoint of any of the models"
    )
    parser.add_argument("--tokens", type=int, default=1500)
    arguments = parser.parse_args()
    model = hf_mamba.Mamba2ForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : arguments.tokens]
    expected, found = (cross_entropy(model, ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    change = 100 * (math.exp(found - expected) - 1)
    print(f"{ids.shape[1]} tokens; nats a token: fp32 {expected:.6f}, bf16 {found:.6f}; perplexity {change:+.4f} %")


if __name__ == "__main__":
    main()
