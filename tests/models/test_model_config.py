import dataclasses
import json
import subprocess
import sys
import tomllib

import pytest

from delta_jax.config import described, load_config, to_dict
from delta_jax.layers import RopeScaling
from delta_jax.models import MixerSpec, ModelConfig

TABLE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_layers": 4,
    "pattern": [
        {"mixer": "delta_net", "num_heads": 2},
        {"mixer": "gated_delta_net", "head_dim": 8, "expand_v": 1.5},
    ],
}
EXPERTS = {"expert_size": 8, "num_experts": 8, "num_experts_per_token": 2}


def test_reads_its_table_and_writes_it_again():
    config = load_config(ModelConfig, TABLE)
    assert config.pattern[0] == MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
    assert [(len(run.block), run.repeats) for run in config.runs] == [(2, 2)]
    assert load_config(ModelConfig, to_dict(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))
    hybrid = TABLE | {"layer_overrides": [{"layers": [1, 2], "mixer": "attention", "num_heads": 4}], "experts": EXPERTS}
    config = load_config(ModelConfig, hybrid)
    assert [layer.mixer.mixer for layer in config.layers] == ["delta_net", "attention", "attention", "gated_delta_net"]
    assert load_config(ModelConfig, to_dict(config)) == config
    changed = load_config(ModelConfig, TABLE, ["pattern.0.num_heads=4", "pattern.1.norm_placement=post"])
    assert dict(changed.pattern[0].options) == {"num_heads": 4}
    assert [spec.norm_placement for spec in changed.pattern] == ["pre", "post"]


def test_tables_inside_a_mixer_and_the_placement_of_its_norms_are_written_and_read_again():
    """As a run saves them, and as the command shows them."""
    stretched = {"mixer": "attention", "num_heads": 2, "rope_scaling": {"kind": "linear", "factor": 2.0}}
    table = TABLE | {
        "pattern": [stretched, TABLE["pattern"][0]],
        "layer_overrides": [stretched | {"layers": [3], "norm_placement": "post"}],
        "experts": EXPERTS | {"num_expert_groups": 4, "num_groups_per_token": 2, "normalize_weights": False},
        "dense_layers": [2],
    }
    config = load_config(ModelConfig, table, ["pattern.0.rope_scaling.factor=3"])
    assert [layer.mixer.norm_placement for layer in config.layers] == ["pre", "pre", "pre", "post"]
    assert [layer.experts for layer in config.layers] == [True, True, False, True]
    assert dict(config.pattern[0].options)["rope_scaling"] == RopeScaling(kind="linear", factor=3.0)
    assert hash(config) == hash(load_config(ModelConfig, json.loads(json.dumps(to_dict(config)))))
    text = described(config)
    assert load_config(ModelConfig, tomllib.loads(text)) == config
    for meaning in (
        "# where the norms of the block are",
        "# how these wave lengths are stretched",
        "# groups that a token",
    ):
        assert meaning in text


@pytest.mark.parametrize(
    ("layers", "pattern", "dense", "runs"),
    [
        (8, 4, (0,), [(1, 1), (1, 2), (1, 1), (1, 3), (1, 1)]),
        (12, 1, (0, 2, 4, 6, 8, 10), [(2, 6)]),
        (24, 4, (0, 8, 16), [(8, 3)]),
        (24, 4, (23,), [(4, 5), (1, 3), (1, 1)]),
        (24, 1, (10, 11), [(1, 10), (1, 2), (1, 12)]),
    ],
)
def test_dense_layers_anywhere_leave_a_stack_that_repeats(layers, pattern, dense, runs):
    """Layers are compiled once for each place in a block, however many repeat it."""
    specs = [{"mixer": "gated_delta_net", "num_heads": 2, "head_dim": 8}] * (pattern - 1)
    table = TABLE | {"num_layers": layers, "pattern": [*specs, TABLE["pattern"][0]], "experts": EXPERTS}
    config = load_config(ModelConfig, table | {"dense_layers": dense})
    assert [(len(run.block), run.repeats) for run in config.runs] == runs
    stack = [layer for run in config.runs for layer in run.block * run.repeats]
    assert [place for place, layer in enumerate(stack) if not layer.experts] == list(dense)
    assert tuple(stack) == config.layers


