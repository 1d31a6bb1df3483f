"""The presets have the sizes of the models they are named after; nothing is allocated to see it."""

import tomllib
from pathlib import Path

import jax
import pytest
from flax import nnx

from delta_jax.config import load_config
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig, number_of_parameters

CONFIGS = Path(__file__).parents[2] / "configs"


def count(config):
    return number_of_parameters(jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("preset", "parameters", "millions"),
    [
        ("delta_net_340m", 374_362_112, 374.4),
        ("delta_net_1.3b", 1_365_677_056, 1365.7),
        ("gated_delta_net_1.3b", 1_387_348_732, 1387.3),
    ],
)
def test_preset_has_its_size(preset, parameters, millions):
    table = tomllib.loads((CONFIGS / f"{preset}.toml").read_text())
    assert count(load_config(ModelConfig, table["model"])) == parameters
    assert round(parameters / 1e6, 1) == millions


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
        mlp_size=5,
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
    ],
)
def test_recipe_covers_the_tokens_of_the_paper(preset, tokens, batch):
    table = tomllib.loads((CONFIGS / f"{preset}.toml").read_text())
    assert table["batch_size"] * table["sequence_length"] == batch
    assert abs(table["steps"] * batch / tokens - 1) < 1e-4
