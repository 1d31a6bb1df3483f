"""The benchmark of GPUs, as far as it goes without one: cases, refusals, what is left out, the page."""

from dataclasses import asdict

from benchmarks import gpu


def test_a_runner_times_every_case_and_refuses_by_name() -> None:
    cases = [
        gpu.Case(name=gate, gate=gate, tokens=2, heads=1, key_heads=1, size=2) for gate in ("head", "none", "channel")
    ]
    functions = {
        "head": lambda q, k, v, beta, g: q * k * v * (beta * g)[..., None].astype(v.dtype),
        "channel": lambda *_: 1 / 0,
    }
    found = dict(gpu.jax_runner(functions)(cases))
    assert list(found) == [case.name for case in cases]
    assert set(found["head"]) == set(gpu.DIRECTIONS)
    assert all(x["ms"] > 0 and x["bytes"] > 0 for x in found["head"].values())
    assert found["none"] == {"refused": "ValueError: it has no function for a gate of kind 'none'"}
    assert found["channel"] == {"refused": "ZeroDivisionError: division by zero"}


def test_what_gives_no_figures_is_left_out_by_name() -> None:
    cases = gpu.CASES[:1]
    found = {
        "FlashQLA": gpu.measure("FlashQLA", cases, None),
        "delta_jax, xla": gpu.measure("delta_jax, xla", cases, 0.01),
    }
    page = gpu.report(
        {"date": "today", "device": "NVIDIA H200", "cases": [asdict(case) for case in cases], "implementations": found}
    )
    assert "Left out: FlashQLA: ModuleNotFoundError: No module named" in page
    assert "Left out: delta_jax, xla: it had not ended after 0.01 seconds." in page
    assert page.count(cases[0].name) == 2
