"""What a token costs in the library's decode loop on a TPU that is not here, by the compiler's own estimates.

Usage: python -m benchmarks.tpu_schedule.decode PRESET BATCH [BATCH ...] [--generation v6e]. For every batch one line of
JSON for each kernel, and one for the whole: milliseconds a token of XLA's products, of its copies of more than a MiB, of
its other instructions, and of the kernels, which take their traffic or their cycles, whichever is more; and how many
instructions run a token.
"""

import argparse
import functools
import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tpu_schedule.chips import CHIPS
from benchmarks.tpu_schedule.compiler import (
    DUMP,
    pallas_calls,
)  # sets the environment: before everything that imports JAX
from benchmarks.tpu_schedule.llo import Kernel, read_dump

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx  # isort: skip
from jax.sharding import NamedSharding, PartitionSpec  # isort: skip

from delta_jax.config import load_config  # isort: skip
from delta_jax.inference.generate import _decode  # isort: skip
from delta_jax.inference.sampling import Sampling  # isort: skip
from delta_jax.models import LanguageModel, ModelConfig  # isort: skip
from delta_jax.parallel import MeshConfig, make_mesh, tpu_topology  # isort: skip
from delta_jax.training import TrainConfig  # isort: skip

LARGE = 1 << 20
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


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
        jax.eval_shape(Sampling().numbers),
        shape((vocab,), jnp.bool_),
        shape((2,), jnp.int32),
    )


class Program:
    """The text of a compiled program: what one turn of its outermost loop runs."""

    def __init__(self, text: str) -> None:
        bodies = re.findall(r"^(ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
        self.computations = {name: body.splitlines() for _, name, body in bodies}
        entry = next(name for is_entry, name, _ in bodies if is_entry)
        loops = [line for line in self.computations[entry] if " while(" in line]
        loop = max(loops, key=len)  # the carry of the decode loop has the most arrays
        self.turn = list(self._run(_called(loop, "body"), 1))

    def _run(self, computation: str, times: int) -> Any:
        """Every instruction with how often it runs; of a condition's branches the one that has the fewest."""
        for line in self.computations[computation]:
            if " while(" in line:
                condition = "\n".join(self.computations[_called(line, "condition")])
                trips = re.findall(r"constant\((\d+)\)", condition)
                yield from self._run(_called(line, "body"), times * int(trips[0] if trips else 1))
            elif " conditional(" in line:
                names = re.search(r"branch_computations=\{([^}]*)\}", line)
                branches = names[1].replace("%", "").split(", ") if names else []
                yield from min(([*self._run(name, times)] for name in branches), key=len)
            elif " call(" in line:
                yield from self._run(_called(line, "to_apply"), times)
            else:
                yield line, times

    def kind(self, line: str) -> str:
        if 'custom_call_target="tpu_custom_call"' in line:
            return "kernels"
        inside = "\n".join(self.computations.get(_called(line, "calls"), ())) + line
        if " convolution(" in inside or " dot(" in inside:
            return "products"
        moved = max(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", line.split(" = ")[1].split("), ")[0])), default=0)
        if moved > LARGE and re.search(r" (copy|copy-start|dynamic-slice|dynamic-update-slice)\(", inside):
            return "copies"
        return "others"


def _called(line: str, role: str) -> str:
    found = re.search(rf"\b{role}=%([^,\s]+)", line)
    return found[1] if found else ""


def _bytes(of: tuple[str, str]) -> int:
    size = SIZES.get(of[0], 0)
    for n in filter(None, of[1].split(",")):
        size *= int(n)
    return size


def measure(config: ModelConfig, batch: int, generation: str) -> dict[str, Any]:
    chip = CHIPS[generation]
    mesh = make_mesh(MeshConfig(), tpu_topology(chip.topology)[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    given = arguments(config, batch)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), given)
    folder, start = Path(DUMP.name), time.time()
    for path in folder.iterdir():
        path.unlink()
    with jax.set_mesh(mesh):
        traced = _decode.trace(*placed)
        compiled = traced.lower().compile()
    seconds, memory = time.time() - start, compiled.memory_analysis()
    programs, calls = read_dump(folder), {call["name"]: call for call in pallas_calls(traced.jaxpr.jaxpr)}
    program = Program(compiled.as_text() or "")

    @functools.cache
    def kernel_cycles(name: str) -> float:
        call = calls[re.sub(r"\.\d+$", "", name)]
        cycles = call["steps"] * Kernel(*programs[name][:2], gridded=call["steps"] > 1).cycles(chip)
        print(json.dumps(call | {"cycles": cycles, "traffic": call["bytes"] / chip.bandwidth * chip.clock}), flush=True)
        return max(cycles, call["bytes"] / chip.bandwidth * chip.clock)

    cycles: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for line, times in program.turn:
        kind = program.kind(line)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        name = re.search(r"%(\S+) = ", line)
        if kind == "kernels" and name:
            cycles[kind] += times * kernel_cycles(name[1])
        elif estimate:
            cycles[kind] += times * int(estimate[1])
        count[kind] += times * (kind == "kernels" or estimate is not None)
    return {
        "batch": batch,
        "generation": generation,
        "milliseconds": {kind: round(1e3 * n / chip.clock, 3) for kind, n in cycles.items()},
        "sum": round(1e3 * sum(cycles.values()) / chip.clock, 3),
        "instructions": dict(count),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[2])),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--generation", default="v6e", choices=CHIPS)
    parser.add_argument("--param-dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="of the model; default the preset's")
    options = parser.parse_args()
    config = load_config(TrainConfig, options.preset).model
    layers = options.layers or config.num_layers
    config = replace(config, param_dtype=options.param_dtype, num_layers=layers)
    for batch in options.batches:
        print(json.dumps(measure(config, batch, options.generation)), flush=True)


if __name__ == "__main__":
    main()
