"""Reading a GGUF file, the format of llama.cpp, as a Transformers model with float32 weights and its tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from operant.config import install_line
from operant.models.folder import expect_all_weights
from operant.types import OperantError

logger = logging.getLogger(__name__)

# Vocabularies whose every digit is a token of its own, as llama.cpp names them (`tokenizer.ggml.pre`). Transformers
# splits them as GPT-2 does, which puts the spaces before a number into other tokens than the model was trained on.
DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


def load_gguf(path: str | Path) -> tuple[Any, Any]:
    """The model of a GGUF file, its weights in float32, and its tokenizer; what precision they had is logged.

    Rounded weights are read as the numbers that they were rounded to, and can be trained and saved like any others.
    Raises OperantError when the package gguf is missing, when Transformers cannot read the architecture, and for a file
    that is no GGUF, is cut off, or lacks weights of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GgufConfig

    file = Path(path)
    header = _read_header(file)
    folder, named = str(file.parent), {"gguf_file": file.name}
    with _no_bar():
        try:
            config = AutoConfig.from_pretrained(folder, **named)
        except ValueError as error:
            if "is not supported" not in str(error):
                raise
            raise OperantError(
                f"{path} holds a {_text(header, 'general.architecture')}, which Transformers cannot read from a GGUF; "
                "give the model's folder or hub id"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(folder, **named)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),  # packed it could be neither trained nor saved
            **named,
        )  # fmt: skip
    expect_all_weights(path, loading)
    model.config.name_or_path = model.name_or_path = ""  # the file's folder is none that PEFT could look into
    if _text(header, "tokenizer.ggml.pre") in DIGITS_APART:
        _split_digits(tokenizer)
    if tokens := header.get_field("tokenizer.ggml.tokens"):
        _drop_tokens(tokenizer, after=len(tokens.data))
    logger.warning("%s", precision_in_words(file, header))
    return model, tokenizer


def count_gguf(path: Path) -> int:
    """How many weights a GGUF file holds, by its header. Raises OperantError as `load_gguf` does for the file."""
    return sum(int(tensor.n_elements) for tensor in _read_header(path).tensors)


def precision_in_words(file: Path, header: Any) -> str:
    """One line on how a GGUF file keeps its weights, and what became of them."""
    kinds: Counter[str] = Counter()
    for tensor in header.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in header.tensors) / max(1, kinds.total())
    (kind, _), *others = kinds.most_common()
    also = f", also {', '.join(name for name, _ in others)}" if others else ""
    lost = "" if kind == "F32" else "; what rounding lost does not come back"
    return f"{file.name} keeps {bits:.3g} bits a weight ({kind}{also}), now float32{lost}"


def _read_header(file: Path) -> Any:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise OperantError(f"{file} is a file, but no GGUF; give the model's folder")
    if importlib.util.find_spec("gguf") is None:
        raise OperantError(f"reading {file} needs the package gguf: {install_line('gguf')}")
    from gguf import GGUFReader

    try:
        header = GGUFReader(file)
        _ = _text(header, "general.architecture"), header.tensors[0]
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # it reads past the end and makes arrays of that
        raise OperantError(f"{file} is cut off or damaged; fetch it again") from error
    return header


def _text(header: Any, key: str) -> str:
    field = header.get_field(key)
    return "" if field is None else str(field.contents())


def _split_digits(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)


def _drop_tokens(tokenizer: Any, after: int) -> None:
    """GPT-2's `<|endoftext|>`, which Transformers adds behind a byte-level vocabulary that has none (Llama 3's)."""
    from tokenizers import Tokenizer

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in core["added_tokens"] if token["id"] < after]
    if len(kept) < len(core["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core | {"added_tokens": kept}))


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Transformers' bar for GGUF weights obeys no switch."""
    from transformers import modeling_gguf_pytorch_utils as reading

    bar = vars(reading).get("tqdm")
    reading.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reading.tqdm = bar
