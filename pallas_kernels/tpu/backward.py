"""The backward kernel: tile by tile from the last to the first, while the cotangents of the states stay in VMEM.

What took the forward long is kept from it: the states before every tile, Y, and the inverses. All else is made again.

With the symbols of `pallas_kernels.tpu.forward`, N = Y dS'^T, and dO already multiplied by the scale:

    dY = (P diag(b))^T dO + (b exp(Z) K) dS'
    (I + A diag(b))^T dB = dY                            dV = dB
    dA = -dB Y^T diag(b)   (i > j)                       dP = dO Y^T diag(b)   (i >= j)
    dQ = exp(G) (dO S^T)  + dP through the scores        dE = -exp(G) (dB S^T) + dA through the scores
    dK = b exp(Z) N       + dA and dP through the scores
    db_j = Y_j . dB_j / b_j; where b_j = 0, the sum over what b_j scales: its columns of A and P, its key
    dS = exp(G_128) dS' + (exp(G) Q)^T dO - (exp(G) E)^T dB

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor` of the pairs around its token, the
reads after it, the writes before it and the whole; the short form q dq - k dk is a difference of large numbers.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import backward_channel
from pallas_kernels.tpu.backward_scratch import BackwardScratch, Stash, add, add_erase, parted, reads_of
from pallas_kernels.tpu.forward import (
    Kept,
    bytes_of,
    held,
    in_memory,
    kept_bytes,
    kept_specs,
    of_tile,
    solve_product,
    state_spec,
    tokens_bytes,
    tokens_specs,
)
from pallas_kernels.tpu.plan import Plan, vmem_bytes
from pallas_kernels.tpu.prepare import complete, prepare
from pallas_kernels.tpu.products import TILE, column, lanes, product, row_sums, rows, split, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    END,
    HALF,
    START,
    Prepared,
    Ref,
    Tokens,
    erase_of,
    finished,
    of_head,
    of_key,
    operand,
    scalar_row,
    start_of,
)

PAIRS, READS, WRITES, WHOLE = range(1, 5)  # the rows of a gate per head in the cotangents of the scalars, after beta's


def backward_bytes(plan: Plan) -> int:
    """VMEM that `backward` needs: its scratch, and its blocks twice."""
    states = 2 * plan.heads * plan.key * plan.value * 4
    d_out = plan.group * TILE * plan.heads * plan.value * operand(plan).itemsize
    blocks = 2 * tokens_bytes(plan, plan.group) + d_out + states + kept_bytes(plan)
    return bytes_of(BackwardScratch.shapes(plan)) + 2 * blocks


def backward(plan: Plan, tokens: Tokens, kept: Kept, d_o: Array, d_state: Array) -> tuple[Tokens, Array]:
    """Cotangents of the inputs, laid out like them, and of the initial states, float32 `[batch, heads, key, value]`.

    `d_o` is `[batch, time, heads * value]`, `d_state` the cotangents of the final states. Those of `scalars` are `[batch,
    programs, tiles, kinds * heads, 128]`: beta; with a gate per head also the four parts of its gradient.
    """
    f32 = jnp.float32
    last = plan.groups - 1
    specs = tokens_specs(plan, lambda t: last - t)
    kinds = 1 + WHOLE * (plan.gate == "head")

    def body(
        tokens: Tokens,
        kept: Kept,
        d_o: Ref,
        d_last: Ref,
        d_tokens: Tokens,
        d_state: Ref,
        scratch: BackwardScratch,
    ) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            d_state[0] = d_last[0]

        @pl.loop(0, plan.group)
        def _(step: Array) -> None:
            index = plan.group - 1 - step
            tile, d_tile, here = of_tile(tokens, index), of_tile(d_tokens, index), in_memory(scratch, step)
            left = jax.tree.map(lambda ref: ref.at[0, :, index], kept)
            stash = Stash(here.prepared._replace(x=left.inverses), left.states, left.y)
            is_steep = finished(prepare(plan, tile, stash.prepared, here.tile))
            finished(complete(plan, tile, stash.prepared, here.tile, inverts=False))
            d_tile_o = d_o.at[0, pl.ds(pl.multiple_of(index * TILE, TILE), TILE)]
            _tile_backward(plan, tile, stash, d_tile_o, d_state.at[0], d_tile, here, is_steep)

    def tile_scalars(spec: pl.BlockSpec) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, plan.group, kinds * plan.heads, TILE), spec.index_map)

    out_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
    scalars = jax.ShapeDtypeStruct((plan.batch, plan.programs, plan.tiles, kinds * plan.heads, TILE), f32)
    return pl.pallas_call(
        body,
        grid=(plan.batch, plan.programs, plan.groups),
        in_specs=[specs, kept_specs(plan, lambda t: last - t), specs.v, state_spec(plan)],
        out_specs=[specs._replace(scalars=tile_scalars(specs.scalars)), state_spec(plan)],
        out_shape=[out_shapes._replace(scalars=scalars), jax.ShapeDtypeStruct(d_state.shape, f32)],
        scratch_shapes=[held(BackwardScratch.shapes(plan))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_backward",
    )(tokens, kept, d_o, d_state)


def _tile_backward(
    plan: Plan,
    tokens: Tokens,
    stash: Stash,
    d_o: Ref,
    d_state: Ref,
    d_tokens: Tokens,
    scratch: BackwardScratch,
    steep: Array | None,
) -> None:
    """Cotangents of one tile's inputs, from those of its outputs, `[128, heads * value]`.

    `d_state`, float32 `[heads, key, value]`, holds those of the state after the tile, and then before it; with a gate per
    channel `steep` is what `prepare` returned.
    """
    value = plan.value
    for h in range(plan.heads):
        scratch.d_o[h] = (of_head(d_o, h, value).astype(jnp.float32) * plan.scale).astype(scratch.d_o.dtype)
    _values_backward(plan, tokens, stash.prepared, d_state, scratch)
    for h in range(plan.heads):
        d_tokens.v[:, h * value : (h + 1) * value] = scratch.d_b[h, :TILE].astype(d_tokens.v.dtype)
    _scores_cotangents(plan, tokens, stash, d_tokens.scalars, scratch)
    if steep is not None:
        backward_channel.scores_backward(plan, tokens, stash.prepared, scratch, steep)
    else:
        _head_scores_backward(plan, tokens, scratch)
    _reads_backward(plan, tokens, stash, d_tokens.scalars, scratch)
    _writes_backward(plan, tokens, stash, d_state, d_tokens.scalars, scratch)
    _state_backward(plan, tokens, stash, d_state, d_tokens.scalars, scratch)
    if plan.gate == "channel":
        backward_channel.gates_backward(plan, d_tokens.g, scratch)
    for j in range(plan.key_heads):
        here = slice(j * plan.key, (j + 1) * plan.key)
        d_tokens.q[:, here] = scratch.d_q[j].astype(d_tokens.q.dtype)
        d_tokens.k[:, here] = scratch.d_k[j].astype(d_tokens.k.dtype)
    for j in range(plan.erase_heads):
        d_tokens.erase[:, j * plan.key : (j + 1) * plan.key] = scratch.d_erase[j].astype(d_tokens.erase.dtype)


def _values_backward(plan: Plan, tokens: Tokens, done: Prepared, d_state: Ref, scratch: BackwardScratch) -> None:
    """dY, and from it dB."""
    exact, columns = plan.exact, _write_columns(plan, tokens)
    for h in range(plan.heads):
        for n, part in enumerate(_parts(plan, done.p[h] * scalar_row(plan, tokens, BETA, h))):
            scratch.weights_turned[h, n * TILE : (n + 1) * TILE] = transposed(part)
    if plan.gate == "channel":
        for h in range(plan.heads):
            scratch.keys_turned[h] = transposed(done.keys[h])
    for h in range(plan.heads):
        scratch.solve[h] = _joined(product(scratch.weights_turned[h], scratch.d_o[h], exact))
    for h in range(plan.heads):
        if plan.gate == "channel":
            known = product(scratch.keys_turned[h], d_state[h], exact)
        else:  # the keys are not rounded
            known = product(of_key(plan, tokens.k, h), d_state[h], exact) * column(columns, h, plan.value)
        scratch.solve[h] = scratch.solve[h] + known
    if plan.erases:
        _solve_backward(plan, tokens, done, scratch)
    for h in range(plan.heads):
        for n, part in enumerate(_parts(plan, scratch.solve[h])):
            scratch.d_b[h, n * TILE : (n + 1) * TILE] = part


def _solve_backward(plan: Plan, tokens: Tokens, done: Prepared, scratch: BackwardScratch) -> None:
    """Turns dY into dB."""
    for h in range(plan.heads):
        scratch.x_turned[h] = transposed(done.x[h])
        corner = done.a[h, HALF:] * scalar_row(plan, tokens, BETA, h)
        scratch.corner_turned[h] = transposed(corner)[:HALF]
    for h in range(plan.heads):
        scratch.solve[h, HALF:] = solve_product(plan, scratch.x_turned[h, HALF:], scratch.solve[h, HALF:])
    for h in range(plan.heads):
        known = solve_product(plan, scratch.corner_turned[h], scratch.solve[h, HALF:])
        scratch.solve[h, :HALF] = scratch.solve[h, :HALF] - known
    for h in range(plan.heads):
        scratch.solve[h, :HALF] = solve_product(plan, scratch.x_turned[h, :HALF], scratch.solve[h, :HALF])


def _scores_cotangents(plan: Plan, tokens: Tokens, stash: Stash, d_scalars: Ref, scratch: BackwardScratch) -> None:
    """dA and dP, times the decay of a gate per head; the parts of beta's and a gate's cotangents that lie in the scores."""
    done, exact = stash.prepared, plan.exact
    row, lane = rows(TILE, TILE), lanes(TILE, TILE)
    for h in range(plan.heads):
        raw = product(reads_of(plan, scratch.d_o, scratch.d_b, h), stash.y_of(plan, tokens, h), exact, transpose_b=True)
        scratch.raw_p[h] = raw[:TILE]
        if plan.erases:
            scratch.raw_a[h] = _joined(raw[TILE:])
    for h in range(plan.heads):
        weight = scalar_row(plan, tokens, BETA, h)
        scale = weight if done.decay is None else done.decay[h] * weight
        d_p = scratch.raw_p[h] if plan.gate != "none" else jnp.where(row >= lane, scratch.raw_p[h], 0.0)
        scratch.d_p[h] = (d_p * scale).astype(scratch.d_p.dtype)
        terms = d_p * done.p[h]
        if plan.erases:
            d_a = scratch.raw_a[h] if plan.gate == "channel" else jnp.where(row > lane, scratch.raw_a[h], 0.0)
            scratch.d_a[h] = (d_a * -scale).astype(scratch.d_a.dtype)
            terms = terms - d_a * done.a[h]
        _of_kind(plan, d_scalars, BETA)[pl.ds(h, 1)] = jnp.sum(terms, 0, keepdims=True)
        if plan.gate == "head":
            scratch.pair_terms[h] = terms * weight
    if plan.gate != "head":
        return
    later = (row < lane).astype(operand(plan))
    for h in range(plan.heads):
        parts = _parts(plan, scratch.pair_terms[h])
        right = jnp.concatenate([later] * len(parts), 0)
        scratch.pair_sums[h] = product(jnp.concatenate(parts, 1), right, exact)
    for h in range(plan.heads):
        crossing = jnp.sum(jnp.where(row >= lane, scratch.pair_sums[h], 0.0), 0, keepdims=True)
        _of_kind(plan, d_scalars, PAIRS)[pl.ds(h, 1)] = crossing


def _head_scores_backward(plan: Plan, tokens: Tokens, scratch: BackwardScratch) -> None:
    """What the scores give to queries, keys and erase keys; the first to write them."""
    for h in range(plan.heads):
        scratch.d_scores_turned[h, :, :TILE] = transposed(scratch.d_p[h])
        if plan.erases:
            scratch.d_scores_turned[h, :, TILE:] = transposed(scratch.d_a[h])
    for h in range(plan.heads):
        reads = of_key(plan, tokens.q, h)
        if plan.erases:
            reads = jnp.concatenate([reads, erase_of(plan, tokens, h)], 0)
        add(plan, scratch.d_k, h, product(scratch.d_scores_turned[h], reads, plan.exact))
    for h in range(plan.heads):
        d_reads = product(reads_of(plan, scratch.d_p, scratch.d_a, h), of_key(plan, tokens.k, h), plan.exact)
        add(plan, scratch.d_q, h, d_reads[:TILE])
        if plan.erases:
            add_erase(plan, scratch, h, d_reads[TILE:], start=True)


def _parts(plan: Plan, x: Array) -> tuple[Array, ...]:
    """An operand as so many of its dtype as the gradient of a gate per head wants: its sums over tokens may cancel."""
    return split(x) if parted(plan) else (x.astype(operand(plan)),)


def _joined(x: Array) -> Array:
    """The product of `_parts` that lie one below the other."""
    return x if len(x) == TILE else x[:TILE] + x[TILE:]


def _write_columns(plan: Plan, tokens: Tokens) -> Array:
    """What a token's write is scaled by besides the decays of channels, b exp(Z) or b, of every head as columns."""
    scales = _of_kind(plan, tokens.scalars, BETA)[...]
    if plan.gate == "head":
        scales = scales * _of_kind(plan, tokens.scalars, END)[...]
    return transposed(scales)


