"""flash-linear-attention's Triton kernels of the gated delta rule, compiled for sm_90 without a GPU and without torch.

Usage: python -m benchmarks.peers.fla_triton FOLDER, in an environment with triton and fla-core, which is only read. For
every configuration that its autotuner would time on a Hopper GPU, writes the machine code to FOLDER; prints them all as
JSON: kernel, block sizes, programs, threads, shared memory, registers, file. The shape is the one that FlashQLA's authors
time: 16 key heads, 32 value heads of 128, 8192 tokens, the forward.
"""

import ast
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KEY_HEADS, HEADS, SIZE, CHUNK, TOKENS = 16, 32, 128, 64, 8192
CHUNKS = TOKENS // CHUNK
FIXED = {
    "H": KEY_HEADS,
    "HV": HEADS,
    "K": SIZE,
    "V": SIZE,
    "BT": CHUNK,
    "BC": 16,
    "USE_G": True,
    "SAVE_NEW_VALUE": True,
}
B16, F32 = "*bf16", "*fp32"
# Kernel, file, arrays, configurations (block sizes, warps, stages) of its autotuner, programs.
KERNELS = [
    (
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
        "gated_delta_rule/chunk_fwd.py",
        {"k": B16, "g": F32, "beta": F32, "A": B16},
        [({"BK": size}, warps, 3) for size in (32, 64) for warps in (1, 2, 4)],
        lambda blocks: CHUNKS * HEADS,
    ),
    (
        "recompute_w_u_fwd_kernel",
        "gated_delta_rule/wy_fast.py",
        {"k": B16, "v": B16, "beta": F32, "w": B16, "u": B16, "A": B16, "g": F32},
        [({"BK": 64, "BV": 64}, *c) for c in itertools.product((2, 4, 8), (2, 3, 4))],
        lambda blocks: CHUNKS * HEADS,
    ),
    (
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "common/chunk_delta_h.py",
        {"k": B16, "v": B16, "w": B16, "v_new": B16, "g": F32, "h": B16},
        [({"BV": size}, *c) for size in (32, 64) for c in itertools.product((2, 4), (2, 3, 4))],
        lambda blocks: SIZE // blocks["BV"] * HEADS,
    ),
    (
        "chunk_fwd_kernel_o",
        "common/chunk_o.py",
        {"q": B16, "k": B16, "v": B16, "h": B16, "g": F32, "o": B16},
        [({"BK": size, "BV": size}, warps, 3) for size, warps in ((128, 8), (64, 4), (32, 2))],
        lambda blocks: SIZE // blocks["BV"] * CHUNKS * HEADS,
    ),
]
HEAD = """
import triton
import triton.language as tl

SOLVE_TRIL_DOT_PRECISION = tl.constexpr("tf32")


@triton.jit
def exp2(x):
    return tl.math.exp2(x.to(tl.float32))


@triton.jit
def unflatten_program_id(X: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    return pid % X, pid // X
"""


def module(folder: Path):
    """The kernels alone, as a module: the package's own wants torch, and a GPU."""
    root, parts = Path(distribution("fla-core").locate_file("fla/ops")), [HEAD]
    for name, file, *_ in KERNELS:
        text = (root / file).read_text()
        node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
        parts.append("\n\n@triton.jit(do_not_specialize=['T'])\n")
        parts.append("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n")
    (folder / "kernels.py").write_text("".join(parts))
    spec = importlib.util.spec_from_file_location("kernels", folder / "kernels.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def main():
    folder = Path(sys.argv[1])
    kernels, rows = module(folder), []
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, _, arrays, configurations, programs in KERNELS:
        function = getattr(kernels, name)
        scalars = {"T": "i32", "scale": "fp32"}
        signature = {n: arrays.get(n) or scalars.get(n) or "constexpr" for n in function.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if n in arrays}
        for blocks, warps, stages in configurations:
            given = FIXED | blocks  # what is not given is None, which is false
            constants = {n: given.get(n) for n, kind in signature.items() if kind == "constexpr"}
            source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
            options = {"num_warps": warps, "num_stages": stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            path = folder / f"{len(rows)}.cubin"
            path.write_bytes(compiled.asm["cubin"])
            said = subprocess.run([reader, "-res-usage", path], capture_output=True, text=True, check=True).stdout
            row = {"kernel": name, "blocks": blocks, "programs": programs(blocks), "threads": 32 * warps}
            row |= {"stages": stages, "shared_bytes": compiled.metadata.shared, "path": str(path)}
            rows.append(row | {"registers": int(re.search(r"REG:(\d+)", said).group(1))})
    print(json.dumps({"versions": {n: distribution(n).version for n in ("triton", "fla-core")}, "rows": rows}))


if __name__ == "__main__":
    main()
