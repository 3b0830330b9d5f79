"""What a model's generation_config says of how its texts begin, end and are drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from operant.data.text import Codec

__all__ = ["Generation"]

# how a chat model is asked when neither its makers nor anybody else says: at temperature 1 a small one talks nonsense
CHAT_TEMPERATURE, CHAT_TOP_P = 0.7, 0.9


@dataclass(frozen=True, slots=True)
class Generation:
    """How a model is meant to be sampled; where its texts begin and end is its codec's (`Codec.ending_at`).

    banned: tokens that are never drawn. banned_first: tokens that are not drawn as the first one of a text.
    temperature, top_p, top_k: None where the model's makers say nothing.
    """

    banned: tuple[int, ...] = ()
    banned_first: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def of(cls, config: Any, vocabulary: int) -> Generation:
        """What a Transformers GenerationConfig, or None, says of a model with so many token ids."""
        words = getattr(config, "bad_words_ids", None) or ()
        single = [word[0] for word in words if len(word) == 1]
        return cls(
            banned=_ids([*single, *(getattr(config, "suppress_tokens", None) or ())], vocabulary),
            banned_first=_ids(getattr(config, "begin_suppress_tokens", None) or (), vocabulary),
            temperature=getattr(config, "temperature", None), top_p=getattr(config, "top_p", None),
            top_k=getattr(config, "top_k", None),
        )  # fmt: skip

    def settings(
        self,
        temperature: float | Literal["auto"] | None,
        top_p: float | Literal["auto"] | None,
        top_k: int | Literal["auto"] | None,
        *,
        chat: bool,
    ) -> tuple[float, float, int]:
        """(temperature, top_p, top_k): what is given, or else what the model's makers say.

        Where neither says anything of any, the model draws from its own distribution, (1, 1, 0), and one with a chat
        template from a narrower one.

        None and "auto" are not given. chat: the model has a chat template.
        """
        given = [None if value == "auto" else value for value in (temperature, top_p, top_k)]
        stated = [self.temperature, self.top_p, self.top_k]
        nobody = all(value is None for value in [*given, *stated])
        usual = (CHAT_TEMPERATURE, CHAT_TOP_P, 0) if chat and nobody else (1.0, 1.0, 0)
        found = [
            usual[i] if g is None and s is None else s if g is None else g
            for i, (g, s) in enumerate(zip(given, stated))
        ]
        return float(found[0]), float(found[1]), int(found[2])  # type: ignore[arg-type]


def with_ends(codec: Codec, config: Any, *, encoder: bool) -> Codec:
    """The codec of a model whose GenerationConfig, or None, says where its texts begin and end.

    encoder: only a decoder that an encoder stands before writes its own first token. A language that the codec's style
        names goes before the config's.
    """
    ends = getattr(config, "eos_token_id", None)
    named = [ends] if isinstance(ends, int) else list(ends or ())
    first = getattr(config, "forced_bos_token_id", None) if encoder else None
    if encoder and codec.first_id is not None:
        first = codec.first_id
    return codec.ending_at(named, None if first is None else int(first))


def _ids(values: Iterable[int], vocabulary: int) -> tuple[int, ...]:
    return tuple(sorted({int(value) for value in values if 0 <= int(value) < vocabulary}))
