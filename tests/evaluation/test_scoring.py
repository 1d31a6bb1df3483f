"""Scores with shared contexts and beginnings against the plain way, and how few programs they take."""

import jax
import numpy as np
import pytest
from flax import nnx

from delta_jax.evaluation import Score, score, scoring
from delta_jax.inference import reading
from tests.evaluation.plain import next_logits, plain_score
from tests.inference.conftest import VOCAB, make

RNG = np.random.default_rng


def draw(generator, least, most):
    return generator.integers(0, VOCAB, generator.integers(least, most, endpoint=True)).tolist()


def make_requests(contexts, seed=0, lengths=(9, 16), answers=((1, 1), (2, 2), (5, 8), (5, 8)), beginning=()):
    """Contexts of some length, each with an answer of each of some lengths: few powers of two, few programs."""
    generator = RNG(seed)
    texts = [[*beginning, *draw(generator, *lengths)] for _ in range(contexts)]
    return [(context, draw(generator, *few)) for context in texts for few in answers]


def check(model, requests, found, max_length=1000):
    for (context, continuation), one in zip(requests, found, strict=True):
        kept = max_length + 1 - len(continuation)
        total, greedy = plain_score(model, context[-kept:], continuation)
        assert one.log_probability == pytest.approx(total, abs=2e-4)
        assert one.greedy == greedy


def test_scores_are_those_of_the_plain_way(model):
    """Several continuations of a context, contexts that begin alike, and one that is nothing but that beginning."""
    beginning = RNG(9).integers(0, VOCAB, 64).tolist()
    requests = [*make_requests(5), *make_requests(8, seed=1, beginning=beginning), (beginning, [3, 4, 5, 6, 7])]
    RNG(2).shuffle(requests)
    found = score(model, requests, max_length=1000, batch_size=4)
    check(model, requests, found)
    apart = score(model, requests, max_length=1000, batch_size=4, shared_prefixes=False)
    np.testing.assert_allclose([one[0] for one in apart], [one[0] for one in found], atol=2e-4)
    assert [one.greedy for one in apart] == [one.greedy for one in found]


def test_attention_goes_on_from_what_is_shared():
    hybrid, beginning = make("gated_delta_net", "attention"), RNG(9).integers(0, VOCAB, 64).tolist()
    requests = make_requests(5, answers=((5, 8),) * 2, beginning=beginning)
    check(hybrid, requests, score(hybrid, requests, max_length=1000, batch_size=4))


def test_the_likeliest_tokens_are_greedy(model):
    context, tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5], []
    for _ in range(3):
        tokens.append(int(np.argmax(next_logits(model, context + tokens))))
    wrong = [*tokens[:2], (tokens[2] + 1) % VOCAB]
    requests = [(context, tokens), (context, wrong), (context, tokens[:2]), (context[1:], tokens)]
    found = score(model, requests, max_length=50, batch_size=4)
    assert [one.greedy for one in found[:3]] == [True, False, True]
    check(model, requests, found)


def test_what_is_too_long_is_cut_at_its_beginning(model):
    requests = [*make_requests(4, lengths=(20, 40)), ([1, 2], [3] * 8), ([7] * 50, [3] * 8)]
    check(model, requests, score(model, requests, max_length=8, batch_size=4), max_length=8)
    with pytest.raises(ValueError, match="continuation 1 has 9 tokens, more than max_length, which is 8"):
        score(model, [([1], [2]), ([1], [3] * 9)], max_length=8)


def test_nothing_is_certain_and_costs_nothing(model):
    assert score(model, [], max_length=8) == []
    assert score(model, [([1], [])], max_length=8) == [Score(0.0, True)]
    some = [(context, [3]) for context in ([2], [3], [4], [5])]
    found = score(model, [([1], []), *some, ([1], [])], max_length=8, batch_size=4)
    assert found[0] == found[-1] == Score(0.0, True) and found[1].log_probability < 0


def test_mistakes_are_named(model):
    for requests, said in (
        [[([], [1])], "context 0 is empty"],
        [[([1], [VOCAB])], "continuation 0 holds a token outside"],
        [[([1], [2]), ([VOCAB], [2])], "context 1 holds a token outside"],
    ):
        with pytest.raises(ValueError, match=said):
            score(model, requests, max_length=8)
    with pytest.raises(ValueError, match="max_length"):
        score(model, [([1], [2])], max_length=0)
    with pytest.raises(ValueError, match="batch_size"):
        score(model, [([1], [2])], max_length=8, batch_size=0)


