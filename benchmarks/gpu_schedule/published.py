"""`python -m benchmarks.gpu_schedule.published`: the estimate for kernels of others, whose time on an H200 is published.

The forward of flash-linear-attention's gated delta rule, compiled by Triton in its own environment (`make peers` builds
it): of each kernel, the configuration that the estimate finds fastest, as its autotuner would by the clock. How often
loops turn is written here by hand. The shape, 16 key heads and 32 value heads of 128, 8192 tokens, takes 0.472 ms on an
H200, as FlashQLA's authors publish.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import table
from delta_jax.compiled.multiprocessor import Multiprocessor, multiprocessor
from delta_jax.compiled.sass import Program, Span
from delta_jax.parallel import GPUS
from delta_jax.parallel.gpus import disassembler

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-fla" / "bin" / "python"
PUBLISHED = 0.472
KEY_HEADS, HEADS, SIZE, CHUNK, TOKENS = 16, 32, 128, 64, 8192
KEYS, TOKEN_HEADS = 2 * TOKENS * KEY_HEADS * SIZE, TOKENS * HEADS  # bytes of the keys
STATES = 2 * TOKENS // CHUNK * HEADS * SIZE**2
BYTES = {  # read and written, every array once
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": KEYS + TOKEN_HEADS * (4 + 4 + 2 * CHUNK),
    "recompute_w_u_fwd_kernel": KEYS + TOKEN_HEADS * (4 + 4 + 2 * CHUNK + 3 * 2 * SIZE),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": KEYS + TOKEN_HEADS * (4 + 3 * 2 * SIZE) + STATES,
    "chunk_fwd_kernel_o": 2 * KEYS + TOKEN_HEADS * (4 + 2 * 2 * SIZE) + STATES,
}


def turns_of(row: dict[str, Any], program: Program, span: Span) -> int:
    """How often a loop runs: over chunks, over the blocks of a key or a value, or over the rows of a block of 16."""
    if row["kernel"] == "chunk_gated_delta_rule_fwd_kernel_h_blockdim64":
        return TOKENS // CHUNK
    if not any(i.multiplies for i in program.code[span.start : span.stop]):
        return 16 - 2
    return SIZE // row["blocks"]["BK"]


def listing(path: str) -> str:
    """The machine code of a file, with its control codes as Mosaic prints them."""
    text = subprocess.run([disassembler(), "-hex", path], capture_output=True, text=True, check=True).stdout
    return "\n".join(control_codes(text[text.index(".section\t.text.") :]))


def control_codes(text: str) -> Iterator[str]:
    """Lines of a listing with the bits of every instruction, as Mosaic prints them: control codes, address, instruction."""
    before = None
    for line in text.splitlines():
        if re.match(r"\.L_x_\d+:", line):
            yield line.strip()
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/", line):
            before = found
        elif before and (found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            # The second half of an instruction: stall, yield, what is set by results and by operands, what is waited for.
            codes = int(found.group(1), 16) >> 41
            stall, written, read, waits = codes & 15, codes >> 5 & 7, codes >> 8 & 7, codes >> 11 & 63
            waiting = "&".join(str(n) for n in range(6) if waits >> n & 1) or "-"
            sets = ":".join("-" if slot == 7 else str(slot) for slot in (read, written))
            yield f" {waiting}:{sets}:Y:{stall} /*{before.group(1)}*/ {before.group(2).rstrip('; ')} ;"
            before = None


def estimate(row: dict[str, Any], processor: Multiprocessor) -> dict[str, Any]:
    """A row with its cycles and milliseconds."""
    program = Program(listing(row["path"]), processor.multiply_adds)
    spans = program.find_loops(lambda body: True)
    total = program.with_turns(spans, {span: turns_of(row, program, span) for span in spans})
    together, _ = processor.together(row["registers"], row["threads"], row["shared_bytes"])
    milliseconds, sets = processor.milliseconds(
        programs=row["programs"],
        together=together,
        cycles=total.estimated,
        busy=total.busy * row["threads"] / 128,
        memory_bytes=BYTES[row["kernel"]],
    )
    return row | {"cycles": total.estimated, "together": together, "milliseconds": milliseconds, "sets": sets}


def published() -> str:
    """The table of the fastest configurations, and their sum beside the published time; why not, where it cannot be made."""
    if not PYTHON.exists():
        return "Left out: the environment of flash-linear-attention is not built (make peers)."
    with tempfile.TemporaryDirectory(prefix="delta_jax-") as folder:
        command = [str(PYTHON), "-m", "benchmarks.peers.fla_triton", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return f"Left out: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}"
        found = json.loads(done.stdout.splitlines()[-1])
        processor = multiprocessor(GPUS["h200"])
        rows = [estimate(row, processor) for row in found["rows"]]
    fastest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["milliseconds"]):
        fastest.setdefault(row["kernel"], row)
    head = ["kernel", "blocks", "programs", "registers", "together", "estimated cycles", "ms", "set by"]
    lines = [
        [
            f"`{name}`",
            ", ".join(f"{key} {size}" for key, size in row["blocks"].items()),
            f"{row['programs']} x {row['threads']}",
            *(str(row[key]) for key in ("registers", "together")),
            f"{row['cycles']:.0f}",
            f"{row['milliseconds']:.3f}",
            row["sets"],
        ]
        for name, row in fastest.items()
    ]
    whole = sum(row["milliseconds"] for row in fastest.values())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    said = f"Together {whole:.3f} ms; published {PUBLISHED} ms, {PUBLISHED / whole:.2f} times that. {versions}."
    return f"{table(head, lines)}\n\n{said}"


def main() -> None:
    """Compile and print; exit code 1 where it is left out."""
    text = published()
    print(text)
    sys.exit(text.startswith("Left out"))


if __name__ == "__main__":
    main()
