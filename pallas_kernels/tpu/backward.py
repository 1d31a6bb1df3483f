"""The backward kernel: from the states before every group of tiles, forwards through the group and back again.

With the symbols of `pallas_kernels.tpu.tile`, N = Y dS'^T, and dO already multiplied by the scale:

    dY = (P diag(b))^T dO + (b exp(Z) K) dS'
    (I + A diag(b))^T dB = dY                            dV = dB
    dA = -dB Y^T diag(b)   (i > j)                       dP = dO Y^T diag(b)   (i >= j)
    dQ = exp(G) (dO S^T)  + dP through the scores        dE = -exp(G) (dB S^T) + dA through the scores
    dK = b exp(Z) N       + dA and dP through the scores
    db_j = Y_j . dB_j / b_j; where b_j = 0, the sum over what b_j scales: its columns of A and P, its key
    dS = exp(G_128) dS' + (exp(G) Q)^T dO - (exp(G) E)^T dB

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor` of the pairs around its token, the
reads after it, the writes before it and the whole; the short form q dq - k dk is a difference of large numbers. (Inside 16
tokens with gentle gates it is taken, on sums that hold the same rounded factors, so that they cancel exactly.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu import scores
from pallas_kernels.tpu.forward import bytes_of, held, in_memory, of_tile, state_spec, tokens_bytes, tokens_specs
from pallas_kernels.tpu.plan import Plan, vmem_bytes
from pallas_kernels.tpu.products import TILE, column, lanes, product, rows, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    END,
    HALF,
    START,
    Prepared,
    Ref,
    Temporary,
    Tokens,
    carry,
    erase_of,
    if_steep,
    key_of,
    of_head,
    of_key,
    operand,
    prepare,
    prepared_shapes,
    scalar_row,
    solve_product,
    temporary_shapes,
)

PAIRS, READS, WRITES, WHOLE = range(1, 5)  # the rows of a gate per head in the cotangents of the scalars, after beta's


class Stash(NamedTuple):
    """What the way forwards leaves for the way back, of every tile of a group; axes `[group, heads, ...]`."""

    prepared: Prepared
    states: Ref  # before the tile, [key, value]
    y: Ref  # [128, value]


class Scratch(NamedTuple):
    temporary: Temporary
    state: Ref  # float32 [heads, key, value]
    new: Ref  # float32 [heads, 128, value]: B forwards, dY and dB backwards
    d_o: Ref  # dO times the scale, an operand, [heads, 128, value]
    d_b: Ref  # dB likewise
    d_a: Ref  # dA and dP as operands, [heads, 128, 128]
    d_p: Ref
    raw_p: Ref  # float32, before masks, decays and beta
    raw_a: Ref
    d_reads: Ref  # float32 [heads, 128, key]
    d_writes: Ref
    scores_turned: Ref  # transposes of scores as operands: [heads, 128, 128 or 256]
    keys_turned: Ref  # [heads, 128, key]
    x_turned: Ref  # [heads, 128, 64]
    reads_turned: Ref  # [heads, key, 128 or 256]
    d_q: Ref  # float32 [key heads, 128, key]
    d_k: Ref
    d_erase: Ref
    terms: Ref  # a gate per channel: factor * d_factor of levels, reads and writes, as operands [heads, 9 * 128, key]
    near: Ref  # likewise: what pairs inside 16 tokens give to gentle gates, float32 [heads, 128, key]
    whole: Ref  # likewise of the whole, [heads, 8, key]


def _vmem(*shape: int, dtype: DTypeLike = jnp.float32) -> object:
    return pltpu.VMEM(shape, dtype)


def _stash_shapes(plan: Plan) -> Stash:
    return Stash(
        prepared_shapes(plan, plan.group),
        _vmem(plan.group, plan.heads, plan.key, plan.value, dtype=operand(plan)),
        _vmem(plan.group, plan.heads, TILE, plan.value, dtype=operand(plan)),
    )


def _scratch_shapes(plan: Plan) -> Scratch:
    channel, reads = plan.gate == "channel", 1 + plan.erases
    return Scratch(
        temporary=temporary_shapes(plan),
        state=_vmem(plan.heads, plan.key, plan.value),
        new=_vmem(plan.heads, TILE, plan.value),
        d_o=_vmem(plan.heads, TILE, plan.value, dtype=operand(plan)),
        d_b=_vmem(plan.heads, TILE, plan.value, dtype=operand(plan)),
        d_a=_vmem(plan.heads, TILE, TILE, dtype=operand(plan)) if plan.erases else None,
        d_p=_vmem(plan.heads, TILE, TILE, dtype=operand(plan)),
        raw_p=_vmem(plan.heads, TILE, TILE),
        raw_a=_vmem(plan.heads, TILE, TILE) if plan.erases else None,
        d_reads=_vmem(plan.heads, TILE, plan.key),
        d_writes=_vmem(plan.heads, TILE, plan.key),
        scores_turned=_vmem(plan.heads, TILE, reads * TILE, dtype=operand(plan)),
        keys_turned=_vmem(plan.heads, TILE, plan.key, dtype=operand(plan)),
        x_turned=_vmem(plan.heads, TILE, HALF) if plan.erases else None,
        reads_turned=_vmem(plan.heads, plan.key, reads * TILE, dtype=operand(plan)),
        d_q=_vmem(plan.key_heads, TILE, plan.key),
        d_k=_vmem(plan.key_heads, TILE, plan.key),
        d_erase=_vmem(plan.erase_heads, TILE, plan.key) if plan.erase_heads else None,
        terms=_vmem(plan.heads, (len(scores.BLOCKS) + 2) * TILE, plan.key, dtype=operand(plan)) if channel else None,
        near=_vmem(plan.heads, TILE, plan.key) if channel else None,
        whole=_vmem(plan.heads, 8, plan.key) if channel else None,
    )


def backward_bytes(plan: Plan) -> int:
    """VMEM that `backward` needs: its scratch, and its blocks twice."""
    states = 4 * plan.heads * plan.key * plan.value * 4
    d_out = plan.group * TILE * plan.heads * plan.value * operand(plan).itemsize
    return bytes_of((_stash_shapes(plan), _scratch_shapes(plan))) + 2 * (2 * tokens_bytes(plan) + d_out + states)


def backward(plan: Plan, tokens: Tokens, states: Array, d_o: Array, d_state: Array) -> tuple[Tokens, Array]:
    """Cotangents of the inputs, laid out like them, and of the initial states.

    Those of `scalars` are `[batch, programs, tiles, kinds * heads, 128]`: beta; with a gate per head also the four parts of
    its gradient.
    """
    f32 = jnp.float32
    heads, last = plan.programs * plan.heads, plan.groups - 1
    specs = tokens_specs(plan, lambda t: last - t)
    kinds = 1 + WHOLE * (plan.gate == "head")

    def body(
        tokens: Tokens, kept: Ref, d_o: Ref, d_last: Ref, d_tokens: Tokens, d_state: Ref, stash: Stash, scratch: Scratch
    ) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            d_state[0] = d_last[0]

        scratch.state[0] = kept[0, :, 0]

        @pl.loop(0, plan.group)
        def _(index: Array) -> None:
            tile, left = of_tile(tokens, index), jax.tree.map(lambda ref: ref.at[index], stash)
            here = in_memory(scratch, index)
            prepare(plan, tile, left.prepared, here.temporary)
            for h in range(plan.heads):
                left.states[h] = here.state[h].astype(left.states.dtype)
            carry(plan, tile, left.prepared, here.state, here.new, left.y, None, None)

        @pl.loop(0, plan.group)
        def _(step: Array) -> None:
            index = plan.group - 1 - step
            left, here = jax.tree.map(lambda ref: ref.at[index], stash), in_memory(scratch, step)
            d_tile_o = d_o.at[0, pl.ds(pl.multiple_of(index * TILE, TILE), TILE)]
            _tile_backward(plan, of_tile(tokens, index), left, d_tile_o, d_state.at[0], of_tile(d_tokens, index), here)

    def tile_scalars(spec: pl.BlockSpec) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, plan.group, kinds * plan.heads, TILE), spec.index_map)

    out_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
    scalars = jax.ShapeDtypeStruct((plan.batch, plan.programs, plan.tiles, kinds * plan.heads, TILE), f32)
    square = (heads, plan.key, plan.value)
    return pl.pallas_call(
        body,
        grid=(plan.batch, plan.programs, plan.groups),
        in_specs=[
            specs,
            pl.BlockSpec((1, plan.heads, 1, plan.key, plan.value), lambda b, h, t: (b, h, last - t, 0, 0)),
            specs.v,
            state_spec(plan),
        ],
        out_specs=[specs._replace(scalars=tile_scalars(specs.scalars)), state_spec(plan)],
        out_shape=[out_shapes._replace(scalars=scalars), jax.ShapeDtypeStruct((plan.batch, *square), f32)],
        scratch_shapes=[
            _stash_shapes(plan),
            held(_scratch_shapes(plan)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_backward",
    )(tokens, states, d_o, d_state)


def _tile_backward(
    plan: Plan, tokens: Tokens, stash: Stash, d_o: Ref, d_state: Ref, d_tokens: Tokens, scratch: Scratch
) -> None:
    """Cotangents of one tile's inputs; `d_state` holds those of the state after the tile, and then before it."""
    value = plan.value
    for h in range(plan.heads):
        scratch.d_o[h] = (of_head(d_o, h, value).astype(jnp.float32) * plan.scale).astype(scratch.d_o.dtype)
    _values_backward(plan, tokens, stash.prepared, d_state, scratch)
    for h in range(plan.heads):
        d_tokens.v[:, h * value : (h + 1) * value] = scratch.d_b[h].astype(d_tokens.v.dtype)
    _scores_cotangents(plan, tokens, stash, d_tokens.scalars, scratch)
    if plan.gate == "channel":
        _channel_scores_backward(plan, tokens, stash.prepared, scratch)
    else:
        _head_scores_backward(plan, tokens, scratch)
    _state_backward(plan, tokens, stash, d_state, d_tokens.scalars, scratch)
    if plan.gate == "channel":
        _channel_gates_backward(plan, tokens, d_tokens.g, scratch)
    for j in range(plan.key_heads):
        here = slice(j * plan.key, (j + 1) * plan.key)
        d_tokens.q[:, here] = scratch.d_q[j].astype(d_tokens.q.dtype)
        d_tokens.k[:, here] = scratch.d_k[j].astype(d_tokens.k.dtype)
    for j in range(plan.erase_heads):
        d_tokens.erase[:, j * plan.key : (j + 1) * plan.key] = scratch.d_erase[j].astype(d_tokens.erase.dtype)


