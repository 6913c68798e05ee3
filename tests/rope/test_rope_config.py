"""Reading and writing config.json: both dialects, and everything that must be refused."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from rope_examples import ALL

from longwing.errors import ConfigError
from longwing.rope import MEANING, METHODS, RopeConfig
from longwing.rope.config import PARAMETERS
from longwing.rope.methods import frequencies

BAD_NUMBERS = [0, -1, math.nan, math.inf, -math.inf, 1e308, 10**400, "2", True, [2.0]]
LISTS = ("short_factor", "long_factor")
NUMERIC = [
    (name, parameter)
    for name in METHODS
    for parameter in (*PARAMETERS[name][0], *PARAMETERS[name][1])
    if parameter not in (*LISTS, "truncate")
]


def read(raw, *, head_dim=64, max_position=2048, **more):
    return RopeConfig.from_hf(raw, head_dim=head_dim, max_position=max_position, **more)


def both(name: str) -> dict:
    return ALL[name].new | ALL[name].old


@pytest.mark.parametrize("name", ALL)
def test_both_dialects_mean_the_same_alone_and_together(name):
    example = ALL[name]
    assert example.config(example.new) == example.config(example.old)
    assert example.config(both(name)) == example.config(example.new)


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_reads_back_equal_even_through_a_file(name):
    cfg = ALL[name].config()
    raw = json.loads(json.dumps(cfg.to_hf()))
    for left_out in ((), ("rope_parameters",), ("rope_scaling",)):
        half = {key: value for key, value in raw.items() if key not in left_out}
        back = read(half, head_dim=cfg.head_dim, max_position=raw["max_position_embeddings"])
        assert back == cfg


def test_longropes_trained_length_is_written_where_transformers_4_looks_for_it():
    assert ALL["longrope"].config().to_hf()["original_max_position_embeddings"] == 4096


def test_numbers_are_written_as_fractions_since_transformers_complains_of_whole_ones():
    written = ALL["linear"].config().to_hf()["rope_parameters"]
    assert isinstance(written["factor"], float)
    assert isinstance(replace(ALL["linear"].config(), theta=10000).to_hf()["rope_theta"], float)


@pytest.mark.parametrize("name", ALL)
def test_the_older_name_type_works_alone_and_beside_the_newer(name):
    example = ALL[name]
    kind = example.scaling["rope_type"]
    renamed = {k: v for k, v in example.scaling.items() if k != "rope_type"} | {"type": kind}
    assert (
        example.config({"rope_theta": example.theta, "rope_scaling": renamed}) == example.config()
    )
    doubled = example.scaling | {"type": kind}
    assert (
        example.config({"rope_theta": example.theta, "rope_scaling": doubled}) == example.config()
    )


def test_su_is_an_older_name_of_longrope():
    example = ALL["longrope"]
    scaling = example.scaling | {"rope_type": "su"}
    assert example.config({"rope_theta": 1e4, "rope_scaling": scaling}) == example.config()


def test_no_settings_at_all_are_plain_rope_with_the_familys_base():
    for raw in ({}, {"rope_scaling": None}, {"rope_parameters": None}, {"rope_parameters": {}}):
        cfg = read(raw | {"hidden_size": 64}, default_theta=5e5)
        assert (cfg.method, cfg.theta, cfg.trained_len, cfg.max_len) == ("default", 5e5, 2048, 2048)


def test_dynamic_with_alpha_is_static_ntk_as_vllm_and_sglang_read_it():
    cfg = read({"rope_scaling": {"rope_type": "dynamic", "alpha": 4.0}})
    assert cfg == ALL["ntk"].config()
    assert cfg.to_hf()["rope_parameters"]["rope_type"] == "dynamic"


def test_falconlite_defaults_are_the_published_ones():
    cfg = read({"rope_scaling": {"type": "falconlite"}}, max_position=11000)
    assert (cfg.alpha, cfg.trained_len, cfg.max_len) == (0.25, 2048, 11000)


def test_phi3_states_the_trained_length_at_the_top_and_no_factor():
    example = ALL["longrope"]
    scaling = dict(example.scaling)
    original = scaling.pop("original_max_position_embeddings")
    raw = {"rope_scaling": scaling, "original_max_position_embeddings": original}
    cfg = example.config(raw)
    assert cfg == example.config()
    assert cfg.factor == 32.0


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("default", 2048),
        ("linear", 8192),
        ("dynamic", 4096),
        ("yarn", 131072),
        ("yarn, max_position unmultiplied", 131072),
        ("llama3", 131072),
        ("longrope", 131072),
        ("ntk", 2048),
        ("falconlite", 24576),
    ],
)
def test_the_claimed_length_follows_the_habits_of_config_json(name, claim):
    assert ALL[name].config().max_len == claim


def test_a_yarn_factor_left_out_is_the_ratio_of_the_lengths():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 3000, "factor": None}
    cfg = read({"rope_scaling": scaling}, max_position=100_000)
    assert cfg.factor == pytest.approx(100 / 3)
    assert cfg.max_len == 100_000


def test_yarn_defaults_written_out_or_left_out_are_equal():
    example = ALL["yarn"]
    full = example.scaling | {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    assert example.config({"rope_theta": 1e6, "rope_scaling": full}) == example.config()


def test_harmless_fields_are_read_past():
    example = ALL["yarn"]
    raw = {"rope_theta": 1e6, "rope_interleaved": False, "rope_local_base_freq": None}
    scaling = example.scaling | {"finetuned": True, "partial_rotary_factor": 1.0, "mscale": None}
    assert example.config(raw | {"rope_scaling": scaling}) == example.config()


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: str(v)[:9])
@pytest.mark.parametrize(("name", "parameter"), NUMERIC)
def test_a_bad_number_is_refused_by_name(name, parameter, value):
    example = ALL[name]
    for raw in (
        {"rope_parameters": example.scaling | {parameter: value}},
        {"rope_scaling": example.scaling | {parameter: value}},
    ):
        with pytest.raises(ConfigError, match=rf"rope {parameter} is .+, but .+; .+"):
            example.config(raw)
    with pytest.raises(ConfigError, match=parameter):
        replace(example.config(), **{parameter: value})


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 1, 1.0], ids=lambda v: str(v)[:9])
def test_a_bad_theta_is_refused_by_name(value):
    for raw in ({"rope_theta": value}, {"rope_parameters": {"rope_theta": value}}):
        with pytest.raises(ConfigError, match=r"rope theta is .+ from 1.000001 to"):
            read(raw)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 1, 2048.0, 2**31], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize("name", ["default", "linear", "yarn", "llama3", "longrope", "falconlite"])
def test_a_bad_trained_length_is_refused_by_name(name, value):
    scaling = ALL[name].scaling | {"original_max_position_embeddings": value}
    with pytest.raises(ConfigError, match="original_max_position_embeddings is"):
        ALL[name].config({"rope_scaling": scaling})


@pytest.mark.parametrize("field", ["head_dim", "trained_len", "max_len"])
@pytest.mark.parametrize("value", [*BAD_NUMBERS, 3.5], ids=lambda v: str(v)[:9])
def test_a_bad_count_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"rope {field} is .+ whole number"):
        replace(ALL["default"].config(), **{field: value})


def test_an_odd_head_is_refused():
    with pytest.raises(ConfigError, match="head_dim is 63, but it must be even"):
        read({}, head_dim=63)


@pytest.mark.parametrize("field", LISTS)
@pytest.mark.parametrize(
    "value", [[], [1.0] * 47, [1.0] * 49, 2.0, "1" * 48, *([1.0] * 47 + [x] for x in BAD_NUMBERS)],
    ids=lambda v: str(v)[-12:],
)  # fmt: skip
def test_a_bad_list_is_refused_by_name(field, value):
    example = ALL["longrope"]
    with pytest.raises(ConfigError, match=f"rope {field} is"):
        example.config({"rope_scaling": example.scaling | {field: value}})


@pytest.mark.parametrize("value", [0, 1, "true", 1.0])
def test_truncate_must_be_a_truth_value(value):
    with pytest.raises(ConfigError, match=r"truncate is .+ true or false"):
        replace(ALL["yarn"].config(), truncate=value)


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_the_method_does_not_use_is_refused(name):
    example, good = ALL[name], ALL[name].config()
    unused = {"factor": 2.0, "alpha": 2.0, "beta_fast": 8.0, "truncate": False, "mscale": 1.0}
    unused |= {"low_freq_factor": 1.0, "long_factor": (1.0,) * 32, "attention_factor": 1.0}
    for parameter in unused.keys() - set(PARAMETERS[name][0] + PARAMETERS[name][1]):
        with pytest.raises(ConfigError, match=f"rope {parameter} is .+ {name} does not use it"):
            replace(good, **{parameter: unused[parameter]})
        if (name, parameter) != ("dynamic", "alpha"):  # that is how others spell ntk
            with pytest.raises(ConfigError, match=parameter):
                example.config({"rope_scaling": example.scaling | {parameter: unused[parameter]}})


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_the_method_needs_is_missed_by_name(name):
    example = ALL[name]
    for parameter in PARAMETERS[name][0]:
        scaling = {key: value for key, value in example.scaling.items() if key != parameter}
        if name in ("yarn", "longrope") and parameter == "factor":
            scaling.pop("original_max_position_embeddings")  # else factor follows from it
        if parameter in example.scaling:
            with pytest.raises(ConfigError, match=f"rope {parameter} is missing"):
                example.config({"rope_theta": 1e4, "rope_scaling": scaling})


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "field", ["attn_factor", "mrope_section", "alpha_value", "llama_4_scaling"]
)
def test_an_unknown_field_is_refused_and_never_ignored(dialect, field):
    with pytest.raises(ConfigError, match=f"rope {field} is .+ not ignored"):
        read({dialect: {"rope_type": "linear", "factor": 2.0, field: 1}})


@pytest.mark.parametrize("field", ["rope_local_base_freq", "rope_ratio", "rotary_pct", "rope_dim"])
def test_an_unknown_field_at_the_top_is_refused_too(field):
    with pytest.raises(ConfigError, match=f"{field} is 0.5"):
        read({field: 0.5})


def test_interleaved_pairs_are_refused():
    with pytest.raises(ConfigError, match="rope_interleaved is True"):
        read({"rope_interleaved": True})


@pytest.mark.parametrize("value", [0.5, 2, True, "1", math.nan])
def test_heads_that_rotate_in_part_are_refused(value):
    for raw in ({"partial_rotary_factor": value},
                {"rope_parameters": {"partial_rotary_factor": value}}):  # fmt: skip
        with pytest.raises(ConfigError, match="partial_rotary_factor is"):
            read(raw)


@pytest.mark.parametrize("kind", ["mrope", "proportional", "", "YARN", 3, True, ["yarn"]])
def test_an_unknown_method_is_refused_with_the_list_of_known_ones(kind):
    with pytest.raises(ConfigError, match=r"rope_type is .+ one of default, linear, ntk"):
        read({"rope_scaling": {"rope_type": kind, "factor": 2.0}})


def test_settings_per_layer_type_are_refused_with_the_reason():
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    with pytest.raises(ConfigError, match=r"rope_parameters.full_attention is .+ per layer type"):
        read({"rope_parameters": nested})


@pytest.mark.parametrize("value", ["yarn", [], 4.0, True])
def test_settings_that_are_no_object_are_refused(value):
    with pytest.raises(ConfigError, match=r"rope_scaling is .+ object"):
        read({"rope_scaling": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "linear"}, r"differ in method \("),
        ({"factor": 4.0}, r"differ in .*factor \("),
        ({"rope_theta": 5e5}, r"rope_theta is 500000.0, .* 10000.0"),
    ],
)
def test_dialects_that_disagree_are_refused_by_the_field(change, message):
    raw = both("dynamic")
    with pytest.raises(ConfigError, match=f"{message}.+equal"):
        read(raw | {"rope_scaling": raw["rope_scaling"] | change})
    with pytest.raises(ConfigError, match=f"{message}.+equal"):
        read(raw | {"rope_parameters": raw["rope_parameters"] | change})


def test_a_base_that_only_one_dialect_knows_is_a_disagreement():
    raw = both("dynamic") | {"rope_parameters": ALL["dynamic"].scaling | {"rope_theta": 5e5}}
    del raw["rope_theta"]
    with pytest.raises(ConfigError, match=r"differ in theta \(500000.0 / 10000.0\)"):
        read(raw)


@pytest.mark.parametrize("field", ["rope_theta", "original_max_position_embeddings"])
def test_a_field_stated_twice_must_be_the_same_twice(field):
    raw = {"rope_parameters": {"rope_type": "default", field: 4096}, field: 8192}
    with pytest.raises(ConfigError, match=rf"rope_parameters.{field} is 4096, but .+ 8192"):
        read(raw)


def test_two_names_of_the_type_must_agree():
    with pytest.raises(ConfigError, match=r"rope_type is 'linear', but .+ 'dynamic'"):
        read({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}})


def test_dynamic_must_not_name_another_trained_length():
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096}
    with pytest.raises(ConfigError, match="original_max_position_embeddings is 4096"):
        read({"rope_scaling": scaling}, max_position=8192)
    assert read({"rope_scaling": scaling}, max_position=4096).trained_len == 4096


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor"),
        ("yarn", {"beta_fast": 0.5}, "beta_fast"),
        ("yarn", {"mscale": 1.0}, "mscale"),
        ("yarn", {"mscale_all_dim": 1.0}, "mscale_all_dim"),
        ("yarn, mscale", {"attention_factor": 1.0}, "mscale"),
        ("yarn", {"trained_len": 4}, "trained_len"),
        ("yarn", {"trained_len": 2**30, "theta": 1.5}, "trained_len"),
        ("ntk", {"alpha": 1e-5}, "alpha"),
        ("falconlite", {"alpha": 1e5}, "alpha"),
        ("dynamic", {"head_dim": 2}, "head_dim"),
    ],
)
def test_values_at_odds_with_each_other_are_refused(name, change, field):
    with pytest.raises(ConfigError, match=f"rope {field} is"):
        replace(ALL[name].config(), **change)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn"])
def test_a_claim_that_config_json_cannot_state_is_not_lost_silently(name):
    cfg = replace(ALL[name].config(), max_len=10_000)
    with pytest.raises(ConfigError, match="max_len is 10000"):
        cfg.to_hf()


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_stay_finite_at_the_edge_of_every_bound(name):
    shortest = 8192 if name == "yarn" else 2  # below that its blend has no place at this theta
    cfg = replace(ALL[name].config(), theta=1e15, trained_len=shortest, max_len=2**30)
    for change in ({"factor": 1e6}, {"factor": 1.0}, {"alpha": 1e-6}, {"alpha": 1e6}):
        if change.keys() <= set(PARAMETERS[name][0]):
            try:
                extreme = replace(cfg, **change)
            except ConfigError:
                continue  # refused before any arithmetic: as good
            inv_freq_F, scale = frequencies(extreme, 2**30)
            assert torch.isfinite(inv_freq_F).all()
            assert (inv_freq_F > 0).all()
            assert math.isfinite(scale)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        ALL["yarn"].config().factor = 8.0


def test_every_parameter_is_explained():
    for needs, may in PARAMETERS.values():
        assert {*needs, *may} <= MEANING.keys()
    assert PARAMETERS.keys() == METHODS.keys()
