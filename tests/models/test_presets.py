"""The presets have the sizes of the models they are named after; nothing is allocated to see it."""

import tomllib
from pathlib import Path

import jax
import pytest
from flax import nnx

from delta_jax.config import load_config
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig, number_of_parameters
from delta_jax.parallel import MeshConfig, make_mesh, parameter_shardings, path_string
from delta_jax.training.optimizer import weight_decay_mask
from delta_jax.training.state import abstract_model

CONFIGS = Path(__file__).parents[2] / "configs"


def count(config):
    return number_of_parameters(jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def model_of(preset, changes=()):
    return load_config(ModelConfig, tomllib.loads((CONFIGS / f"{preset}.toml").read_text())["model"], changes)


@pytest.mark.parametrize(
    ("preset", "parameters", "millions"),
    [
        ("delta_net_340m", 374_362_112, 374.4),
        ("delta_net_1.3b", 1_365_677_056, 1365.7),
        ("gated_delta_net_1.3b", 1_387_348_732, 1387.3),
        ("delta_product_213m", 213_925_632, 213.9),
        ("delta_product_392m", 392_392_704, 392.4),
        ("delta_product_805m", 805_777_920, 805.8),
        ("gated_delta_net_h1_0.4b", 579_916_908, 579.9),
        ("gated_delta_net_h1_1.3b", 1_390_336_290, 1390.3),
        ("gated_delta_net_h2_1.3b", 1_426_687_356, 1426.7),
        # As many as Hugging Face transformers 5.23 builds.
        ("kimi_linear_48b_a3b", 49_122_675_072, 49122.7),
        ("qwen3_next_80b_a3b", 79_674_391_296, 79674.4),
    ],
)
def test_preset_has_its_size(preset, parameters, millions):
    assert count(model_of(preset)) == parameters
    assert round(parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gated_delta_net_2_1.3b", 1_302_638_112), ("gated_delta_net_2_hybrid_1.3b", 1_300_314_384)],
)
def test_blocks_have_the_size_that_their_authors_state(preset, parameters):
    blocks = jax.eval_shape(lambda: LanguageModel(model_of(preset), rngs=nnx.Rngs(0))).blocks
    assert number_of_parameters(blocks) == parameters


@pytest.mark.parametrize(("size", "hidden", "heads"), [("340m", 1024, 8), ("1.3b", 2048, 16)])
def test_attention_in_place_of_delta_net(size, hidden, heads):
    """It has neither convolutions nor write strengths nor an output norm, and otherwise the same projections."""
    less = 3 * 4 * hidden + hidden * heads + 128
    base = count(model_of(f"delta_net_{size}"))
    assert count(model_of(f"delta_net_{size}_global")) == base - 2 * less
    assert count(model_of(f"delta_net_{size}_sliding")) == base - 12 * less


@pytest.mark.parametrize(
    ("preset", "hidden", "heads", "writes", "millions"),
    [
        ("delta_product_213m", 768, 8, 1, 213.8),
        ("delta_product_213m", 736, 6, 2, 214.1),
        ("delta_product_392m", 1024, 12, 1, 392.2),
        ("delta_product_392m", 1024, 8, 2, 392.3),
        ("delta_product_805m", 1536, 16, 1, 805.4),
        ("delta_product_805m", 1468, 12, 2, 806.3),
    ],
)
def test_delta_product_of_fewer_writes_has_as_many_parameters(preset, hidden, heads, writes, millions):
    pattern = {"num_heads": heads, "num_householder": writes}
    changes = [f"hidden_size={hidden}", *(f"pattern.0.{name}={value}" for name, value in pattern.items())]
    assert round(count(model_of(preset, changes)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("mixer", "options", "millions"),
    [
        ("kimi_delta_attention", {"num_heads": 8, "head_dim": 128}, 387.0),
        ("gated_delta_net_2", {"num_heads": 8, "head_dim": 128}, 437.1),
    ],
)
def test_members_of_width_1024(mixer, options, millions):
    spec = MixerSpec(mixer=mixer, options=tuple(options.items()))
    config = ModelConfig(vocab_size=32000, hidden_size=1024, num_layers=24, pattern=(spec,))
    assert round(count(config) / 1e6, 1) == millions


@pytest.mark.parametrize(("preset", "billions"), [("kimi_linear_48b_a3b", 3.5), ("qwen3_next_80b_a3b", 3.9)])
def test_few_parameters_are_active(preset, billions):
    config = model_of(preset)
    idle = (
        (config.experts.num_experts - config.experts.num_experts_per_token)
        * 3
        * config.hidden_size
        * config.experts.expert_size
    )
    active = count(config) - (config.num_layers - len(config.dense_layers)) * idle
    assert round(active / 1e9, 1) == billions


def test_the_large_hybrids_have_the_layers_of_their_papers():
    kimi, qwen = model_of("kimi_linear_48b_a3b"), model_of("qwen3_next_80b_a3b")
    full = [place + 1 for place, layer in enumerate(kimi.layers) if layer.mixer.mixer == "latent_attention"]
    assert full == [4, 8, 12, 16, 20, 24, 27]
    assert [layer.experts for layer in kimi.layers] == [False] + [True] * 26
    assert [layer.mixer.mixer for layer in qwen.layers] == (["gated_delta_net"] * 3 + ["attention"]) * 12
    two = model_of("delta_net_340m_global")
    assert [place for place, layer in enumerate(two.layers) if layer.mixer.mixer == "attention"] == [1, 12]


@pytest.mark.parametrize("preset", ["gated_delta_net_h2_1.3b", "kimi_linear_48b_a3b", "qwen3_next_80b_a3b"])
def test_every_parameter_of_a_hybrid_has_a_place_on_the_mesh_and_a_word_on_weight_decay(preset):
    _, parameters = abstract_model(model_of(preset))
    parameter_shardings(parameters, make_mesh(MeshConfig(data=2, fsdp=4)))
    decays = weight_decay_mask(parameters)
    flat = {path_string(path): decay for path, decay in jax.tree_util.tree_leaves_with_path(decays)}
    assert not any(decay for path, decay in flat.items() if path.endswith(("scale", "bias")))
    assert all(decay for path, decay in flat.items() if path.endswith(("_proj", "kernel", "offset")))


def test_gated_delta_net_with_the_large_heads_is_no_340m():
    config = ModelConfig(
        vocab_size=32000, hidden_size=1024, num_layers=21, pattern=(MixerSpec(mixer="gated_delta_net"),)
    )
    assert count(config) == 512_272_124
    assert round(count(config) / 1e6, 1) == 512.3


def test_the_count_adds_up():
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=3,
        intermediate_size=5,
        pattern=(MixerSpec(mixer="delta_net", options=(("num_heads", 2),)),),
    )
    mixer = 4 * 8 * 8 + 3 * 4 * 8 + 8 * 2 + 4
    assert count(config) == 2 * 11 * 8 + 3 * (mixer + 3 * 8 * 5 + 2 * 8) + 8


@pytest.mark.parametrize(
    ("preset", "tokens", "batch"),
    [
        ("delta_net_340m", 15e9, 2**19),
        ("delta_net_1.3b", 100e9, 2**21),
        ("gated_delta_net_1.3b", 100e9, 2**19),
        ("delta_net_340m_global", 15e9, 2**19),
        ("delta_net_1.3b_sliding", 100e9, 2**21),
        ("gated_delta_net_h1_0.4b", 15e9, 2**19),
        ("gated_delta_net_h2_1.3b", 100e9, 2**19),
        ("gated_delta_net_2_hybrid_1.3b", 100e9, 2**19),
        ("delta_product_213m", 19e9, 2**19),
        ("delta_product_392m", 35e9, 2**19),
        ("delta_product_805m", 55e9, 2**19),
        ("kimi_linear_48b_a3b", 1.4e12, 2**25),
    ],
)
def test_recipe_covers_the_tokens_of_the_paper(preset, tokens, batch):
    table = tomllib.loads((CONFIGS / f"{preset}.toml").read_text())
    assert table["batch_size"] * table["sequence_length"] == batch
    assert abs(table["steps"] * batch / tokens - 1) < 1e-4
