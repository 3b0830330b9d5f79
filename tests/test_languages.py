"""Models that answer in many languages: NLLB's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.families import configuration
from operant.config import EvalConfig, SampleConfig, SftConfig
from operant.data.chat import PromptStyle
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.rl.evaluate import evaluate_from, sample_from
from operant.stages.sft import sft
from operant.types import OperantError

LANGUAGES = ["eng_Latn", "fra_Latn", "zho_Hans"]


def many_languages(legacy: bool = False) -> Codec:
    """A tokenizer of NLLB's kind over the letters; legacy: the end of a prompt stands before its language."""
    from transformers import NllbTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, *("▁" + letter for letter in letters)]
    vocab = {name: i for i, name in enumerate(names)}
    return Codec(NllbTokenizer(vocab=vocab, merges=[], additional_special_tokens=LANGUAGES, legacy_behaviour=legacy))


def names(codec: Codec, ids: object) -> list[str]:
    return codec.tokenizer.convert_ids_to_tokens([int(i) for i in ids])  # type: ignore[attr-defined]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a tiny M2M-100, NLLB's form."""
    from transformers import M2M100ForConditionalGeneration

    codec = many_languages()
    config = configuration("m2m_100", {"vocab_size": codec.vocab_size, "pad_token_id": 1, "bos_token_id": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Policy(M2M100ForConditionalGeneration(config).eval(), codec, device="cpu").save(tmp_path / "nllb")
    return tmp_path / "nllb"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prompt_has_one_end_and_its_language(legacy: bool) -> None:
    """Some tokenizers write `</s> language`; another end behind that is read by no model as it was trained."""
    codec = many_languages(legacy)
    plain = codec.tokenizer("ab c")["input_ids"]
    assert codec.encode_prompt("ab c", encoder=True).tolist() == plain
    assert names(codec, plain).count("</s>") == 1
    chinese = codec.in_style(PromptStyle(source_lang="zho_Hans"))
    ids = chinese.encode_prompt("ab c", encoder=True)
    assert names(codec, ids)[-2:] == (["</s>", "zho_Hans"] if legacy else ["c", "</s>"])
    assert "zho_Hans" in names(codec, ids) and "eng_Latn" not in names(codec, ids)
    assert chinese.hash != codec.hash and codec.encode_prompt("ab c", encoder=True).tolist() == plain


def test_sample_and_eval_write_in_the_language_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    policy = Policy.load(model, device="cpu")
    wanted = {}
    for language in ("fra_Latn", "zho_Hans"):
        policy.codec.tokenizer.src_lang = "zho_Hans"
        ids = policy.codec.tokenizer("ab c", return_tensors="pt")["input_ids"]
        first = policy.codec.tokenizer.convert_tokens_to_ids(language)
        out = policy.model.generate(ids, max_new_tokens=8, do_sample=False, forced_bos_token_id=first)
        wanted[language] = out[0, 1:].tolist()
    assert wanted["fra_Latn"][1:] != wanted["zho_Hans"][1:]
    for language, tokens in wanted.items():
        config = SampleConfig(
            model=str(model), source_lang="zho_Hans", target_lang=language, temperature=0.0, max_tokens=8, device="cpu"
        )
        notes: list[str] = []
        ((_, done),) = sample_from(config, ["ab c"], notes.append)
        assert done.tokens.tolist() == tokens and not done.sampled[0] and not notes
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "ab c", "reference": "x"}) + "\n")
    samples = tmp_path / "samples.jsonl"
    evaluate_from(
        EvalConfig(
            model=str(model), data=str(rows), metrics=["chrf"], samples=str(samples), max_tokens=8,
            source_lang="zho_Hans", target_lang="fra_Latn", device="cpu",
        )
    )  # fmt: skip
    said = json.loads(samples.read_text(encoding="utf-8"))["completion"]
    assert said == policy.codec.decode(wanted["fra_Latn"])


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tuning_keeps_the_languages_with_the_model(
    rank: int, model: Path, tmp_path: Path, no_report: None
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": w, "completion": w[::-1]}) + "\n" for w in ("ab", "cd", "ef", "gh")))
    sft(
        SftConfig(
            model=str(model), data=str(data), out=str(tmp_path / "run"), source_lang="zho_Hans", target_lang="fra_Latn",
            steps=1, lora_rank=rank, device="cpu", tensorboard=False, prompt_field="prompt",
            reference_field="completion",
        ),
        quiet=True,
    )  # fmt: skip
    learned = tmp_path / "run" / "model"
    ((_, done),) = sample_from(SampleConfig(model=str(learned), max_tokens=4, device="cpu"), ["ab"])
    assert names(many_languages(), done.tokens[:1]) == ["fra_Latn"] and not done.sampled[0]
    tokenizer = AutoTokenizer.from_pretrained(learned)  # and plain Transformers reads both
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("zho_Hans", "fra_Latn")
    if not rank:
        first = GenerationConfig.from_pretrained(learned).forced_bos_token_id
        assert tokenizer.convert_ids_to_tokens(first) == "fra_Latn"


def test_what_is_missing_or_unknown_is_said_in_one_line(model: Path, codec: Codec) -> None:
    notes: list[str] = []
    list(sample_from(SampleConfig(model=str(model), max_tokens=2, device="cpu"), ["ab"], notes.append))
    assert notes == ["the model answers in many languages and nobody says in which; give --target_lang"]
    with pytest.raises(OperantError, match="no language 'fra'; it knows fra_Latn and others"):
        next(sample_from(SampleConfig(model=str(model), target_lang="fra", device="cpu"), ["ab"]))
    with pytest.raises(OperantError, match="leave --source_lang and --target_lang out"):
        codec.in_style(PromptStyle(target_lang="fra_Latn"))
