"""Language models with several kinds of mixers, with layers at given places and with experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.inference import generate
from delta_jax.models import ExpertsConfig, LanguageModel, LayerOverride, MixerSpec, ModelConfig
from delta_jax.models.language_model import Block
from delta_jax.testing import relative_error

VOCAB, TIME = 29, 16
LATENT = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 6}
LATENT |= {"rope_theta": 50.0, "use_head_gate": True, "q_lora_rank": 5}
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=12,
    num_layers=5,
    intermediate_size=16,
    dtype="float32",
    initializer_std=0.4,
    pattern=(
        MixerSpec(mixer="delta_net", options=(("num_heads", 2), ("implementation", "recurrent"))),
        MixerSpec(mixer="attention", options=(("num_heads", 2), ("window", 4)), norm_placement="post"),
    ),
    layer_overrides=(LayerOverride(layers=(4,), mixer="latent_attention", options=tuple(LATENT.items())),),
    experts=ExpertsConfig(
        expert_size=6,
        num_experts=4,
        num_experts_per_token=2,
        shared_expert_size=6,
        routed_scaling_factor=2.0,
        num_expert_groups=2,
        normalize_weights=False,
    ),
)
SEGMENTS = np.array([[1] * 6 + [2] * 10, [1] * 10 + [0] * 6], np.int32)


@pytest.fixture(scope="module")
def model():
    """Filled by numpy: compiling the initialisation takes longer than all the rest."""
    structure, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + 0.4 * draw.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(structure, jax.tree_util.tree_map_with_path(fill, state))


def tokens():
    return jax.random.randint(jax.random.key(0), (2, TIME), 0, VOCAB)


@jax.jit
def run(model, tokens, segment_ids=None, cache=None):
    return model(tokens, segment_ids=segment_ids, cache=cache, return_cache=True)


def test_layers_lie_where_the_config_says(model):
    assert [(len(run.block), run.repeats) for run in CONFIG.runs] == [(2, 2), (1, 1)]
    assert [type(block.mixer).__name__ for block in model.blocks] == ["DeltaNet", "Attention", "LatentAttention"]
    assert [len(block.mixer_norm.scale) for block in model.blocks] == [2, 2, 1]
    layers = dataclasses.replace(CONFIG, num_layers=7, dense_layers=(0, 1)).layers
    assert [layer.mixer.mixer for layer in layers] == [
        "delta_net", "attention", "delta_net", "attention", "latent_attention", "attention", "delta_net"
    ]  # fmt: skip
    assert [layer.experts for layer in layers] == [False] * 2 + [True] * 5


@pytest.mark.parametrize("experts", [CONFIG.experts, None])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_norms_of_a_block_are_before_or_after(placement, experts):
    """Written out with the layers of the block, whose names are the same."""
    spec = dataclasses.replace(CONFIG.pattern[1], norm_placement=placement)
    config = dataclasses.replace(CONFIG, num_layers=1, pattern=(spec,), layer_overrides=(), experts=experts)
    block = Block(config, config.layers[0], rngs=nnx.Rngs(0))
    for norm, start in ((block.mixer_norm, 0.5), (block.mlp_norm, -1.0)):
        norm.scale[...] = jnp.linspace(start, 2.0, 12)
    x = 3.0 * jax.random.normal(jax.random.key(1), (2, 7, 12))

    def feed_forward(x):
        y = block.mlp(x)
        return y[0] if isinstance(y, tuple) else y

    wanted = x
    for norm, layer in ((block.mixer_norm, block.mixer), (block.mlp_norm, feed_forward)):
        wanted = wanted + (layer(norm(wanted)) if placement == "pre" else norm(layer(wanted)))
    np.testing.assert_allclose(block(x).x, wanted, atol=1e-6)
    assert relative_error(block(x).x, x) > 0.1


def test_step_by_step_and_in_parts_equals_the_whole(model):
    x = tokens()
    whole, _ = run(model, x)
    cache, outputs = model.init_cache(2, length=TIME), []
    logits, cache = run(model, x[:, :11], None, cache)
    outputs = [logits]
    for t in range(11, TIME):
        logits, cache = run(model, x[:, t : t + 1], None, cache)
        outputs.append(logits)
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 1e-5
    beyond, _ = run(model, x[:, :1], None, cache)
    assert np.isnan(beyond).all()
    with pytest.raises(ValueError, match=f"room for {TIME} tokens of a segment and holds {TIME}"):
        model(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match="length must be a positive integer"):
        model.init_cache(2)
    with pytest.raises(ValueError, match=f"length must not be less than the room there is, {TIME} tokens, got 3"):
        model.extend_cache(cache, 3)


def test_packed_equals_separate(model):
    x = tokens()
    packed, _ = run(model, x, jnp.asarray(SEGMENTS))
    for row, start, stop in ((0, 0, 6), (0, 6, 16), (1, 0, 10), (1, 10, 16)):
        alone, _ = run(model, x[row : row + 1, start:stop])
        assert relative_error(packed[row : row + 1, start:stop], alone) < 1e-5


def test_generation_equals_running_the_whole_text_for_every_token(model):
    prompts, new = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]], 7
    text = np.zeros((3, TIME), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
    forward = jax.jit(lambda model, tokens: model(tokens))
    for step in range(new):
        best = np.argmax(forward(model, jnp.asarray(text)), axis=-1)
        for row, prompt in enumerate(prompts):
            text[row, len(prompt) + step] = best[row, len(prompt) + step - 1]
    wanted = [text[row, len(prompt) : len(prompt) + new].tolist() for row, prompt in enumerate(prompts)]
    assert generate(model, prompts, max_new_tokens=new) == wanted


def test_a_program_does_not_grow_with_depth():
    def size(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(lambda model, x: model(x))(model, tokens())).count("dot_general")

    shallow = size()
    assert shallow == size(
        num_layers=41, layer_overrides=(dataclasses.replace(CONFIG.layer_overrides[0], layers=(40,)),)
    )
    assert size(num_layers=40, layer_overrides=()) < shallow


def test_gradients_reach_every_parameter_but_the_biases(model):
    def loss(model, x):
        logs = jax.nn.log_softmax(model(x[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logs, x[:, 1:, None], axis=-1))

    for path, value in nnx.to_flat_state(nnx.state(jax.jit(jax.grad(loss))(model, tokens()))):
        size = np.sqrt(np.mean(np.square(value[...])))
        assert size == 0 if path[-1] == "expert_bias" else size > 1e-7, path


def test_padding_is_as_if_it_were_not_there(model):
    """On either side, and in a step; with ids no vocabulary has, in an embedding of NaN."""
    model = nnx.clone(model)
    x, real = tokens()[:, :12], 12
    wanted, last = run(model, x, jnp.asarray(SEGMENTS[:, :12]), model.init_cache(2, length=TIME))
    mask = np.zeros((2, TIME), bool)
    mask[0, -real:], mask[1, :real] = True, True

    def padded(x, filler):
        full = np.full((2, TIME), filler, np.int32)
        full[mask] = np.asarray(x).ravel()
        return jnp.asarray(full)

    @jax.jit
    def masked(model, tokens, segment_ids, mask, cache):
        features, cache, loads = model.features_and_loads(tokens, segment_ids=segment_ids, mask=mask, cache=cache)
        return model.head(features), cache, loads

    ids = padded(SEGMENTS[:, :12], 77)
    logits, cache, loads = masked(model, padded(x, -1), ids, jnp.asarray(mask), model.init_cache(2, length=TIME))
    np.testing.assert_allclose(np.asarray(logits)[mask], np.asarray(wanted).reshape(-1, VOCAB), atol=2e-5)
    assert not np.any(np.asarray(logits)[~mask])
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for load in loads:
        np.testing.assert_array_equal(np.sum(load, axis=-1), 2 * mask.sum())
    model.embed.embedding[...] = model.embed.embedding[...].at[0].set(jnp.nan)
    kept = jnp.where(x == 0, 1, x)
    again, _, _ = masked(model, padded(kept, 0), ids, jnp.asarray(mask), model.init_cache(2, length=TIME))
    assert np.isfinite(again).all()
