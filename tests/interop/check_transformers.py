"""Whether transformers loads what was exported: no tensor missing or left over, and the same logits.

    python tests/interop/check_transformers.py EXPORTED...     with torch (CPU) and transformers 5.23 or 5.24

Each argument is an exported folder named like one of tests/interop/checkpoints, whose expected.npz has the tokens and the
logits. Nothing of delta_jax is imported, so that any environment with transformers will do. Ends with 1 if one differs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

LIMIT = 5e-6


def check(folder: Path) -> str:
    expected = np.load(Path(__file__).parent / "checkpoints" / folder.name.removesuffix("_fresh") / "expected.npz")
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = {
        name: sorted(info[name])[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]
    }
    wrong = {name: keys for name, keys in wrong.items() if not all(key.startswith("mtp.") for key in keys)}
    with torch.no_grad():
        got = model(torch.from_numpy(expected["tokens"]).long()).logits.double().numpy()
    want = expected["logits"].astype(np.float64)
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    good = error <= LIMIT and not wrong
    return f"{'passed' if good else 'FAILED'}  {folder.name}: {type(model).__name__}, error {error:.1e} {wrong or ''}"


def main() -> int:
    lines = [check(Path(name)) for name in sys.argv[1:]]
    print("\n".join(lines))
    return int(not lines or any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
