"""The chunkwise form beside the recurrence (DeltaNet figure 1): `python -m experiments.speedup [--scale ...] [--list]`.

This one times and does not train, so it is no `Study`; it has what the page asks of one, `claim_rows` and `section`.
"""

import datetime
import itertools
import json
import shlex
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from delta_jax.config import load_config, to_dict
from delta_jax.layers import l2_normalize
from delta_jax.layers.checks import require_positive_integers, require_positive_numbers
from delta_jax.ops import delta_rule
from experiments.harness import Verdict
from experiments.harness.layout import NUMBER
from experiments.harness.page import markdown_table
from experiments.harness.results import BUSY, PACKAGES, check_writable, machine, put, read
from experiments.harness.runner import default_folder, one_sentence, parse

RECURRENT, CHUNKWISE = "recurrent", "xla"
LAYOUT = {
    "order": int,
    "head_size": int,
    "date": str,
    "versions": {"jax": str},
    "machine": {"cpu": str, "cores": int, "load_before": NUMBER, "device": str, "platform": str},
    "seconds": NUMBER,
    "rounds": {str: [{RECURRENT: NUMBER, CHUNKWISE: NUMBER}]},
    "config": {"tokens": int, "width": int, "dtype": str, "rounds": int},
}
"""Of a file of results, see `misfit`."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is timed: all lengths with all head sizes.

    Attributes:
        lengths: T, each a divisor of tokens.
        head_sizes: of keys and values, each a divisor of width.
        tokens: B * T.
        width: heads * head size.
        dtype: of the inputs.
        rounds: turns that either form takes for each length.
        seconds: of a turn.
    """

    lengths: tuple[int, ...]
    head_sizes: tuple[int, ...]
    tokens: int
    width: int
    dtype: str = "float32"
    rounds: int = 3
    seconds: float = 1.0

    def __post_init__(self) -> None:
        require_positive_integers(tokens=self.tokens, width=self.width, rounds=self.rounds)
        require_positive_numbers(seconds=self.seconds)
        for name, values, whole in (("lengths", self.lengths, "tokens"), ("head_sizes", self.head_sizes, "width")):
            number = getattr(self, whole)
            if not values or any(value < 1 or number % value for value in values) or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold divisors of {whole}, {number}, and none twice, got {values}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


class Statement(NamedTuple):
    """A claim; `judge` reads the median speed-up of every (head size, length)."""

    text: str
    paper: str
    judge: Callable[[Mapping[tuple[int, int], float]], Verdict]


def always(found: Mapping[tuple[int, int], float]) -> Verdict:
    """The least and the largest speed-up."""
    low, high = min(found.values()), max(found.values())
    return Verdict(f"{low:.1f}x to {high:.1f}x", low > 1)


def with_length(found: Mapping[tuple[int, int], float]) -> Verdict:
    """The longest sequences against the shortest, at every head size."""
    ends = {size: (min(t for s, t in found if s == size), max(t for s, t in found if s == size)) for size, _ in found}
    pairs = [(size, found[size, low], found[size, high]) for size, (low, high) in ends.items()]
    words = ", ".join(f"heads of {size}: {low:.1f}x to {high:.1f}x" for size, low, high in pairs)
    return Verdict(words, grows([high / low for _, low, high in pairs]))


def with_size(found: Mapping[tuple[int, int], float]) -> Verdict:
    """From head size to head size, at the longest sequences."""
    longest = max(length for _, length in found)
    values = [(size, value) for (size, length), value in sorted(found.items()) if length == longest]
    words = ", ".join(f"heads of {size}: {value:.1f}x" for size, value in values)
    growth = [after / before for (_, before), (_, after) in itertools.pairwise(values)]
    return Verdict(f"T = {longest}: {words}", grows(growth) if growth else None)


