"""OpenVINO GenAI in process, in its own environment: openvino_worker.py FOLDER."""

from __future__ import annotations

import itertools
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from conversation import Times, converse

BATCHED_TOKENS = 2048  # of one step; the default of 256 made prompts of 1,024 slower


def main() -> None:
    """Load the model and answer."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 32
    scheduler.max_num_batched_tokens = BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")
    numbers = itertools.count()

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, int, Times]:
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        inputs = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        start = time.perf_counter()
        handles = [pipeline.add_request(next(numbers), ids, config) for ids in inputs]
        times: Times = [[] for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - start
            for handle, at in zip(handles, times, strict=True):
                if handle.can_read():
                    at += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        return time.perf_counter() - start, sum(map(len, times)), times

    converse(genai.get_version(), generate)


if __name__ == "__main__":
    main()