def _values_backward(plan: Plan, tokens: Tokens, done: Prepared, d_state: Ref, scratch: Scratch) -> None:
    """dY and dB."""
    exact, dtype = plan.exact, scratch.d_b.dtype
    for h in range(plan.heads):
        weights = (done.p[h] * scalar_row(plan, tokens, BETA, h)).astype(dtype)
        scratch.scores_turned[h, :, :TILE] = transposed(weights)
    for h in range(plan.heads):
        scratch.keys_turned[h] = transposed(done.keys[h])
    for h in range(plan.heads):
        scratch.new[h] = product(scratch.scores_turned[h, :, :TILE], scratch.d_o[h], exact)
    for h in range(plan.heads):
        d_new = scratch.new[h] + product(scratch.keys_turned[h], d_state[h], exact)
        if plan.erases:
            scratch.new[h] = d_new
        else:
            scratch.d_b[h] = d_new.astype(dtype)
    if not plan.erases:
        return
    for h in range(plan.heads):
        scratch.x_turned[h] = transposed(done.x[h])
        corner = done.a[h, HALF:] * scalar_row(plan, tokens, BETA, h)
        scratch.raw_p[h, :, :HALF] = transposed(corner)
    for h in range(plan.heads):
        scratch.new[h, HALF:] = solve_product(plan, scratch.x_turned[h, HALF:], scratch.new[h, HALF:])
    for h in range(plan.heads):
        known = solve_product(plan, scratch.raw_p[h, :HALF, :HALF], scratch.new[h, HALF:])
        scratch.new[h, :HALF] = scratch.new[h, :HALF] - known
    for h in range(plan.heads):
        scratch.new[h, :HALF] = solve_product(plan, scratch.x_turned[h, :HALF], scratch.new[h, :HALF])
    for h in range(plan.heads):
        scratch.d_b[h] = scratch.new[h].astype(dtype)


