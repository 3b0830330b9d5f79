"""operant beside TRL on the same work: seconds a step, tokens a second, memory, start-up, reward against wall time.

python -m benchmarks.trl                a table
python -m benchmarks.trl --json         the last line holds only the ratios, above 1 where operant is better
python -m benchmarks.trl --write        the table goes into docs/results
python -m benchmarks.trl --fresh        measures again what runs/bench already holds
python -m benchmarks.trl --device cuda --size base --dtype bf16        on a GPU, 88 M parameters
python -m benchmarks.trl --pretrained models/smollm2-135m-instruct --lora_rank 8     on a real chat model

Both train the same GPT-2-shaped model of 4.3 M parameters in float32, from the same folder, on the same prompts, 4 a
step with 8 completions each, with the same learning rate and reward; each run is its own process, the two alternate.
`fixed`: EOS is never drawn, so that all completions have 64 tokens. `natural`: EOS is biased once so that their mean
length is a quarter of the 64 that are allowed. `chat`, of a pretrained model: both ask by messages, through its chat
template.

TRL runs with what its guides on speed and memory advise and this machine can use: no gradient checkpointing (its
default is on), beta 0 and therefore no reference model, one batch for generation and update, the fused AdamW, no
logging, no checkpoints; on a GPU without vLLM and the hub's kernels. `--trl_option name=value` tries others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.cells import PAGES, ROOT, Records, machine, markdown, spread, write_section

CELLS = ROOT / "runs" / "bench"
RECORDS = Records(CELLS)
SYSTEMS = ("operant", "trl")
ALGORITHMS = ("grpo", "rloo")
SETTINGS = ("fixed", "natural")
CHAT = "chat"  # the setting of a pretrained model
PROMPTS, GROUP, MAX_TOKENS, VOCABULARY = 4, 8, 64, 4096
SHAPES = {  # of GPT-2; `tiny` has 4.3 M parameters with this vocabulary, `base` 88 M
    "tiny": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_inner": 1024},
    "base": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072},
}
WARMUP = 2  # steps that are not measured: allocators and caches fill
SWEEP = (3e-4, 1e-3, 3e-3)
MOMENTS = (1 / 3, 2 / 3, 1.0)  # of the learning time, where the reward is read
INSTALL = "TRL is not installed; install it with: pip install -c constraints.txt -e '.[bench]' (or make bench)"


# --- the work: one tokenizer, prompts, two models ------------------------------------------------------------------


def words(count: int) -> list[str]:
    """Pseudo-words of two to four syllables, the same ones always."""
    dice = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    return ["".join(dice.choices(syllables, k=dice.randint(2, 4))) for _ in range(count)]


def texts(count: int, length: int, seed: int) -> list[str]:
    dice, stock = random.Random(seed), words(3000)
    return [" ".join(dice.choices(stock, k=length)) for _ in range(count)]


def prompt_rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    """256 prompts: a few words, or a chat's question with them."""
    if not given.pretrained:
        return [{"prompt": text} for text in texts(256, 5, seed=3)]
    asked = [f"Tell a short story about a place called {text}." for text in texts(256, 2, seed=3)]
    return [{"prompt": [{"role": "user", "content": text}]} for text in asked]


def reward(text: str) -> float:
    """The share of the letter a: cheap, so that neither system waits for it, and easily learned."""
    return text.count("a") / max(1, len(text))


