"""Samples spread over workers: the folder of one process, to the byte."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_worker import InlineWorker
from transformers import FalconConfig, LlamaConfig

from longwing.cluster.calibration import SpreadSamples, split
from longwing.errors import CalibrationError
from longwing.quant import statistics
from longwing.quant.calibration import Calibration, make_calibration
from longwing.quant.quantize import quantize
from longwing.quant.spec import QuantSpec
from longwing.tokenizer import Tokenizer
from tiny import COMMON, save_model, write_tokenizer

SHAPE = {**COMMON, "hidden_size": 64, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=96, num_key_value_heads=2),
    "falcon-40b": FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, folder in folders.items():
        save_model(CONFIGS[name], folder)
        write_tokenizer(folder)
    return folders


@pytest.fixture(autouse=True)
def _narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even these layers have several."""
    monkeypatch.setattr(statistics, "_PANEL", 40)


def calibration(folder: Path, tmp_path: Path) -> Calibration:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    sizes = {"num_samples": 5, "seqlen": 40, "num_long": 1, "long_seqlen": 90}
    return make_calibration(Tokenizer.from_folder(folder), [text], **sizes)


def spread(
    folder: Path, samples: Calibration, spec: QuantSpec, num: int, dies_at: int = 0
) -> SpreadSamples:
    def hire(make: Callable[[], object]) -> InlineWorker:
        return InlineWorker(make, dies_at)

    return SpreadSamples(hire, num, folder, samples, spec, device="cpu", dtype="float32")


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "method", "rotate", "num", "stages"),
    [
        ("llama", "gptq", "none", 3, True),
        ("llama", "qronos", "full", 2, True),
        ("falcon-40b", "gptaq", "heads", 6, True),
        ("falcon-40b", "gptq", "none", 2, False),
    ],
)
def test_folder_is_that_of_one_process_to_the_byte(
    name: str, method: str, rotate: str, num: int, stages: bool,
    dense: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = dense[name]
    spec = QuantSpec(bits=4, group_size=32, method=method, rotate=rotate)
    samples = calibration(source, tmp_path)
    quantize(source, tmp_path / "alone", spec, samples, true_sequential=stages)
    held = spread(source, samples, spec, num)
    done = quantize(
        source, tmp_path / "spread", spec, samples, true_sequential=stages, samples=held
    )
    assert digests(done.folder) == digests(tmp_path / "alone")


def test_run_that_lost_a_worker_goes_on_with_other_workers(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    source, spec = dense["llama"], QuantSpec(bits=4, group_size=32, method="gptaq")
    samples = calibration(source, tmp_path)
    quantize(source, tmp_path / "alone", spec, samples)
    with pytest.raises(CalibrationError, match="the same command goes on"):
        # The first block takes 24 questions: its panels are many here.
        quantize(
            source, tmp_path / "out", spec, samples, samples=spread(source, samples, spec, 3, 30)
        )
    done = quantize(
        source, tmp_path / "out", spec, samples, samples=spread(source, samples, spec, 2)
    )
    assert done.num_resumed == 1
    assert digests(done.folder) == digests(tmp_path / "alone")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 12))
def test_every_sample_has_one_worker_and_every_worker_a_sample(
    lengths: list[int], num: int
) -> None:
    shares = split(lengths, num)
    assert [number for share in shares for number in share] == list(range(len(lengths)))
    assert len(shares) == min(num, len(lengths))
    assert all(shares)


def test_long_samples_weigh_more() -> None:
    assert split([1] * 8 + [4, 4], 2) == [range(8), range(8, 10)]
