"""transformers' `generate` in bf16: transformers_worker.py FOLDER."""

from __future__ import annotations

import sys
import time

import torch
import transformers
from conversation import Times, converse
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load the model and answer."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, int, Times]:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - start, (made.shape[1] - ids.shape[1]) * len(prompts), []

    converse(transformers.__version__, generate)


if __name__ == "__main__":
    main()