def grows(factors: Sequence[float]) -> bool | None:
    """Whether all are above one; no verdict where the least is so by less than a tenth."""
    return None if 1 / 1.1 < min(factors) < 1.1 else min(factors) > 1


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """As `Study`, where it applies."""

    name: str
    title: str
    source: str
    text: str
    scales: Mapping[str, Timing]
    claims: tuple[Statement, ...]
    published: Mapping[int, tuple[str, ...]]

    def claim_rows(self, root: Path) -> Iterator[list[str]]:
        """A row for each claim and scale: claim, the paper's number, ours, scale, verdict."""
        for text, paper, judge in self.claims:
            judged = {
                scale: judge(_medians(files)) for scale in self.scales if (files := self.read(root / self.name / scale))
            }
            for scale, verdict in judged.items():
                yield [text, paper, verdict.ours, scale, verdict.word]
            if not judged:
                yield [text, paper, "not run", "", "cannot tell"]

    def section(self, root: Path) -> str:
        """Its part of the page."""
        parts = [f"## {self.title}", f"{self.source}. {self.text}", self._published()]
        for scale in self.scales:
            files = self.read(root / self.name / scale)
            parts += [f"**{scale}**: {_setting(files)}", _table(files)] if files else [f"**{scale}**: not run."]
        return "\n\n".join(parts)

    def _published(self) -> str:
        lengths = ["T", *(f"{2**power / 2:g}K" for power in range(6))]
        rows = [[f"paper, heads of {size}", *values] for size, values in self.published.items()]
        return markdown_table(lengths, rows)

    def read(self, folder: Path) -> list[dict[str, Any]]:
        """The results in a folder, a file for each head size."""
        return read(folder, LAYOUT, lambda file: file["head_size"])


STUDY = SpeedUp(
    name="speedup",
    title="Chunkwise against recurrent",
    source="Yang et al., DeltaNet (arXiv 2406.06484), figure 1",
    text="How many times faster DeltaNet's forward and backward pass is in the chunkwise form than token by token, at "
    "B * T constant. The paper (its blog has the numbers, read off a plot) compares two Triton kernels at a width of 2048 "
    "and 16,384 tokens on a GPU it does not name; here both forms are XLA's, the recurrence a `lax.scan` that keeps "
    "every state for the backward pass, so the two columns measure related things and not the same. The two take "
    "turns, a ratio is taken within a turn, and shown is the median with the least and the largest.",
    scales={
        "cpu": Timing(lengths=(128, 256, 512, 1024, 2048, 4096), head_sizes=(16, 32, 64), tokens=4096, width=128),
        "gpu": Timing(
            lengths=(512, 1024, 2048, 4096, 8192, 16384),
            head_sizes=(64, 128, 256),
            tokens=16384,
            width=2048,
            dtype="bfloat16",
        ),
        "paper": Timing(
            lengths=(512, 1024, 2048, 4096, 8192, 16384),
            head_sizes=(64, 128, 256),
            tokens=16384,
            width=2048,
            dtype="bfloat16",
            rounds=10,
            seconds=5.0,
        ),
    },
    claims=(
        Statement("The chunkwise form is faster at every length and head size", "4.0x to 36.6x", always),
        Statement(
            "The longer the sequences, the larger the speed-up",
            "0.5K to 16K, heads of 64: 4.0x to 23.7x; of 128: 7.1x to 32.8x; of 256: 10.2x to 36.6x",
            with_length,
        ),
        Statement(
            "The larger the heads, the larger the speed-up",
            "T = 16K, heads of 64: 23.7x; of 128: 32.8x; of 256: 36.6x",
            with_size,
        ),
    ),
    published={
        64: ("4.0", "4.5", "5.8", "9.5", "15.7", "23.7"),
        128: ("7.1", "7.4", "7.2", "10.5", "15.8", "32.8"),
        256: ("10.2", "10.2", "10.2", "17.5", "28.7", "36.6"),
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Times what is not there yet; exits with status 2 and one sentence where the user asks for what is not there."""
    options = parse(STUDY, arguments)
    console = Console()
    with one_sentence(STUDY.name):
        timing = load_config(Timing, to_dict(STUDY.scales[options.scale]), options.overrides)
        folder = Path(options.output) if options.output else default_folder(STUDY, options)
        known = {file["head_size"] for file in STUDY.read(folder) if file["config"] == to_dict(timing)}
        if options.list:
            _list(timing, known, console)
            return
        check_writable(folder)
        words = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", f"experiments.{STUDY.name}", *words])
        stamp = machine()  # once: the load of later sizes is that of the earlier ones
        for order, size in enumerate(timing.head_sizes):
            if size not in known:
                table = {"order": order, "command": command, **_measure(timing, size, stamp, console)}
                text = json.dumps(table | {"config": to_dict(timing)}, separators=(",", ":"))
                put(folder / f"heads_of_{size}.json", text + "\n")
        console.print(f"Results: {folder}. The page is made by: python -m experiments.report")


def _measure(timing: Timing, size: int, stamp: dict[str, Any], console: Console) -> dict[str, Any]:
    """Milliseconds of either form at every length, a median a round."""
    start = time.monotonic()
    calls = {
        (length, form): _call(timing, size, length, form)
        for length in timing.lengths
        for form in (RECURRENT, CHUNKWISE)
    }
    rows: dict[int, list[dict[str, float]]] = {length: [] for length in timing.lengths}
    for number in range(timing.rounds):
        for length in timing.lengths:
            turns = {form: _median(calls[length, form], timing.seconds) for form in (RECURRENT, CHUNKWISE)}
            rows[length].append({form: round(taken, 4) for form, taken in turns.items()})
        found = ", ".join(f"{length}: {_ratios(rows[length])[-1]:.1f}x" for length in timing.lengths)
        console.print(f"heads of {size}, round {number + 1}/{timing.rounds}: {found}", highlight=False, soft_wrap=True)
    device = jax.devices()[0]
    return {
        "head_size": size,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": stamp | {"device": device.device_kind, "platform": device.platform},
        "seconds": round(time.monotonic() - start, 1),
        "rounds": rows,
    }


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call, of as many as take so many seconds."""
    call()
    calls = min(max(2, round(seconds / timeit.timeit(call, number=1))), 100)
    return 1e3 * median(timeit.repeat(call, number=1, repeat=calls))


def _call(timing: Timing, size: int, length: int, form: str) -> Callable[[], Any]:
    """A compiled forward and backward pass on inputs like those of a DeltaNet layer."""
    shape = (timing.tokens // length, length, timing.width // size, size)
    q, k, v, weights = (
        jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(length), 4)
    )
    beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), shape[:-1]))
    inputs = [x.astype(timing.dtype) for x in (l2_normalize(q), l2_normalize(k), v, beta, weights)]

    def passes(q: Array, k: Array, v: Array, beta: Array, weights: Array) -> Any:
        output, pull = jax.vjp(lambda *args: delta_rule(*args, implementation=form)[0], q, k, v, beta)
        return output, pull(weights)

    compiled = jax.jit(passes).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def _ratios(rounds: Sequence[Mapping[str, float]]) -> list[float]:
    return [turn[RECURRENT] / turn[CHUNKWISE] for turn in rounds]


