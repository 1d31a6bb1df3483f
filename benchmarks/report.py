"""The tables of a run as Markdown."""

import json
from pathlib import Path
from typing import Any


def report_markdown(result: dict[str, Any]) -> str:
    """The page that `benchmarks.cpu` prints and writes.

    Args:
        result: what ends up in cpu.json.

    Returns:
        Markdown text.
    """
    from experiments.harness.results import BUSY  # not above: it loads much that the other reports have no use for

    machine, shape = result["machine"], result["shape"]
    rounds = len(result["rows"][0]["ms"]["forward"])
    parts = [
        "# Speed and memory on the CPU",
        f"{result['date']}, `{result['command'].strip()}`, {result['seconds']} s. {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load_before']} before, Python {machine['python']}.",
        f"float32, B=1, T={shape['tokens']}, H={shape['heads']}, K={shape['key_size']}, "
        f"V={shape['value_size']}; forward + backward returns the output and the gradients of q, k, v, beta, "
        f"g. Milliseconds: median of {rounds} interleaved rounds (lowest to highest round), and the fastest "
        "repeat of the run.",
        _speed(result["rows"]),
        "Their time over ours: the ratio within a round, median (lowest to highest), and fastest repeat over "
        "fastest repeat. Above 1 we are faster. First against our gate per head:",
        _ratios(result["rows"], "per_head"),
        "The implementation with a gate per channel, against our gate per channel:",
        _ratios([row for row in result["rows"] if row["problem"] == "kda"], "per_channel"),
        _matmul_text(result["rows"]),
        "Extra memory is XLA's temp_size_in_bytes of the compiled function, in 10^6 bytes: every buffer that "
        "is neither an argument nor a result. Errors are relative, root mean square, against the float64 "
        "recurrence.",
        _memory(result["rows"]),
        "Versions: " + "; ".join(sorted({_versions(row["versions"]) for row in result["rows"]})) + ".",
        *(f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()),
    ]
    if machine["load_before"] > BUSY:
        parts.insert(2, f"**The machine was busy (load {machine['load_before']}): these figures are no measurement.**")
    if "sweep" in result:
        parts += [
            "## Chunkwise against recurrence",
            _sweep_text(result["sweep"]),
            _sweep(result["sweep"]["rows"]),
        ]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _speed(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any], direction: str) -> list[str]:
        if direction not in row:
            return ["", ""]
        ms = row[direction]
        spread = f"{ms['median_ms']:.1f} ({ms['lowest_ms']:.1f} to {ms['highest_ms']:.1f})"
        return [spread, f"{ms['fastest_ms']:.1f}"]

    head = ["implementation", "forward", "fastest", "forward + backward", "fastest"]
    return table(head, [[row["name"], *cells(row, "forward"), *cells(row, "forward_backward")] for row in rows])


def _ratios(rows: list[dict[str, Any]], gate: str) -> str:
    def cells(row: dict[str, Any], direction: str) -> list[str]:
        if direction not in row:
            return ["", ""]
        ratio = row[direction]["over_ours_" + gate]
        return [
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
            f"{ratio['fastest']:.2f}",
        ]

    head = ["implementation", "forward", "fastest", "forward + backward", "fastest"]
    return table(head, [[row["name"], *cells(row, "forward"), *cells(row, "forward_backward")] for row in rows])


def _matmul_text(rows: list[dict[str, Any]]) -> str:
    row = next(row for row in rows if row["problem"] == "matmul")
    return (
        f"Our forward is {row['flops'] / 1e9:.2f} GFLOP with chunks of {row['chunk']} "
        f"(`benchmarks.ours.forward_flops`); the one matmul multiplies two {row['size']} x {row['size']} "
        "float32 matrices in the same process. Our forward takes "
        f"{1 / row['forward']['over_ours_per_head']['median']:.2f} times as long "
        f"({1 / row['forward']['over_ours_per_head']['fastest']:.2f} times by the fastest repeats)."
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    def megabytes(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e6:.0f}" if key in row else ""

    def error(row: dict[str, Any], gradients: bool) -> str:
        errors = (value for name, value in row["errors"].items() if name.startswith("d") == gradients)
        return f"{max(errors):.1e}"

    lines = [
        [
            row["name"],
            megabytes(row, "forward_bytes"),
            megabytes(row, "forward_backward_bytes"),
            error(row, False),
            error(row, True),
        ]
        for row in rows
        if "errors" in row
    ]
    head = [
        "implementation",
        "forward, MB",
        "forward + backward, MB",
        "error of o",
        "worst error of a gradient",
    ]
    return table(head, lines)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _sweep_text(sweep: dict[str, Any]) -> str:
    return (
        f"Forward + backward, float32, B=1, H={sweep['heads']}, K=V={sweep['size']}, gate per head; median, "
        "milliseconds. The recurrence is differentiated by JAX, which keeps a state for every token: two "
        "heads, so that the longest fits."
    )


def _sweep(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            str(row["tokens"]),
            f"{row['xla']['median_ms']:.1f}",
            f"{row['recurrent']['median_ms']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['xla']['bytes'] / 1e6:.0f}",
            f"{row['recurrent']['bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    return table(["T", "chunkwise", "recurrence", "ratio", "chunkwise, MB", "recurrence, MB"], lines)


def write(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Writes a benchmark's figures and its page as NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
