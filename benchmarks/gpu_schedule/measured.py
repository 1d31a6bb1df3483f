"""Times that were measured, for the error of the estimates: those of docs/benchmarks/gpu.md."""

MEASURED = {
    ("Gated DeltaNet, 32 heads", "forward"): {"delta_rule_prepare": 0.104, "delta_rule_forward": 0.196},
    ("Gated DeltaNet, 32 heads", "backward"): {
        "delta_rule_reverse": 0.265,
        "delta_rule_scores": 0.173,
        "delta_rule_gradients": 0.324,
    },
    ("Kimi Linear", "forward"): {"delta_rule_prepare": 0.469, "delta_rule_forward": 0.202},
    ("Kimi Linear", "backward"): {
        "delta_rule_reverse": 0.245,
        "delta_rule_scores": 0.103,
        "delta_rule_gradients": 1.031,
    },
}
"""(shape, call) -> kernel -> milliseconds on an H200, of those kernels of 2026-11-26 that still do as much."""
