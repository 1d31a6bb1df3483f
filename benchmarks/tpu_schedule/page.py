"""The tables of a run as Markdown."""

from collections.abc import Iterable
from typing import Any

from benchmarks.report import table
from benchmarks.tpu_schedule import GENERATIONS
from benchmarks.tpu_schedule.calibration import calibration
from delta_jax.compiled.core import CORES, Core

TOKENS = 128
Row = dict[str, Any]

INTRODUCTION = """\
What the TPU compiler makes of the kernels, read on a CPU host: no TPU ran anything, and every time here is an estimate.

- A *bundle* is one instruction word of a TensorCore, issued in at least one cycle. A grid step's bundles are those between
  the ends of the grid's own loop, loops inside by their trip counts, every branch as if it were taken. A gate per channel
  has two rows: tiles decide as they run which way they take, and each row has one way and the decision. The forward's first
  step of a sequence prepares a tile more than the others, which is in no figure: 1.6 % of the kernel at 8192 tokens.
- *Cycles* are the bundles replayed in order with the compiler's own latencies: a result popped from a queue of the MXU, XLU
  or EUP before it is there makes the core wait. Not in it: DMA, conflicts of memory banks, instruction fetch, the pipeline's
  first and last step. Where memory is the limit, "bandwidth" says so.
- Both are per token and head: the sum over all grid steps by batch x tokens x value heads. "Around" is what XLA runs around
  the kernels in the same call, in the cycles that the compiler itself estimates for every instruction, loops by their trip
  counts ("+" where it has no estimate for some, such as gathers on the SparseCore). A row of XLA is our "xla"
  implementation, all of it around.
- A *whole call* is what a layer does: the L2 norm of queries and keys, then the public op, what it adds to the kernels
  included (the step: the kernel alone). Its *milliseconds* are the kernels' cycles, or their traffic at the peak of HBM
  where that takes longer, and the cycles around them, by the clock, times a factor, with the smallest and the largest time
  to be expected. Factor and spread are those between such cycles and times that others have published, on v6e and TPU7x;
  on v5e and v5p nobody has checked them. The host's 0.1 ms a call are not in it.
- Arguments are bfloat16 arrays [batch, tokens, heads x size] with float32 beta and gates, as a projection leaves them, of
  batch 1 (the step: batch 64 and one token). "KDA with its gate" is the workload that tokamax's authors time: beta and the
  raw gate bfloat16 too, the bounded gate computed in the call, one sequence or 25 packed ones; tokamax gets its own
  layout, heads first.
- HBM traffic in 10^6 bytes: of the kernels, blocks by the grid steps at which their index changes; around them, operands and
  results of every instruction that lie in HBM; and the least, arguments and results once. VMEM: the sum of the
  allocations in the dump, spills included. "Spill stores" and "fills" are those of a grid step.
- *Bandwidth*: arguments and results, each moved once, over what HBM moves in the cycles above. *MXU*: the part of the cycles
  times MXUs that rows stream through, whatever part of the array they fill. The larger of the two is the fraction of the
  roofline; above 100 % of the bandwidth, memory sets the time and the cycles hide behind it. A chip with two TensorCores is
  one of them with half the bandwidth; the milliseconds of v5p, where both are one device, are those of both at work. The
  shares of the units by kernel are slots in use over slots in its cycles."""

SOURCE = (
    "Peak and bandwidth of a chip: Google Cloud TPU documentation, the pages of v5e, v5p, v6e and TPU7x. TensorCores a "
    "chip and MXU sizes: the same pages and the architecture page. A clock is not published there for any of them: it is "
    "the one at which the MXUs reach the published peak."
)


CALIBRATION = (
    "The device times that tokamax's authors publish (PR 1103 of its repository) beside the cycles of their kernels and of "
    "what XLA runs around them, by the clock, without a factor."
)
RATIOS = (
    "Above 1 we take less: of the kernels alone in bundles and in cycles, and of whole calls in the estimated time."
)