def prepare(folder: Path, size: str) -> None:
    """Write the models `fixed` and `natural` with their tokenizer, once."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from operant import Codec

    codec = Codec.train_bpe(texts(4000, 12, seed=1), vocab_size=VOCABULARY)
    torch.manual_seed(0)
    shape = SHAPES[size] | {"n_positions": 256}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"pad_token_id": codec.pad_id, "bos_token_id": codec.bos_id, "eos_token_id": codec.eos_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=codec.vocab_size, **shape, **still, **ids)).eval()
    direction = model.transformer.wte.weight[codec.eos_id].detach().clone()
    direction /= direction.square().sum()
    sample = torch.tensor([list(codec.encode(text)[:8]) for text in texts(16, 8, seed=2)])

    def chance(bias: float) -> float:
        with torch.no_grad():
            model.transformer.ln_f.bias.copy_(bias * direction)
            return float(model(sample).logits.softmax(-1)[..., codec.eos_id].mean())

    wanted, bias = 4 / MAX_TOKENS, 5.0
    for _ in range(8):
        now = chance(bias)
        bias += math.log(wanted / (1 - wanted)) - math.log(now / (1 - now))
    for setting, value in (("natural", bias), ("fixed", -12.0)):
        chance(value)
        staged = folder / f".{setting}"
        model.save_pretrained(staged)
        codec.save(staged)
        shutil.rmtree(folder / setting, ignore_errors=True)
        staged.rename(folder / setting)


# --- one run, in its own process ------------------------------------------------------------------------------------


class Watch:
    """What a run notes while it goes on: the end of each step, generation, memory, rewards."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.generated: list[tuple[float, int, float]] = []  # seconds, tokens, CPU seconds
        self.rewards: list[float] = []

    def generate(self, call: Callable[[], Any], lengths: Callable[[Any], list[int]]) -> Any:
        settle()
        begun, cpu = time.perf_counter(), time.process_time()
        answer = call()
        settle()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        self.generated.append((seconds, sum(lengths(answer)), cpu))
        return answer

    def step(self) -> None:
        settle()
        self.ends.append(time.time() - self.started)
        self.cpu.append(time.process_time())

    def facts(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][WARMUP - 1 :]
        kept = self.generated[WARMUP : len(self.ends)]
        return {
            "step": statistics.median(steps),
            "cpu": statistics.median(b - a for a, b in zip(self.cpu[WARMUP - 1 :], self.cpu[WARMUP:], strict=False)),
            "generate": sum(t for _, t, _ in kept) / sum(s for s, _, _ in kept),
            "generate_cpu": sum(t for _, t, _ in kept) / sum(c for _, _, c in kept),
            "length": statistics.mean(t for _, t, _ in kept) / (PROMPTS * GROUP),
            "memory": peak_mib(),
            "first_update": self.ends[0],
            "ends": self.ends,
            "rewards": self.rewards,
        }


def settle() -> None:
    """Wait for what a GPU still has to do."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """Peak memory: what was allocated on the GPU where one is used, else what was resident of this process.
    ru_maxrss would count its parent's before exec."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / (1 << 20)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def run_operant(given: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    import operant

    policy = operant.Policy.load(given.model, device=given.device, dtype=given.dtype)
    if given.lora_rank:
        policy.add_lora(given.lora_rank)
    prompts = operant.load_prompts(prompt_rows(given), policy.codec, **({} if given.pretrained else {"separator": ""}))
    sample = operant.Sampler.sample

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watch.generate(
            lambda: sample(self, *args, **kwargs), lambda groups: [len(c.tokens) for group in groups for c in group]
        )

    operant.Sampler.sample = timed  # type: ignore[method-assign]
    facts: dict[str, Any] = {}

    def after(step: int, metrics: dict[str, float]) -> bool:
        watch.step()
        watch.rewards.append(metrics["train/reward_mean"])
        over = step >= given.steps or (given.seconds > 0 and watch.ends[-1] - watch.ends[0] > given.seconds)
        if over:
            facts.update(watch.facts())
        return over

    operant.train(
        policy, prompts, lambda prompt, completion: reward(completion.text),
        algorithm=given.algorithm, group_size=GROUP, prompts_per_step=PROMPTS, max_tokens=MAX_TOKENS, lr=given.lr,
        warmup_steps=0, steps=given.steps, save_every=10**9, tensorboard=False, quiet=True, overwrite=True,
        reward_workers=0, out=str(CELLS / f"work-{os.getpid()}"), callbacks=[after],
    )  # fmt: skip
    shutil.rmtree(CELLS / f"work-{os.getpid()}", ignore_errors=True)
    return facts


