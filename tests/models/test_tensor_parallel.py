"""Models that several ranks share, against the same models of one: over gloo, and part by part.

Logits and tokens come from real processes (`tensor_parallel_ranks.py`), all cases from one start of
them. What a rank reads, and what is refused, needs no others: a `Group` that has met nobody loads.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensor_parallel_ranks import answers
from torch import Tensor
from transformers import FalconConfig, LlamaConfig, PretrainedConfig

from adapter_folders import write_random_adapter
from gptq_writer import write_gptq
from longwing.checkpoint import Checkpoint, read_packed
from longwing.errors import CheckpointError, ConfigError
from longwing.kernels import PackedWeight
from longwing.layers import Attention
from longwing.models import Decoder, ModelConfig, check_split, load_model, loader
from longwing.parallel import Group
from tiny import ARCHITECTURES, COMMON, VOCAB, save_model

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SCRIPT = Path(__file__).with_name("tensor_parallel_ranks.py")
Folder = Callable[[str, str], Path]


def _kv_heads(name: str) -> int:
    return ModelConfig.from_hf(ARCHITECTURES[name]().to_dict()).num_kv_heads


SHARED = [name for name in ARCHITECTURES if _kv_heads(name) % 2 == 0]
UNSHARED = [name for name in ARCHITECTURES if _kv_heads(name) == 1]
FORMATS = ("dense", "4-bit", "act-order")
PACKED: dict[str, dict[str, Any]] = {
    "4-bit": {"bits": 4, "group_size": 32},
    "act-order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
}
WIDE: dict[str, Any] = {**COMMON, "hidden_size": 128, "num_attention_heads": 4}
MORE: dict[str, Callable[[], PretrainedConfig]] = {
    "odd vocabulary": lambda: FalconConfig(
        **{**WIDE, "vocab_size": VOCAB + 1, "hidden_size": 64}, num_kv_heads=2, alibi=False,
        new_decoder_architecture=True,
    ),
    # Wide enough for the layout that a GPU streams, on each of two ranks.
    "parallel falcon": lambda: FalconConfig(
        **{**WIDE, "num_hidden_layers": 1}, num_kv_heads=2, new_decoder_architecture=True,
        alibi=False, bias=True, ffn_hidden_size=128,
    ),
    "llama": lambda: LlamaConfig(
        **{**WIDE, "num_hidden_layers": 1}, num_key_value_heads=2, intermediate_size=128,
        attention_bias=True, mlp_bias=True,
    ),
}  # fmt: skip
# Of two blocks, and wide enough that one hands its sum to the other's norms.
FOLDED: dict[str, Callable[[], PretrainedConfig]] = {
    "folding falcon": lambda: FalconConfig(
        **{**WIDE, "hidden_size": 1024, "num_attention_heads": 8}, num_kv_heads=2,
        new_decoder_architecture=True, alibi=False, bias=False, ffn_hidden_size=1024,
    ),
}  # fmt: skip
STREAMED = {"parallel falcon": "act-order", "llama": "4-bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder(name, kind)`: a tiny model, dense or packed, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str) -> Path:
        if (name, kind) not in made:
            path = made[name, kind] = tmp_path_factory.mktemp("model")
            config = {**ARCHITECTURES, **MORE, **FOLDED}[name]()
            if kind == "dense":
                save_model(config, path)
            else:
                write_gptq(config, path, **PACKED[kind])
        return made[name, kind]

    return make


@pytest.fixture(scope="module")
def adapter(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`adapter(name)`: one of every linear of a dense model, made once."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            path = tmp_path_factory.mktemp("adapters") / "one"
            write_random_adapter(path, folder(name, "dense"), seed=1)
            made[name] = str(path)
        return made[name]

    return make


def _cases() -> dict[int, dict[str, dict[str, Any]]]:
    """Size of group -> name of case -> what `answers` takes, the folder as (name, kind)."""
    two: dict[str, dict[str, Any]] = {
        f"{name}, {kind}": {"folder": (name, kind)} for name in SHARED for kind in FORMATS
    }
    two["odd vocabulary"] = {"folder": ("odd vocabulary", "dense")}
    two["kept packed"] = {"folder": ("llama2-biases", "act-order"), "unpack": False}
    for name in ("falcon-40b", "falcon-rw", "qwen2"):
        for kind in ("dense", "act-order"):
            two[f"{name}, {kind}, prepared"] = {"folder": (name, kind), "form": "prepared"}
    two["falcon-40b, adapter"] = {"folder": ("falcon-40b", "dense"), "adapter": "falcon-40b"}
    two["llama3, adapter, prepared"] = {
        "folder": ("llama3", "dense"),
        "form": "prepared",
        "adapter": "llama3",
    }
    for name, kind in STREAMED.items():
        streamed = {"form": "streamed", "dtype": "float16", "unpack": False, "num_new": 1}
        two[f"{name}, {kind}, streamed"] = {"folder": (name, kind), **streamed}
    four = {
        f"{name}, {kind}": {"folder": (name, kind)}
        for name in ("falcon-rw-12-heads", "falcon-parallel-per-head", "llama2")
        for kind in FORMATS
    }
    return {2: two, 4: four}


CASES = [(size, name) for size, cases in _cases().items() for name in cases]


@pytest.fixture(scope="module")
def in_folders(folder: Folder, adapter: Callable[[str], str]) -> Callable[..., dict[str, Any]]:
    """`in_folders(case)`: the same with paths for names."""

    def made(case: dict[str, Any]) -> dict[str, Any]:
        paths = {"folder": str(folder(*case["folder"]))}
        if "adapter" in case:
            paths["adapter"] = adapter(case["adapter"])
        return {**case, **paths}

    return made


def _run(worlds: list[dict[str, Any]], room: Path) -> None:
    """Start the groups one after the other; each rank writes what it finds."""
    (room / "plan.json").write_text(json.dumps(worlds))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(SCRIPT), str(room / "plan.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def of_ranks(
    in_folders: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where every rank's answers to all cases lie: SIZE.NUMBER.RANK.safetensors."""
    room = tmp_path_factory.mktemp("ranks")
    worlds = [
        {
            "size": size,
            "meeting": f"file://{room}/meeting-{size}",
            "cases": [
                {**in_folders(case), "out": str(room / f"{size}.{number}")}
                for number, case in enumerate(cases.values())
            ],
        }
        for size, cases in _cases().items()
    ]
    _run(worlds, room)
    return room


