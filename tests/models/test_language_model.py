import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.models import LanguageModel, MixerSpec, ModelConfig, number_of_parameters
from delta_jax.testing import relative_error

VOCAB, TIME = 23, 18
SEGMENTS = np.array([[1] * 6 + [2] * 12, [1] * 12 + [0] * 6], np.int32)


@functools.cache
def make(seed=0, pattern=("delta_net", "gated_delta_net"), implementation=None, **changes):
    options = (("num_heads", 2), ("head_dim", 4), ("chunk_size", 16), ("implementation", implementation))
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "num_layers": 2 * len(pattern),
        "pattern": tuple(MixerSpec(mixer=name, options=options) for name in pattern),
        "intermediate_size": 20,
        "initializer_std": 0.3,
        "dtype": "float32",
    }
    config = ModelConfig(**(settings | changes))
    return LanguageModel(config, rngs=nnx.Rngs(seed))


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (2, TIME), 0, VOCAB)


@jax.jit
def run(model, tokens, segment_ids=None, cache=None):
    return model(tokens, segment_ids=segment_ids, cache=cache, return_cache=True)


@jax.jit
def gradient(model, tokens):
    def loss(model):
        logs = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(model)


def test_parameters_have_the_names_that_rules_are_written_for():
    mixer = {f"{x}_proj/kernel" for x in "qkvbo"} | {f"{x}_conv/kernel" for x in "qkv"} | {"o_norm/scale"}
    gated = mixer | {"a_proj/kernel", "g_proj/kernel", "A_log", "dt_bias"}
    block = {"mixer_norm/scale", "mlp_norm/scale"} | {f"mlp/{x}_proj/kernel" for x in ("gate", "up", "down")}
    wanted = {"embed/embedding", "lm_head/kernel", "final_norm/scale"}
    wanted |= {f"blocks/0/{name}" for name in block | {f"mixer/{x}" for x in mixer}}
    wanted |= {f"blocks/1/{name}" for name in block | {f"mixer/{x}" for x in gated}}
    flat = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(make()))}
    assert set(flat) == wanted
    assert all(value.shape[0] == 2 for name, value in flat.items() if name.startswith("blocks/"))
    assert flat["blocks/1/mixer/k_conv/kernel"].shape == (2, 4, 8)
    assert flat["lm_head/kernel"].shape == (12, VOCAB)


def test_the_scan_runs_the_blocks_in_order():
    model, x = make(), tokens()

    @jax.jit
    def apply(block, hidden):
        hidden = hidden + block.mixer(block.mixer_norm(hidden))
        return hidden + block.mlp(block.mlp_norm(hidden))

    hidden = model.embed(x)
    for repeat in range(2):
        for stack in model.blocks:
            hidden = apply(jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stack), hidden)
    logits = np.asarray(model.final_norm(hidden), np.float64) @ np.asarray(model.lm_head.kernel[...], np.float64)
    assert relative_error(model(x), logits) < 3e-6


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_product"])  # every layer has its own contract
def test_step_by_step_equals_the_whole(name):
    model, x = make(pattern=(name,)), tokens()
    whole, last = run(model, x)
    cache, outputs = model.init_cache(2), []
    for t in range(TIME):
        logits, cache = run(model, x[:, t : t + 1], None, cache)
        outputs.append(logits)
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 1e-5
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(last), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_packed_equals_separate():
    model, x = make(), tokens()
    packed, _ = run(model, x, jnp.asarray(SEGMENTS))
    for row, start, stop in ((0, 0, 6), (0, 6, 18), (1, 0, 12), (1, 12, 18)):
        alone, _ = run(model, x[row : row + 1, start:stop])
        assert relative_error(packed[row : row + 1, start:stop], alone) < 1e-5
    unpacked, _ = run(model, x)
    assert relative_error(packed[0, 6:], unpacked[0, 6:]) > 0.01


def test_outputs_never_depend_on_later_tokens():
    model, x = make(), tokens()
    logits, _ = run(model, x)
    for cut in (1, 7, 16):
        changed, _ = run(model, x.at[:, cut:].set((x[:, cut:] + 1) % VOCAB))
        np.testing.assert_array_equal(logits[:, :cut], changed[:, :cut])
        assert relative_error(changed[:, cut:], logits[:, cut:]) > 0.01


def test_gradients_reach_every_parameter_of_every_layer():
    for path, value in nnx.to_flat_state(nnx.state(gradient(make(implementation="recurrent"), tokens()))):
        rows = value[...] if path[0] == "blocks" else value[...][None]
        for row in rows:
            assert np.isfinite(row).all(), path
            assert np.sqrt(np.mean(np.square(row))) > 1e-9, path