def run_trl(given: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if given.algorithm == "grpo":
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

        own: dict[str, Any] = {"loss_type": "grpo"}
    else:
        from trl import RLOOConfig as Config
        from trl import RLOOTrainer as Trainer

        own = {}
    own |= {name: json.loads(value) for name, _, value in (o.partition("=") for o in given.trl_option)}
    facts: dict[str, Any] = {}

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.step()
            if state.global_step >= given.steps or (
                given.seconds > 0 and watch.ends[-1] - watch.ends[0] > given.seconds
            ):
                facts.update(watch.facts())
                control.should_training_stop = True

    def judge(completions: list[Any], **kwargs: Any) -> list[float]:
        values = [reward(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
        watch.rewards.append(statistics.mean(values))
        return values

    out = CELLS / f"work-{os.getpid()}"
    config = Config(
        **{
            "output_dir": str(out), "per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP,
            "max_completion_length": MAX_TOKENS, "learning_rate": given.lr, "max_steps": given.steps,
            "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0,
            "max_grad_norm": 1.0, "beta": 0.0, "bf16": given.dtype == "bf16", "gradient_checkpointing": False,
            "use_cpu": given.device == "cpu",
            "optim": "adamw_torch_fused", "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
            "disable_tqdm": True, "dataloader_pin_memory": False, **own,
        }
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    adapter = None
    if given.lora_rank:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=given.lora_rank, lora_alpha=2 * given.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype="float32"), reward_funcs=judge, args=config,
        train_dataset=Dataset.from_list(prompt_rows(given)), processing_class=tokenizer, callbacks=[Ends()],
        peft_config=adapter,
    )  # fmt: skip
    generate = trainer._generate_single_turn

    def timed(*args: Any, **kwargs: Any) -> Any:
        return watch.generate(
            lambda: generate(*args, **kwargs),
            # GRPO's also returns log-probs
            lambda answer: [len(ids) for ids in (answer[0] if isinstance(answer, tuple) else answer)],
        )

    trainer._generate_single_turn = timed
    trainer.train()
    shutil.rmtree(out, ignore_errors=True)
    return facts


# --- cells: one small file for each finished run ---------------------------------------------------------------------


def model_folder(given: argparse.Namespace, setting: str) -> Path:
    if given.pretrained:
        return Path(given.pretrained).resolve()
    return CELLS / ("models" if given.size == "tiny" else f"models-{given.size}") / setting


def settings_of(given: argparse.Namespace) -> tuple[str, ...]:
    return (CHAT,) if given.pretrained else SETTINGS


def cell(given: argparse.Namespace, system: str, algorithm: str, setting: str, **what: Any) -> dict[str, Any]:
    """The facts of one run: from runs/bench, or measured now in a process of its own."""
    order = {"system": system, "algorithm": algorithm, "setting": setting, "threads": given.threads} | what
    if given.device != "cpu":
        order |= {"device": given.device}
    if (given.size, given.dtype) != ("tiny", "float32"):
        order |= {"size": given.size, "dtype": given.dtype}
    if given.pretrained:
        order |= {"pretrained": Path(given.pretrained).name, "lora_rank": given.lora_rank}
    if system == "trl" and given.trl_option:
        order["options"] = given.trl_option
    name = "-".join(re.sub(r"\W+", "_", f"{value}") for value in order.values())
    if RECORDS.has(name) and not given.fresh:
        return RECORDS.get(name)
    command = [
        sys.executable, "-m", "benchmarks.trl", "--child", system, "--algorithm", algorithm,
        "--model", str(model_folder(given, setting)), "--threads", str(given.threads),
        "--device", given.device, "--size", given.size, "--dtype", given.dtype,
        "--pretrained", given.pretrained, "--lora_rank", str(given.lora_rank),
        "--lr", str(what.get("lr", 1e-6)), "--steps", str(what["steps"]), "--seconds", str(what.get("seconds", 0.0)),
        *(argument for option in given.trl_option for argument in ("--trl_option", option)),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--started", repr(time.time())],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nthe run {name} ended with status {done.returncode}: {' '.join(command)}")
    facts = dict(json.loads(done.stdout.splitlines()[-1]))
    RECORDS.put(name, facts)
    print(f"{name}: {facts['step']:.3f} s a step, {facts['generate']:.0f} tokens/s", file=sys.stderr)
    return facts


def measure(given: argparse.Namespace) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for repeat in range(given.repeat):
        for algorithm in given.algorithms:
            for setting in settings_of(given):
                for system in SYSTEMS if repeat % 2 == 0 else SYSTEMS[::-1]:
                    facts = cell(given, system, algorithm, setting, steps=given.steps, repeat=repeat)
                    found.setdefault((system, algorithm, setting), []).append(facts)
    return found


# figure: (heading, True where more is better, digits)
FIGURES = {
    "step": ("seconds a step", False, 3),
    "cpu": ("CPU seconds a step", False, 3),
    "generate": ("tokens/s generated", True, 0),
    "generate_cpu": ("tokens per CPU second generated", True, 0),
    "memory": ("peak MiB", False, 0),
    "first_update": ("seconds to the first update", False, 2),
}


def paired(
    found: dict[tuple[str, str, str], list[dict[str, Any]]], algorithm: str, setting: str, figure: str
) -> list[float]:
    """operant against TRL in each pair of alternating runs; above 1 operant is better."""
    pairs = zip(found["operant", algorithm, setting], found["trl", algorithm, setting], strict=True)
    better_if_more = FIGURES[figure][1]
    return [(a[figure] / b[figure]) if better_if_more else (b[figure] / a[figure]) for a, b in pairs]


def ratios(found: dict[tuple[str, str, str], list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the pairs; of several algorithms (and settings, where the name has none) the worst counts."""
    algorithms = sorted({algorithm for _, algorithm, _ in found})

    def worst(figure: str, settings: tuple[str, ...]) -> float:
        return round(min(statistics.median(paired(found, a, s, figure)) for a in algorithms for s in settings), 3)

    if any(setting == CHAT for _, _, setting in found):
        return {figure: worst(figure, (CHAT,)) for figure in ("step", "generate", "memory", "first_update")}
    return {
        "step_fixed": worst("step", ("fixed",)),
        "step_natural": worst("step", ("natural",)),
        "generate_natural": worst("generate", ("natural",)),
        "memory": worst("memory", SETTINGS),
        "first_update": worst("first_update", SETTINGS),
    }


def table(found: dict[tuple[str, str, str], list[dict[str, Any]]]) -> str:
    rows = []
    for system, algorithm, setting in found:
        if system == "trl":
            continue
        for figure, (heading, _, digits) in FIGURES.items():
            ours, theirs = (spread([f[figure] for f in found[s, algorithm, setting]], digits) for s in SYSTEMS)
            ratio = spread(paired(found, algorithm, setting, figure), 2)
            rows.append([f"{algorithm.upper()}, {setting}: {heading}", ours, theirs, ratio])
    return markdown(["", "operant", "TRL", "ratio, above 1: operant is better"], rows)


def learning(given: argparse.Namespace) -> str:
    """Reward against wall time, each system at the best learning rate of the same sweep."""
    times = [round(given.learn_seconds * share) for share in MOMENTS]
    table_rows = []
    for system in SYSTEMS:
        rows = []
        for lr in SWEEP:
            facts = cell(given, system, "grpo", "natural", steps=10**6, lr=lr, seconds=given.learn_seconds)
            since = [end - facts["ends"][0] for end in facts["ends"]]
            seen = []
            for t in times:
                near = [r for r, s in zip(facts["rewards"], since, strict=False) if t - 0.1 * times[-1] <= s <= t]
                seen.append(statistics.mean(near) if near else math.nan)
            rows.append((seen[-1], lr, seen, len(since)))
        _, lr, seen, steps = max(rows)
        table_rows.append([system, f"{lr:g}", *(f"{r:.3f}" for r in seen), f"{steps}"])
    return markdown(["reward, seconds after the first update", "rate", *(f"{t} s" for t in times), "steps"], table_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the ratios, as the last line")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already in runs/bench")
    parser.add_argument(
        "--repeat", type=int, default=3, help="pairs of alternating runs; 0 for the runs that learn alone"
    )
    parser.add_argument("--steps", type=int, default=14, help="steps of a run, of which the first two are not measured")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="tiny", choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--pretrained", default="", help="the folder of a chat model to measure on")
    parser.add_argument("--lora_rank", type=int, default=0, help="of an adapter on it; 0 trains all weights")
    parser.add_argument(
        "--learn_seconds", type=float, default=60.0, help="length of the runs that learn; 0 leaves them out"
    )
    parser.add_argument("--trl_option", action="append", default=[], help="name=JSON, added to TRL's configuration")
    for hidden in ("--child", "--model", "--algorithm"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--lr", "--seconds", "--started"):
        parser.add_argument(hidden, type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()

    if given.child:
        if given.threads:
            import torch

            torch.set_num_threads(given.threads)
        run = run_operant if given.child == "operant" else run_trl
        print(json.dumps(run(given, Watch(given.started))))
        return
    if find_spec("trl") is None:
        sys.exit(INSTALL)
    CELLS.mkdir(parents=True, exist_ok=True)
    folder = model_folder(given, SETTINGS[0]).parent
    if not given.pretrained and not all((folder / setting / "config.json").exists() for setting in SETTINGS):
        # in a process of its own: what this one has in memory must not count for its children
        subprocess.run(
            [sys.executable, "-c", f"from benchmarks.trl import *; prepare(Path({str(folder)!r}), {given.size!r})"],
            check=True, cwd=ROOT,
        )  # fmt: skip
    if given.repeat:
        side_by_side(given)
    if given.learn_seconds and not given.json and not given.pretrained:
        rates = ", ".join(f"{lr:g}" for lr in SWEEP)
        text = "\n".join([
            f"`python -m benchmarks.trl --repeat 0 --threads {given.threads}`: GRPO, natural lengths, best of the "
            f"learning rates {rates} for each. {machine()}.", "", learning(given),
        ])  # fmt: skip
        print(text)
        if given.write:
            write_section("trl learning", text)


def side_by_side(given: argparse.Namespace) -> None:
    """The two in turn, as a table or as the ratios alone."""
    found = measure(given)
    if given.json:
        print(json.dumps(ratios(found)))
        return
    place = "" if given.device == "cpu" else f" --device {given.device} --size {given.size} --dtype {given.dtype}"
    if given.pretrained:
        place += (
            f" --pretrained {given.pretrained} --lora_rank {given.lora_rank} --algorithms {' '.join(given.algorithms)}"
        )
    first = given.algorithms[0]
    lengths = {s: statistics.mean(f["length"] for f in found["operant", first, s]) for s in settings_of(given)}
    lines = [
        f"`python -m benchmarks.trl --repeat {given.repeat} --steps {given.steps} --threads {given.threads}{place}`: "
        f"median [lowest, highest] of {given.repeat} pairs of runs. {machine()}. Mean length "
        + ", ".join(f"{name} {length:.1f}" for name, length in lengths.items())
        + " tokens.",
        "",
        table(found),
        "",
        f"`--json`: `{json.dumps(ratios(found))}`",
    ]
    text = "\n".join(lines)
    print(text)
    if given.write:
        section = "trl" if given.device == "cpu" else f"trl {given.device}"
        if given.pretrained:
            section += " pretrained lora" if given.lora_rank else " pretrained"
        write_section(section, text, ROOT / "docs" if given.pretrained else PAGES)


if __name__ == "__main__":
    main()