def test_a_uniform_model(model):
    model = nnx.clone(model)
    model.lm_head.kernel[...] = 0 * model.lm_head.kernel[...]
    requests = make_requests(5)
    for (_, continuation), one in zip(requests, score(model, requests, max_length=99, batch_size=4), strict=True):
        assert one.log_probability == pytest.approx(-len(continuation) * np.log(VOCAB), rel=1e-6)


def programs():
    return [function._cache_size() for function in (reading._read, reading._score, reading._take)]


@pytest.mark.parametrize("shared", [True, False])
def test_more_documents_of_other_lengths_compile_nothing(model, shared):
    beginning = RNG(9).integers(0, VOCAB, 64).tolist()
    lengths = []

    def run(contexts, seed):
        requests = make_requests(contexts, seed) + make_requests(contexts, seed + 1, beginning=beginning)
        lengths.append({len(context) for context, _ in requests})
        score(model, requests, max_length=1000, batch_size=4, shared_prefixes=shared)
        return programs()

    before = run(5, 0)
    assert run(10, 2) == run(20, 4) == before
    assert lengths[0] < lengths[2]


def test_contexts_and_beginnings_are_read_once(model, monkeypatch):
    """Few tokens are read, which the shapes that are computed say."""
    shapes, read = [], scoring.read_prompts

    def noted(model, prompts, *, after=None):
        shapes.append((len(prompts), max(map(len, prompts))))
        return read(model, prompts, after=after)

    monkeypatch.setattr(scoring, "read_prompts", noted)
    generator = RNG(3)
    beginning = generator.integers(0, VOCAB, 70).tolist()
    contexts = [[*beginning, *draw(generator, 8, 8)] for _ in range(8)]
    requests = [(context, [answer]) for context in contexts for answer in range(4)]
    score(model, requests, max_length=1000, batch_size=4)
    assert shapes == [(1, 64), (4, 14), (4, 14)]
    shapes.clear()
    score(model, requests, max_length=1000, batch_size=4, shared_prefixes=False)
    assert shapes == [(4, 78)] * 8


def families(contexts, rows):
    return sorted((start, sorted(members)) for start, members in scoring._families([tuple(c) for c in contexts], rows))


def test_families_are_contexts_that_begin_alike():
    first, second = [1] * 64, [1] * 32 + [2] * 40
    contexts = [[*first, n] for n in range(5)] + [[*second, n] for n in range(5)] + [[9]]
    assert families(contexts, 4) == [(0, [10]), (64, [0, 1, 2, 3, 4]), (64, [5, 6, 7, 8, 9])]
    # Too few of them, or too little in common: a batch less full would cost more.
    assert families(contexts, 6) == [(0, [10]), (32, list(range(10)))]
    assert families(contexts, 11) == [(0, list(range(11)))]
    assert families([[*first[:32], *[n] * 500] for n in range(4)] + [[3]] * 9, 4) == [(0, list(range(13)))]


def test_logits_are_never_more_than_a_chunk(model, monkeypatch):
    """In the program itself, whatever the length; the numbers stay."""
    monkeypatch.setattr(reading, "_AT_ONCE", 4 * 2 * VOCAB + 7)
    fresh = jax.jit(reading._score.__wrapped__)
    monkeypatch.setattr(reading, "_score", fresh)
    generator = RNG(4)
    contexts, continuations = ([draw(generator, 9, 16) for _ in range(4)] for _ in range(2))
    read = reading.read_prompts(model, contexts)
    found = reading.log_probabilities(model, read, continuations)
    for context, continuation, one in zip(contexts, continuations, found, strict=True):
        assert one.log_probabilities.sum() == pytest.approx(plain_score(model, context, continuation)[0], abs=1e-3)
    tokens, lengths = reading.padded(continuations)
    traced = jax.make_jaxpr(reading._score)(model, read.logits, read.cache, tokens, jax.numpy.asarray(lengths, "int32"))
    sizes = {shape for shape in shapes_of(traced.jaxpr) if shape[-1:] == (VOCAB,)}
    assert (4, 2, VOCAB) in sizes and max(map(np.prod, sizes)) == 4 * 2 * VOCAB


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)
