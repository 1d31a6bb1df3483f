"""The tables of a run as Markdown."""

from collections.abc import Iterable
from typing import Any

from benchmarks.report import table
from benchmarks.tpu_schedule.chips import CHIPS, SOURCE, Chip

TOKENS = 128
Row = dict[str, Any]

INTRODUCTION = """\
What the TPU compiler makes of the kernels, read on a CPU host: no TPU ran anything, and none of these figures is a time.

- A *bundle* is one instruction word of a TensorCore, issued in at least one cycle. A grid step's bundles are those between
  the ends of the grid's own loop, loops inside by their trip counts, every branch as if it were taken. A gate per channel
  has two rows: tiles decide as they run which way they take, and each row has one way and the decision.
- *Cycles* are the bundles replayed in order with the compiler's own latencies: a result popped from a queue of the MXU, XLU
  or EUP before it is there makes the core wait. Not in it: DMA, conflicts of memory banks, instruction fetch, the pipeline's
  first and last step. Where memory is the limit, "bandwidth" says so.
- Both are per token and head: the sum over all grid steps by batch x tokens x value heads. "Around" is what XLA runs around
  the kernels in the same call (bundles; "+" where one was not in the dump or its loop could not be read). A row of XLA is
  our "xla" implementation, all of it around: no Pallas kernel, its loops over chunks by their trip counts.
- Arguments are bfloat16 arrays [batch, tokens, heads x size] with float32 beta and gates, as a projection leaves them, of
  batch 1 (the step: batch 64 and one token); tokamax gets its own layout, heads first.
- HBM traffic in 10^6 bytes: of the kernels, blocks by the grid steps at which their index changes; around them, what XLA
  says its instructions access (where it says it); and the least, arguments and results once. VMEM: the sum of the
  allocations in the dump, spills included. "Spill stores" and "fills" are those of a grid step.
- *Bandwidth*: arguments and results, each moved once, over what HBM moves in the cycles above. *MXU*: the part of the cycles
  times MXUs that rows stream through, whatever part of the array they fill. The larger of the two is the fraction of the
  roofline; above 100 % of the bandwidth, memory sets the time and the cycles hide behind it. A chip with two TensorCores is
  one of them with half the bandwidth. The shares of the units by kernel are slots in use over slots in its cycles."""

PUBLISHED = {"forward": 1.78, "forward_backward": 4.59}
"""Milliseconds on TPU7x that tokamax's authors give for their kernels with 32 heads and 8192 tokens (its PR 1103)."""


def page(result: Row) -> str:
    """The page that `benchmarks.tpu_schedule` prints and writes."""
    rows = [row for row in result["rows"] if "error" not in row]
    generations = [name for name in CHIPS if any(generation(row) == name for row in rows)]
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
            summary(here, CHIPS[name]),
            "By kernel:",
            kernels(here, CHIPS[name]),
        ]
    parts += [text for text in [calibration(rows)] if text]
    parts += ["## Chips", chips(generations), SOURCE]
    parts += ["## Did not compile", "\n".join(failed)] if failed else []
    left_out = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    parts += ["## Left out", "\n".join(left_out)] if left_out else []
    parts += ["## Ratios", "Above 1 we take fewer bundles (cycles).", ratios(rows, generations)]
    return "\n\n".join(parts) + "\n"


def calibration(rows: list[Row]) -> str:
    """How the cycles of tokamax's kernels compare with the times its authors publish."""
    found = []
    for row in rows:
        if row["implementation"] == "tokamax" and row["generation"] == "tpu7x" and row["case"]["heads"] == 32:
            milliseconds = 1e3 * per_token(row, "cycles") * units(row) / CHIPS["tpu7x"].clock
            published = PUBLISHED[row["direction"]]
            found.append(
                f"{words(row['direction'])} {published} ms, {published / milliseconds:.2f} times its cycles here"
            )
    if not found:
        return ""
    return (
        "A measure of what the cycles leave out: the device times that tokamax's authors publish for this shape on TPU7x "
        f"(32 heads; PR 1103 of its repository) are {'; '.join(found)}."
    )


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
    return f"{found['bundles'] / units(row):.2f}" + "+" * (found["unread"] > 0)


def bandwidth(row: Row, chip: Chip) -> float:
    """Least bytes over the bytes that HBM moves in the kernels' cycles."""
    seconds = per_token(row, "cycles") * units(row) / chip.clock
    return row["bytes_least"] / (chip.bandwidth / chip.cores * seconds)


def multiplying(row: Row) -> float:
    """MXU time over cycles, of all kernels of a row."""
    busy = sum(kernel["multiplying"] * kernel["bundles"] * kernel["steps"] for kernel in row["kernels"])
    return busy / (per_token(row, "cycles") * units(row))


def summary(rows: list[Row], chip: Chip) -> str:
    head = ["shape", "", "bundles", "cycles", "around", "bandwidth", "MXU", "kernels MB", "around MB", "least MB"]
    lines = []
    for row in rows:
        if not row["kernels"]:  # XLA alone
            lines.append([label(row), words(row["direction"]), "", "", around(row), "", "", *megabytes(row)])
            continue
        figures = [f"{per_token(row, what):.2f}" for what in ("bundles", "cycles")]
        shares = [f"{bandwidth(row, chip):.0%}", f"{multiplying(row):.0%}"]
        lines.append([label(row), words(row["direction"]), *figures, around(row), *shares, *megabytes(row)])
    return table(head, lines)


def megabytes(row: Row) -> list[str]:
    moved = sum(kernel["bytes"] for kernel in row["kernels"])
    return ["" if x is None else f"{x / 1e6:.0f}" for x in (moved, row["around_bytes"], row["bytes_least"])]


def words(direction: str) -> str:
    return direction.replace("_", " + ")


def kernels(rows: list[Row], chip: Chip) -> str:
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
            total = per_token(ours, "bundles") + ours["around"]["bundles"] / units(ours)
            lines.append(
                [
                    row["generation"],
                    f"{label(row)} over the kernels: {words(row['direction'])}",
                    f"{row['around']['bundles'] / units(row) / total:.2f}",
                    "",
                ]
            )
    return table(["chip", "", "bundles", "cycles"], lines)


def alike(row: Row, other: Row) -> bool:
    """The same work: a gate per channel, sizes, heads, direction."""
    keys = ("gate", "heads", "key_heads", "key", "value", "tokens", "dtype")
    return row["direction"] == other["direction"] and all(row["case"][key] == other["case"][key] for key in keys)


def quotient(above: Row, below: Row) -> list[str]:
    return [f"{per_token(above, what) / per_token(below, what):.2f}" for what in ("bundles", "cycles")]


def chips(generations: Iterable[str]) -> str:
    head = ["", "bfloat16 TFLOP/s", "HBM GB/s", "TensorCores", "MXUs a core", "clock implied, GHz"]
    head += ["matmul to pop", "transpose", "lane permute", "EUP"]
    lines = []
    for name in generations:
        chip = CHIPS[name]
        figures = [f"{chip.peak / 1e12:.0f}", f"{chip.bandwidth / 1e9:.0f}", str(chip.cores)]
        figures += [f"{chip.mxus} of {chip.mxu_size} x {chip.mxu_size}", f"{chip.clock / 1e9:.2f}"]
        lines.append([name, *figures, *(str(x) for x in (chip.matmul, chip.transpose, chip.permute, chip.eup))])
    return table(head, lines)
