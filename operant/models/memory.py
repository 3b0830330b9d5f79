"""What fits into memory: what is free, what a model's weights and a token of a batch need, and how a layer is computed
anew in the backward pass instead of being kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from operant.models.folder import ADAPTER, count_weights
from operant.models.gguf import count_gguf
from operant.types import OperantError

# Bytes that the activations of a micro-batch may take: of what is free, and on a CPU at most, so that a model of 0.1
# billion weights learns in 3 GB.
SHARE = 0.4
ENOUGH_ON_CPU = 2**30


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where nobody says.

    On a CPU the least of what the machine has to give and what this process's control group may take.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_group()]
    return min((bytes for bytes in found if bytes is not None), default=None)


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _left_in_group() -> int | None:
    """What a container may still take (control groups, version 2 and 1). Its cached files do not count: they go."""
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            cached = 0
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                cached += int(value) if name == "inactive_file" else 0
            return int((folder / limit).read_text()) - int((folder / used).read_text()) + cached
    return None


# --- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """A way to hold a model: the flags that choose it, and the bytes that it takes for each weight, at least."""

    flags: str
    bytes_per_weight: int


def expect_room(source: str | Path, ways: Sequence[Way], device: torch.device) -> None:
    """Refuse a model, before it is loaded, whose weights alone do not fit into the memory that is free.

    ways: the one that is asked for, then others that take less. Only copies of weights are counted, not activations,
    caches or libraries: what is refused here cannot fit, and what is not may still run out. A model of whose size
    nothing is known passes, such as one that is still to come from the hub.
    Raises OperantError with what would fit: the first of the other ways that does, or a smaller model.
    """
    weights, free = weights_in(source), free_memory(device)
    if weights is None or free is None or weights * ways[0].bytes_per_weight <= free:
        return
    fitting = next((way for way in ways if weights * way.bytes_per_weight <= free), None)
    if fitting is not None:
        instead = f"{fitting.flags} takes {_size(weights * fitting.bytes_per_weight)}"
    else:
        least = min(ways, key=lambda way: way.bytes_per_weight)
        how = "" if least is ways[0] else f" with {least.flags}"
        instead = f"a model of {_count(free / least.bytes_per_weight)} weights would fit{how}"
    raise OperantError(
        f"{source} has {_count(weights)} weights, which take {_size(weights * ways[0].bytes_per_weight)} at least, and "
        f"{_size(free)} of memory are free; {instead}"
    )


def expect_room_to_learn(source: str | Path, rank: int, dtype: str, device: torch.device) -> None:
    """`expect_room` for a stage that trains an adapter of this rank, or all weights with Adam where it is 0.

    Of all weights there are their gradients and two moments too; of an adapter's base there is nothing else.
    """
    if not rank and not os.path.exists(os.path.join(source, ADAPTER)):  # unlike Path's, false for an impossible name
        ways = [Way("", 16), Way("--lora_rank 8", 4), Way("--lora_rank 8 --dtype bf16-true", 2)]
    elif dtype != "bf16-true":
        ways = [Way("", 4), Way("--dtype bf16-true", 2)]
    else:
        ways = [Way("", 2)]
    expect_room(source, ways, device)


def weights_in(source: str | Path) -> int | None:
    """How many weights a model has, by the headers of its files: `count_weights`, or of a GGUF file."""
    return count_gguf(Path(source)) if os.path.isfile(source) else count_weights(source)


def _count(weights: float) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.3g} million"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"


# --- batches ---------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in RAM or on a GPU."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))
    )


def bytes_kept(compute: Callable[[], Any], weights: Iterator[nn.Parameter]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `compute`, the weights left out."""
    own = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = compute()
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    del graph
    return total


@contextlib.contextmanager
def computed_again(model: Any, inside: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, a layer keeps nothing but its input for the backward pass, which computes the layer again (Chen et al.
    2016), in the context that `inside` makes.

    Transformers' own way needs a model in training mode, with its dropout, and knows of no such context.
    Raises OperantError for a model whose layers are not known.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise OperantError(
            f"the layers of a {model.config.model_type} cannot be computed again; leave --activation_checkpointing out"
        )
    for layer in layers:
        layer.forward = _again(layer.forward, inside)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _again(forward: Any, inside: Callable[[], contextlib.AbstractContextManager[Any]]) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        contexts = lambda: (contextlib.nullcontext(), inside())  # noqa: E731
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return run