def _scores_cotangents(plan: Plan, tokens: Tokens, stash: Stash, d_scalars: Ref, scratch: Scratch) -> None:
    """dA and dP, times the decay of a gate per head; the parts of beta's and a gate's cotangents that lie in the scores."""
    done, exact = stash.prepared, plan.exact
    row, lane = rows(TILE, TILE), lanes(TILE, TILE)
    for h in range(plan.heads):
        scratch.raw_p[h] = product(scratch.d_o[h], stash.y[h], exact, transpose_b=True)
    if plan.erases:
        for h in range(plan.heads):
            scratch.raw_a[h] = product(scratch.d_b[h], stash.y[h], exact, transpose_b=True)
    for h in range(plan.heads):
        weight = scalar_row(plan, tokens, BETA, h)
        scale = weight if done.decay is None else done.decay[h] * weight
        d_p = jnp.where(row >= lane, scratch.raw_p[h], 0.0)
        scratch.d_p[h] = (d_p * scale).astype(scratch.d_p.dtype)
        terms = d_p * done.p[h]
        if plan.erases:
            d_a = jnp.where(row > lane, -scratch.raw_a[h], 0.0)
            scratch.d_a[h] = (d_a * scale).astype(scratch.d_a.dtype)
            terms = terms + d_a * done.a[h]
        d_scalars[pl.ds(h, 1)] = jnp.sum(terms, 0, keepdims=True)
        if plan.gate == "head":
            scratch.raw_p[h] = terms * weight
    if plan.gate != "head":
        return
    for h in range(plan.heads):
        scratch.raw_p[h] = product(scratch.raw_p[h], (row < lane).astype(jnp.float32), exact)
    for h in range(plan.heads):
        crossing = jnp.sum(jnp.where(row >= lane, scratch.raw_p[h], 0.0), 0, keepdims=True)
        d_scalars[pl.ds(PAIRS * plan.heads + h, 1)] = crossing


