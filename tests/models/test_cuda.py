"""The same code on a GPU: the CPU's logits and tokens, from dense and from packed weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig

from gptq_writer import write_gptq
from longwing.engine.generator import load
from longwing.errors import CapacityError
from longwing.models.streamed_linear import StreamedLinear
from tiny import ARCHITECTURES, COMMON, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gpu_gives_the_cpu_s_logits_and_tokens(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    tokens = torch.randint(0, 320, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    cpu = load(tiny_folder(name), device="cpu", dtype="float32")
    gpu = load(tiny_folder(name), device="cuda", dtype="float32")
    torch.testing.assert_close(gpu.logits(tokens).cpu(), cpu.logits(tokens), rtol=1e-3, atol=1e-3)
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    expected = cpu.generate(tokens, **settings).token_ids
    assert gpu.generate(tokens, **settings).token_ids == expected
    sampled = {**settings, "temperature": 0.8, "seed": 3}
    assert gpu.generate(tokens, **sampled).token_ids == cpu.generate(tokens, **sampled).token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights_on_a_gpu_give_the_cpu_s_logits(
    bits: int, dtype: str, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {**COMMON, "hidden_size": 128, "num_attention_heads": 4}
    write_gptq(FalconConfig(**shape), tmp_path, bits=bits, group_size=64, desc_act=True)
    write_tokenizer(tmp_path)
    tokens = list(range(30))
    expected_TV = load(tmp_path, device="cpu", dtype="float32").logits(tokens)
    gpu = load(tmp_path, device="cuda", dtype=dtype)
    assert gpu.model.lm_head.weight is gpu.model.embedding.weight
    assert any(isinstance(module, StreamedLinear) for module in gpu.model.modules())
    error = (gpu.logits(tokens).cpu() - expected_TV).abs().max() / expected_TV.abs().max()
    assert error < (0.05 if dtype == "bfloat16" else 0.01)


def test_model_that_a_gpu_cannot_hold_is_refused_before_it_is_read(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    with pytest.raises(CapacityError, match="more than the"):
        load(tiny_folder("llama2"), device="cuda")
