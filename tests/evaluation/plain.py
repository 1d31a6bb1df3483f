"""The plain way to score: for every token all before it is read anew, alone, and nothing is remembered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

LONGEST = 128  # one length, so that one program is compiled: what stands after a token changes nothing


@jax.jit
def _logits(model, tokens, place):
    return model(tokens)[0, place]


def next_logits(model, tokens):
    """Of the token after those given, float64 [V]."""
    return _next_logits(model, tuple(tokens))


@functools.lru_cache(maxsize=1024)
def _next_logits(model, tokens):
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_logits(model, jnp.asarray(row), jnp.int32(len(tokens) - 1)), np.float64)


def plain_score(model, context, continuation):
    """The log-probability of a continuation, and whether each of its tokens is the likeliest."""
    tokens, total, greedy = list(context), 0.0, True
    for token in continuation:
        logits = next_logits(model, tokens)
        total += logits[token] - np.logaddexp.reduce(logits)
        greedy = greedy and int(np.argmax(logits)) == token
        tokens.append(token)
    return total, greedy