def _head_scores_backward(plan: Plan, tokens: Tokens, scratch: Scratch) -> None:
    """What the scores give to queries, keys and erase keys; the first to write them."""
    for h in range(plan.heads):
        scratch.scores_turned[h, :, :TILE] = transposed(scratch.d_p[h])
        if plan.erases:
            scratch.scores_turned[h, :, TILE:] = transposed(scratch.d_a[h])
    for h in range(plan.heads):
        k = of_key(plan, tokens.k, h)
        _add(plan, scratch.d_q, h, product(scratch.d_p[h], k, plan.exact))
    for h in range(plan.heads):
        reads = of_key(plan, tokens.q, h)
        if plan.erases:
            reads = jnp.concatenate([reads, erase_of(plan, tokens, h)], 0)
        _add(plan, scratch.d_k, h, product(scratch.scores_turned[h], reads, plan.exact))
    if plan.erases:
        for h in range(plan.heads):
            d_erase = product(scratch.d_a[h], of_key(plan, tokens.k, h), plan.exact)
            _add_erase(plan, scratch, h, d_erase, start=True)


def _add(plan: Plan, ref: Ref, head: int, x: Array, *, start: bool = True, block: int = 1) -> None:
    """Adds what a value head gives to its key head (or erase head); with `start` the first of a key head overwrites.

    `x` holds the `right_rows` of a level.
    """
    index = head * ref.shape[0] // plan.heads
    first = start and head * ref.shape[0] % plan.heads == 0
    for here, there in scores.right_pieces(block):
        ref[index, there] = x[here] if first else ref[index, there] + x[here]