def _of_kind(plan: Plan, scalars: Ref, kind: int) -> Ref:
    """The token scalars of a kind, or their cotangents, `[heads, 128]`."""
    return scalars.at[pl.ds(kind * plan.heads, plan.heads)]


def _reads_backward(plan: Plan, tokens: Tokens, stash: Stash, d_scalars: Ref, scratch: BackwardScratch) -> None:
    """What reads the state before the tile: queries and erase keys, and the gates up to them."""
    done, f32 = stash.prepared, jnp.float32
    rounded = scratch.d_b.at[:, :TILE]

    def start(h: int) -> Array:
        return done.factors.start[h] if plan.gate == "channel" else start_of(done, h, plan.key)

    for h in range(plan.heads):
        d_reads = product(reads_of(plan, scratch.d_o, rounded, h), stash.states[h], plan.exact, transpose_b=True)
        scratch.query_reads[h] = d_reads[:TILE]
        if plan.erases:
            scratch.erase_reads[h] = d_reads[TILE:]
    for h in range(plan.heads):
        d_read = scratch.query_reads[h]
        add(plan, scratch.d_q, h, d_read if plan.gate == "none" else d_read * start(h), start=False)
        if plan.gate != "none":
            scratch.read_terms[h] = of_key(plan, tokens.q, h).astype(f32) * d_read
    for h in range(plan.heads if plan.erases else 0):
        d_read = scratch.erase_reads[h]
        d_erase = d_read if plan.gate == "none" else d_read * start(h)
        add_erase(plan, scratch, h, -d_erase, start=False)
        if plan.gate != "none":
            scratch.read_terms[h] = scratch.read_terms[h] - erase_of(plan, tokens, h).astype(f32) * d_read
    if plan.gate == "head":
        terms = row_sums([scratch.read_terms[h] for h in range(plan.heads)])
        _of_kind(plan, d_scalars, READS)[...] = terms * _of_kind(plan, tokens.scalars, START)[...]
    elif plan.gate == "channel":
        for h in range(plan.heads):
            terms = scratch.read_terms[h] * start(h)
            scratch.terms(h, "reads")[...] = terms.astype(operand(plan))


