"""Adapters on disk and in memory: alone, beside the name of their base, and back to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model
from program import pairs, write_rows
from safetensors.torch import load_file, save_file

import operant
from operant.cli import main
from operant.config import MergeConfig, PreferConfig, SftConfig, TrainConfig
from operant.data.batch import from_sequences
from operant.data.text import Codec
from operant.models.encoder import Encoder
from operant.models.folder import copy_linked, hash_weights, settle
from operant.models.policy import Policy
from operant.models.reward_model import RewardFacts, RewardModel
from operant.run.merge import merge
from operant.types import Batch, OperantError

PROMPTS, ANSWERS = [[40, 41, 42], [50, 51]], [[60, 61], [70, 71, 72]]


@pytest.fixture
def base(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    make_policy("llama").save(tmp_path / "models" / "base")
    return tmp_path / "models" / "base"


def batch_for(policy: Policy) -> Batch:
    ids = [torch.tensor(row).numpy() for row in PROMPTS], [torch.tensor(row).numpy() for row in ANSWERS]
    return from_sequences(*ids, encoder=policy.has_encoder, pad_id=policy.codec.pad_id)


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.logprobs(batch_for(policy)).logprobs


def shake(policy: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def adapted(base: Path, **options: Any) -> Policy:
    policy = Policy.load(base, device="cpu")
    policy.add_lora(rank=2, **options)
    shake(policy)
    return policy


def plain_peft(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()


# --- an adapter alone ------------------------------------------------------------------------------------------------


def test_an_adapter_is_saved_alone_and_loads_with_its_base_wherever_both_are_moved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted(base)
    expected = logprobs(policy)
    folder = tmp_path / "runs" / "adapter"
    policy.save(folder)
    assert not (folder / "base").exists() and not (folder / "model.safetensors").exists()
    facts = json.loads((folder / "base.json").read_text())
    assert facts == {"path": "../../models/base", "sha256": hash_weights(base)}
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    assert torch.equal(logprobs(Policy.load(folder, device="cpu")), expected)
    moved = tmp_path / "elsewhere" / "deeper"
    moved.mkdir(parents=True)
    (tmp_path / "runs").rename(moved / "runs")
    (tmp_path / "models").rename(moved / "models")
    again = Policy.load(moved / "runs" / "adapter", device="cpu")
    assert torch.equal(logprobs(again), expected)
    # plain PEFT reads the path from where it runs
    monkeypatch.chdir(moved / "runs" / "adapter")
    theirs = plain_peft(Path())
    row = torch.tensor([PROMPTS[0] + ANSWERS[0]])
    with torch.no_grad():
        assert torch.allclose(theirs(row).logits, again.model.eval()(row).logits, atol=1e-5)


def test_an_adapter_saved_again_still_names_the_base(base: Path, tmp_path: Path) -> None:
    """What a live learner does: load a version, learn, save the next."""
    adapted(base).save(tmp_path / "a" / "one")
    second = Policy.load(tmp_path / "a" / "one", device="cpu")
    shake(second, seed=1)
    second.save(tmp_path / "two")
    shutil.rmtree(tmp_path / "a")
    assert json.loads((tmp_path / "two" / "base.json").read_text())["path"] == "../models/base"
    assert torch.equal(logprobs(Policy.load(tmp_path / "two", device="cpu")), logprobs(second))


def test_a_hub_id_names_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    there = cache / "models--someone--tiny"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text(revision)
    shutil.copytree(base, there / "snapshots" / revision)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(cache))
    policy = Policy.load("someone/tiny", device="cpu")
    policy.add_lora(rank=2)
    shake(policy)
    policy.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == {"hub": "someone/tiny", "revision": revision}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/tiny", revision)
    Policy.load("someone/tiny", device="cpu").save(tmp_path / "first", by_name=True)
    (there / "refs" / "main").write_text("f" * 40)  # the hub has moved on; what was named has not
    assert not [*(tmp_path / "first").glob("*.safetensors")]
    unchanged = logprobs(Policy.load(base, device="cpu"))
    assert torch.equal(logprobs(Policy.load(tmp_path / "first", device="cpu")), unchanged)
    copy_linked(tmp_path / "first", tmp_path / "model")
    settle(tmp_path / "model", tmp_path / "first", tmp_path / "model")
    assert not (tmp_path / "model" / "base.json").exists()
    assert torch.equal(logprobs(Policy.load(tmp_path / "model", device="cpu")), unchanged)
    assert torch.equal(logprobs(Policy.load(tmp_path / "adapter", device="cpu")), logprobs(policy))
    shutil.rmtree(there)
    with pytest.raises(OperantError, match="someone/tiny"):
        Policy.load(tmp_path / "adapter", device="cpu")


def test_a_base_that_is_gone_or_another_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    policy = adapted(base)
    policy.save(tmp_path / "adapter")
    other = Policy.load(base, device="cpu")
    shake(other)
    hidden = tmp_path / "hidden"
    base.rename(hidden)
    with pytest.raises(OperantError, match=r"the base of .*adapter, \.\./models/base from there, is gone"):
        Policy.load(tmp_path / "adapter", device="cpu")
    other.save(base)
    with pytest.raises(OperantError, match=r"models/base is not the base that .*adapter stands on: .* sha256"):
        Policy.load(tmp_path / "adapter", device="cpu")
    other.add_lora(rank=2)
    other.save(tmp_path / "others")
    with pytest.raises(OperantError, match="another base"):
        other.restore(tmp_path / "adapter")
    shutil.rmtree(base)
    hidden.rename(tmp_path / "adapter" / "base")  # uploaded together, in one folder
    assert torch.equal(logprobs(Policy.load(tmp_path / "adapter", device="cpu")), logprobs(policy))


def test_a_base_that_lies_nowhere_comes_along_as_a_link(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    policy.add_lora(rank=2)
    shake(policy)
    policy.save(tmp_path / ".staging" / "model")
    (tmp_path / ".staging").rename(tmp_path / "first")
    policy.moved_to(tmp_path / "first" / "model")
    policy.save(tmp_path / "second" / "model")
    one, two = (tmp_path / n / "model" / "base" / "model.safetensors" for n in ("first", "second"))
    assert one.stat().st_ino == two.stat().st_ino
    shutil.rmtree(tmp_path / "first")
    expected = logprobs(policy)
    again = Policy.load(tmp_path / "second" / "model", device="cpu")
    assert torch.equal(logprobs(again), expected)
    policy.moved_to(tmp_path / "nowhere")  # and where it has gone it is written once more
    policy.save(tmp_path / "third")
    assert torch.equal(logprobs(Policy.load(tmp_path / "third", device="cpu")), expected)


def test_a_base_that_was_changed_in_memory_is_not_named(base: Path, tmp_path: Path) -> None:
    policy = Policy.load(base, device="cpu")
    shake(policy)
    policy.add_lora(rank=2)
    policy.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "base" / "model.safetensors").exists()
    assert torch.equal(logprobs(Policy.load(tmp_path / "adapter", device="cpu")), logprobs(policy))


def test_a_new_adapter_on_an_adapter_stands_on_the_sum(base: Path, tmp_path: Path) -> None:
    policy = adapted(base)
    policy.save(tmp_path / "first")
    before = logprobs(policy)
    policy.add_lora(rank=3)
    assert torch.allclose(logprobs(policy), before, atol=1e-5)
    shake(policy, seed=1)
    policy.save(tmp_path / "second")
    assert torch.equal(logprobs(Policy.load(tmp_path / "second", device="cpu")), logprobs(policy))


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"modules_to_save": ["lm_head"]},
        {"bias": "all"}, {"trainable_token_indices": [40, 60]}, {"use_dora": True},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)  # fmt: skip
def test_what_peft_changes_in_the_base_reloads_to_the_same_logits(
    changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    policy = Policy.load(base, device="cpu")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.model = get_peft_model(policy.model, config)
    shake(policy)
    expected = logprobs(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.save(tmp_path / "one")
        loaded = Policy.load(tmp_path / "one", device="cpu")
        assert torch.allclose(logprobs(loaded), expected, atol=1e-6)
        loaded.save(tmp_path / "two")
        assert torch.allclose(logprobs(Policy.load(tmp_path / "two", device="cpu")), expected, atol=1e-6)
        shake(loaded, seed=1)
        loaded.restore(tmp_path / "two")
        assert torch.allclose(logprobs(loaded), expected, atol=1e-6)
    assert (tmp_path / "one" / "base").exists() == ("init_lora_weights" in changes)


def test_a_folder_of_before_with_the_whole_base_in_it_loads(base: Path, tmp_path: Path) -> None:
    policy = adapted(base)
    expected = logprobs(policy)
    old = tmp_path / "old"
    policy.save(old)
    shutil.copytree(base, old / "base")
    (old / "base.json").unlink()
    settings = json.loads((old / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/gone/from/here/base"  # an absolute path of another machine
    (old / "adapter_config.json").write_text(json.dumps(settings))
    loaded = Policy.load(old, device="cpu")
    assert torch.equal(logprobs(loaded), expected)
    shake(policy, seed=1)
    policy.restore(old)
    assert torch.equal(logprobs(policy), expected)
    loaded.save(tmp_path / "next")  # the old folder may be pruned: the base goes along
    shutil.rmtree(old)
    assert torch.equal(logprobs(Policy.load(tmp_path / "next", device="cpu")), expected)


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_on_every_linear_layer_but_the_head_or_on_those_named(base: Path) -> None:
    def layers(**options: Any) -> set[str]:
        policy = Policy.load(base, device="cpu")
        policy.add_lora(rank=3, **options)
        return {name.split(".")[-4] for name, p in policy.model.named_parameters() if "lora_A" in name}

    assert layers() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers(targets=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    with pytest.raises(OperantError, match=r"no layer is named query; --lora_targets takes some of .*q_proj"):
        layers(targets=["query"])


def test_alpha_scales_what_is_added_and_dropout_acts_in_fine_tuning_alone(base: Path) -> None:
    def moved(**options: Any) -> Policy:
        policy = Policy.load(base, device="cpu")
        policy.add_lora(rank=2, **options)
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                if "lora_B" in name:
                    p.fill_(1e-3)
        return policy

    begin = logprobs(Policy.load(base, device="cpu"))
    usual, double = (logprobs(moved(alpha=alpha)) - begin for alpha in (0.0, 8.0))
    assert torch.allclose(usual, logprobs(moved(alpha=4.0)) - begin)  # twice the rank
    assert 1.9 < float((double / usual)[usual.abs() > 1e-4].median()) < 2.1
    policy = moved(dropout=0.5)
    policy.model.eval()
    assert torch.equal(logprobs(policy), logprobs(policy)) and torch.equal(logprobs(policy) - begin, usual)
    policy.model.train()
    assert not torch.equal(logprobs(policy), logprobs(policy))


def test_the_stages_take_the_settings_and_keep_alpha_as_a_number(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    given = {"model": str(base), "data": str(data), "steps": 1, "device": "cpu", "tensorboard": False}
    out = str(tmp_path / "sft")
    lora: dict[str, Any] = {"lora_rank": 3, "lora_targets": ["q_proj"]}
    operant.sft(SftConfig(**given, **lora, lora_dropout=0.2, out=out, batch_size=2), quiet=True)
    kept = yaml.safe_load((tmp_path / "sft" / "config.yaml").read_text())
    assert (kept["lora_alpha"], kept["lora_targets"], kept["lora_dropout"]) == (6.0, ["q_proj"], 0.2)
    settings = json.loads((tmp_path / "sft" / "model" / "adapter_config.json").read_text())
    assert [settings[n] for n in ("r", "lora_alpha", "target_modules", "lora_dropout")] == [3, 6, ["q_proj"], 0.2]
    # the number and the default that it came from agree, and a configuration of before, which has neither, with both
    operant.sft(SftConfig(**(given | {"steps": 2}), **lora, lora_dropout=0.2, out=out, batch_size=2, resume=True),
                quiet=True)  # fmt: skip
    with pytest.raises(OperantError, match=r"--lora_targets .* give --lora_rank too"):
        operant.sft(SftConfig(**given, lora_targets=["q_proj"], out=str(tmp_path / "none")), quiet=True)
    assert not {"lora_dropout"} & {f.name for cls in (TrainConfig, PreferConfig) for f in dataclasses.fields(cls)}


# --- weights that are missing ----------------------------------------------------------------------------------------


def rename_weight(file: Path, old: str, new: str) -> None:
    weights = load_file(file)
    weights[new] = weights.pop(next(name for name in weights if old in name))
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_model_whose_weights_are_misnamed_is_refused_by_name(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    policy.save(tmp_path / "model")
    name = next(
        n
        for n in policy.model.state_dict()
        if n.endswith(("1.mlp.c_proj.weight", "1.mlp.down_proj.weight", "wo.weight"))
    )
    rename_weight(tmp_path / "model" / "model.safetensors", name, "somewhere.else")
    with pytest.raises(OperantError, match=r"lacks 1 of the model's weights, such as .* \(it has somewhere\.else"):
        Policy.load(tmp_path / "model", device="cpu")
    with pytest.raises(OperantError, match="lacks 1 of the model's weights"):
        policy.restore(tmp_path / "model")


def test_an_adapter_whose_weights_are_misnamed_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    policy = adapted(base)
    policy.save(tmp_path / "adapter")
    rename_weight(tmp_path / "adapter" / "adapter_model.safetensors", "0.self_attn.q_proj.lora_B", "somewhere.else")
    for load in (lambda: Policy.load(tmp_path / "adapter", device="cpu"), lambda: policy.restore(tmp_path / "adapter")):
        with pytest.raises(OperantError, match=r"lacks 1 of the adapter's weights, such as .*q_proj\.lora_B"):
            load()


def test_a_reader_may_lack_a_head_and_nothing_else(codec: Codec, tmp_path: Path) -> None:
    encoder = Encoder.new("bert", "tiny", codec, max_length=32, device="cpu")
    encoder.model.bert.save_pretrained(tmp_path)  # as sentence-transformers does
    codec.save(tmp_path)
    loaded = Encoder.load(tmp_path, device="cpu")
    tokens = torch.tensor([PROMPTS[0]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    encoder.model.eval(), loaded.model.eval()
    assert torch.equal(loaded.hidden(tokens, mask), encoder.hidden(tokens, mask))
    rename_weight(tmp_path / "model.safetensors", "layer.1.output.dense.weight", "somewhere.else")
    with pytest.raises(OperantError, match=r"lacks 1 of .*layer\.1\.output\.dense\.weight"):
        Encoder.load(tmp_path, device="cpu")


# --- who may read what is written ------------------------------------------------------------------------------------


def test_weights_may_be_read_by_whom_their_neighbours_may_be(
    base: Path, codec: Codec, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("gpt2")
    policy.add_critic()
    policy.add_target_network()
    policy.save(tmp_path / "whole")
    adapted(base).save(tmp_path / "adapter")
    lone = make_policy("gpt2")
    lone.add_lora(rank=2)
    lone.save(tmp_path / "inner")
    RewardModel(Encoder.new("bert", "tiny", codec, device="cpu"), RewardFacts("regression")).save(tmp_path / "reward")
    files = [f for name in ("whole", "adapter", "inner", "reward") for f in (tmp_path / name).rglob("*") if f.is_file()]
    assert sum(f.suffix == ".safetensors" for f in files) == 8
    (tmp_path / "fresh").touch()
    assert {f.stat().st_mode for f in files} == {(tmp_path / "fresh").stat().st_mode}


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_writes_a_plain_folder_in_the_precision_of_the_base(
    dtype: torch.dtype, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(base)
    policy = adapted(base)
    expected = logprobs(policy)
    policy.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "format.json").write_text("{}")  # what lies beside stays beside
    out = tmp_path / "deep" / "merged"
    main(["merge", "--model", str(tmp_path / "adapter"), "--out", str(out)])
    assert f"one model in {out}" in capsys.readouterr().out
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert not [f for f in out.iterdir() if "adapter" in f.name or f.name.startswith("base")]
    assert (out / "format.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == dtype and AutoTokenizer.from_pretrained(out).decode([40]) == policy.codec.decode([40])
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(logprobs(Policy.load(out, device="cpu")), expected, atol=close)


def test_merging_refuses_what_it_cannot_do(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(base).save(tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    given = {"model": str(tmp_path / "adapter"), "out": str(tmp_path / "merged")}
    with pytest.raises(OperantError, match="holds no adapter"):
        merge(MergeConfig(model=str(base), out=given["out"]))
    merge(MergeConfig(**given))
    with pytest.raises(OperantError, match="is there already; add --overwrite, or choose"):
        merge(MergeConfig(**given))
    for overwrite in (False, True):
        with pytest.raises(OperantError, match="is there already; choose another --out"):
            merge(MergeConfig(**(given | {"out": str(tmp_path / "mine")}), overwrite=overwrite))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("operant.run.merge.sync_tree", full)
        with pytest.raises(OperantError, match="the disk is full while writing"):
            merge(MergeConfig(**given, overwrite=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "merged", "mine", "models"]
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    merge(MergeConfig(**given, overwrite=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "merged", "mine", "models"]


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pissa", [False, True])
def test_the_reference_of_a_trained_adapter_is_a_second_one_and_no_copy_of_the_base(
    pissa: bool, base: Path, tmp_path: Path
) -> None:
    policy = adapted(base)
    if pissa:
        policy.model.peft_config["default"].init_lora_weights = "pissa"
    policy.save(tmp_path / "tuned")
    policy = Policy.load(tmp_path / "tuned", device="cpu")
    if pissa:
        policy.model.peft_config["default"].init_lora_weights = "pissa"
    begin = logprobs(policy)
    count = sum(p.numel() for p in policy.model.parameters())
    own = sum(p.numel() for p in policy.trainable_parameters())
    policy.freeze_reference()
    assert torch.equal(logprobs(policy), begin)
    assert sum(p.numel() for p in policy.model.parameters()) == count + own
    shake(policy, seed=1)
    assert float((logprobs(policy) - begin).abs().max()) > 1e-2
    with policy.as_reference():
        assert torch.equal(logprobs(policy), begin)
    policy.save(tmp_path / "next")  # the reference is not a part of what is saved
    assert {f.name for f in (tmp_path / "next").iterdir()} == {f.name for f in (tmp_path / "tuned").iterdir()}
    assert torch.equal(logprobs(Policy.load(tmp_path / "next", device="cpu")), logprobs(policy))


def test_the_reference_of_a_new_adapter_is_the_model_with_it_off(base: Path) -> None:
    policy = Policy.load(base, device="cpu")
    begin = logprobs(policy)
    policy.add_lora(rank=2)
    count = sum(p.numel() for p in policy.model.parameters())
    policy.freeze_reference()
    assert sum(p.numel() for p in policy.model.parameters()) == count
    shake(policy)
    with policy.as_reference():
        assert torch.equal(logprobs(policy), begin)


def test_models_without_a_base_of_their_own_are_still_plain(codec: Codec, tmp_path: Path) -> None:
    Policy(tiny_model("gpt2", codec), codec, device="cpu").save(tmp_path)
    assert not (tmp_path / "base.json").exists()


def test_an_adapter_of_another_rank_is_refused_and_a_twin_learns_alone(base: Path, tmp_path: Path) -> None:
    policy = Policy.load(base)
    policy.add_lora(2)
    twin = policy.twin()
    with torch.no_grad():
        for parameter in twin.trainable_parameters():
            parameter.add_(1.0)
    assert not any(bool((p == 1.0).all()) for p in policy.trainable_parameters())
    twin.save(tmp_path / "twin")
    policy.restore(tmp_path / "twin")
    pairs = zip(policy.trainable_parameters(), twin.trainable_parameters(), strict=True)
    assert all(torch.equal(own, theirs) and own is not theirs for own, theirs in pairs)
    with pytest.raises(ValueError, match="nothing can be shared"):
        Policy.load(base).twin()
    other = Policy.load(base)
    other.add_lora(3)
    other.save(tmp_path / "other")
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    with pytest.raises(OperantError, match=r"is of another rank or model.* is \[3, "):
        policy.restore(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_new_adapter_is_turned_away_from_what_all_texts_have_in_common(
    family: str, make_policy: Callable[..., Policy]
) -> None:
    policy, plain = (make_policy(family) for _ in range(2))
    for one in (policy, plain):
        one.add_lora(rank=2)
    batches = [batch_for(policy), policy.batch_of_sequences([np.array([9, 4])], [np.array([5, 5, 7])])]
    read: dict[str, list[torch.Tensor]] = {}
    layers = {name: m for name, m in policy.model.named_modules() if hasattr(m, "lora_A")}

    def note(name: str, states: torch.Tensor) -> None:
        read.setdefault(name, []).append(states.flatten(0, -2))

    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    for batch in batches:
        policy.logprobs(batch)
    for handle in handles:
        handle.remove()
    policy.turn_adapter_away(batches, 3)
    for name, layer in layers.items():
        states = torch.cat(read[name]).detach()
        common = torch.linalg.svd(states, full_matrices=False)[2][:3]
        weight = layer.lora_A["default"].weight.detach()
        old = dict(plain.model.named_modules())[name].lora_A["default"].weight.detach()
        assert float((weight @ common.T).abs().max()) < 1e-4 * float(weight.abs().max())
        assert torch.allclose(weight.norm(), old.norm()) and not torch.equal(weight, old)
        rest = old - (old @ common.T) @ common
        assert torch.allclose(weight / weight.norm(), rest / rest.norm(), atol=1e-4)
    assert torch.equal(logprobs(policy), logprobs(plain))  # nothing is added yet
    shake(policy)
    trained = [p.clone() for p in policy.trainable_parameters()]
    policy.turn_adapter_away(batches, 3)  # what has learned stays
    assert all(torch.equal(a, b) for a, b in zip(trained, policy.trainable_parameters(), strict=True))
