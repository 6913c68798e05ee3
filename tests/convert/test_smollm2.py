"""The real SmolLM2-135M-Instruct, fetched as a first run fetches it, against transformers."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from longwing.models import load_model

pytestmark = pytest.mark.slow


def texts() -> Iterator[str]:
    """Prose, code, numbers, many scripts, control tokens; and 500 random mixtures of them."""
    parts = [*"abc XYZ0123456789\n\t'.,!?()[]{}<>|_-+*/=", " the", " and", "'s", "'LL", "   "]
    parts += ["é", "ñ", "中文", "日本語", "한국어", "ह", "🙂", "🦙", "\U0001f468\u200d\U0001f467"]
    parts += ["½", "²", "Ⅷ", "٣", "\u00a0", "\r\n", "def f(x):\n    return", "don't WON'T we'll"]
    parts += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "3.14159e-10"]
    yield from ("", "3½ cups, ½ off", *parts)
    rng = random.Random(7)
    for _ in range(500):
        yield "".join(rng.choice(parts) for _ in range(rng.randint(1, 40)))


def test_weights_and_logits_are_those_transformers_reads_from_the_gguf_file(
    smollm2_gguf: Path, smollm2_folder: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    converted = load_file(smollm2_folder / "model.safetensors")
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys() - {"lm_head.weight"}  # tied
    for name, weight in converted.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, expected[name].half()), name
    ours = load_model(smollm2_folder)
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    tokens_T = torch.tensor(tokenizer.encode("The capital of France is").ids)
    with torch.inference_mode():
        ours_TV = ours.logits(ours(tokens_T, torch.arange(len(tokens_T))))
        theirs_TV = theirs(tokens_T[None]).logits[0]
    # Only the rounding to float16 lies between them.
    torch.testing.assert_close(ours_TV, theirs_TV, rtol=0, atol=0.05)
    assert tokenizer.decode([int(ours_TV[-1].argmax())]) == " Paris"


def test_tokens_are_those_transformers_reads_from_the_gguf_file(
    smollm2_gguf: Path, smollm2_folder: Path
) -> None:
    ours = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers 5.23 leaves out the model's own first step, digits one by one; it is put back.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    again = AutoTokenizer.from_pretrained(smollm2_folder)
    for text in texts():
        assert ours.encode(text).ids == theirs.encode(text) == again.encode(text), text
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
        chat, tokenize=False
    )


def test_tokens_are_as_the_models_own_tokenizer_makes_them(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>user\n").ids[0] == 1  # and no begin token before it
    assert tokenizer.encode("in 1234").tokens == ["in", "Ġ", "1", "2", "3", "4"]
    assert tokenizer.encode("3½").tokens == ["3", "Â½"]
    assert tokenizer.encode(" ½").tokens == ["Ġ", "Â½"]  # digits of any script stand alone
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