def _writes_backward(
    plan: Plan, tokens: Tokens, stash: Stash, d_state: Ref, d_scalars: Ref, scratch: BackwardScratch
) -> None:
    """What writes to the state after the tile: keys and beta, and the gates behind them."""
    done, exact, f32 = stash.prepared, plan.exact, jnp.float32
    columns = _write_columns(plan, tokens)
    for h in range(plan.heads):
        scratch.writes[h] = product(stash.y_of(plan, tokens, h), d_state[h], exact, transpose_b=True)
    for h in range(plan.heads):
        k = of_key(plan, tokens.k, h).astype(f32)
        d_write = scratch.writes[h]
        if plan.gate == "channel":
            d_write = d_write * done.factors.end[h]
        weighted = d_write * column(columns, h, plan.key)
        add(plan, scratch.d_k, h, weighted, start=False)
        scratch.write_terms[h] = k * d_write
        if plan.gate == "channel":
            scratch.terms(h, "writes")[...] = (k * weighted).astype(operand(plan))
    weights = row_sums([scratch.write_terms[h] for h in range(plan.heads)])
    beta, d_beta = _of_kind(plan, tokens.scalars, BETA)[...], _of_kind(plan, d_scalars, BETA)
    if plan.gate == "head":
        weights = weights * _of_kind(plan, tokens.scalars, END)[...]
        _of_kind(plan, d_scalars, WRITES)[...] = weights * beta
    summed = d_beta[...] + weights
    if plan.erases:
        # dB_j = beta_j U_j and d_beta_j = Y_j . U_j: where beta is not zero this needs no sum that cancels.
        direct = row_sums([stash.y[h].astype(f32) * scratch.solve[h] for h in range(plan.heads)])
        summed = jnp.where(beta == 0.0, summed, direct / jnp.where(beta == 0.0, 1.0, beta))
    d_beta[...] = summed


def _state_backward(
    plan: Plan, tokens: Tokens, stash: Stash, d_state: Ref, d_scalars: Ref, scratch: BackwardScratch
) -> None:
    """Turns dS' into dS; what the decay of the whole tile gives to its gates."""
    done, exact, f32 = stash.prepared, plan.exact, jnp.float32
    for h in range(plan.heads):
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
            _of_kind(plan, d_scalars, WHOLE)[pl.ds(h, 1)] = jnp.where(lanes(1, TILE) == 0, total, 0.0)
            d_state[h] = d_new * whole
        elif plan.gate == "channel":
            scratch.d_whole[h] = done.whole[h] * row_sums([old * d_new])
            d_state[h] = d_new * column(transposed(done.whole[h]), 0, plan.value)
    for h in range(plan.heads):
        d_reads = reads_of(plan, scratch.d_o, scratch.d_b.at[:, :TILE], h)
        d_state[h] = d_state[h] + product(scratch.reads_turned[h], d_reads, exact)