def _medians(files: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    return {
        (file["head_size"], int(length)): median(_ratios(rounds))
        for file in files
        for length, rounds in file["rounds"].items()
    }


def _setting(files: Sequence[Mapping[str, Any]]) -> str:
    config, stamp = files[0]["config"], files[0]["machine"]
    load = max(file["machine"]["load_before"] for file in files)
    busy = f" **The machine was busy (load {load})**: the forms met the same load, but read no times out of it." * (
        load > BUSY
    )
    name = stamp["cpu"] if stamp["platform"] == "cpu" else stamp["device"]
    return (
        f"{config['tokens']} tokens, width {config['width']}, {config['dtype']}, {config['rounds']} turns. {name}, "
        f"{stamp['cores']} cores, JAX {files[0]['versions']['jax']}, {files[0]['date']}. "
        f"Time: {sum(file['seconds'] for file in files) / 60:.1f} minutes.{busy}"
    )


def _table(files: Sequence[Mapping[str, Any]]) -> str:
    lengths = list(files[0]["rounds"])
    rows = []
    for file in files:
        found = [_ratios(file["rounds"][length]) for length in lengths]
        cells = [f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in found]
        rows.append([f"heads of {file['head_size']}", *cells])
    return markdown_table(["T", *lengths], rows)


def _list(timing: Timing, known: set[int], console: Console) -> None:
    table = Table("head size", "lengths", "heads", "minutes", "state")
    cost = 2 * len(timing.lengths) * (timing.rounds * timing.seconds + 5) / 60
    for size in timing.head_sizes:
        state = "done" if size in known else "to do"
        table.add_row(str(size), ", ".join(map(str, timing.lengths)), str(timing.width // size), f"{cost:.1f}", state)
    console.print(table)
    left = cost * len(set(timing.head_sizes) - known)
    console.print(f"About {left:.0f} minutes to do, with five seconds to compile each.", highlight=False)


if __name__ == "__main__":
    main()
