import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.inference import Piece, generate, penalize, stream
from delta_jax.inference.generate import _decode
from delta_jax.inference.reading import _read
from tests.inference.conftest import VOCAB, make

NEW = 12
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4]]


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
def test_no_value_compiles_again_and_none_changes_the_tokens_before_it_matters(model, syllables):
    key = jax.random.key(5)
    longest = generate(model, PROMPTS, max_new_tokens=150, temperature=0.9, key=key)
    prefills, decodes = _read._cache_size(), _decode._cache_size()
    for count in (1, 2, 63, 64, 65, 130):
        rows = generate(model, PROMPTS, max_new_tokens=count, temperature=0.9, key=key)
        assert rows == [row[:count] for row in longest]
    for options in (
        {"temperature": 0.1},
        {"temperature": 7},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_k": 2**40, "top_p": 1.0},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"stop": "ba", "tokenizer": syllables},
    ):
        generate(model, PROMPTS, max_new_tokens=2, key=key, **({"temperature": 0.9} | options))
    generate(model, PROMPTS, max_new_tokens=2, stop_id=[1, 2, 3])  # greedy, without a key
    generate(model, PROMPTS[:2], max_new_tokens=2, samples=2)  # as many rows, of other prompts: another pass over these
    assert _decode._cache_size() == decodes
    list(stream(model, PROMPTS, max_new_tokens=5, block=3))
    prefills = _read._cache_size()
    lengths = [PROMPTS[0] * 2, *PROMPTS[1:3], PROMPTS[3] * 6]
    generate(model, lengths, max_new_tokens=5)
    assert (_read._cache_size(), _decode._cache_size()) == (prefills, decodes)
    for _ in range(2):
        generate(model, PROMPTS[:3], max_new_tokens=3)
    assert (_read._cache_size(), _decode._cache_size()) == (prefills + 1, decodes + 1)
    for length in (17, 23, 32):  # beyond the next power of two: another pass over the prompts, the same loop
        generate(model, [[7] * length, *PROMPTS[1:]], max_new_tokens=3)
    assert (_read._cache_size(), _decode._cache_size()) == (prefills + 2, decodes + 1)


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
        ([[1]], {"stop": "a"}, "tokenizer must be given with stop"),
        ([[1]], {"stop": ["a", ""]}, "stop must be a text or several, none of them empty"),
        ([[1]], {"stop": 3}, "stop must be a text or several"),
        ([[1]], {"tokenizer": "bytes"}, "tokenizer must be one, as load_tokenizer makes it, got 'bytes'"),
        ([[1]], {"key": 3}, "key must be one PRNG key"),
        ([[1]], {"key": jax.random.split(jax.random.key(0))}, "key must be one PRNG key"),
        ([[1]], {"samples": 0}, "samples must be a positive integer"),
        ([[1]], {"prefix": "file"}, "prefix must be a Reading"),
        ([[]], {"prefix": None}, "prompt 0 is empty"),
        ([[1]], {"min_p": 0.1}, "min_p need a temperature"),
    ],
)
def test_mistakes_are_named(model, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **({"max_new_tokens": 2} | options))


def test_a_stream_yields_what_generate_gives(model, syllables):
    whole = generate(model, PROMPTS, max_new_tokens=NEW)
    stop = whole[0][4]
    blocks = list(stream(model, PROMPTS, max_new_tokens=NEW, block=5, tokenizer=syllables, stop_id=stop))
    assert len(blocks) == 3
    for row, wanted in zip(zip(*blocks, strict=True), whole, strict=True):
        ended = stop in wanted
        wanted = wanted[: wanted.index(stop)] if ended else wanted
        assert [token for piece in row for token in piece.tokens] == wanted
        assert "".join(piece.text for piece in row) == syllables.decode(wanted)
        assert row[-1].finish == ("stop" if ended else "length")
    assert blocks[0][0].finish == "stop"
    assert blocks[1][0] == blocks[2][0] == Piece([], "", "stop")
    assert sum(len(piece.tokens) for piece in blocks[0]) > NEW  # what is new came at once
    with pytest.raises(ValueError, match="block must be at most 64, got 65"):
        stream(model, PROMPTS, max_new_tokens=NEW, block=65)
    with pytest.raises(ValueError, match="streams must be integers"):
        stream(model, PROMPTS, max_new_tokens=NEW, streams=[1])


def test_a_text_ends_before_a_stop_string_wherever_it_begins(model, syllables):
    whole = generate(model, PROMPTS[:1], max_new_tokens=NEW)
    text = syllables.decode(whole[0])
    for start, end in ((4, 6), (3, 6), (5, 8), (0, 3), (23, 24)):  # between tokens, inside, over a border, first, last
        stop = text[start:end]
        place = text.index(stop)
        for stops in (stop, ["zz", stop, text[start : end + 1]]):
            options = {"tokenizer": syllables, "stop": stops, "max_new_tokens": NEW}
            ((row,),) = [list(zip(*stream(model, PROMPTS[:1], block=2, **options), strict=True))]
            assert "".join(piece.text for piece in row) == text[:place]
            assert row[-1].finish == "stop"
            assert len(row) == min(-(-(place + len(stop)) // 4), NEW // 2)  # no block after that of its last token
            assert generate(model, PROMPTS[:1], **options) == [whole[0][: place // 2]]
    options = {"tokenizer": syllables, "stop": text[-1] + "zz", "max_new_tokens": NEW}
    ((row,),) = [list(zip(*stream(model, PROMPTS[:1], **options), strict=True))]
    assert "".join(piece.text for piece in row) == text  # what might have been a beginning was none
    assert row[-1].finish == "length"


def test_samples_of_a_prompt_draw_for_themselves(model):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "key": jax.random.key(3)}
    three, two = (generate(model, PROMPTS[:2], samples=n, **options) for n in (3, 2))
    assert [[len(row) for row in rows] for rows in three] == [[NEW] * 3] * 2
    assert len({tuple(row) for rows in three for row in rows}) == 6
    assert [rows[:2] for rows in three] == two
    assert [rows[0] for rows in three] == generate(model, PROMPTS[:2], **options)
    assert generate(model, PROMPTS[:2], samples=2, max_new_tokens=3) == [
        [row] * 2 for row in generate(model, PROMPTS[:2], max_new_tokens=3)
    ]


@pytest.mark.usefixtures("as_users_call")  # a key may be raw
def test_streams_choose_what_is_drawn(model):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "key": jax.random.key(3)}
    wanted = generate(model, PROMPTS, **options)
    order = [2, 0, 3, 1]
    found: list = [[] for _ in order]
    for pieces in stream(model, [PROMPTS[i] for i in order], streams=order, **options):
        found = [row + piece.tokens for row, piece in zip(found, pieces, strict=True)]
    assert found == [wanted[i] for i in order]
    raw = jax.random.key_data(options["key"])
    assert generate(model, PROMPTS, **options | {"key": raw}) == wanted


def test_a_repetition_penalty_counts_prompt_and_continuation(model):
    prompt, penalty = PROMPTS[2], 1.7
    (row,) = generate(model, [prompt], max_new_tokens=NEW, repetition_penalty=penalty)
    (free,) = generate(model, [prompt], max_new_tokens=NEW)
    assert row != free
    (logits,) = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([prompt + row], jnp.int32))
    for place in range(NEW):
        seen = jnp.asarray(np.isin(np.arange(VOCAB), prompt + row[:place]))
        assert row[place] == np.argmax(penalize(logits[len(prompt) + place - 1], seen, penalty))
