"""Runner for the PyTorch Gated DeltaNet of transformers' Qwen3-Next."""

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]
from transformers.models.qwen3_next.modeling_qwen3_next import (  # type: ignore[import-not-found]
    torch_chunk_gated_delta_rule,
)

from benchmarks.problem import NAMES, load, relative_errors
from benchmarks.timing import Case, serve


def case(folder: Path) -> Case:
    """Both directions; torch has no memory analysis to report."""
    inputs, answer = load(folder, "gdn")
    x = [torch.from_numpy(inputs[name]).requires_grad_() for name in NAMES]
    do = torch.from_numpy(inputs["do"])

    def forward() -> torch.Tensor:
        q, k, v, beta, g = x
        return torch_chunk_gated_delta_rule(q, k, v, g, beta)[0]

    def forward_backward() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output = forward()
        return output, torch.autograd.grad(output, x, do)

    def forward_only() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    output, gradients = forward_backward()
    found = {"o": output.detach()} | {"d" + name: d for name, d in zip(NAMES, gradients, strict=True)}
    found["forward o"] = forward_only()
    errors = relative_errors(
        {name: array.numpy() for name, array in found.items()}, answer | {"forward o": answer["o"]}
    )
    return Case(calls={"forward": forward_only, "forward_backward": forward_backward}, facts={"errors": errors})


if __name__ == "__main__":
    serve({"gdn": case(Path(sys.argv[1]))}, ("transformers", "torch"))
