"""The backward pass of a tile's scores and gates, with a gate per channel.

The cotangent of a gate is gathered from the terms of `pallas_kernels.tpu.backward`. Inside 16 tokens with gentle gates
the short form q dq - k dk is taken, on sums that hold the same rounded factors, so that they cancel exactly.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from pallas_kernels.tpu import scores
from pallas_kernels.tpu.backward_scratch import BackwardScratch, add, add_erase
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE, lanes, product, rows, transposed
from pallas_kernels.tpu.tile import Prepared, Ref, Tokens, erase_of, if_steep, key_of, of_key, operand


def scores_backward(plan: Plan, tokens: Tokens, done: Prepared, scratch: BackwardScratch, steep: Array) -> None:
    """As `backward._head_scores_backward`, level by level; leaves what the levels give to the gates."""

    def apart() -> None:
        _own_backward(plan, tokens, scratch)
        for block in scores.NEAR_BLOCKS:
            _level_backward(plan, tokens, done, scratch, block)
        inside = _gates_held(scores.NEAR_BLOCKS, operand(plan))
        for h in range(plan.heads):
            scratch.d_near[h] = product(inside, scratch.near_terms[h], plan.exact)

    def together() -> None:
        _near_backward(plan, tokens, done, scratch)

    if_steep(plan, steep, apart, together)
    for block in scores.FAR_BLOCKS:
        _level_backward(plan, tokens, done, scratch, block)


def _own_backward(plan: Plan, tokens: Tokens, scratch: BackwardScratch) -> None:
    """Begins the cotangents of the keys with the pairs of a token with itself."""
    diagonal, zero = rows(TILE, TILE) == lanes(TILE, TILE), jnp.zeros((), operand(plan))
    for h in range(plan.heads):
        q, k = (of_key(plan, x, h) for x in (tokens.q, tokens.k))
        own = jnp.where(diagonal, scratch.d_p[h], zero)
        add(plan, scratch.d_q, h, product(own, k, plan.exact))
        add(plan, scratch.d_k, h, product(own, q, plan.exact))
        if scratch.d_erase is not None:
            add(plan, scratch.d_erase, h, jnp.zeros((TILE, plan.key), jnp.float32))


def _near_backward(plan: Plan, tokens: Tokens, done: Prepared, scratch: BackwardScratch) -> None:
    """Begins the cotangents of the keys with all pairs inside 16 tokens, of gentle gates; and what these give to gates."""
    near, earlier = scores.near(), scores.near(earlier=True)
    f32, dtype = jnp.float32, operand(plan)
    zero = jnp.zeros((), dtype)
    for h in range(plan.heads):
        of_rows, of_keys = done.factors.near_rows(h)[...], done.factors.near_keys(h)[...]
        # The gates take a difference of sums over the same pairs: it is exact if both sums have the same factors.
        keys = (of_key(plan, tokens.k, h).astype(f32) * of_keys).astype(dtype)
        reads = [(of_key(plan, tokens.q, h).astype(f32) * of_rows).astype(dtype)]
        d_scores = [jnp.where(near, scratch.d_p[h], zero)]
        if plan.erases:
            reads.append((erase_of(plan, tokens, h).astype(f32) * of_rows).astype(dtype))
            d_scores.append(jnp.where(earlier, scratch.d_a[h], zero))
        stacked = jnp.concatenate(d_scores, 0)
        d_reads = product(stacked, keys, plan.exact)
        d_keys = product(transposed(stacked), jnp.concatenate(reads, 0), plan.exact)
        add(plan, scratch.d_q, h, d_reads[:TILE] * of_rows)
        add(plan, scratch.d_k, h, d_keys * of_keys)
        terms = reads[0].astype(f32) * d_reads[:TILE] - keys.astype(f32) * d_keys
        if plan.erases:
            add_erase(plan, scratch, h, d_reads[TILE:] * of_rows, start=True)
            terms = terms + reads[1].astype(f32) * d_reads[TILE:]
        scratch.d_near[h] = scores.near_suffix_sums(terms)


def _level_backward(plan: Plan, tokens: Tokens, done: Prepared, scratch: BackwardScratch, block: int) -> None:
    """Adds what the pairs that meet at a level give to the keys, and leaves the level's terms."""
    f32, zero = jnp.float32, jnp.zeros((), operand(plan))
    for h in range(plan.heads):
        factor = done.factors.level(h, block)[...]
        q, k = (of_key(plan, x, h).astype(f32) for x in (tokens.q, tokens.k))
        keys, right = k * factor, scores.right_rows(factor, block)
        meets = scores.meets(block)
        d_scores = [jnp.where(meets, scores.right_rows(scratch.d_p[h], block), zero)]
        reads = [scores.right_rows(q, block)]
        if plan.erases:
            d_scores.append(jnp.where(meets, scores.right_rows(scratch.d_a[h], block), zero))
            erase = k if scratch.d_erase is None else erase_of(plan, tokens, h).astype(f32)
            reads.append(scores.right_rows(erase, block))
        stacked = jnp.concatenate(d_scores, 0)
        d_reads = product(stacked, keys, plan.exact)
        d_q = d_reads[: len(right)] * right
        add(plan, scratch.d_q, h, d_q, start=False, block=block)
        terms = reads[0] * d_q
        if plan.erases:
            d_erase = d_reads[len(right) :] * right
            add_erase(plan, scratch, h, d_erase, start=False, block=block)
            terms = terms + reads[1] * d_erase
        weighted = jnp.concatenate([x * right for x in reads], 0)
        d_keys = product(transposed(stacked), weighted, plan.exact) * factor
        j = key_of(plan, h)
        for left in scores.left_pieces(block):
            scratch.d_k[j, left] = scratch.d_k[j, left] + d_keys[left]
        if block < 8:
            terms = terms + k * d_keys
        else:
            pieces = []
            for (here, _), left in zip(scores.right_pieces(block), scores.left_pieces(block), strict=True):
                pieces += [k[left] * d_keys[left], terms[here]]
            terms = jnp.concatenate(pieces, 0)
        scratch.terms(h, block)[...] = terms.astype(operand(plan))


def _gates_held(blocks: Sequence[int], dtype: jnp.dtype) -> Array:
    """Which gates the terms of the levels hold: for every level a matrix of 0 and 1, `[gate, token]`, side by side."""
    gate, token = rows(TILE, TILE), lanes(TILE, TILE)
    held = []
    for block in blocks:
        right = token // block % 2 == 1
        inside = (right & (gate <= token)) | (~right & (gate > token))
        held.append(inside & (gate // block == token // block))
    return jnp.concatenate([x.astype(dtype) for x in held], 1)


def gates_backward(plan: Plan, d_g: Ref, scratch: BackwardScratch) -> None:
    """Gathers the cotangent of every gate, `[128, heads * key]`, from the terms whose range of tokens holds it."""
    gate, token, dtype = rows(TILE, TILE), lanes(TILE, TILE), operand(plan)
    reads, writes = (gate <= token).astype(dtype), (gate > token).astype(dtype)
    held = jnp.concatenate([_gates_held(scores.FAR_BLOCKS, dtype), reads, writes], 1)  # in the order of `FAR_TERMS`
    for h in range(plan.heads):
        far = product(held, scratch.far_terms[h], plan.exact)
        total = far + scratch.d_near[h] + scratch.d_whole[h][:1]
        d_g[:, h * plan.key : (h + 1) * plan.key] = total.astype(d_g.dtype)