def page(result: Row) -> str:
    """The page that `benchmarks.tpu_schedule` prints and writes."""
    rows = [row for row in result["rows"] if "error" not in row]
    generations = [name for name in GENERATIONS if any(generation(row) == name for row in rows)]
    failed = [
        f"- {label(row)}, {row['direction']}, {generation(row)}: {row['error']}"
        for row in result["rows"]
        if "error" in row
    ]
    versions = sorted({f"{name} {number}" for row in rows for name, number in row["versions"].items()})
    parts = [
        "# Static schedules on TPU",
        f"{result['date']}, `{result['command'].strip()}`, {result['seconds']} s. {', '.join(versions)}.",
        INTRODUCTION,
    ]
    for name in generations:
        here = [row for row in rows if generation(row) == name]
        parts += [
            f"## {name}",
            "Per token and head:",
            summary(here, CORES[name]),
            "By kernel:",
            kernels(here),
        ]
    checked = calibration(rows)
    parts += ["## Calibration", CALIBRATION, checked] if checked else []
    parts += ["## Chips", chips(generations), SOURCE]
    parts += ["## Did not compile", "\n".join(failed)] if failed else []
    left_out = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    parts += ["## Left out", "\n".join(left_out)] if left_out else []
    parts += ["## Ratios", RATIOS, ratios(rows, generations)]
    return "\n\n".join(parts) + "\n"


def generation(row: Row) -> str:
    return row["generation"]


def label(row: Row) -> str:
    """What a row is called: the shape, and who computes it."""
    case = row["case"]
    who = {"pallas": "", "xla": ", XLA", "tokamax": ""}[row["implementation"]]
    return case["name"] + who


def per_token(row: Row, what: str) -> float:
    """Bundles or cycles of all kernels per token and head."""
    return sum(kernel[what] * kernel["steps"] for kernel in row["kernels"]) / units(row)


def units(row: Row) -> int:
    """Batch x tokens x heads."""
    case = row["case"]
    return case["heads"] * (case["decode_batch"] if row["direction"] == "step" else case["tokens"])


def around(row: Row) -> str:
    found = row["around"]
    return f"{found['cycles'] / units(row):.2f}" + "+" * bool(found["unestimated"])


def milliseconds(row: Row) -> str:
    """The estimate of the whole call and its spread."""
    found = row["milliseconds"]
    return f"{found['estimate']:.3f} ({found['least']:.3f} to {found['most']:.3f})"


def bandwidth(row: Row, core: Core) -> float:
    """Least bytes over the bytes that HBM moves in the kernels' cycles."""
    seconds = per_token(row, "cycles") * units(row) / core.clock
    return row["bytes_least"] / (core.bandwidth * seconds)


def multiplying(row: Row) -> float:
    """MXU time over cycles, of all kernels of a row."""
    busy = sum(kernel["multiplying"] * kernel["bundles"] * kernel["steps"] for kernel in row["kernels"])
    return busy / (per_token(row, "cycles") * units(row))


def summary(rows: list[Row], core: Core) -> str:
    head = ["shape", "", "bundles", "cycles", "around", "whole call, ms", "kernels, ms", "bandwidth", "MXU"]
    lines = []
    for row in rows:
        figures, shares = ["", ""], ["", "", ""]  # of XLA alone
        if row["kernels"]:
            figures = [f"{per_token(row, what):.2f}" for what in ("bundles", "cycles")]
            shares = [f"{row['milliseconds']['kernels']:.3f}", f"{bandwidth(row, core):.0%}", f"{multiplying(row):.0%}"]
        about = [label(row), words(row["direction"]), *figures, around(row), milliseconds(row)]
        lines.append([*about, *shares, *megabytes(row)])
    return table([*head, "kernels MB", "around MB", "least MB"], lines)


def megabytes(row: Row) -> list[str]:
    moved = sum(kernel["bytes"] for kernel in row["kernels"])
    return [f"{x / 1e6:.0f}" for x in (moved, row["around"]["bytes"], row["bytes_least"])]


def words(direction: str) -> str:
    return direction.replace("_", " + ")


