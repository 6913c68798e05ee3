"""Our models against transformers: the judge for every architecture and variant."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longwing.engine.generator import Generator
from longwing.models import load_model
from longwing.tokenizer import Tokenizer
from tiny import ARCHITECTURES

Folder = Callable[[str], Path]
T = 64


def _tokens(seed: int, length: int = T) -> torch.Tensor:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed))


def assert_equal_logits(actual_TV: torch.Tensor, expected_TV: torch.Tensor) -> None:
    """Within 1e-4 of each position's largest logit: float32 sums in another order give 1e-5."""
    largest_T1 = expected_TV.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(actual_TV / largest_T1, expected_TV / largest_T1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_transformers(name: str, tiny_folder: Folder) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=torch.float32).eval()
    ours = load_model(tiny_folder(name))
    tokens_T = _tokens(1)
    with torch.inference_mode():
        expected_TV = theirs(tokens_T[None]).logits[0]
        actual_TV = ours.logits(ours(tokens_T, torch.arange(T)))
    assert expected_TV.std() > 0.5  # else agreement would say little
    assert_equal_logits(actual_TV, expected_TV)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_64_greedy_tokens_equal_those_of_transformers(name: str, tiny_folder: Folder) -> None:
    folder = tiny_folder(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # longrope: a prompt beyond the trained 32, since transformers would change factors on the way.
    prompt = _tokens(2, 40 if name == "llama-longrope" else 20)
    generator = Generator(load_model(folder, context=128), Tokenizer.from_folder(folder))
    if name == "llama-dynamic":
        theirs.model.rotary_emb = _static_rotation(generator, need=len(prompt) + 64)
    with torch.inference_mode():
        expected = theirs.generate(
            prompt[None], do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
        )[0, len(prompt) :].tolist()
    answer = generator.generate(prompt.tolist(), max_new_tokens=64, min_new_tokens=64)
    assert answer.token_ids == expected


def _static_rotation(generator: Generator, need: int) -> LlamaRotaryEmbedding:
    """transformers' plain RoPE with the base that our ladder gives a sequence of `need` tokens.

    Its own dynamic RoPE changes the base at every step and leaves old keys under old bases.
    """
    rope, rotary = generator.model.config.rope, generator.model.rotary
    assert rope is not None
    assert rotary is not None
    config = ARCHITECTURES["llama2"]()
    base = rope.base_at(rotary.rung_for(need, 0))
    assert base > 2 * rope.theta
    config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", ["falcon-rw", "falcon-40b", "mistral", "llama-yarn"])
def test_tokens_through_pages_equal_one_pass_without_a_cache(
    name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longwing.engine.generator.PREFILL_CHUNK", 7)
    monkeypatch.setattr("longwing.engine.generator.PAGE_LEN", 4)
    folder = tiny_folder(name)
    generator = Generator(load_model(folder), Tokenizer.from_folder(folder))
    prompt = _tokens(3, 30).tolist()
    answer = generator.generate(prompt, max_new_tokens=16, ignore_eos=True).token_ids
    for n in range(16):
        logits_TV = generator.logits(prompt + answer[:n])
        assert int(logits_TV[-1].argmax()) == answer[n]


@pytest.mark.slow
def test_smollm2_reads_and_continues_real_text_as_transformers_does(smollm2_folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    generator = Generator(load_model(smollm2_folder), Tokenizer.from_folder(smollm2_folder))
    text = (Path(__file__).parents[1] / "data/falconlite/example_long_ctx.txt").read_text()[:1500]
    prompt = generator.tokenizer.encode(text)
    assert len(prompt) > 250
    with torch.inference_mode():
        expected_TV = theirs(torch.tensor([prompt])).logits[0]
    assert_equal_logits(generator.logits(prompt), expected_TV)
    with torch.inference_mode():
        continued = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64
        )[0, len(prompt) :].tolist()
    answer = generator.generate(prompt, max_new_tokens=64, min_new_tokens=64)
    assert answer.token_ids == continued