@pytest.mark.parametrize(("size", "name"), CASES)
def test_ranks_give_the_logits_and_tokens_of_one(
    size: int, name: str, in_folders: Callable[..., dict[str, Any]], of_ranks: Path
) -> None:
    cases = _cases()[size]
    number = list(cases).index(name)
    found = [load_file(of_ranks / f"{size}.{number}.{rank}.safetensors") for rank in range(size)]
    _agree(found, answers(**in_folders(cases[name])), 0.03 if "streamed" in name else 1e-4)


def _agree(found: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float) -> None:
    """Ranks agree with one, and with each other to the bit: else they would part."""
    assert expected["paged_SV"].std() > 0.1
    for own in found:
        assert own.keys() == expected.keys()
        assert torch.equal(own["tokens_S"], expected["tokens_S"])
        for key, logits in expected.items():
            torch.testing.assert_close(own[key], logits, atol=tolerance, rtol=tolerance)
            assert torch.equal(own[key], found[0][key])


ON_GPUS: list[dict[str, Any]] = [
    {"folder": ("falcon-40b", "dense"), "dtype": "float32"},
    *(
        {"folder": of, "form": "streamed", "dtype": dtype, "unpack": False, "num_new": num_new}
        for of, dtype, num_new in (
            (("parallel falcon", "act-order"), "float16", 3),
            (("llama", "4-bit"), "float16", 3),
            (("folding falcon", "4-bit"), "bfloat16", 1),
        )
    ),
]


