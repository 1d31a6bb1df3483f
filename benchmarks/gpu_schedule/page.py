"""The schedules of GPU kernels as Markdown."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_schedule.measured import MEASURED
from benchmarks.report import table
from delta_jax.compiled.multiprocessor import DRAIN, LATENCY, REACHED, SPREAD, START, WAITS, multiprocessor
from delta_jax.parallel import GPUS

Row = dict[str, Any]

INTRODUCTION = f"""What NVIDIA's compiler makes of the Mosaic GPU kernels, compiled ahead of time on a machine without a
GPU: `make gpu-schedule`. **No GPU has run them here: milliseconds are estimates.** For the kernels that were measured on
an H200, to which the estimate's four figures were fitted, the measured time lay between {SPREAD[0]:.2f} and
{SPREAD[1]:.2f} times the estimate; nothing was measured on other chips. `delta_jax/compiled/multiprocessor.py` says how
cycles become milliseconds.

- *Registers* a thread; *spills*, bytes that a thread stores of registers for which there was no room; *shared memory* of a
  program in KiB; *together*, programs that fit a multiprocessor, and what limits them.
- *Serialised*: warnings of ptxas by which products of a warpgroup wait for each other.
- Cycles of one program: *issue* by the stall counts alone, *estimated* with waits, of the *tensor* cores, and of *shared
  memory* without conflicts.
- *ms*, and what sets it: latency (programs wait for their own results), throughput (a unit is in use all the time), memory.
- Bytes in 10^6: what a kernel reads and writes, every array once; *least*, arguments and results of the op once.
- The backward follows a forward: of cotangents of the outputs, with what the forward kept. The step is one token of 64
  sequences. Shapes are of batch 1, with keys and values of 128 where the name says nothing else."""


def page(result: Row) -> str:
    """The page that `benchmarks.gpu_schedule` prints and writes."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about = f"{result['date']}, `{result['command']}`, {result['seconds']} s. {versions}."
    return "\n\n".join(["# Static schedules on GPU", about, INTRODUCTION, tables(result)]) + "\n"


def tables(result: Row) -> str:
    """The page without what explains it."""
    rows = [row for row in result["rows"] if "error" not in row]
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    parts = []
    for chip in chips:
        here = [row for row in rows if row["chip"] == chip]
        parts += [f"## {chip}", "Whole calls:", calls(here), "By kernel:", kernels(here)]
    if checked := errors(rows):
        parts += ["## Against measured times", "The H200 of docs/benchmarks/gpu.md, milliseconds.", checked]
    if published := result.get("published"):
        about = "flash-linear-attention's forward of the Qwen3-Next shape on an H200, to which nothing was fitted:"
        parts += ["## A published kernel", about, published]
    failed = [f"- {label(row)}, {row['chip']}: {row['error']}" for row in result["rows"] if "error" in row]
    parts += ["## Did not compile", "\n".join(failed)] if failed else []
    parts += ["## Assumptions", processors(chips), assumptions()] if chips else []
    return "\n\n".join(parts)


def label(row: Row) -> str:
    return f"{row['case']['name']}, {row['call']}"


def calls(rows: list[Row]) -> str:
    head = ["call", "ms", "kernels", "MB", "least MB", "ratio", "temporary MB", "compiled in, s"]
    lines = [
        [
            label(row),
            f"{row['milliseconds']:.3f}",
            str(len(row["kernels"])),
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes_least'] / 1e6:.0f}",
            f"{row['bytes'] / row['bytes_least']:.1f}",
            f"{row['temporary_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return table(head, lines)


def kernels(rows: list[Row]) -> str:
    head = ["kernel", "programs", "registers", "spills", "KiB", "together", "serialised", "issue", "estimated"]
    head += ["tensor", "shared", "MB", "ms", "set by"]
    lines = [
        [
            f"{label(row)}: `{kernel['name']}`",
            f"{kernel['programs']} x {kernel['threads']}",
            str(kernel["registers"]),
            str(kernel["spill_stores"]),
            f"{kernel['shared_bytes'] / 1024:.0f}",
            f"{kernel['together']} ({kernel['limit']})",
            ", ".join(kernel["serialised"]) or "no",
            *(f"{kernel[name]:.0f}" for name in ("issue", "cycles", "tensor", "shared")),
            f"{kernel['bytes'] / 1e6:.0f}",
            f"{kernel['milliseconds']:.3f}",
            kernel["sets"],
        ]
        for row in rows
        for kernel in row["kernels"]
    ]
    return table(head, lines)


def errors(rows: Iterable[Row]) -> str:
    """Estimated beside measured; "" where nothing has been measured."""
    lines = []
    for row in rows:
        times = MEASURED.get((row["case"]["name"], row["call"]), {}) if row["chip"] == "h200" else {}
        for kernel in row["kernels"]:
            if kernel["name"] in times:
                measured, estimated = times[kernel["name"]], kernel["milliseconds"]
                figures = [f"{measured:.3f}", f"{estimated:.3f}", f"{measured / estimated:.2f}"]
                lines.append([f"{label(row)}: `{kernel['name']}`", *figures])
    return table(["kernel", "measured", "estimated", "measured / estimated"], lines) if lines else ""


def processors(chips: Iterable[str]) -> str:
    head = ["", "multiprocessors", "bfloat16 TFLOP/s", "multiply-adds a cycle", "clock implied, GHz", "memory GB/s"]
    lines = []
    for chip in chips:
        found = multiprocessor(GPUS[chip])
        figures = [str(found.count), f"{GPUS[chip].flops / 1e12:.0f}", str(found.multiply_adds)]
        lines.append([chip, *figures, f"{found.clock / 1e9:.2f}", f"{found.bandwidth / 1e9:.0f}"])
    return table(head, lines)


def assumptions() -> str:
    told = ", ".join(f"{name} {cycles}" for name, cycles in LATENCY.items())
    return (
        f"Latencies of a warp alone, in cycles: {told}. They count {WAITS:g} times; a wait for a group of products "
        f"ends {DRAIN} cycles after its last; a program starts and ends in {START} cycles; {REACHED:.0%} of the bandwidth "
        "is reached."
    )
