"""`python -m benchmarks.gpu`: the kernels beside the other implementations on an NVIDIA GPU, in one run.

Named shapes of real models, and a sweep over T at a constant 65,536 tokens, in bfloat16: the output ("forward"), and the
output with the gradients of q, k, v, beta and g ("forward + backward"). Every implementation runs in a process of its own,
one after another, from the same seed; one that is not installed, or that refuses a case, is left out by name with its
reason, and so is what does not end within --seconds. A figure is the median over ten rounds of calls that follow each other
without waiting, each round long enough that the device and not the host is what takes the time. Beside it stands the
fraction of the roofline: the larger of the bytes of all arguments and results over the bandwidth, and of the FLOPs of the
chunkwise form over the rate of the tensor cores.

Writes gpu.json and gpu.md into the folder given by --output, again after every implementation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.options import folder, seconds
from benchmarks.report import table, write

ROOT = Path(__file__).resolve().parents[1]
MARK = "GPU-BENCH "
CHUNK = 64
RATES = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.04e12, 312e12),
    "B200": (8e12, 2250e12),
    "RTX PRO 6000": (1.79e12, 504e12),
    "RTX 4090": (1.01e12, 165e12),
    "A6000": (0.768e12, 155e12),
}
"""Bytes and bfloat16 FLOPs a second, from NVIDIA's data sheets, of the SXM modules where there are such; any other GPU is
held against an H200."""

DIRECTIONS = ("forward", "forward_backward")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem."""

    name: str
    gate: str
    tokens: int
    batch: int = 1
    key_heads: int = 32
    heads: int = 32
    size: int = 128

    def limits(self, device: str, direction: str) -> tuple[float, float]:
        """Milliseconds that the bytes and the FLOPs take at least; a backward counts as two forwards."""
        bandwidth, rate = next((r for name, r in RATES.items() if name in device), RATES["H200"])
        gates = {"none": 1, "head": 2, "channel": 1 + self.size}[self.gate] * 4 * self.heads
        moved = 4 * self.size * (self.key_heads + self.heads) + gates
        flops = self.heads * (8 * CHUNK * self.size + 6 * self.size**2)
        if direction == "forward_backward":
            moved, flops = 3 * moved, 3 * flops
        tokens = self.batch * self.tokens
        return 1e3 * tokens * moved / bandwidth, 1e3 * tokens * flops / rate


