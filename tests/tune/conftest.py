"""What a run needs, small: a tokenizer with chat tokens, records, and a packed model."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import FalconConfig

from gptq_writer import write_gptq
from longwing.tokenizer import Tokenizer
from tiny import COMMON, write_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, and FalconLite2's three special tokens: 256 ends, 257 prompts, 258 answers."""
    folder = tmp_path_factory.mktemp("chat")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|prompter|>", "<|assistant|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions with one of three short answers each."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "records.jsonl"
    lines = [
        {"prompt": f"colour {rng.randrange(9)}? ", "answer": rng.choice(["red", "blue", "tan"])}
        for _ in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`packed_folder(bits)`: a random Falcon with grouped heads and act-order, packed."""
    made: dict[int, Path] = {}

    def folder(bits: int) -> Path:
        if bits not in made:
            made[bits] = tmp_path_factory.mktemp(f"packed-{bits}")
            config = FalconConfig(
                **{**COMMON, "hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2},
                new_decoder_architecture=True, max_position_embeddings=256,
            )  # fmt: skip
            write_gptq(config, made[bits], bits=bits, desc_act=True)
            write_tokenizer(made[bits])
        return made[bits]

    return folder
