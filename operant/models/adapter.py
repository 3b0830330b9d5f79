"""Low-rank adapters (Hu et al. 2021) by PEFT: put on a model, saved without its base, loaded and put back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from operant.config import LoraConfig, ModelConfig
from operant.models.folder import ADAPTER, INNER, Base, call_base, copy_linked, expect_base, holds, name_base
from operant.models.stem import blocks_of
from operant.types import OperantError

__all__ = [
    "Adaptable", "adapt", "add_adapter", "base_weights", "freeze_adapter", "is_fresh", "load_adapter",
    "rank_of", "restore_adapter", "save_adapter", "turn_away",
]  # fmt: skip

WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # of the adapter that learns, PEFT's own
REFERENCE = "reference"  # of a frozen copy of it
SEEN = 1024  # tokens by which it is known what layers read
# of each model: where what learns lies in memory, and `adapter_weights`
_WEIGHTS: weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], dict[str, Tensor]]] = weakref.WeakKeyDictionary()
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # what PEFT puts into the names of a base's weights


def add_adapter(
    model: Any,
    rank: int,
    *,
    alpha: float = 0.0,
    targets: Sequence[str] = (),
    layers: int = 0,
    dropout: float = 0.0,
    seed: int = 0,
    task: str | None = None,
) -> Any:
    """The model with a new adapter, W + (alpha / rank) · B A with B = 0, whose weights alone are trained.

    alpha: 0 is twice the rank. targets: of the layers' names, each a last part such as "q_proj"; none is every linear
    layer but the head. task: PEFT's name of it.

    Raises OperantError when no layer has one of these names.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = alpha or 2 * rank
        config = LoraConfig(
            r=rank, lora_alpha=int(scale) if float(scale).is_integer() else scale, lora_dropout=dropout,
            target_modules=_upper(model, layers, targets) if layers else list(targets) or "all-linear", task_type=task,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )  # fmt: skip
        try:
            with quiet_peft():
                return get_peft_model(model, config)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            linear = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")}
            raise OperantError(
                f"no layer is named {', '.join(targets)}; --lora_targets takes some of {', '.join(sorted(linear))}"
            ) from error


def _upper(model: Any, layers: int, targets: Sequence[str]) -> list[str]:
    """The linear layers of the last blocks, as the model names them. Raises OperantError where there are no blocks."""
    blocks = blocks_of(model)
    if blocks is None:
        raise OperantError(f"a {model.config.model_type} is no single row of blocks; leave --lora_layers out")
    inside = {id(module) for block in blocks[-layers:] for module in block.modules()}
    return [
        name for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
        and (not targets or name.rpartition(".")[2] in targets)
    ] or list(targets)  # fmt: skip


