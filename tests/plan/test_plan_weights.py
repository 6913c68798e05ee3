"""The planned weights are the bytes of the tensors that a checkpoint holds."""

import pytest
import torch
from tiny_models import CONFIGS, config

from longwing.checkpoint import QuantConfig, packed_tensors
from longwing.errors import ConfigError, RequestError
from longwing.kernels import BITS, PackedWeight
from longwing.models import DTYPES, ModelConfig, empty_model
from longwing.plan import known_config, plan
from longwing.plan.weights import block_linears, num_parameters


def stored_packed(in_features: int, out_features: int, bits: int, group_size: int) -> dict:
    """The tensors of one packed layer, as a checkpoint holds them."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    weight = PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32),
        zeros_GN=torch.ones(groups, out_features, dtype=torch.uint8),
        scales_GN=torch.ones(groups, out_features, dtype=torch.float16),
    )
    return packed_tensors(weight, "gptq")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights_are_the_bytes_of_the_models_tensors(kind, dtype):
    model = empty_model(config(kind)).to(DTYPES[dtype])
    stored = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    if model.config.tie_embeddings:
        del stored["lm_head.weight"]
    assert plan(config(kind), context=1, dtype=dtype).weights.total == sum(stored.values())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 48, 1024])
def test_packed_weights_are_the_bytes_of_the_stored_tensors(kind, bits, group_size):
    model = empty_model(config(kind)).to(torch.bfloat16)
    dense = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    if model.config.tie_embeddings:
        del dense["lm_head.weight"]
    by_suffix = dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"), 0)
    for name, linear in block_linears(model):
        del dense[f"{name}.weight"]
        tensors = stored_packed(linear.in_features, linear.out_features, bits, group_size)
        for suffix, tensor in tensors.items():
            by_suffix[suffix] += tensor.nbytes
    quant = QuantConfig(bits=bits, group_size=group_size)
    weights = plan(config(kind), context=1, quant=quant).weights
    assert weights.qweight == by_suffix["qweight"]
    assert weights.zeros == by_suffix["qzeros"]
    assert weights.scales == by_suffix["scales"]
    assert weights.g_idx == by_suffix["g_idx"]
    assert weights.total == sum(by_suffix.values()) + sum(dense.values())


def test_a_head_of_another_dtype_is_a_copy_of_a_tied_embedding():
    tied = plan(config("llama, tied"), context=1)
    copied = plan(config("llama, tied"), context=1, head_dtype="float32")
    assert tied.weights.head == 0
    assert copied.weights.head == 160 * 256 * 4
    assert copied.weights.total == tied.weights.total + copied.weights.head
    assert copied.parameters == tied.parameters


def test_a_tied_embedding_counts_once_among_the_parameters():
    untied, tied = empty_model(config("llama")), empty_model(config("llama, tied"))
    assert num_parameters(untied) == num_parameters(tied) + 160 * 256


def test_group_128_is_refused_for_falcon_7b_and_told_what_fits():
    with pytest.raises(ConfigError) as error:
        plan(known_config("falcon-7b"), context=2048, bits=4, group_size=128)
    message = str(error.value)
    assert "group size 128 does not divide the 4,544 input features" in message
    assert "transformer.h.0.self_attention.query_key_value" in message
    assert "(35.5 groups)" in message
    assert message.endswith("for this model use 64, 32, 16 or -1 (one group)")


@pytest.mark.parametrize("group_size", [64, 32, 16, -1])
def test_the_group_sizes_that_the_refusal_names_are_accepted(group_size):
    plan(known_config("falcon-7b"), context=2048, bits=4, group_size=group_size)


def test_a_folder_with_ragged_groups_is_planned_though_none_would_be_made():
    """SmolLM2-135M, hidden size 576: 4.5 groups of 128, so 5 in a folder made elsewhere."""
    smol = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        }
    )
    planned = plan(smol, context=1, quant=QuantConfig(bits=4, group_size=128))
    # Outputs of q, k, v, o, gate and up, which have 576 inputs; and of down, which has 1,536.
    columns = 5 * (576 + 192 + 192 + 576 + 1536 + 1536) + 12 * 576
    assert planned.weights.scales == 30 * columns * 2
    assert planned.weights.zeros == 30 * columns // 2
    assert (planned.bits, planned.group_size) == (4, 128)
    with pytest.raises(ConfigError, match="group size 128 does not divide the 576 input features"):
        plan(smol, context=1, bits=4, group_size=128)


def test_groups_that_divide_plan_the_same_for_a_folder_and_for_one_to_come():
    folder = plan(config("llama"), context=64, quant=QuantConfig(bits=3, group_size=64))
    assert folder == plan(config("llama"), context=64, bits=3, group_size=64)


def test_a_folders_settings_and_asked_for_bits_exclude_each_other():
    with pytest.raises(RequestError, match="not both"):
        plan(config("llama"), context=1, quant=QuantConfig(bits=4, group_size=64), bits=4)


@pytest.mark.parametrize(("bits", "group_size"), [(5, 128), (16, 128), (4, 0), (4, -2)])
def test_settings_that_gptq_does_not_know_are_refused(bits, group_size):
    with pytest.raises(ConfigError):
        plan(known_config("falcon-40b"), context=2048, bits=bits, group_size=group_size)


def test_a_width_that_leaves_words_half_filled_is_refused():
    odd = ModelConfig.from_hf({**CONFIGS["llama"], "intermediate_size": 720})
    half_filled = r"gate_proj has 720 output features; at 3 bits"
    with pytest.raises(ConfigError, match=half_filled):
        plan(odd, context=1, bits=3, group_size=-1)
    with pytest.raises(ConfigError, match=half_filled):
        plan(odd, context=1, quant=QuantConfig(bits=3, group_size=-1))


# K * N * bits / 8 + groups * N * (2 + bits / 8) over all layers, in GB, worked out by hand.
GPTQ_GB = [
    ("falcon-40b", -1, 2, 10.20),
    ("falcon-40b", -1, 3, 15.30),
    ("falcon-40b", -1, 4, 20.39),
    ("falcon-40b", -1, 8, 40.78),
    ("falcon-40b", 128, 2, 10.91),
    ("falcon-40b", 128, 3, 16.04),
    ("falcon-40b", 128, 4, 21.18),
    ("falcon-40b", 128, 8, 41.72),
    ("falcon-7b", -1, 2, 1.66),
    ("falcon-7b", -1, 3, 2.49),
    ("falcon-7b", -1, 4, 3.32),
    ("falcon-7b", -1, 8, 6.63),
    ("falcon-7b", 64, 2, 1.89),
    ("falcon-7b", 64, 3, 2.73),
    ("falcon-7b", 64, 4, 3.57),
    ("falcon-7b", 64, 8, 6.94),
]


@pytest.mark.parametrize(("name", "group_size", "bits", "gigabytes"), GPTQ_GB)
def test_packed_falcons_have_their_known_size(name, group_size, bits, gigabytes):
    planned = plan(known_config(name), context=1, bits=bits, group_size=group_size)
    assert round(planned.weights.packed / 1e9, 2) == gigabytes


@pytest.mark.parametrize(("bits", "gigabytes"), [(2, 47.5), (3, 69.9), (4, 92.3), (8, 181.7)])
def test_packed_falcon_180b_has_its_known_size(bits, gigabytes):
    planned = plan(known_config("falcon-180b"), context=1, bits=bits)
    assert round(planned.weights.packed / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("name", "quantised", "dense_gb", "embedding_gb"),
    [
        ("falcon-7b", 6.63, 13.25, 0.591),
        ("falcon-40b", 40.77, 81.54, 1.065),
        ("falcon-180b", 177.59, 355.17, 1.931),
    ],
)
def test_falcons_have_their_known_parameters(name, quantised, dense_gb, embedding_gb):
    dense = plan(known_config(name), context=1)
    packed = plan(known_config(name), context=1, bits=4, group_size=-1)
    assert round(packed.quantised_parameters / 1e9, 2) == quantised
    assert round(dense.weights.linears / 1e9, 2) == dense_gb
    assert round(dense.weights.embedding / 1e9, 3) == embedding_gb
    assert dense.weights.head == 0


def test_falcon_40b_at_4_bits_is_20_39_gb_of_weights_and_0_8_of_scales_and_zeros():
    weights = plan(known_config("falcon-40b"), context=24_576, bits=4, group_size=128).weights
    assert weights.qweight == 40_768_634_880 // 2
    assert round((weights.scales + weights.zeros) / 1e9, 1) == 0.8


def test_one_bit_less_saves_an_eighth_of_a_byte_a_weight_and_a_zero_point():
    """The 4- and the 3-bit plan of one model differ by the sum of K * N / 8 + G * N / 8."""
    four, three = (
        plan(known_config("falcon-40b"), context=24_576, bits=bits, group_size=128)
        for bits in (4, 3)
    )
    saved = 0
    for _, linear in block_linears(empty_model(known_config("falcon-40b"))):
        K, N = linear.in_features, linear.out_features
        saved += K * N // 8 + (K // 128) * N // 8
    assert four.weights.total - three.weights.total == saved
    assert four.kv_bytes == three.kv_bytes
    assert four.quantised_parameters == three.quantised_parameters == 40_768_634_880
