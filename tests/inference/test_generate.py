import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.inference import generate
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig

VOCAB, NEW = 40, 12
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4]]


@functools.cache
def make(*names, dtype="float32"):
    options = (("num_heads", 2), ("head_dim", 4))
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2 * len(names),
        pattern=tuple(MixerSpec(mixer=name, options=options) for name in names),
        intermediate_size=24,
        initializer_std=0.4,
        dtype=dtype,
    )
    return LanguageModel(config, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def model():
    return make("delta_net", "gated_delta_net")


def by_hand(model, prompt, count):
    """Greedy decoding that runs the whole text through the model for every token."""
    text = np.zeros((1, 32), np.int32)
    text[0, : len(prompt)] = prompt
    run = jax.jit(lambda model, tokens: model(tokens))
    for place in range(len(prompt), len(prompt) + count):
        text[0, place] = np.argmax(run(model, jnp.asarray(text))[0, place - 1])
    return text[0, len(prompt) : len(prompt) + count].tolist()


def test_greedy_equals_running_the_whole_text_for_every_token(model):
    together = generate(model, PROMPTS, max_new_tokens=NEW)
    assert together == [by_hand(model, prompt, NEW) for prompt in PROMPTS]
    assert len(set(map(tuple, together))) == len(PROMPTS)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_product", "retnet"])  # every layer has its own contract
def test_a_batch_equals_one_by_one(name):
    model = make(name)
    together = generate(model, PROMPTS, max_new_tokens=NEW)
    assert together == [generate(model, [prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]


def test_a_prompt_may_be_an_array(model):
    prompts = [np.array(prompt) for prompt in PROMPTS]
    assert generate(model, prompts, max_new_tokens=3) == generate(model, PROMPTS, max_new_tokens=3)


def test_ends_before_the_stop_id(model):
    whole = generate(model, PROMPTS, max_new_tokens=NEW)
    stop = whole[0][4]
    cut = generate(model, PROMPTS, max_new_tokens=NEW, stop_id=stop)
    assert cut == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len(cut[0]) < NEW
    assert generate(model, PROMPTS[:1], max_new_tokens=NEW, stop_id=stop) == cut[:1]
    assert generate(model, PROMPTS[:1], max_new_tokens=NEW, stop_id=whole[0][0]) == [[]]


def test_several_stop_ids(model):
    whole = generate(model, PROMPTS, max_new_tokens=NEW)
    stops = {whole[0][4], whole[1][2]}
    cut = generate(model, PROMPTS, max_new_tokens=NEW, stop_id=sorted(stops))
    assert cut == [row[: min((row.index(stop) for stop in stops & set(row)), default=NEW)] for row in whole]
    assert len(cut[1]) < NEW


@pytest.mark.usefixtures("as_users_call")  # an integer is a number
def test_no_value_compiles_again_and_none_changes_the_tokens_before_it_matters(model):
    from delta_jax.inference.generate import _decode, _prefill

    key = jax.random.key(5)
    longest = generate(model, PROMPTS, max_new_tokens=150, temperature=0.9, key=key)
    prefills, decodes = _prefill._cache_size(), _decode._cache_size()
    for count in (1, 2, 63, 64, 65, 130):
        rows = generate(model, PROMPTS, max_new_tokens=count, temperature=0.9, key=key)
        assert rows == [row[:count] for row in longest]
    for options in (
        {"temperature": 0.1},
        {"temperature": 7},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_k": 2**40, "top_p": 1.0},
    ):
        generate(model, PROMPTS, max_new_tokens=2, key=key, **({"temperature": 0.9} | options))
    generate(model, PROMPTS, max_new_tokens=2, stop_id=[1, 2, 3])  # greedy, without a key
    lengths = [PROMPTS[0] * 2, *PROMPTS[1:3], PROMPTS[3] * 6]
    generate(model, lengths, max_new_tokens=5)
    assert (_prefill._cache_size(), _decode._cache_size()) == (prefills, decodes)
    for _ in range(2):
        generate(model, PROMPTS[:2], max_new_tokens=3)
    assert (_prefill._cache_size(), _decode._cache_size()) == (prefills + 1, decodes + 1)
    for length in (17, 23, 32):  # beyond the next power of two: another pass over the prompts, the same loop
        generate(model, [[7] * length, *PROMPTS[1:]], max_new_tokens=3)
    assert (_prefill._cache_size(), _decode._cache_size()) == (prefills + 2, decodes + 1)


def test_a_cache_that_keeps_every_token_grows():
    model, prompt, count = make("attention"), PROMPTS[2], 203
    (row,) = generate(model, [prompt], max_new_tokens=count)
    assert row[:NEW] == generate(model, [prompt], max_new_tokens=NEW)[0]
    logits = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([prompt + row], jnp.int32))
    assert row == jnp.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist()


def test_the_key_decides_what_is_drawn(model):
    def draw(prompts, seed):
        return generate(model, prompts, max_new_tokens=NEW, temperature=1.0, top_k=20, key=jax.random.key(seed))

    assert draw(PROMPTS, 0) == draw(PROMPTS, 0)
    assert draw(PROMPTS, 0) != draw(PROMPTS, 1)
    assert draw(PROMPTS, 0)[:2] == draw(PROMPTS[:2], 0)
    same = draw([PROMPTS[0], PROMPTS[0]], 0)
    assert same[0] != same[1]


def test_a_vanishing_temperature_is_greedy(model):
    drawn = generate(model, PROMPTS, max_new_tokens=NEW)
    for temperature in (1e-6, 1e-10, 1e-40, 5e-324):
        assert drawn == generate(model, PROMPTS, max_new_tokens=NEW, temperature=temperature, key=jax.random.key(0))
    assert drawn == generate(model, PROMPTS, max_new_tokens=NEW, temperature=1.0, top_k=1, key=jax.random.key(0))


def test_bfloat16_generates():
    rows = generate(make("gated_delta_net", dtype="bfloat16"), PROMPTS, max_new_tokens=4)
    assert [len(row) for row in rows] == [4] * 4
    assert all(0 <= token < VOCAB for row in rows for token in row)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, "prompt 0 holds a token outside"),
        ([[-1]], {}, "prompt 0 holds a token outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": 1.0}, "key"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": 3}, "top_k"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": None}, "max_new_tokens"),
        ([[1]], {"stop_id": VOCAB}, "stop_id"),
        ([[1]], {"stop_id": [3, -1]}, "stop_id"),
        ([[1]], {"stop_id": "a"}, "stop_id"),
    ],
)
def test_mistakes_are_named(model, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **({"max_new_tokens": 2} | options))