def _add_erase(plan: Plan, scratch: Scratch, head: int, x: Array, *, start: bool, block: int = 1) -> None:
    """Adds to the cotangent of the erase key; where the write key erases, to that of the write key, never first."""
    if scratch.d_erase is None:
        _add(plan, scratch.d_k, head, x, start=False, block=block)
    else:
        _add(plan, scratch.d_erase, head, x, start=start, block=block)


def _row_sums(x: Array, exact: bool) -> Array:
    """The sums of the rows of a float32 matrix, as a row."""
    return product(jnp.ones((8, x.shape[1]), jnp.float32), x, exact, transpose_b=True)[:1]


def _state_backward(plan: Plan, tokens: Tokens, stash: Stash, d_state: Ref, d_scalars: Ref, scratch: Scratch) -> None:
    """What reads from the state before the tile and writes to the one after it; turns dS' into dS."""
    done, exact, f32 = stash.prepared, plan.exact, jnp.float32
    picked = tokens.scalars[: plan.heads]
    if plan.gate == "head":
        start, end = (tokens.scalars[kind * plan.heads : (kind + 1) * plan.heads] for kind in (START, END))
        picked = jnp.concatenate([picked * end, start], 0)
    columns = transposed(picked)
    levels = len(scores.BLOCKS)

    def put(kind: int, h: int, x: Array) -> None:
        d_scalars[pl.ds(kind * plan.heads + h, 1)] = x

    def start_of(h: int) -> Array:
        return column(columns, plan.heads + h, plan.key) if plan.gate == "head" else done.factors[h, -2 * TILE : -TILE]

    for h in range(plan.heads):  # queries
        scratch.d_reads[h] = product(scratch.d_o[h], stash.states[h], exact, transpose_b=True)
    for h in range(plan.heads):
        d_read = scratch.d_reads[h]
        _add(plan, scratch.d_q, h, d_read if plan.gate == "none" else d_read * start_of(h), start=False)
        if plan.gate != "none":
            scratch.d_reads[h] = of_key(plan, tokens.q, h).astype(f32) * d_read
    if plan.erases:  # erase keys
        for h in range(plan.heads):
            scratch.d_writes[h] = product(scratch.d_b[h], stash.states[h], exact, transpose_b=True)
        for h in range(plan.heads):
            d_read = scratch.d_writes[h]
            d_erase = d_read if plan.gate == "none" else d_read * start_of(h)
            _add_erase(plan, scratch, h, -d_erase, start=False)
            if plan.gate != "none":
                scratch.d_reads[h] = scratch.d_reads[h] - erase_of(plan, tokens, h).astype(f32) * d_read
    for h in range(plan.heads):  # what the reads give to the gates
        if plan.gate == "head":
            put(READS, h, _row_sums(scratch.d_reads[h], exact) * scalar_row(plan, tokens, START, h))
        elif plan.gate == "channel":
            terms = scratch.d_reads[h] * start_of(h)
            scratch.terms[h, levels * TILE : (levels + 1) * TILE] = terms.astype(scratch.terms.dtype)
    for h in range(plan.heads):  # keys
        scratch.d_writes[h] = product(stash.y[h], d_state[h], exact, transpose_b=True)
    for h in range(plan.heads):
        k = of_key(plan, tokens.k, h).astype(f32)
        d_write = scratch.d_writes[h]
        if plan.gate == "channel":
            d_write = d_write * done.factors[h, -TILE:]
        weighted = d_write * column(columns, h, plan.key)
        _add(plan, scratch.d_k, h, weighted, start=False)
        scratch.d_writes[h] = k * d_write
        if plan.gate == "channel":
            scratch.terms[h, (levels + 1) * TILE :] = (k * weighted).astype(scratch.terms.dtype)
    for h in range(plan.heads):
        weight = _row_sums(scratch.d_writes[h], exact)
        if plan.gate == "head":
            weight = weight * scalar_row(plan, tokens, END, h)
            put(WRITES, h, weight * scalar_row(plan, tokens, BETA, h))
        d_beta = d_scalars[pl.ds(h, 1)] + weight
        if plan.erases:
            # dB_j = beta_j U_j and d_beta_j = Y_j . U_j: where beta is not zero this needs no sum that cancels.
            beta = scalar_row(plan, tokens, BETA, h)
            direct = _row_sums(stash.y[h].astype(f32) * scratch.new[h], exact)
            d_beta = jnp.where(beta == 0.0, d_beta, direct / jnp.where(beta == 0.0, 1.0, beta))
        d_scalars[pl.ds(h, 1)] = d_beta
    for h in range(plan.heads):  # the state
        reads = [of_key(plan, tokens.q, h) if done.query_in is None else done.query_in[h]]
        if plan.erases:
            reads.append(-(erase_of(plan, tokens, h) if done.erase_in is None else done.erase_in[h]))
        for n, x in enumerate(reads):
            x = transposed(x)
            if plan.gate == "head":
                x = (x.astype(f32) * scalar_row(plan, tokens, START, h)).astype(x.dtype)
            scratch.reads_turned[h, :, n * TILE : (n + 1) * TILE] = x
    for h in range(plan.heads):
        old, d_new = stash.states[h].astype(f32), d_state[h]
        if plan.gate == "head":
            whole = scalar_row(plan, tokens, START, h)[:, TILE - 1 :]
            total = jnp.sum(old * d_new, keepdims=True) * whole
            put(WHOLE, h, jnp.where(lanes(1, TILE) == 0, total, 0.0))
            d_state[h] = d_new * whole
        elif plan.gate == "channel":
            scratch.whole[h] = done.whole[h] * _row_sums(old * d_new, exact)
            d_state[h] = d_new * column(transposed(done.whole[h]), 0, plan.value)
    for h in range(plan.heads):
        d_reads = jnp.concatenate([scratch.d_o[h], scratch.d_b[h]], 0) if plan.erases else scratch.d_o[h]
        d_state[h] = d_state[h] + product(scratch.reads_turned[h], d_reads, exact)