CASES = (
    Case(name="Gated DeltaNet, 32 heads", gate="head", tokens=8192),
    Case(name="Qwen3-Next", gate="head", tokens=8192, key_heads=16),
    Case(name="Kimi Linear", gate="channel", tokens=8192),
    Case(name="DeltaNet 1.3B", gate="none", tokens=8192, key_heads=16, heads=16),
    *(
        Case(name=f"T = {n}", gate="head", tokens=n, batch=65536 // n, key_heads=16, heads=16)
        for n in (1024, 4096, 16384, 65536)
    ),
    Case(name="4 heads, T = 131072", gate="head", tokens=131072, key_heads=4, heads=4),
)


def inputs(case: Case) -> dict[str, np.ndarray]:
    """float32: unit keys and queries, decays as a new layer has them, and the cotangent of the output.

    What is drawn for the first 1024 tokens is repeated, for drawing takes long.
    """
    random, drawn = np.random.default_rng(0), min(case.tokens, 1024)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal((1, drawn, *shape), np.float32)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    keys, values = (case.key_heads, case.size), (case.heads, case.size)
    arrays = {"q": unit(normal(*keys)), "k": unit(normal(*keys)), "v": normal(*values), "do": normal(*values)}
    arrays["beta"] = 1 / (1 + np.exp(-normal(case.heads)))
    if case.gate != "none":
        arrays["g"] = -np.exp(normal(*(values if case.gate == "channel" else values[:1])) - 3)
    repeats = (case.batch, case.tokens // drawn)
    return {name: np.tile(x, (*repeats, *(1,) * (x.ndim - 2))) for name, x in arrays.items()}


def _rounds(call: Callable[[], Any], wait: Callable[[Any], None]) -> float:
    """Milliseconds of a call: the median of ten rounds of at least 30 ms."""

    def spent(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        return 1e3 * (time.perf_counter() - start) / count

    spent(3)
    count = max(3, int(30 / spent(5)))
    return median(spent(count) for _ in range(10))


Runner = Callable[[Sequence[Case]], Iterator[tuple[str, dict[str, Any]]]]
"""What an implementation finds for every case: the name of the case, and the figures or why it refuses."""


def _refusal(error: Exception) -> dict[str, str]:
    return {"refused": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def _function_of(functions: dict[str, Callable[..., Any]], case: Case) -> Callable[..., Any]:
    if case.gate not in functions:
        raise ValueError(f"it has no function for a gate of kind {case.gate!r}")
    return functions[case.gate]


def jax_runner(functions: dict[str, Callable[..., Any]]) -> Runner:
    """Times a function `(q, k, v, beta, g) -> o` for every gate.

    Compiling takes far longer than what is timed, so all cases are compiled first, at the same time.
    """
    import jax
    import jax.numpy as jnp

    def arguments_of(case: Case) -> tuple[dict[str, Any], Any]:
        arrays = {name: jnp.asarray(x, dtype_of(name)) for name, x in inputs(case).items()}
        return arrays, arrays.pop("do")

    def shapes_of(case: Case) -> tuple[dict[str, Any], Any]:
        arrays = {
            name: jax.ShapeDtypeStruct((case.batch, case.tokens, *x.shape[2:]), dtype_of(name))
            for name, x in inputs(replace(case, batch=1, tokens=1)).items()
        }
        return arrays, arrays.pop("do")

    def dtype_of(name: str) -> Any:
        return jnp.float32 if name in ("g", "beta") else jnp.bfloat16

    def lowered(case: Case) -> list[Any]:
        function = _function_of(functions, case)

        def forward(arrays: Any, d_o: Any) -> Any:
            return function(*(arrays.get(name) for name in ("q", "k", "v", "beta", "g")))

        def both(arrays: Any, d_o: Any) -> Any:
            o, pull = jax.vjp(lambda arrays: forward(arrays, d_o), arrays)
            return o, pull(d_o)

        return [jax.jit(f, keep_unused=True).lower(*shapes_of(case)) for f in (forward, both)]

    def figures(case: Case, directions: list[Any]) -> dict[str, Any]:
        arguments, results = arguments_of(case), {}
        for direction, compiled in zip(DIRECTIONS, directions, strict=True):
            memory: Any = compiled.memory_analysis()
            total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            ms = _rounds(lambda: compiled(*arguments), jax.block_until_ready)  # noqa: B023 - called at once
            results[direction] = {"ms": ms, "bytes": total}
        return results

    def run(cases: Sequence[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found: list[Any] = []
            for case in cases:
                try:
                    found.append([threads.submit(x.compile) for x in lowered(case)])
                except Exception as error:  # a case that one implementation refuses is left out by name
                    found.append(error)
        for case, directions in zip(cases, found, strict=True):
            try:
                if isinstance(directions, Exception):
                    raise directions
                yield case.name, figures(case, [x.result() for x in directions])
            except Exception as error:
                yield case.name, _refusal(error)

    return run


def torch_runner(functions: dict[str, Callable[..., Any]]) -> Runner:
    """Likewise for functions of torch tensors."""
    import torch  # type: ignore[import-not-found]

    def figures(case: Case) -> dict[str, Any]:
        function = _function_of(functions, case)
        tensors = {
            name: torch.tensor(x, device="cuda", dtype=torch.float32 if name in ("g", "beta") else torch.bfloat16)
            for name, x in inputs(case).items()
        }
        d_o = tensors.pop("do")
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}
        arguments = [tensors.get(name) for name in ("q", "k", "v", "beta", "g")]

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        def both() -> Any:
            return torch.autograd.grad(function(*arguments), list(tensors.values()), d_o)

        results = {}
        for direction, call in zip(DIRECTIONS, (forward, both), strict=True):
            torch.cuda.reset_peak_memory_stats()
            ms = _rounds(call, lambda _: torch.cuda.synchronize())
            results[direction] = {"ms": ms, "bytes": torch.cuda.max_memory_allocated()}
        return results

    def run(cases: Sequence[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
        for case in cases:
            try:
                yield case.name, figures(case)
            except Exception as error:
                yield case.name, _refusal(error)

    return run


def _ours(implementation: str) -> Runner:
    from delta_jax import delta_rule

    def function(*arguments: Any) -> Any:
        return delta_rule(*arguments, implementation=implementation)[0]

    return jax_runner(dict.fromkeys(("none", "head", "channel"), function))


def _jax_linear_attention() -> Runner:
    from jla.ops.mosaic_gpu import gated_delta_rule, kda  # type: ignore[import-not-found]

    return jax_runner(
        {
            "none": lambda q, k, v, beta, g: gated_delta_rule.delta_rule(q, k, v, beta)[0],
            "head": lambda q, k, v, beta, g: gated_delta_rule.gated_delta_rule(q, k, v, g, beta)[0],
            "channel": lambda q, k, v, beta, g: kda.kda(q, k, v, g, beta)[0],
        }
    )


def _flash_linear_attention() -> Runner:
    from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]
    from fla.ops.kda import chunk_kda  # type: ignore[import-not-found]

    return torch_runner(
        {
            "none": lambda q, k, v, beta, g: chunk_delta_rule(q, k, v, beta)[0],
            "head": lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta)[0],
            "channel": lambda q, k, v, beta, g: chunk_kda(q, k, v, g, beta)[0],
        }
    )


def _flash_qla() -> Runner:
    from flash_qla import chunk_gated_delta_rule  # type: ignore[import-not-found]

    return torch_runner({"head": lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta)[0]})


RUNNERS: dict[str, tuple[str, Callable[[], Runner]]] = {
    "delta_jax, pallas": ("jax", lambda: _ours("pallas")),
    "delta_jax, mosaic_mma": ("jax", lambda: _ours("mosaic_mma")),
    "delta_jax, xla": ("jax", lambda: _ours("xla")),
    "jax-linear-attention": ("jax-linear-attention", _jax_linear_attention),
    "flash-linear-attention": ("flash-linear-attention", _flash_linear_attention),
    "FlashQLA": ("flash-qla", _flash_qla),
}


def _run(name: str, cases: Sequence[Case]) -> None:
    """What a process of one implementation does: a line of JSON for its version and for every case."""
    package, make = RUNNERS[name]
    runner = make()
    print(MARK + json.dumps({"version": f"{package} {version(package)}"}), flush=True)
    for case, result in runner(cases):
        print(MARK + json.dumps({"case": case, "result": result}), flush=True)


def measure(name: str, cases: Sequence[Case], limit: float | None) -> dict[str, Any]:
    """The cases of an implementation, and why those are left out that have no result; at most `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--cases", *(case.name for case in cases)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors) as process,
    ):
        try:
            process.wait(limit)
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            ended = f"it had not ended after {limit:g} seconds"
        process.wait()
        output.seek(0)
        lines = [json.loads(x.removeprefix(MARK)) for x in output if x.startswith(MARK)]
        errors.seek(0)
        said = [x.strip() for x in errors if x.strip()]
    found: dict[str, Any] = {"cases": {x["case"]: x["result"] for x in lines[1:]}}
    if lines:
        found["version"] = lines[0]["version"]
    if process.returncode:
        found["left_out"] = said[-1] if said and process.returncode > 0 else ended
    return found


def report(result: dict[str, Any]) -> str:
    """The page that is printed and written."""
    parts = [
        "# Speed and memory on an NVIDIA GPU",
        f"{result['date']}, {result['device']}, bfloat16. Milliseconds, the fraction of the roofline, and the peak of "
        "memory in 10^6 bytes.",
    ]
    for direction in DIRECTIONS:
        rows = []
        for case in (Case(**x) for x in result["cases"]):
            limit = max(case.limits(result["device"], direction))
            row = [case.name, f"{limit:.3f}"]
            for found in result["implementations"].values():
                x = found["cases"].get(case.name, {}).get(direction)
                row.append(f"{x['ms']:.3f}, {limit / x['ms']:.0%}, {x['bytes'] / 1e6:.0f}" if x else "-")
            rows.append(row)
        parts += ["## " + direction.replace("_", " + "), table(["case", "roofline", *result["implementations"]], rows)]
    for name, found in result["implementations"].items():
        if "version" in found:
            parts.append(f"{name}: {found['version']}.")
        if "left_out" in found:
            parts.append(f"Left out: {name}{' (what has no figure)' if found['cases'] else ''}: {found['left_out']}.")
        parts += [f"{name} refused {c}: {x['refused']}." for c, x in found["cases"].items() if "refused" in x]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=folder, default=str(ROOT / "docs" / "benchmarks"), help="folder of gpu.json and gpu.md"
    )
    parser.add_argument("--only", nargs="+", choices=list(RUNNERS), default=list(RUNNERS), help="implementations")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="cases whose names have one of these")
    parser.add_argument("--seconds", type=seconds, help="how long an implementation may take, compiling included")
    parser.add_argument("--run", choices=list(RUNNERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [case for case in CASES if any(text in case.name for text in arguments.cases)]
    if not cases:
        parser.error(f"argument --cases: none has one of {arguments.cases} in its name: {[x.name for x in CASES]}")
    if arguments.run:
        _run(arguments.run, cases)
        return 0
    # Not in this process, which would hold memory.
    look = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    platform, device = subprocess.check_output([sys.executable, "-c", look], text=True).strip().split("|")
    if platform != "gpu":
        print(f"benchmarks.gpu: error: it measures GPUs, and this is a {platform}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device,
        "cases": [asdict(case) for case in cases],
        "implementations": {},
    }
    for name in arguments.only:
        result["implementations"][name] = measure(name, cases, arguments.seconds)
        page = report(result)
        write(arguments.output, "gpu", result, page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