def kernels(rows: list[Row]) -> str:
    head = ["kernel", "grid", "token-heads a step", "bundles a step", "a tile and head", "loops", "cycles a step"]
    head += ["MXU", "XLU", "VALU", "EUP", "load", "store", "spill stores", "fills", "VMEM MiB"]
    lines = []
    for row in rows:
        for kernel in row["kernels"]:
            share = units(row) / kernel["steps"]
            loops = ", ".join(f"{size} x {trips or '?'}" for size, trips in kernel["loops"])
            waits = kernel["bundles"] / kernel["cycles"]
            use = {name: kernel["occupancy"][name] * waits for name in ("XLU", "VALU", "EUP", "VLOAD", "VSTORE")}
            lines.append(
                [
                    f"{label(row)}, {words(row['direction'])}: `{kernel['name']}`",
                    " x ".join(map(str, kernel["grid"])),
                    f"{share:.0f}",
                    str(kernel["bundles"]),
                    f"{kernel['bundles'] / share * (1 if row['direction'] == 'step' else TOKENS):.0f}",
                    loops,
                    str(kernel["cycles"]),
                    f"{kernel['multiplying'] * waits:.0%}",
                    *(f"{x:.0%}" for x in use.values()),
                    str(kernel["spills"]),
                    str(kernel["fills"]),
                    f"{kernel['vmem_bytes'] / 2**20:.1f}",
                ]
            )
    return table(head, lines)


def same(row: Row, other: Row, direction: str) -> bool:
    """Whether `other` is the same problem on the same chip by the same implementation in another direction."""
    keys = ("case", "generation", "implementation")
    return other["direction"] == direction and all(row[key] == other[key] for key in keys)


def ratios(rows: list[Row], generations: Iterable[str]) -> str:
    lines = []
    for name in generations:
        here = [row for row in rows if row["generation"] == name and row["kernels"]]
        for row in here:
            if row["direction"] == "forward":
                whole = next((other for other in here if same(row, other, "forward_backward")), None)
                if whole is not None:
                    lines.append([name, f"{label(row)}: forward + backward over forward", *quotient(whole, row)])
        for theirs in here:
            if theirs["implementation"] != "tokamax":
                continue
            lines += [
                [name, f"{label(theirs)} over {label(ours)}: {words(theirs['direction'])}", *quotient(theirs, ours)]
                for ours in here
                if ours["implementation"] == "pallas" and alike(ours, theirs)
            ]
    for row in rows:
        if row["implementation"] == "xla":
            ours = next(o for o in rows if o["implementation"] == "pallas" and o["generation"] == row["generation"]
                        and o["case"] == row["case"] and o["direction"] == row["direction"])  # fmt: skip
            about = [row["generation"], f"{label(row)} over the kernels: {words(row['direction'])}"]
            lines.append([*about, "", "", whole_calls(row, ours)])
    return table(["chip", "", "bundles", "cycles", "whole calls"], lines)


def alike(row: Row, other: Row) -> bool:
    """The same work: gate, sizes, heads, segments, direction."""
    keys = ("gate", "segments", "heads", "key_heads", "key", "value", "tokens", "dtype")
    return row["direction"] == other["direction"] and all(row["case"][key] == other["case"][key] for key in keys)


def quotient(above: Row, below: Row) -> list[str]:
    shares = [f"{per_token(above, what) / per_token(below, what):.2f}" for what in ("bundles", "cycles")]
    return [*shares, whole_calls(above, below)]


def whole_calls(above: Row, below: Row) -> str:
    return f"{above['milliseconds']['estimate'] / below['milliseconds']['estimate']:.2f}"


def chips(generations: Iterable[str]) -> str:
    head = ["", "bfloat16 TFLOP/s", "HBM GB/s", "TensorCores", "MXUs a core", "clock implied, GHz"]
    head += ["matmul to pop", "transpose", "lane permute", "EUP", "factor"]
    lines = []
    for name in generations:
        core = CORES[name]
        figures = [f"{core.chip.flops / 1e12:.0f}", f"{core.chip.hbm_bytes / 1e9:.0f}", str(core.cores)]
        figures += [f"{core.mxus} of {core.mxu_size} x {core.mxu_size}", f"{core.clock / 1e9:.2f}"]
        figures += [str(x) for x in (core.matmul, core.transpose, core.permute, core.eup)]
        least, most = core.spread
        checked = "" if core.measured else ", not checked"
        lines.append([name, *figures, f"{core.factor:.2f} ({least:.2f} to {most:.2f}{checked})"])
    return table(head, lines)