def test_remat_changes_memory_not_numbers():
    jax.config.update("jax_disable_most_optimizations", False)  # the limits are those of the code that users run
    plain = jax.tree.leaves(gradient(make(pattern=("gated_delta_net",)), tokens()))
    names = {"remat_save": ("delta_rule_output",), "remat_offload": ("delta_rule_states", "mixer_output")}
    for options in ({"remat": "dots"}, {"remat": "block"}, {"remat": "dots"} | names, {"remat": "block"} | names):
        again = jax.tree.leaves(gradient(make(pattern=("gated_delta_net",), **options), tokens()))
        for one, other in zip(again, plain, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-6, rtol=1e-4)


def test_remat_saves_memory():
    def residuals(remat, **names):
        model = make(remat=remat, pattern=("delta_net",), num_layers=32, **names)
        _, backward = jax.eval_shape(lambda model: jax.vjp(lambda model: model(tokens()), model), model)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    none, dots, block = (residuals(remat) for remat in ("none", "dots", "block"))
    assert block < dots < none
    assert block < number_of_parameters(make(pattern=("delta_net",), num_layers=32)) + 48 * 2 * TIME * 12
    assert residuals("block", remat_save=("mixer_output",)) == block + 32 * 2 * TIME * 12


def test_what_is_saved_by_name_is_not_computed_again():
    """With its states and its output kept, the op runs forward once."""

    def loops(**names):
        model = make(pattern=("gated_delta_net",), num_layers=1, remat="block", implementation="xla", **names)
        return str(jax.make_jaxpr(gradient)(model, tokens())).count("scan[")

    once = loops(remat_save=("delta_rule_states", "delta_rule_output"))
    assert once < loops()


def test_the_seed_decides_every_number():
    one, same, other = (jax.tree.leaves(nnx.state(make(seed))) for seed in (4, 4, 5))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    np.testing.assert_array_equal(run(make(4), tokens())[0], run(make(4), tokens())[0])
    assert sum(not np.array_equal(a, b) for a, b in zip(one, other, strict=True)) > 20


def test_layers_begin_different():
    for path, value in nnx.to_flat_state(nnx.state(make())):
        if path[0] == "blocks" and path[-1] != "scale":
            assert not np.array_equal(value[...][0], value[...][1]), path


def test_tied_embeddings_serve_as_the_head():
    model = make(tie_embeddings=True)
    assert number_of_parameters(make()) - number_of_parameters(model) == VOCAB * 12
    features, cache = model.features(tokens())
    assert cache is None
    wanted = np.asarray(features, np.float64) @ np.asarray(model.embed.embedding[...], np.float64).T
    assert relative_error(model(tokens()), wanted) < 1e-6


def test_a_model_without_mlp_is_its_mixers_alone():
    model = make(intermediate_size=0, pattern=("delta_net",))
    x = model.embed(tokens())
    for repeat in range(2):
        block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], model.blocks[0])
        x = x + block.mixer(block.mixer_norm(x))
    assert relative_error(model.features(tokens())[0], model.final_norm(x)) < 2e-6
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert not any("mlp" in name for name in names)


def test_weights_of_the_first_tokens_sum_embeddings():
    model, ids = make(), tokens() % 5
    certain = model.features(jax.nn.one_hot(ids, 5))[0]
    assert relative_error(certain, model.features(ids)[0]) < 1e-6
    assert relative_error(certain, model.features(jax.nn.one_hot(ids, VOCAB))[0]) < 1e-6
    assert relative_error(model.features(jax.nn.one_hot(ids, 5) / 2)[0], certain) > 1e-3


def test_bfloat16_computes_near_float32_and_returns_float32_logits():
    wide, _ = run(make(), tokens())
    narrow, cache = run(make(dtype="bfloat16"), tokens())
    assert narrow.dtype == jnp.float32
    assert 1e-3 < relative_error(narrow, wide) < 0.1
    assert all(entry.state.dtype == jnp.float32 for entry in cache)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(make(dtype="bfloat16"))))
    values, counts = np.unique(
        np.asarray(narrow.astype(jnp.bfloat16).astype(jnp.float32) == narrow), return_counts=True
    )
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)).get(True, 0) < 0.2 * narrow.size


def test_the_cache_does_not_grow():
    model = make()
    shapes = [
        jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(run, model, tokens()[:, :time])[1])
        for time in (1, TIME)
    ]
    assert shapes[0] == shapes[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), model.init_cache(2)) == shapes[0]


def test_the_cache_is_returned_only_when_asked_for():
    model, x = make(), tokens()
    logits, cache = model(x, cache=model.init_cache(2))
    assert len(cache) == 2
    assert relative_error(model(x), logits) < 1e-6
