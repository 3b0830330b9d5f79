"""An ordinary sequence-classification checkpoint of Transformers as a reward model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operant.data.hub import fetched, load_fault
from operant.data.text import Codec, looks_like_path
from operant.models.encoder import by_length
from operant.models.policy import resolve_device
from operant.types import OperantError

__all__ = ["Classifier", "is_classifier"]


def is_classifier(source: str | Path) -> bool:
    """Whether a folder holds a sequence-classification model; a hub id, `owner/name`, is taken for one."""
    folder = Path(source)
    if not folder.exists():
        return "/" in str(source) and not looks_like_path(str(source))
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForSequenceClassification") for name in names)


class Classifier:
    """A model with a head for whole texts, and its tokenizer.

    Its reward of one label alone is the logit, as reward models of this form are trained. With several labels it is the
    log-odds of the named one, z_l − log Σ_{j≠l} exp z_j.

    A tokenizer with a chat template reads prompt and answer as a chat; one with a separator reads them as a pair of
    texts; any other reads them as two lines.
    """

    def __init__(self, model: Any, codec: Codec, label: str = "", *, device: str = "auto") -> None:
        """label: which one pays, by its name or number; "" where there is only one.

        Raises OperantError where the label is not there, or several are and none is named.
        """
        self.device = resolve_device(device)
        self.model, self.codec = model.to(self.device).eval(), codec
        names = {int(i): str(name) for i, name in model.config.id2label.items()}
        self.count = int(model.config.num_labels)
        chosen = [i for i, name in names.items() if label in (name, str(i))]
        if (label and not chosen) or (self.count > 1 and not label):
            asked = f"has no label {label!r}" if label else "has several labels, of which one has to be named"
            raise OperantError(f"the classifier {asked}; write label= one of {', '.join(names.values())}")
        self.label = chosen[0] if chosen else 0
        if codec.pad_id is not None and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = codec.pad_id  # by which a decoder finds its last token

    @classmethod
    def load(cls, source: str | Path, label: str = "", *, device: str = "auto") -> Classifier:
        """Load a folder or hub id. Raises OperantError where there is none, or weights of it are missing."""
        from transformers import AutoModelForSequenceClassification

        try:
            with fetched(source):
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
                )
        except OperantError:
            raise
        except Exception as error:  # of many types: Transformers', safetensors', the hub client's
            raise OperantError(
                f"cannot load a classifier from {source} ({load_fault(error)}); give a folder or hub id of one"
            ) from error
        if missing := sorted(loading["missing_keys"]):
            raise OperantError(f"{source} lacks {missing[0]}: it is no classifier that was trained; give one that was")
        return cls(model, Codec.load(source), label, device=device)

    @property
    def max_length(self) -> int:
        """Tokens that fit."""
        known = getattr(self.model.config, "max_position_embeddings", None)
        return int(known) if isinstance(known, int) and known > 0 else 2**20

    def read(self, messages: Sequence[dict[str, str]], prompt: str, answer: str) -> dict[str, list[int]]:
        """What the model is given for an answer to a prompt: int[T] by name, as its tokenizer puts them.

        messages: of a chat, those before the answer; empty for a plain prompt.
        """
        tokenizer = self.codec.tokenizer
        if tokenizer.chat_template:
            before = list(messages) or [{"role": "user", "content": prompt}]
            turns = [*before, {"role": "assistant", "content": answer}]
            pieces = self.codec.chat_text(turns, generation_prompt=False).pieces
            ids = [self.codec.encode(text, parse_special=special) for text, special in pieces]
            return {"input_ids": np.concatenate(ids).tolist()}
        given = (prompt, answer) if prompt and tokenizer.sep_token_id is not None else (
            f"{prompt}\n{answer}" if prompt else answer,
        )  # fmt: skip
        return dict(tokenizer(*given, split_special_tokens=True))

    @torch.no_grad()
    def predict(self, readings: Sequence[dict[str, list[int]]], max_tokens: int = 8192) -> list[float]:
        """The reward of each reading. max_tokens: padded tokens that go through the model at once."""
        out = [0.0] * len(readings)
        for chosen in by_length([len(one["input_ids"]) for one in readings], max_tokens):
            width = max(len(readings[i]["input_ids"]) for i in chosen)
            rows = {name: np.zeros((len(chosen), width), np.int64) for name in readings[chosen[0]]}
            mask = np.zeros((len(chosen), width), np.int64)
            rows["input_ids"][:] = self.codec.pad_id or 0
            for row, i in enumerate(chosen):
                for name, values in readings[i].items():
                    rows[name][row, : len(values)] = values
                mask[row, : len(readings[i]["input_ids"])] = 1
            rows["attention_mask"] = mask
            given = {name: torch.from_numpy(values).to(self.device) for name, values in rows.items()}
            logits = self.model(**given).logits.float().cpu()
            others = torch.cat([logits[:, : self.label], logits[:, self.label + 1 :]], 1)
            own = logits[:, self.label] - (others.logsumexp(1) if self.count > 1 else 0.0)
            for row, i in enumerate(chosen):
                out[i] = float(own[row])
        return out
