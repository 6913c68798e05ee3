"""A whole model through the Triton kernels: interpreted on a CPU, in float16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import FalconConfig, LlamaConfig, PretrainedConfig

from gptq_writer import write_gptq
from longwing.engine.generator import Generator
from longwing.models import load_model, streamed_linear
from longwing.models.llama import LlamaBlock
from longwing.models.prepare import weight_bytes
from longwing.models.streamed_falcon import StreamedFalconBlock
from longwing.models.streamed_llama import StreamedLlamaBlock
from longwing.models.streaming import stream_weights
from longwing.tokenizer import Tokenizer
from tiny import COMMON, write_tokenizer

pytest.importorskip("triton")
# The interpreter multiplies what lies beyond a context too, whatever it is, before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE: dict[str, Any] = {**COMMON, "hidden_size": 128, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon-7b": lambda: FalconConfig(**SHAPE, multi_query=True, alibi=False),
    "falcon-40b": lambda: FalconConfig(
        **SHAPE, num_kv_heads=2, new_decoder_architecture=True, alibi=False
    ),
    "falcon-rw": lambda: FalconConfig(
        **SHAPE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "llama": lambda: LlamaConfig(**SHAPE, intermediate_size=256, num_key_value_heads=2),
    "llama-act-order": lambda: LlamaConfig(
        **SHAPE, intermediate_size=256, num_key_value_heads=2, attention_bias=True, mlp_bias=True
    ),
}


def read(folder: Path) -> Generator:
    model = load_model(folder, device=DEVICE, dtype=torch.float16, unpack=False)
    return Generator(model, Tokenizer.from_folder(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_model_gives_the_references_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gptq(
        CONFIGS[name](),
        tmp_path,
        bits=4,
        group_size=64,
        desc_act=name in ("llama-act-order", "falcon-7b"),
    )
    write_tokenizer(tmp_path)
    monkeypatch.setenv("LONGWING_KERNELS", "reference")
    reference = read(tmp_path)
    prompt = list(range(1, 20))  # many enough for the form that takes many tokens
    settings: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True, "logprobs": 3}
    expected = reference.generate(prompt, **settings)
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    # Folded in bfloat16 alone, which the interpreter cannot multiply; these numbers are small.
    monkeypatch.setattr(streamed_linear, "FOLDABLE", {torch.float16})
    fast = read(tmp_path)
    packed_bytes = weight_bytes(fast.model)
    num_packed = sum(linear.packed is not None for _, linear in fast.model.linears())
    assert stream_weights(fast.model) == num_packed > 0
    assert all(linear.packed is None for _, linear in fast.model.linears())
    blocks = (StreamedFalconBlock, StreamedLlamaBlock)
    assert all(isinstance(block, blocks) for block in fast.model.blocks)
    assert weight_bytes(fast.model) < 1.5 * packed_bytes
    hand_overs = [getattr(block, "outgoing", None) for block in fast.model.blocks[:-1]]
    assert all((over is not None) == (name == "falcon-40b") for over in hand_overs)
    found = fast.generate(prompt, **settings)
    for one, other in zip(found.tokens, expected.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.03)
        if one.id != other.id:  # two tokens all but equally likely; from there on texts differ
            break


@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 32, True), (3, 64, False)])
@pytest.mark.parametrize("name", ["falcon-40b", "llama"])
def test_whatever_the_format_steps_of_any_few_tokens_give_the_references_hidden_states(
    name: str,
    bits: int,
    group_size: int,
    sym: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which products are by digits depends on both, and norms are folded where all are."""
    write_gptq(CONFIGS[name](), tmp_path, bits=bits, group_size=group_size, sym=sym)
    monkeypatch.setattr(streamed_linear, "FOLDABLE", {torch.float16})
    models = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("LONGWING_KERNELS", kernels)
        models.append(load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False))
    stream_weights(models[1])
    for num_tokens in (1, 2, 4, 9):
        tokens_T = torch.arange(3, 3 + num_tokens).to(DEVICE)
        found_TD = []
        for kernels, model in zip(("reference", "triton"), models, strict=True):
            monkeypatch.setenv("LONGWING_KERNELS", kernels)
            with torch.inference_mode():
                found_TD.append(model(tokens_T, torch.arange(num_tokens).to(DEVICE)).double())
        expected_TD, streamed_TD = found_TD
        assert (streamed_TD - expected_TD).norm() / expected_TD.norm() < 0.01


def test_block_that_the_kernels_lack_a_form_for_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gptq(CONFIGS["llama"](), tmp_path, bits=4, group_size=16)
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    model = load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False)
    assert stream_weights(model) == 0
    assert all(type(block) is LlamaBlock for block in model.blocks)
    dense = load_model(tmp_path, device=DEVICE, dtype=torch.float32, unpack=False)
    assert stream_weights(dense) == 0


def test_a_step_that_fails_between_two_products_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs count themselves; those of a sum that was not finished must not be counted later."""
    write_gptq(CONFIGS["falcon-40b"](), tmp_path, bits=4, group_size=64)
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    model = load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False)
    stream_weights(model)
    block = model.blocks[0]
    assert isinstance(block, StreamedFalconBlock)
    tokens_T, positions_T = torch.tensor([3, 4, 5]).to(DEVICE), torch.arange(3).to(DEVICE)
    with torch.inference_mode():
        expected_TD = model(tokens_T, positions_T)
        with monkeypatch.context() as patch:
            patch.setattr(block, "_attend", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                model(tokens_T, positions_T)
        assert torch.equal(model(tokens_T, positions_T), expected_TD)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_launches_that_overlap_in_a_graph_give_what_one_after_another_gives(
    num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, as often as it is replayed: no program reads what is not there yet."""
    shape = SHAPE | {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 6}
    config = FalconConfig(**shape, num_kv_heads=2, new_decoder_architecture=True, alibi=False)
    write_gptq(config, tmp_path, bits=4, group_size=64)
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    model = load_model(tmp_path, device=DEVICE, dtype=torch.bfloat16, unpack=False)
    stream_weights(model)
    start_TD = torch.randn(num_tokens, 1024, device=DEVICE, dtype=torch.bfloat16)

    def blocks() -> torch.Tensor:
        hidden_TD = start_TD.clone()
        for block in model.blocks:
            hidden_TD = block(hidden_TD, None, None)
        return hidden_TD

    from longwing.kernels import wna16_triton

    with torch.inference_mode():
        with monkeypatch.context() as patch:
            patch.setattr(wna16_triton, "starts_early", lambda _: False)
            expected_TD = blocks()
        assert torch.equal(blocks(), expected_TD)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_TD = blocks()
        for _ in range(300):
            hidden_TD.zero_()
            graph.replay()
            assert torch.equal(hidden_TD, expected_TD)
