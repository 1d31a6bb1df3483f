"""How much memory reading and writing a published checkpoint takes beside the model itself.

    python -m benchmarks.read_memory [--gigabytes 2] [--folder FOLDER]      on Linux, with the CPU backend

Writes a checkpoint of Qwen3.5's kind with experts, bfloat16, in several files; reads it in a process of its own, and
writes it again. What is reported is the peak of the process's resident memory (VmHWM, reset before) less what it had before
(VmRSS, after a tiny checkpoint was read and written, so that modules and the compiler are in it) less, when reading, the
bytes of the model's arrays. Both should stay within the largest tensor and 10 per cent. Ends with 1 if one does not.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

MODEL = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}
SHARD = 500_000_000


def make(folder: Path, layers: int, **sizes: int) -> None:
    """A checkpoint whose experts are fused, which makes its largest tensors."""
    from delta_jax.interop.architectures import ARCHITECTURES
    from delta_jax.interop.checkpoint import expected_layout
    from delta_jax.interop.keys import Keys
    from delta_jax.interop.safetensors import write_file

    table = MODEL | {"num_hidden_layers": layers} | sizes
    architecture = ARCHITECTURES["qwen3_5_moe_text"]
    config = architecture.config(Keys(table))
    nested = {"model_type": "qwen3_5_moe", "text_config": table}
    layout, _ = expected_layout(architecture, config, nested, None)
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = SHARD
    for name, target in layout.targets.items():
        size = 2 * math.prod(target.shapes[0])
        if size > room and files[-1]:
            files.append({})
            room = SHARD
        files[-1][name] = ("BF16", target.shapes[0])
        room -= size
    noise = (0.02 * np.random.default_rng(0).normal(size=1 << 20)).astype(ml_dtypes.bfloat16).tobytes()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(nested))
    names = [f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))]
    for file, members in zip(names, files, strict=True):

        def data(name: str, members: dict[str, tuple[str, tuple[int, ...]]] = members) -> list[bytes]:
            size = 2 * math.prod(members[name][1])
            return [noise] * (size // len(noise)) + [noise[: size % len(noise)]]

        write_file(folder / file, members, data)
    where = {name: file for file, members in zip(names, files, strict=True) for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def memory(field: str) -> int:
    """Bytes of a line of the process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measured(folder: Path) -> dict[str, int]:
    """In a process of its own: the bytes beyond the model when it is read and when it is written."""
    import jax
    from flax import nnx

    from delta_jax.interop import load_pretrained, save_pretrained
    from delta_jax.interop.checkpoint import open_checkpoint

    tiny = load_pretrained(folder / "tiny", dtype="bfloat16")
    save_pretrained(tiny, folder / "tiny_again", like=folder / "tiny")
    largest = max(tensor.nbytes for tensor in open_checkpoint(folder / "large").tensors.values())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_pretrained(folder / "large", dtype="bfloat16")
    jax.block_until_ready(nnx.state(model))
    read, arrays = memory("VmHWM"), sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    save_pretrained(model, folder / "again", like=folder / "large")
    found = {"largest tensor": largest, "model": arrays, "reading": read - before - arrays}
    return found | {"writing": memory("VmHWM") - held}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, about")
    parser.add_argument("--folder", help="where it is made; default a temporary folder")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(Path(arguments.folder))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        make(folder / "tiny", 4, vocab_size=64, hidden_size=64, num_experts=4, moe_intermediate_size=16)
        make(folder / "large", 4 * max(1, round(arguments.gigabytes / 0.97)))
        command = [sys.executable, "-m", "benchmarks.read_memory", "--measure", "--folder", str(folder)]
        child = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
    found = json.loads(child.stdout.splitlines()[-1])
    for name, size in found.items():
        print(f"{name:15} {size / 1e6:8.1f} MB")
    return int(max(found["reading"], found["writing"]) > 1.1 * found["largest tensor"])


if __name__ == "__main__":
    sys.exit(main())
