"""What a token costs in the library's decode loop on a TPU that is not here, by the compiler's own estimates.

Usage: python -m benchmarks.tpu_schedule.decode PRESET BATCH [BATCH ...] [--generation v6e]. For every batch one line of
JSON: milliseconds a token of XLA's products, of its other instructions, and of the kernels, which take their traffic or
their cycles, whichever is more; of launching the kernels, which is in none of these, where each takes what the compiler
estimates for the smallest of its own instructions; the least that weights and caches, read once (caches written once too),
would take; how many instructions and kernels run a token; and the bytes of caches, of what is overwritten in place, and of
temporaries. Tokens are the likeliest ones, which the compiler is told: it would count what is only run to draw them.
With --tokens N it is a call of the model on N tokens that continue a cache, as a draft is verified: their logits, and the
cache after them all.
"""

import argparse
import json
import re
import time
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.tpu_schedule import GENERATIONS

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx  # isort: skip
from jax.sharding import NamedSharding, PartitionSpec  # isort: skip

from delta_jax.compiled.core import CORES  # isort: skip
from delta_jax.compiled.hlo import computations  # isort: skip
from delta_jax.compiled.jaxpr import kernel_calls  # isort: skip
from delta_jax.compiled.schedule import dump_folder, schedule_of  # isort: skip
from delta_jax.config import load_config  # isort: skip
from delta_jax.inference.generate import _decode  # isort: skip
from delta_jax.inference.sampling import Sampling  # isort: skip
from delta_jax.models import LanguageModel, ModelConfig  # isort: skip
from delta_jax.parallel import MeshConfig, make_mesh, tpu_topology  # isort: skip
from delta_jax.training import TrainConfig  # isort: skip


def arguments(config: ModelConfig, batch: int) -> tuple[Any, ...]:
    """The shapes of the arguments of the decode loop."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    shape, vocab = jax.ShapeDtypeStruct, config.vocab_size
    return (
        model,
        shape((batch, vocab), jnp.float32),
        jax.eval_shape(lambda: model.init_cache(batch, length=4096)),
        shape((batch, vocab), jnp.bool_),
        shape((batch,), jnp.bool_),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        shape((vocab,), jnp.bool_),
        shape((2,), jnp.int32),
    )


_LAUNCH = 2_100  # cycles the compiler estimates for the smallest instruction


@partial(jax.jit, donate_argnames=("logits", "cache", "seen"))
def greedy(
    model: Any, logits: Any, cache: Any, seen: Any, stopped: Any, keys: Any, stops: Any, where: Any
) -> tuple[Any, ...]:
    """The decode loop with constants where it is told how to draw."""
    found: tuple[Any, ...] = _decode(model, logits, cache, seen, stopped, keys, Sampling().numbers(), stops, where)
    return found


@partial(jax.jit, donate_argnames=("cache",))
def verify(model: Any, tokens: Any, cache: Any) -> Any:
    """The logits of several tokens at once."""
    return model(tokens, cache=cache)


def loop_body(hlo: str) -> str:
    """The body of the loop over tokens: of the loops of the entry that which carries the most arrays."""
    entry, lines = computations(hlo)
    loop = max((line for line in lines[entry] if " while(" in line), key=len)
    found = re.search(r"body=%?([\w.-]+)", loop)
    assert found is not None
    return found[1]


def measure(config: ModelConfig, batch: int, generation: str, tokens: int | None = None) -> dict[str, Any]:
    core, folder = CORES[generation], dump_folder()  # before libtpu is loaded
    mesh = make_mesh(MeshConfig(), tpu_topology(GENERATIONS[generation])[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    given = arguments(config, batch)
    if tokens is not None:
        given = given[0], jax.ShapeDtypeStruct((batch, tokens), jnp.int32), given[2]
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), given)
    start = time.time()
    with jax.set_mesh(mesh):
        traced = (greedy if tokens is None else verify).trace(*placed)
        compiled = traced.lower().compile()
    seconds, memory = time.time() - start, compiled.memory_analysis()
    text = compiled.as_text() or ""
    found = schedule_of(
        text, list(kernel_calls(traced.jaxpr)), folder, core, loop_body(text) if tokens is None else None
    )
    if found.unread:
        raise ValueError(f"the bundles of these kernels could not be read: {', '.join(found.unread)}")
    weights, caches = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (given[0], given[2]))
    launches = sum(run.runs for run in found.kernels.values())
    cycles = {
        "products": found.work.products.cycles,
        "others": found.work.others.cycles,
        "kernels": found.kernel_cycles,
        "launches": _LAUNCH * launches,
        "sum": found.cycles,
        "least": core.memory_cycles(weights + 2 * caches),
    }
    return {
        "batch": batch,
        "tokens": tokens or 1,
        "generation": generation,
        "milliseconds": {name: round(1e3 * n / core.clock, 3) for name, n in cycles.items()},
        "instructions": found.work.products.runs + found.work.others.runs,
        "kernels": launches,
        "cache_bytes": caches,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--generation", default="v6e", choices=list(GENERATIONS))
    parser.add_argument("--param-dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="of the model; default the preset's")
    parser.add_argument("--tokens", type=int, help="at once; default the decode loop, of one")
    options = parser.parse_args()
    config = load_config(TrainConfig, options.preset).model
    layers = options.layers or config.num_layers
    config = replace(config, param_dtype=options.param_dtype, num_layers=layers)
    for batch in options.batches:
        print(json.dumps(measure(config, batch, options.generation, options.tokens)), flush=True)


if __name__ == "__main__":
    main()
