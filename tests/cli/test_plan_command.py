"""`delta-jax plan`: rows, one clear line and an exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from delta_jax.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ["plan", "tiny", "model.num_layers=1", "sequence_length=128", "model.pattern.0.implementation=pallas"]


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs that are not here, is not installed")


def test_a_plan_that_fits(libtpu, capsys):
    assert main([*TINY, "--topology", "v5e:1x2", "mesh.fsdp=2"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("compiling the step for v5e:1x2")
    lines = out.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[:-1])
    assert shown["topology"] == "v5e:1x2, 2 chips (TPU v5 lite); figures are those of one chip"
    assert shown["mesh"] == "data=1, fsdp=2, sequence=1, tensor=1"
    assert shown["batch"] == "4 sequences of 128 tokens in 1 micro-batch"
    kernels = shown["kernels"].split(", ")
    assert {"delta_rule_forward", "delta_rule_backward", "gated_norm_forward"} <= set(kernels)
    assert re.fullmatch(r"[\d.]+ [MG]FLOP a step", shown["products"])
    assert {"parameters", "arguments", "outputs", "temporaries", "program", "compiled in"} <= set(shown)
    assert re.fullmatch(r"[\d.]+ [um]s to [\d.]+ [um]s, an estimate: no TPU has run this", shown["step time"])
    least, most = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{2,}", shown["tokens/s"]))
    assert 0 < least <= most < 1e9
    assert re.fullmatch(r"\d+% to \d+%", shown["MFU"])
    time = r"[\d.]+ [um]?s"
    parts = ", ".join(f"{name} {time}" for name in ("products", "kernels", "elementwise and copies", "collectives"))
    assert re.fullmatch(parts, shown["made of"])
    assert "197 TFLOP/s" in shown["assuming"] and "nobody has checked this chip" in shown["assuming"]
    over = rf"([a-z-]+ [\d.]+ ([KM]iB|bytes), )*[a-z-]+ [\d.]+ ([KM]iB|bytes) received a step, at least ({time})"
    found = re.fullmatch(over, shown["over fsdp"])
    assert found and "all-gather" in shown["over fsdp"] and shown["made of"].endswith(f"collectives {found.group(4)}")
    assert (
        shown["collectives"] == "a lower bound: what is received, at the published peak of links, 50 GB/s between chips"
    )
    assert re.fullmatch(r"fits: [\d.]+ [MG]iB of the 16 GiB of a chip", lines[-1])


@pytest.mark.slow  # libtpu is told to write bundles when it is loaded, so this needs a process of its own
def test_the_time_of_the_kernels_is_known_in_a_process_of_its_own(libtpu):
    command = [sys.executable, "-m", "delta_jax.cli", *TINY, "--topology", "v5e:1x1"]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert re.search(r"^made of .*kernels [1-9][\d.]* [um]s", done.stdout, re.M)
    assert "kernel delta_rule" not in done.stdout


def test_a_plan_that_does_not_fit(libtpu, capsys):
    assert main([*TINY, "--topology", "v5e:1x1", "batch_size=65536"]) == 1  # overrides on both sides of an option
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("does not fit: the compiler says: ")
    assert "step time" not in out and "rror" not in err


@pytest.mark.slow  # compiles for four meshes
def test_meshes_are_compared(libtpu, capsys):
    assert main([*TINY, "--topology", "v5e:1x2", "--suggest", "batch_size=2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[:-1])
    sizes = ((2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2))
    assert set(shown) == {"data={}, fsdp={}, sequence={}, tensor={}".format(*mesh) for mesh in sizes}
    time = r"([\d.]+) us"
    row = rf"{time} to {time} a step, of which collectives at least {time}; [\d.]+ MiB of 16 GiB"
    times = [float(re.fullmatch(row, told).group(2)) for told in shown.values()]
    assert times == sorted(times)
    best = next(iter(shown)).split(", ")
    assert lines[-1] == "best: " + " ".join(f"mesh.{size}" for size in best)
    assert err.count("compiling the step for v5e:1x2, data=") == 4


def test_no_mesh_will_do(libtpu, capsys):
    large = ["model.hidden_size=65536", "model.intermediate_size=65536", "model.num_layers=8", "batch_size=3"]
    assert main([*TINY, "--topology", "v5e:1x2", "--suggest", *large]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-1] == "none of these meshes fits"
    assert sorted(err.splitlines()) == sorted(re.sub(r"\s{2,}", ": ", line) for line in lines[:-1]), "said at once, too"
    assert sum(line.endswith("its state alone does not fit") for line in lines) == 2
    assert sum("wanted a multiple of the 2 parts" in line for line in lines) == 2
    odd = ["model.pattern.0.num_heads=1", "batch_size=1", "sequence_length=7"]
    assert main([*TINY, "--topology", "v5e:1x2", "--suggest", *odd]) == 2
    assert "wanted a multiple of the 2 parts" in capsys.readouterr().err


@pytest.mark.slow  # a compiler of its own, in an environment of its own
@pytest.mark.skipif(
    not (ROOT / ".venv-gpu" / "installed").exists(),
    reason="the compiler for GPUs, in .venv-gpu (make .venv-gpu/installed), is not installed",
)
@pytest.mark.parametrize(
    ("topology", "kernels"), [("h100:2x2", "delta_rule_prepare, delta_rule_forward"), ("a100:1", "")]
)
def test_a_plan_for_gpus(topology, kernels):
    """Kernels where they are the automatic choice, XLA elsewhere; a layer of it, for compiling is slow."""
    command = [ROOT / ".venv-gpu" / "bin" / "python", "-m", "delta_jax.cli", "plan", "tiny", "--topology", topology]
    command += ["model.num_layers=1", "sequence_length=64", "model.dtype=bfloat16", "mesh.fsdp=-1", "mesh.data=1"]
    command += ["model.pattern.0.num_heads=1", "model.pattern.0.head_dim=64"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[:-1])
    number, kind = (4, "NVIDIA H100 80GB HBM3") if kernels else (1, "NVIDIA A100-SXM4-80GB")
    assert shown["topology"].startswith(f"{topology}, {number} GPU") and kind in shown["topology"]
    assert shown["mesh"] == f"data=1, fsdp={number}, sequence=1, tensor=1"
    assert shown["kernels"].startswith(kernels or "made by XLA")
    if kernels:
        assert "all-gather" in shown["over fsdp"]
    else:
        assert shown["collectives"] == "none"
    assert re.match(r"at least [\d.]+ [mun]s, a bound, no estimate", shown["step time"])
    assert re.fullmatch(r"fits: [\d.]+ [MG]iB of the 79.\d+ GiB of a GPU", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:3x3"], "topology 'v5e:3x3'"),
        (["--topology", "v4:2x2x1", "batch_size=99999999"], "wanted a multiple of the 4 parts"),
        (["--topology", "v5e:1x1", "batch_size=99999999999"], "batch_size should be below 2^31"),
        (["mesh.data=3", "--topology", "v5e:2x2"], "does not fit the 4 tpu device"),
        (["batch_size=3", "--topology", "v5e:2x2"], "wanted a multiple of the 4 parts"),
    ],
)
def test_mistakes(libtpu, capsys, arguments, message):
    assert main(["plan", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("delta-jax plan: error: ")
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:0x1", "wanted 2 numbers of chips from 1 on"),
        ("v5p:0x0x0", "wanted 3 numbers of chips from 1 on"),
        ("v5e", "as in v5e:2x2"),
        ("v5e:", "as in v5e:2x2"),
        ("v5e:-1x2", "as in v5e:2x2"),
        ("v5e:2x2 ", "as in v5e:2x2"),
        ("v5e:2x2x1", "as in v5e:2x2"),
        ("v5p:2x2", "as in v5p:2x2x2"),
        ("x:2x2", "the generations are v4, v5e, v5p, v6e, tpu7x"),
        ("", "the generations are"),
        ("v5e:1000x1000", "1,000,000 chips, but the largest slice of v5e 256"),
        ("v5e:99999999999999999999x1", "as in v5e:2x2"),
        ("h100:8x", "wanted GPUs a host, and hosts where there are several"),
        ("h300:8", "the kinds of GPU a100, a6000, rtx4090, h100, h200, b200, gb200, b300, rtxpro6000, as in h100:8"),
    ],
)
def test_a_topology_is_checked_before_anything_is_loaded(monkeypatch, capsys, topology, message):
    """libtpu divides by the numbers of chips, and one of 0 would end the process."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "tiny", "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"delta-jax plan: error: topology {topology!r}") and message in error
    assert error.count("\n") == 1


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "tiny", "--topology", "v5e:1x1"]) == 2
    assert 'pip install "delta_jax[tpu]"' in capsys.readouterr().err


def test_without_the_compiler_for_gpus(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "tiny", "--topology", "h100:1"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "delta_jax[gpu-compiler]"' in error and error.count("\n") == 1


@pytest.mark.parametrize("word", ["--depth=3", "depth"])
def test_unknown_words_are_refused(capsys, word):
    with pytest.raises(SystemExit) as exit:
        main(["plan", "tiny", "--topology", "v5e:1x1", "batch_size=4", word])
    assert exit.value.code == 2
    assert word in capsys.readouterr().err


def test_the_topology_is_asked_for(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plan", "tiny"])
    assert exit.value.code == 2
    assert "--topology" in capsys.readouterr().err
