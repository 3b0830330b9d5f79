"""Settings for every test, and the tiny models that several test files share.

torch is imported where it is used: the process that hands out tests to workers needs none.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# what is kept of the checks of models: not in the home of whoever runs the tests
os.environ.setdefault("OPERANT_CACHE", os.path.join(tempfile.gettempdir(), f"operant-tests-{os.getuid()}"))

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serving import Served

    from operant.data.text import Codec
    from operant.models.policy import Policy

# No test cuts the power. A disk that is waited for thousands of times costs minutes; processes of their own do wait.
os.fsync = os.fstat  # type: ignore[assignment]

TEXTS = ["the cat sat on the mat", "a dog ran to the red house", "你好,世界", "one two three four five", "😀 naïve"]
FAMILIES = ("gpt2", "llama", "t5", "bart", "marian")


# The files that take longest, the longest first: they begin first, so that no worker is left alone with one at the end.
LONGEST = """
    recipes loop live_worker stages page serve environment old_data quickstart trust_region forget_serving q_learning
    forget preference_stage real_models cli engine encoder reward_model canary store influence supervisor server
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Also where OMP_NUM_THREADS says otherwise."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def codec() -> Codec:
    from operant.data.text import Codec

    return Codec.train_bpe(TEXTS * 3, vocab_size=288, sentinels=4)


def tiny_model(family: str, codec: Codec, context: int = 48, dropout: float = 0.0) -> Any:
    """A two-layer model with random weights whose distributions are far from flat."""
    import torch
    import transformers as hf

    ids = {"pad_token_id": codec.pad_id, "eos_token_id": codec.eos_id, "bos_token_id": codec.bos_id}
    vocab = codec.vocab_size
    torch.manual_seed(3)
    model: Any
    if family == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=vocab, n_positions=context, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **ids,
            )
        )  # fmt: skip
    elif family == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.4, **ids,
            )
        )  # fmt: skip
    elif family == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=vocab, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
                dropout_rate=dropout, initializer_factor=2.0, n_positions=context,
                decoder_start_token_id=codec.pad_id, **ids,
            )
        )  # fmt: skip
    else:
        kind = {"bart": hf.BartConfig, "marian": hf.MarianConfig}[family]
        config = kind(
            vocab_size=vocab, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=context,
            dropout=dropout, init_std=0.4, decoder_start_token_id=codec.eos_id, forced_eos_token_id=None, **ids,
        )  # fmt: skip
        model = (hf.BartForConditionalGeneration if family == "bart" else hf.MarianMTModel)(config)
        with torch.no_grad():  # tied embeddings of width 16 would make every distribution nearly one-hot
            model.model.shared.weight.mul_(0.7)
    return model.eval()


@pytest.fixture(scope="session")
def make_policy(codec: Codec) -> Callable[..., Policy]:
    from operant.models.policy import Policy

    def make(family: str, *, dtype: str = "float32", device: str = "cpu", **options: Any) -> Policy:
        return Policy(tiny_model(family, codec, **options), codec, device=device, dtype=dtype)

    return make


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """One tiny model for all tests of a file, with room for a chat."""
    return make_policy("gpt2", context=128)


@pytest.fixture(scope="module")
def served(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server of `policy` for all tests of a file, without a learner."""
    from serving import serving

    with serving(policy, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def chat_policy(make_policy: Callable[..., Policy]) -> Policy:
    """A tiny model with a chat template: `<user>` and what is said, a line's end, and `<bot>`."""
    import copy

    from operant.data.text import Codec

    policy = make_policy("gpt2", context=256)
    tokenizer = copy.deepcopy(policy.codec.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    policy.codec = Codec(tokenizer)
    return policy


def sketch(chart: Any, folder: Path) -> str:
    (folder / f"{chart.key}.png").write_bytes(b"\x89PNG\r\n")
    return f"<figure>{chart.key}</figure>"


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are whole but for the lines of their curves, which take longer to draw than a tiny run to learn.

    A test that is marked `draws` has them: of all its runs, or of those in the folders that the mark names.
    """
    from operant.run import report

    mark = request.node.get_closest_marker("draws")
    if mark is not None and not mark.args:
        return
    drawn, figure = mark.args if mark is not None else (), report._figure
    monkeypatch.setattr(
        report, "_figure", lambda chart, folder: (figure if folder.parent.name in drawn else sketch)(chart, folder)
    )


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends without writing its report at all."""
    monkeypatch.setattr("operant.run.run.write_report", lambda folder: None)


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The folder of a real pretrained model, by its name: in models/, or in the folder that OPERANT_MODELS names.

    Where it is not there the test is skipped, and fails where CI is set.
    """

    def find(name: str) -> Path:
        folder = Path(os.environ.get("OPERANT_MODELS") or Path(__file__).parent.parent / "models") / name
        if not (folder / "config.json").exists():
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {folder}: run `make models`")
        return folder

    return find
