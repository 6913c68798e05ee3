"""The corpus of broken folders, and random damage: the answer is a CheckpointError, always.

Judged by `load`: open the folder and read every tensor, packed layers as packed layers.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import good_folders
import pytest
from corrupt import CorruptCase, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longwing.checkpoint import Checkpoint, QuantConfig, TensorFile, read_packed
from longwing.errors import CheckpointError

CASES = cases()


def load(folder: Path) -> None:
    """What a model loader asks of a folder."""
    checkpoint = Checkpoint.open(folder)
    for name, (K, N) in good_folders.LAYERS.items():
        if checkpoint.quant is not None:
            read_packed(checkpoint, name, K, N, checkpoint.quant)
        else:
            checkpoint.read(f"{name}.weight")
    for name in checkpoint.tensors:
        checkpoint.read(name)


def is_refused(action: Callable[[], object]) -> bool:
    """Whether `action` raised a CheckpointError fit for a terminal; other exceptions pass."""
    try:
        action()
    except CheckpointError as error:
        if not str(error).isprintable():
            raise
        return True
    return False


def read_whole(path: Path) -> None:
    file = TensorFile.open(path)
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
    assert sum(info.nbytes for info in file.tensors.values()) < path.stat().st_size


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("good")
    return {
        "dense": good_folders.write_dense(base / "dense"),
        "packed": good_folders.write_packed(base / "packed"),
    }


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_the_good_folders_load(good, kind):
    load(good[kind])


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{case.name}")
        for case in CASES
        for kind in ("dense", "packed")
        if case.needs in ("any", kind)
    ],
)
def test_broken_folder_is_refused_with_file_and_reason(good, tmp_path, kind, case: CorruptCase):
    folder = shutil.copytree(good[kind], tmp_path / "model")
    case.build(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert [part for part in case.expected if part not in message] == [], message
    assert message.isprintable(), "an error must not carry control characters to a terminal"
    assert len(message) < 1000


def test_the_corpus_is_large_and_its_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) >= 70
    assert len(set(names)) == len(names)


def test_random_damage_to_a_header_is_refused_or_harmless(good, tmp_path):
    """20,000 files, each with one to four bytes of length or header changed, then read in full."""
    rng = random.Random(20)
    whole = (good["packed"] / "model.safetensors").read_bytes()
    header_len = 8 + int.from_bytes(whole[:8], "little")
    path, refused = tmp_path / "model.safetensors", 0
    path.write_bytes(whole)
    with path.open("r+b", buffering=0) as stream:
        for _ in range(20_000):
            raw = bytearray(whole[:header_len])
            for _ in range(rng.randint(1, 4)):
                # One in five hits the length itself.
                at = rng.randrange(8) if rng.random() < 0.2 else rng.randrange(8, header_len)
                raw[at] = rng.choice([rng.randrange(256), raw[at] ^ (1 << rng.randrange(8)), 0x22])
            os.pwrite(stream.fileno(), raw, 0)
            refused += is_refused(lambda: read_whole(path))
    assert refused > 15_000


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    whole = (good["packed"] / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for keep in [*range(0, 3000, 7), *range(3000, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError):
            TensorFile.open(path)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "generation_config.json"])
def test_random_damage_to_settings_is_refused_or_harmless(good, tmp_path, name):
    rng = random.Random(name)
    folder = shutil.copytree(good["packed"], tmp_path / "model")
    whole = (folder / name).read_bytes()
    for _ in range(250):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.choice(b'{}[]",:0123456789-e\x00\xff ')
        (folder / name).write_bytes(raw)
        is_refused(lambda: Checkpoint.open(folder))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.sampled_from([-1, 0, 1, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]),
    st.text(max_size=4),
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I32", "U8", "BOOL", "X"]) | ODD,
        "shape": st.lists(ODD | st.integers(0, 4), max_size=10) | ODD,
        "data_offsets": st.lists(ODD | st.integers(0, 64), max_size=3) | ODD,
    }
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    header=st.dictionaries(st.text(max_size=6), FIELDS | ODD, max_size=3) | st.lists(ODD),
    data=st.binary(max_size=64),
)
def test_any_json_as_header_is_refused_or_harmless(tmp_path, header, data):
    raw = json.dumps(header).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    is_refused(lambda: read_whole(path))


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    block=st.dictionaries(
        st.sampled_from(["bits", "group_size", "sym", "desc_act", "format", "dynamic", "method"]),
        ODD
        | st.sampled_from([2, 3, 4, 8, 32, -1, "gptq", "gptq_v2"])
        | st.dictionaries(st.text(max_size=3), ODD, max_size=2),
    )
)
def test_any_quantisation_block_is_refused_or_gives_good_settings(block):
    def parse() -> None:
        config = QuantConfig.from_hf(block, "quantize_config.json")
        assert config.bits in (2, 3, 4, 8)
        assert config.group_size == -1 or config.group_size > 0
        assert QuantConfig.from_hf(config.to_hf(), "again") == config

    is_refused(parse)