@torch.no_grad()
def turn_away(model: Any, read: Callable[[], object], directions: int, *, seed: int = 0) -> None:
    """Turn a new adapter away from what the texts that `read` passes through the model have in common.

    With X float[N, inputs] what a layer reads of N tokens, and U its first right singular vectors, so many as
    `directions` or half of the inputs: A ← A (I − U Uᵀ), scaled back to its norm. A step on one text changes another by
    what A makes alike of both. Most of what a layer reads is alike in every text, and that no longer counts (GPM, Saha
    et al. 2021; InfLoRA, Liang and Li 2024).
    """
    layers = [module for module in model.modules() if NAME in getattr(module, "lora_A", {})]
    inputs: list[Tensor] = []  # layers that read the same have it in common
    read_by: dict[int, list[int]] = {id(layer): [] for layer in layers}
    last: list[Tensor] = []

    def note(layer: Any, arguments: tuple[Any, ...]) -> None:
        if not last or last[0] is not arguments[0]:
            last[:] = [arguments[0]]
            states = arguments[0].reshape(-1, arguments[0].shape[-1])
            inputs.append(states[:: max(1, len(states) // SEEN)].float().cpu())
        read_by[id(layer)].append(len(inputs) - 1)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    common: dict[tuple[int, ...], Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            which, weight = tuple(read_by[id(layer)]), layer.lora_A[NAME].weight
            if which not in common:
                states = torch.cat([inputs[i] for i in which])
                count = min(directions, states.shape[1] // 2, len(states))
                common[which] = torch.svd_lowrank(states, q=min(count + 8, *states.shape), niter=4)[2][:, :count]
            shared = common[which].to(weight)  # decomposed on the processor, which every machine has
            turned = weight - (weight @ shared) @ shared.T
            weight.copy_(turned * (weight.norm() / turned.norm()))


def adapt(model: Adaptable, config: LoraConfig, seed: int) -> None:
    """Put the adapter on a model that a stage's settings ask for, if they do.

    Raises OperantError for settings of an adapter without a rank, and as `add_adapter` does.
    """
    dropout = config.lora_dropout if isinstance(config, ModelConfig) else 0.0
    if config.lora_rank:
        model.add_lora(
            config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets, dropout=dropout, seed=seed
        )
    elif config.lora_alpha or config.lora_targets or dropout:
        raise OperantError(
            "--lora_alpha, --lora_targets and --lora_dropout are of an adapter, and there is none: give --lora_rank too"
        )


class Adaptable(Protocol):
    """What an adapter can be put on."""

    def add_lora(
        self, rank: int, *, alpha: float = 0.0, targets: Sequence[str] = (), dropout: float = 0.0, seed: int = 0
    ) -> None: ...


def rank_of(folder: Path) -> int:
    """The rank of the adapter that a model's folder holds, 0 where it holds whole weights."""
    file = folder / ADAPTER
    return int(json.loads(file.read_text(encoding="utf-8"))["r"]) if os.path.exists(file) else 0


def is_fresh(model: Any) -> bool:
    """Whether the adapter that learns adds nothing yet, so that the model with it off is the same."""
    parts = [p for name, p in model.named_parameters() if f".lora_B.{NAME}." in name or "lora_embedding_B" in name]
    changed = any("modules_to_save" in name or "trainable_tokens" in name for name, _ in model.named_parameters())
    return bool(parts) and not changed and all(not bool(part.any()) for part in parts)


def freeze_adapter(model: Any) -> str | None:
    """Keep the model as it is now, to be computed with later, without a copy of its base.

    Returns the name of a second, frozen adapter; None where the adapter adds nothing yet, and the model with it off is
    what is to be kept.
    """
    from peft import set_peft_model_state_dict

    if is_fresh(model):
        return None
    if REFERENCE not in model.peft_config:
        settings = copy.deepcopy(model.peft_config[NAME])
        if isinstance(getattr(settings, "init_lora_weights", None), str):
            settings.init_lora_weights = True  # PiSSA would change the base a second time
        with quiet_peft():
            model.add_adapter(REFERENCE, settings)
    weights = {name: tensor.clone() for name, tensor in adapter_weights(model).items()}
    set_peft_model_state_dict(model, weights, adapter_name=REFERENCE)
    model.set_adapter(NAME)
    return REFERENCE


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the adapter that learns, by the names that PEFT saves them under; not copies of them.

    A is float[rank, inputs], B is float[outputs, rank].
    """
    from peft import get_peft_model_state_dict

    places = tuple(p.data_ptr() for p in model.parameters() if p.requires_grad)
    known = _WEIGHTS.get(model)
    if known is None or known[0] != places:  # PEFT takes a tenth of a second to tell, for every save and restore
        known = places, get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
        _WEIGHTS[model] = known
    return dict(known[1])


def base_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the model that an adapter is on, as they are now, by the names that they have without it.

    Each is float[…] in the model's own shape.
    """
    found = {}
    for name, tensor in model.get_base_model().state_dict().items():
        parts = name.split(".")
        if not model.peft_config.keys() & set(parts):
            found[".".join(part for part in parts if part not in _WRAPPERS)] = tensor
    return found


def save_adapter(
    model: Any,
    folder: Path,
    base: Base | None,
    save_base: Callable[[Path, dict[str, Tensor]], None],
    needed: str = "",
) -> Base:
    """Write the adapter alone and the name of its base; a base that lies nowhere else goes into the folder too.

    base: what the model is thought to be on; it is compared once, in the weights whose names begin with `needed`, which
    may be left out of the names there. save_base: writes a folder with the weights given, float[…] by name.
    Returns what was named.
    """
    if base is not None and not base.sure:
        frozen = {name: tensor for name, tensor in _frozen(model).items() if name.startswith(needed)}
        base = dataclasses.replace(base, sure=True) if holds(base.place, frozen, needed) else None
    if base is None or (base.inner and not base.place.is_dir()):
        save_base(folder / INNER, {name: t.detach().cpu().contiguous() for name, t in base_weights(model).items()})
        base = Base(folder / INNER, inner=True, sure=True)
    elif base.inner:
        copy_linked(base.place, folder / INNER)
        base = dataclasses.replace(base, place=folder / INNER)
    settings = copy.copy(model.peft_config[NAME])
    settings.inference_mode = True
    if isinstance(settings.target_modules, set):
        settings.target_modules = sorted(settings.target_modules)  # a set is in another order in every process
    if isinstance(getattr(settings, "init_lora_weights", None), str):
        settings.init_lora_weights = True  # PiSSA and others have changed the base, and would do so again on loading
    settings.save_pretrained(str(folder))
    call_base(folder, *name_base(base, folder))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in adapter_weights(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return base


def _frozen(model: Any) -> dict[str, Tensor]:
    """The base's weights without those that are trained with the adapter (biases), which are saved with it."""
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    return {name: t for name, t in base_weights(model).items() if t.data_ptr() not in trained}


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder on it, whose weights are to be trained.

    Raises OperantError when weights of the adapter are not in the folder.
    """
    from peft import PeftModel

    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    if (folder / WEIGHTS).exists():
        _expect_adapter(loaded, load_file(folder / WEIGHTS), folder)
    return loaded


def restore_adapter(model: Any, folder: Path, base: Base | None) -> None:
    """Put the adapter that was saved in `folder` into the model, in place.

    base: what the model is on, where that is known. Raises OperantError when the folder's is another, and as
    `load_adapter` does.
    """
    if base is not None:
        expect_base(folder, base)
    saved = load_file(folder / WEIGHTS)
    _expect_adapter(model, saved, folder)
    with torch.no_grad():
        for name, weights in adapter_weights(model).items():
            weights.copy_(saved[name])


def _expect_adapter(model: Any, saved: dict[str, Tensor], folder: Path) -> None:
    wanted = adapter_weights(model)
    if missing := sorted(wanted.keys() - saved.keys()):
        other = sorted(saved.keys() - wanted.keys())
        instead = f" (it has {other[0]}, which the model has no place for)" if other else ""
        raise OperantError(
            f"{folder / WEIGHTS} lacks {len(missing)} of the adapter's weights, such as {missing[0]}{instead}; "
            "copy the folder again, whole"
        )
    other = [name for name, weights in wanted.items() if weights.shape != saved[name].shape]
    if other:
        raise OperantError(
            f"{folder / WEIGHTS} is of another rank or model: {other[0]} is {list(saved[other[0]].shape)} there and "
            f"{list(wanted[other[0]].shape)} here; give the adapter that this one began with"
        )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks Transformers for an attribute that the latter has renamed; nothing the user could mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