def _channel_scores_backward(plan: Plan, tokens: Tokens, done: Prepared, scratch: Scratch) -> None:
    """As `_head_scores_backward`, level by level; leaves what the levels give to the gates."""
    exact, f32, dtype = plan.exact, jnp.float32, scratch.d_p.dtype
    zero = jnp.zeros((), dtype)

    def steep() -> None:
        diagonal = rows(TILE, TILE) == lanes(TILE, TILE)
        for h in range(plan.heads):
            q, k = (of_key(plan, x, h) for x in (tokens.q, tokens.k))
            own = jnp.where(diagonal, scratch.d_p[h], zero)
            _add(plan, scratch.d_q, h, product(own, k, exact))
            _add(plan, scratch.d_k, h, product(own, q, exact))
            if scratch.d_erase is not None:
                _add(plan, scratch.d_erase, h, jnp.zeros((TILE, plan.key), f32))
        for block in scores.BLOCKS[:4]:
            level(block)

    def gentle() -> None:
        near = scores.near()
        for h in range(plan.heads):
            of_rows, of_keys = done.factors[h, :TILE], done.factors[h, TILE : 2 * TILE]
            # The gates take a difference of sums over the same pairs: it is exact if both sums have the same factors.
            keys = (of_key(plan, tokens.k, h).astype(f32) * of_keys).astype(dtype)
            reads = [(of_key(plan, tokens.q, h).astype(f32) * of_rows).astype(dtype)]
            d_scores = [jnp.where(near, scratch.d_p[h], zero)]
            if plan.erases:
                reads.append((erase_of(plan, tokens, h).astype(f32) * of_rows).astype(dtype))
                d_scores.append(jnp.where(near, scratch.d_a[h], zero))
            stacked = jnp.concatenate(d_scores, 0)
            d_reads = product(stacked, keys, exact)
            d_keys = product(transposed(stacked), jnp.concatenate(reads, 0), exact)
            _add(plan, scratch.d_q, h, d_reads[:TILE] * of_rows)
            _add(plan, scratch.d_k, h, d_keys * of_keys)
            terms = reads[0].astype(f32) * d_reads[:TILE] - keys.astype(f32) * d_keys
            if plan.erases:
                _add_erase(plan, scratch, h, d_reads[TILE:] * of_rows, start=True)
                terms = terms + reads[1].astype(f32) * d_reads[TILE:]
            scratch.near[h] = scores.near_suffix_sums(terms)

    def level(block: int) -> None:
        n = scores.BLOCKS.index(block)
        for h in range(plan.heads):
            factor = done.factors[h, n * TILE : (n + 1) * TILE]
            q, k = (of_key(plan, x, h).astype(f32) for x in (tokens.q, tokens.k))
            keys, right = k * factor, scores.right_rows(factor, block)
            meets = scores.meets(block)
            d_scores = [jnp.where(meets, scores.right_rows(scratch.d_p[h], block), zero)]
            reads = [scores.right_rows(q, block)]
            if plan.erases:
                d_scores.append(jnp.where(meets, scores.right_rows(scratch.d_a[h], block), zero))
                reads.append(
                    scores.right_rows(k if scratch.d_erase is None else erase_of(plan, tokens, h).astype(f32), block)
                )
            stacked = jnp.concatenate(d_scores, 0)
            d_reads = product(stacked, keys, exact)
            d_q = d_reads[: len(right)] * right
            _add(plan, scratch.d_q, h, d_q, start=False, block=block)
            terms = reads[0] * d_q
            if plan.erases:
                d_erase = d_reads[len(right) :] * right
                _add_erase(plan, scratch, h, d_erase, start=False, block=block)
                terms = terms + reads[1] * d_erase
            weighted = jnp.concatenate([x * right for x in reads], 0)
            d_keys = product(transposed(stacked), weighted, exact) * factor
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
            scratch.terms[h, n * TILE : (n + 1) * TILE] = terms.astype(scratch.terms.dtype)

    if_steep(plan, tokens, steep, gentle)
    for block in scores.BLOCKS[4:]:
        level(block)


def _channel_gates_backward(plan: Plan, tokens: Tokens, d_g: Ref, scratch: Scratch) -> None:
    """Gathers the cotangent of every gate from the terms whose range of tokens holds it."""
    gate, token = rows(TILE, TILE), lanes(TILE, TILE)
    held = []
    for block in scores.BLOCKS:
        right = token // block % 2 == 1
        inside = (right & (gate <= token)) | (~right & (gate > token))
        held.append(inside & (gate // block == token // block))
    held += [gate <= token, gate > token]
    matrix = jnp.concatenate([x.astype(operand(plan)) for x in held], 1)

    def gather(levels: slice, near: bool) -> None:
        for h in range(plan.heads):
            total = product(matrix[:, levels], scratch.terms[h, levels], plan.exact) + scratch.whole[h][:1]
            total = total + scratch.near[h] if near else total
            d_g[:, h * plan.key : (h + 1) * plan.key] = total.astype(d_g.dtype)

    if_steep(
        plan,
        tokens,
        functools.partial(gather, slice(0, None), near=False),
        functools.partial(gather, slice(4 * TILE, None), near=True),
    )
