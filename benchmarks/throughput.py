"""Speed and memory of this machine: sampling, the reward, the update. Prints one JSON object a line.

python -m benchmarks.throughput --arch t5 --size tiny --prompts 32 --group_size 8
python -m benchmarks.throughput --arch gpt2 --size base --dtype bf16
python -m benchmarks.throughput --arch gpt2 --size base --dtype bf16 --cudnn_attention    with what is off on a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from operant.algorithms import objectives
from operant.algorithms.learner import Learner
from operant.data.prompts import load_fitting_prompts
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.recipes.quickstart_task import make_task
from operant.rewards import RewardRunner, reward_by_name
from operant.types import Batch, Sampling


def settle() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(repeat: int, call: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds over `repeat` calls after one that warms up, and what the last call returned."""
    result, seconds = call(), []
    for _ in range(repeat):
        settle()
        begun = time.perf_counter()
        result = call()
        settle()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="t5")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--reward", default="chrf")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--cudnn_attention", action="store_true", help="turn it on again, on a GPU")
    given = parser.parse_args()

    task = make_task(0, labelled=0, prompts=given.prompts, dev=0, test=0, raw=2000)
    codec = Codec.train_bpe(task.raw, vocab_size=800, sentinels=32)
    policy = Policy.new(given.arch, given.size, codec, max_length=256, device=given.device, dtype=given.dtype)
    policy.model.eval()
    torch.backends.cuda.enable_cudnn_sdp(given.cudnn_attention)
    encoder = policy.has_encoder
    prompts = load_fitting_prompts(task.prompts, policy)
    sampler = Sampler(policy, max_rows=given.prompts * given.group_size)
    runner = RewardRunner(reward_by_name(given.reward))
    learner = Learner(policy, lr=0.0)

    def loss_of(policy: Policy, batch: Batch) -> Any:
        logprobs = policy.logprobs(batch).logprobs
        return objectives.reinforce(logprobs, logprobs.detach().new_ones(logprobs.shape)), {}

    seeds = itertools.count()  # new texts, and so new lengths, every time

    def sample() -> Any:
        return sampler.sample(prompts, Sampling(max_tokens=given.max_tokens, seed=next(seeds)), given.group_size)

    seconds, groups = timed(given.repeat, sample)
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups) for completion in group]
    tokens = sum(len(completion.tokens) for _, completion in pairs)
    print(json.dumps({"part": "sample", "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}))

    seconds, trajectories = timed(given.repeat, lambda: runner.run(pairs))
    runner.close()
    rate = len(pairs) / seconds
    print(json.dumps({"part": "reward", "name": given.reward, "seconds": seconds, "completions_per_second": rate}))

    batch = policy.batch_of(trajectories)
    seconds, _ = timed(given.repeat, lambda: learner.step([batch], loss_of))
    print(json.dumps({"part": "update", "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}))
    if policy.device.type == "cuda":
        learner._repeatable = False
        free, _ = timed(given.repeat, lambda: learner.step([batch], loss_of))
        learner._repeatable = True
        print(json.dumps({"part": "update in any order", "seconds": free, "of_one_order": seconds / free}))
    if not encoder:
        # side by side: each prompt once for its group, and once for every completion
        repeated = dataclasses.replace(batch, prompt_ids=None)
        ratios = []
        for _ in range(given.repeat):
            shared_seconds, _ = timed(1, lambda: learner.step([batch], loss_of))
            repeated_seconds, _ = timed(1, lambda: learner.step([repeated], loss_of))
            ratios.append(repeated_seconds / shared_seconds)
        print(
            json.dumps(
                {"part": "shared_prompt", "speedup": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
            )
        )

    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    gpu = {"gpu_peak_mib": torch.cuda.max_memory_allocated() / (1 << 20)} if torch.cuda.is_initialized() else {}
    print(json.dumps({"part": "memory", "peak_mib": peak} | gpu))


if __name__ == "__main__":
    main()
