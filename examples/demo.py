"""The main job in one file: text from a Mamba model of ours through `pipeline("text-generation")`.

python examples/demo.py "It is a truth universally acknowledged"
python examples/demo.py "My dear" --model path/or/hub-id --max-new-tokens 200 --seed 3
"""

import argparse
import time

from transformers import TextStreamer, pipeline, set_seed

import hf_mamba  # from here on the Auto classes, and so pipelines, use hf_mamba

__all__ = ["main"]


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prompt", nargs="?", default="It is a truth universally acknowledged")
    parser.add_argument(
        "--model", default=None, help="a folder or an id on the Hub (default: the packaged checkpoint)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    generate = pipeline("text-generation", model=arguments.model or hf_mamba.demo_checkpoint(), device="cpu")
    print(
        f"{type(generate.model).__module__}.{type(generate.model).__name__}, {generate.model.num_parameters():,} parameters\n"
    )
    set_seed(arguments.seed)
    start = time.perf_counter()
    result = generate(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        streamer=TextStreamer(generate.tokenizer),
        return_tensors=True,
    )
    seconds = time.perf_counter() - start
    new = len(result[0]["generated_token_ids"]) - len(generate.tokenizer(arguments.prompt)["input_ids"])
    print(f"\n{new} new tokens in {seconds:.1f} s: {new / seconds:.0f} tokens/s on the CPU")


if __name__ == "__main__":
    main()