@pytest.fixture(scope="module")
def of_gpus(
    in_folders: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where both GPUs' answers lie: case-NUMBER.RANK.safetensors, and sums.RANK.safetensors."""
    room = tmp_path_factory.mktemp("gpus")
    cases = [
        {**in_folders(case), "out": str(room / f"case-{number}")}
        for number, case in enumerate(ON_GPUS)
    ]
    world = {"size": 2, "meeting": f"file://{room}/meeting", "cases": cases}
    _run([{**world, "on_gpus": True, "recorded": str(room / "sums")}], room)
    return room


@two_gpus
@pytest.mark.parametrize("number", range(len(ON_GPUS)))
def test_two_gpus_give_the_logits_of_one(
    number: int, in_folders: Callable[..., dict[str, Any]], of_gpus: Path
) -> None:
    case = ON_GPUS[number]
    found = [load_file(of_gpus / f"case-{number}.{rank}.safetensors") for rank in range(2)]
    one = answers(**in_folders(case), device="cuda:0")
    _agree(found, one, {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}[case["dtype"]])


@two_gpus
def test_a_graph_replays_the_sums_of_two_gpus(of_gpus: Path) -> None:
    for rank in range(2):
        replayed = load_file(of_gpus / f"sums.{rank}.safetensors")["replayed"]
        assert replayed.tolist() == [[3.0, 5.0, 7.0]] * 2


@two_gpus
def test_sums_of_two_gpus_that_reach_each_other_are_nccls(of_gpus: Path) -> None:
    for rank in range(2):
        sums = load_file(of_gpus / f"sums.{rank}.safetensors")
        if "last_places" not in sums:
            pytest.skip("these GPUs do not reach into each other's memory")
        assert sums["last_places"].max() <= 1.0


def _parts(path: Path, size: int, **settings: Any) -> list[Decoder]:
    return [load_model(path, group=Group(rank, size), **settings) for rank in range(size)]


def _put_together(path: Path, size: int) -> dict[str, Tensor]:
    """Every linear of the whole, from the parts that ranks have of it."""
    parts = [dict(model.linears()) for model in _parts(path, size)]
    whole = {}
    for name, linear in load_model(path).linears():
        assert linear.weight is not None
        found_OI = torch.full_like(linear.weight, float("nan"))
        for own in parts:
            shard, weight = own[name].shard, own[name].weight
            assert shard is not None
            assert weight is not None
            found_OI[shard.weight()] = weight
        whole[name] = found_OI
    return whole


def _differs(path: Path) -> bool:
    whole = {name: linear.weight for name, linear in load_model(path).linears()}
    found = _put_together(path, 2)
    return any(w is None or not torch.equal(found[name], w) for name, w in whole.items())


def test_scales_cut_under_act_order_would_be_noticed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classical fault: groups are taken to lie in order, so a rank's inputs have wrong ones."""
    path = folder("falcon-40b", "act-order")
    assert not _differs(path)

    def in_order(*args: Any, **part: Any) -> PackedWeight:
        weight = read_packed(*args, **part)
        ins, in_features = part.get("ins"), args[2]
        if ins is None or ins == slice(0, in_features):
            return weight
        groups = slice(ins.start // 32, ins.stop // 32)
        scales_GN, zeros_GN = weight.scales_GN[groups], weight.zeros_GN[groups]
        return replace(weight, scales_GN=scales_GN, zeros_GN=zeros_GN, g_idx_K=None)

    monkeypatch.setattr(loader, "read_packed", in_order)
    assert _differs(path)


def test_heads_that_are_not_a_rank_s_own_would_be_noticed(folder: Folder) -> None:
    """Slopes of ALiBi go with the heads: the second rank's are the flatter half."""
    first, second = _parts(folder("falcon-rw", "dense"), 2)
    whole = load_model(folder("falcon-rw", "dense"))
    slopes = [
        [m.spec.alibi_slopes_N for m in model.modules() if isinstance(m, Attention)]
        for model in (first, second, whole)
    ]
    for one_N, other_N, whole_N in zip(*slopes, strict=True):
        assert one_N is not None
        assert other_N is not None
        assert whole_N is not None
        assert torch.equal(torch.cat((one_N, other_N)), whole_N)
    assert (second.num_heads, second.num_kv_heads, second.config.num_heads) == (2, 2, 4)


def test_a_tied_head_is_its_rows_of_the_whole_embedding(folder: Folder) -> None:
    model = _parts(folder("falcon-40b", "dense"), 2)[1]
    assert model.embedding.weight.shape == (VOCAB, 128)
    assert model.lm_head.weight is not None
    assert model.lm_head.weight.shape == (VOCAB // 2, 128)
    assert model.lm_head.weight.data_ptr() == model.embedding.weight[VOCAB // 2].data_ptr()


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes of tensor files were read since it was last asked."""
    count, preadv = 0, os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal count
        count += (size := preadv(descriptor, buffers, offset))
        return size

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(os, "preadv", counted)
    return since


@pytest.mark.parametrize("name", ["falcon-rw", "falcon-180b", "llama2"])
def test_a_rank_reads_the_bytes_it_keeps_and_no_more(
    name: str, folder: Folder, bytes_read: Callable[[], int]
) -> None:
    path = folder(name, "dense")
    Checkpoint.open(path)
    of_headers = bytes_read()
    for rank in range(2):
        model = load_model(path, group=Group(rank, 2))
        assert bytes_read() - of_headers == _dense_bytes(model)


def _dense_bytes(model: Decoder) -> int:
    own = dict(model.named_parameters())
    if model.config.tie_embeddings:  # a view
        own.pop("lm_head.weight", None)
    return sum(parameter.nbytes for parameter in own.values())


@pytest.mark.parametrize("kind", ["4-bit", "act-order"])
def test_a_rank_reads_its_part_of_packed_tensors_and_every_g_idx(
    kind: str, folder: Folder, bytes_read: Callable[[], int]
) -> None:
    path = folder("llama3", kind)
    Checkpoint.open(path)
    of_headers = bytes_read()
    for rank in range(2):
        model = load_model(path, group=Group(rank, 2), unpack=False, dtype=torch.float16)
        expected = _dense_bytes(model)
        for _, linear in model.linears():
            if (weight := linear.packed) is not None and linear.shard is not None:
                expected += weight.qweight_WN.nbytes + weight.scales_GN.nbytes
                expected += weight.zeros_GN.numel() * weight.bits // 8
                expected += 4 * linear.shard.in_features
        assert bytes_read() - of_headers == expected


@pytest.mark.parametrize("name", UNSHARED)
def test_one_key_value_head_is_refused_before_anything_is_read(
    name: str, folder: Folder, bytes_read: Callable[[], int]
) -> None:
    path = folder(name, "dense")
    Checkpoint.open(path)
    of_headers = bytes_read()
    with pytest.raises(ConfigError, match=r"1 key/value head .* run a whole copy of it on each"):
        load_model(path, group=Group(0, 2))
    assert bytes_read() == of_headers


def test_a_number_that_does_not_divide_is_told_those_that_do(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks .* 4 key/value heads .* use 1, 2, 4 of them"):
        load_model(folder("llama2", "dense"), group=Group(0, 3))
    raw = ARCHITECTURES["llama2"]().to_dict() | {"intermediate_size": 98}
    with pytest.raises(ConfigError, match="an MLP 98 wide"):
        check_split(ModelConfig.from_hf(raw), 4)


def test_parts_that_end_inside_a_word_are_refused_before_anything_is_read(
    tmp_path: Path, bytes_read: Callable[[], int]
) -> None:
    config = LlamaConfig(**{**WIDE, "hidden_size": 64}, intermediate_size=72)
    write_gptq(config, tmp_path, bits=4, group_size=-1)
    Checkpoint.open(tmp_path)
    of_headers = bytes_read()
    with pytest.raises(ConfigError, match=r"36 to 72 .* whole 32-bit words at 4 bits"):
        load_model(tmp_path, group=Group(1, 2))
    assert bytes_read() == of_headers


def test_a_number_that_is_not_finite_is_refused_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    write = save_model(ARCHITECTURES["llama2"](), tmp_path)
    with torch.no_grad():
        write.model.layers[1].mlp.down_proj.weight[3, 90] = float("inf")
    write.save_pretrained(tmp_path)
    load_model(tmp_path, group=Group(0, 2))
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight: 1 of 3072 values of this rank's part"
    ):
        load_model(tmp_path, group=Group(1, 2))