def test_the_mlp_is_as_wide_as_in_the_papers():
    widths = {1024: 2816, 2048: 5632, 16: 256, 768: 2048}
    for hidden, width in widths.items():
        assert load_config(ModelConfig, TABLE | {"hidden_size": hidden}).mlp_width == width
    assert load_config(ModelConfig, TABLE | {"intermediate_size": 40}).mlp_width == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"mlp_size": 40}, 'unknown key "mlp_size" \\(it is now called intermediate_size\\)'),
        ({"experts": {"size": 8, "num_experts": 8, "num_experts_per_token": 2}}, "it is now called expert_size"),
        ({"pattern": [{"mixer": "mamba_2"}]}, "got 'mamba_2' \\(it is now called mamba2\\)"),
        ({"pattern": [{"mixer": "latent_attention", "latent_size": 4}]}, "it is now called kv_lora_rank"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_layers": 1}, "num_layers must be at least the length of the pattern"),
        ({"pattern": []}, "pattern must hold"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"initializer_std": -0.1}, "initializer_std"),
        ({"remat": "some"}, "remat must be one of none, dots, block"),
        ({"remat": "block", "remat_save": ("states",)}, "remat_save must hold names of delta_rule_states,"),
        ({"remat": "block", "remat_offload": "mixer_output"}, "remat_offload: wanted an array"),
        ({"remat_save": ("mixer_output",)}, "remat_save must be empty with remat = 'none'"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
        ({"pattern": [{"mixer": "delta_nett"}]}, "mixer must be one of .*delta_net"),
        ({"pattern": [{"num_heads": 2}]}, "lacks the key mixer"),
        ({"pattern": [{"mixer": "delta_net", "n_heads": 2}]}, "no option 'n_heads' .did you mean num_heads"),
        ({"pattern": [{"mixer": "delta_net", "norm_eps": 0.1}]}, "no option 'norm_eps'"),
        (
            {"pattern": [{"mixer": "delta_net"}, {"mixer": "delta_net", "num_heads": 3}]},
            "pattern.1: num_heads",
        ),
        ({"pattern": [{"mixer": "delta_net", "conv_size": "4"}]}, "pattern.0: conv_size"),
        ({"pattern": [{"mixer": "delta_net", "expand_v": 0.3}]}, "pattern.0: expand_v"),
        ({"pattern": [{"mixer": "attention", "window": 0}]}, "pattern.0: window must be a positive integer, got 0"),
        ({"pattern": [{"mixer": "attention", "num_heads": 3}]}, "pattern.0: num_heads must divide"),
        ({"pattern": [{"mixer": "attention", "expand_v": 1.0}]}, "no option 'expand_v'"),
        (
            {"layer_overrides": [{"layers": [1], "mixer": "attention", "num_kv_heads": 5}]},
            "layer_overrides.0: num_kv_heads",
        ),
        (
            {"layer_overrides": [{"layers": [4], "mixer": "attention"}]},
            "layer_overrides names layer 4, but the layers are 0 to 3",
        ),
        ({"layer_overrides": [{"layers": [1, 1], "mixer": "attention"}]}, "layer_overrides names layer 1 twice"),
        (
            {"layer_overrides": [{"layers": 1, "mixer": "attention"}]},
            "layer_overrides.0: layers must be an array of integers",
        ),
        (
            {"layer_overrides": [{"layers": [1], "mixer": "attn"}]},
            "layer_overrides.0: mixer must be one of attention, delta_net",
        ),
        ({"num_dense_layers": 1}, "it is now called dense_layers, an array of the layers' numbers"),
        ({"dense_layers": [0]}, "dense_layers must be empty without experts, got .0,."),
        ({"experts": EXPERTS, "dense_layers": 1}, "dense_layers: wanted an array, got 1"),
        ({"experts": EXPERTS, "dense_layers": [4]}, "dense_layers names layer 4, but the layers are 0 to 3"),
        ({"experts": EXPERTS, "dense_layers": [1, 1]}, "dense_layers must name a layer once"),
        (
            {"pattern": [{"mixer": "delta_net", "norm_placement": "between"}]},
            "pattern.0: norm_placement must be one of pre, post, got 'between'",
        ),
        (
            {"pattern": [{"mixer": "attention", "num_heads": 2, "rope_scaling": {"kind": "yarn", "factor": 2.0}}]},
            "pattern.0: rope_scaling: original_max_position_embeddings is missing, which yarn needs",
        ),
        (
            {"pattern": [{"mixer": "attention", "num_heads": 2, "rope_scaling": {"type": "yarn", "factor": 2.0}}]},
            'pattern.0: unknown key "rope_scaling.type"',
        ),
        (
            {"experts": EXPERTS | {"num_expert_groups": 3}},
            "experts: num_expert_groups must divide num_experts into groups of two at least, got 3 and 8",
        ),
        ({"experts": EXPERTS | {"num_groups_per_token": 0}}, "experts: num_groups_per_token must be a positive"),
        ({"experts": EXPERTS | {"normalize_weights": 1}}, "experts.normalize_weights: wanted true or false"),
        (
            {"experts": EXPERTS | {"num_experts_per_token": 9}},
            "experts: num_experts_per_token must be at most num_experts.*got 9 of 8",
        ),
        (
            {"experts": EXPERTS | {"num_experts_per_token": 0}},
            "experts: num_experts_per_token must be a positive integer",
        ),
        ({"experts": EXPERTS | {"num_experts": 0}}, "experts: num_experts"),
        ({"experts": EXPERTS | {"expert_size": -1}}, "experts: expert_size"),
        ({"experts": EXPERTS | {"shared_expert_size": -1}}, "experts: shared_expert_size"),
        (
            {"experts": EXPERTS | {"use_shared_expert_gate": True}},
            "experts: use_shared_expert_gate needs a shared expert",
        ),
        ({"experts": EXPERTS | {"router": "hash"}}, "router"),
        ({"experts": EXPERTS | {"routed_scaling_factor": 0.0}}, "experts: routed_scaling_factor"),
        ({"experts": EXPERTS | {"balance_rate": -0.1}}, "experts: balance_rate"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        load_config(ModelConfig, TABLE | change)


def test_an_option_may_be_named_once():
    with pytest.raises(ValueError, match="num_heads"):
        MixerSpec(mixer="delta_net", options=(("num_heads", 2), ("num_heads", 4)))


def test_a_config_leaves_the_devices_alone():
    """Else it could not be read before `jax.distributed.initialize`."""
    program = (
        "from jax._src import xla_bridge\n"
        "from delta_jax.models import MixerSpec, ModelConfig\n"
        "spec = MixerSpec(mixer='gated_delta_net')\n"
        "ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, pattern=(spec,))\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
