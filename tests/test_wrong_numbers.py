"""Numbers that are none, or of another kind: every public dataclass and function says so in one sentence."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.data import DataConfig, bigram_bits_per_byte, tasks, train_batches, validation_batches
from delta_jax.evaluation import Measurement
from delta_jax.inference import Sampling, generate, keep_top_k, keep_top_p
from delta_jax.layers import DeltaNet
from delta_jax.models import ExpertsConfig, LanguageModel, MixerSpec, ModelConfig
from delta_jax.ops import delta_rule, segment_states
from delta_jax.ops.attention import attend, rotate
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.training import CheckpointConfig, OptimizerConfig, TrainConfig, learning_rate_schedule
from experiments.harness.study import Sweep

MODEL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_layers": 1,
    "pattern": (MixerSpec(mixer="delta_net", options=(("num_heads", 2),)),),
    "intermediate_size": 0,
}
SIZES = {"steps": 3, "batch_size": 2}
CONFIGS = {
    **{cls: {} for cls in (OptimizerConfig, CheckpointConfig, MeshConfig, DataConfig)},
    **{cls: {} for cls in map(vars(tasks).get, tasks.__all__) if dataclasses.is_dataclass(cls)},
    ModelConfig: MODEL,
    ExpertsConfig: {"expert_size": 4, "num_experts": 3, "num_experts_per_token": 2},
    Sampling: {"temperature": 1.0},
    Sweep: SIZES | {"learning_rates": (1e-3,)},
    TrainConfig: SIZES | {"model": ModelConfig(**MODEL), "sequence_length": 3},
}
NO_NUMBERS = (True, "2", float("nan"), float("inf"), [2])
NO_INTEGERS = (1.0, 2.5)


def _wrong(cls):
    """Fields of numbers and of tuples, and what they do not take."""
    for name, hint in typing.get_type_hints(cls).items():
        kinds = (hint, *typing.get_args(hint))
        if {int, float} & set(kinds) and typing.get_origin(hint) is not tuple:
            yield from ((name, value) for value in NO_NUMBERS)
            yield from ((name, value) for value in NO_INTEGERS if float not in kinds)
        if typing.get_origin(hint) is tuple:
            yield from ((name, value) for value in (True, 2, "2", (None,)))


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_fields(cls):
    cls(**CONFIGS[cls])
    for name, value in _wrong(cls):
        with pytest.raises(ValueError, match=name):
            cls(**CONFIGS[cls] | {name: value})


X, IDS = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3), jnp.int32)
CORPUS = DataConfig(path=dataclasses.__file__)
CALLS = {
    "batch_size": lambda value: train_batches(CORPUS, batch_size=value, sequence_length=4),
    "sequence_length": lambda value: validation_batches(CORPUS, batch_size=1, sequence_length=value),
    "training_bytes": lambda value: bigram_bits_per_byte(CORPUS, training_bytes=value),
    "bytes": lambda value: Measurement(bytes=value),
    "steps": lambda value: learning_rate_schedule(OptimizerConfig(), value),
    "k": lambda value: keep_top_k(jnp.ones((1, 3)), value),
    "block": lambda value: attend(X, X, X, scale=1.0, block=value),
    "window": lambda value: attend(X, X, X, scale=1.0, window=value),
    "channels": lambda value: rotate(X, IDS, theta=1e4, channels=value),
    "max_segments": lambda value: segment_states(delta_rule, q=X, k=X, v=X, segment_ids=IDS, max_segments=value),
    "length": lambda value: DeltaNet(8, num_heads=2, rngs=nnx.Rngs(0)).init_cache(1, length=value),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments(name):
    for value in (True, 2.0, "2", float("nan"), -1, [2], 2**70 if name not in ("k", "bytes") else -2):
        with pytest.raises(ValueError, match=name):
            CALLS[name](value)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("theta must be a positive number, got inf", lambda: rotate(X, IDS, theta=float("inf"), channels=2)),
        ("channels must be an even", lambda: rotate(X, IDS, theta=2.0, channels=False)),
        (r"p must lie in \(0, 1\], got nan", lambda: keep_top_p(jnp.ones((1, 3)), float("nan"))),
        (r"p must lie in \(0, 1\], got True", lambda: keep_top_p(jnp.ones((1, 3)), True)),
        ("config: wanted a table, got 2", lambda: make_mesh(2)),
        ("part: wanted one of", lambda: validation_batches(CORPUS, batch_size=1, sequence_length=4, part="test")),
    ],
)
def test_other_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_k_keeps_all():
    assert keep_top_k(jnp.ones((1, 3)), 2**70).tolist() == [[1.0] * 3]


def test_prompts():
    model = nnx.eval_shape(lambda: LanguageModel(ModelConfig(**MODEL), rngs=nnx.Rngs(0)))  # refused before it runs
    for prompts in (
        [[1.5]],
        [[True]],
        [["1"]],
        ["ab"],
        [1],
        [[None]],
        np.ones((1, 2)),
        jnp.ones((1, 2)),
        [jnp.ones((2,), bool)],
    ):
        with pytest.raises(ValueError, match="prompt 0 must be a sequence of token ids, which are integers, got"):
            generate(model, prompts, max_new_tokens=1)
    for prompts in ("ab", 1, None, (), np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="prompts must hold at least one prompt, got"):
            generate(model, prompts, max_new_tokens=1)
    for prompts in ([[11]], np.array([[11]]), jax.numpy.array([[11]]), [(np.int64(11),)]):
        with pytest.raises(ValueError, match="outside"):
            generate(model, prompts, max_new_tokens=1)
