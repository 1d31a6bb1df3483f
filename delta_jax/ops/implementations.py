"""The ways of computing the op, one record each, and which of them a call takes.

A new one is a package of kernels, a record in `IMPLEMENTATIONS`, and a line in `delta_jax.testing.TRIALS`, by which the
contract suite holds it to the definition.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from delta_jax.ops import chunkwise, containment, device, recurrence
from delta_jax.ops.arguments import Arguments
from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.kernels import Kernels, passes_of, step_of, steps_of
from delta_jax.ops.transitions import Through, states_before
from pallas_kernels import devices
from pallas_kernels.inputs import Inputs

FEW_TOKENS = 8  # of which every state is read and written once


class Implementation(NamedTuple):
    """One way of computing the op.

    Attributes:
      name: what `implementation=` calls it.
      unavailable: the sentence that says why it cannot run on the device that is traced for, or None.
      unsupported: the sentence that says why it does not take these arguments, or None.
      run: outputs and final state of a sequence, differentiable.
      step: output and state of one token.
      in_place: outputs and states of at most `FEW_TOKENS` tokens, where the initial state is those of all layers, of which
        it is told which to read and to write in place; None where there is no such way.
      automatic: the sentence that says why it does not run where none is asked for, or None.
      cut_by_compiler: whether XLA can cut it over a mesh by itself.
      group: another name by which it is asked for, which it shares with others.
    """

    name: str
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Arguments], str | None]
    run: Callable[[Arrays, Options], tuple[Array, Array]]
    step: Callable[..., tuple[Array, Array]]
    in_place: Callable[[Arrays, Options, Array], tuple[Array, Array]] | None
    automatic: Callable[[Arguments], str | None]
    cut_by_compiler: bool
    group: str | None = None


def mosaic_tpu() -> Kernels:
    """The kernels for TPUs, imported when they are first needed."""
    from pallas_kernels import tpu

    return tpu


def mosaic_gpu() -> Kernels:
    """The kernels for Hopper GPUs, imported when they are first needed."""
    from pallas_kernels import gpu

    return gpu.HOPPER


def mosaic_mma() -> Kernels:
    """Those for every NVIDIA GPU since Ampere."""
    from pallas_kernels import gpu

    return gpu.PORTABLE


# On which generations of GPUs, and with which dtypes, `make check-gpu` has passed: docs/benchmarks/gpu.md has the runs.
PROVEN = {("mosaic_gpu", "sm_90"): ("bfloat16",)}


def _unproven(name: str, given: Arguments) -> str | None:
    generation = devices.generation() or "this GPU"
    if str(given.v.dtype) in PROVEN.get((name, generation), ()):
        return None
    return f"make check-gpu is not known to have passed on {generation} with {given.v.dtype}: only by name"


def _runs(kernels: Callable[[], Any]) -> bool:
    """Whether kernels for GPUs know the one that is traced for."""
    return device.platform() == "gpu" and kernels().machine() is not None


def _of_kernels(
    name: str,
    kernels: Callable[[], Kernels],
    where: str,
    here: Callable[[], bool],
    *,
    in_place: bool,
    proven: bool = False,
) -> Implementation:
    """The record of a package of Pallas kernels for some devices; `proven` if they are the automatic choice on all."""

    def unavailable() -> str | None:
        this = "another GPU" if device.platform() == "gpu" else f"a {device.platform()}"
        return None if here() else f"the Pallas kernels of {name} run on {where}, and this is {this}"

    return Implementation(
        name=name,
        unavailable=unavailable,
        unsupported=lambda given: kernels().unsupported(Inputs(*given[:6])),
        run=lambda arrays, options: containment.run(passes_of(kernels()), arrays, options),
        step=lambda arrays, options: step_of(kernels(), arrays, options),
        in_place=(lambda arrays, options, layer: steps_of(kernels(), arrays, options, layer)) if in_place else None,
        automatic=lambda given: None if proven else _unproven(name, given),
        cut_by_compiler=False,
        group="pallas",
    )


def _of_xla(
    name: str, run: Callable[[Arrays, Options], tuple[Array, Array]], *, automatic: str | None = None
) -> Implementation:
    return Implementation(
        name=name,
        unavailable=lambda: None,
        unsupported=lambda given: None,
        run=run,
        step=recurrence.one_token,
        in_place=None,
        automatic=lambda given: automatic,
        cut_by_compiler=True,
    )


def _chunkwise_passes(through: Through | None) -> containment.Passes:
    """The chunkwise form, by how the state passes through a group of which all chunks are done at once, if they are."""
    return containment.Passes(
        functools.partial(chunkwise.forward, through=through),
        functools.partial(chunkwise.backward, through=through),
    )


CHUNKWISE = {  # by whether all chunks of a group are done at once
    False: _chunkwise_passes(None),
    True: _chunkwise_passes(states_before),
}


def _chunkwise(arrays: Arrays, options: Options) -> tuple[Array, Array]:
    """The chunkwise form that is made for the device.

    Accelerators do all chunks of a group at once, but for TPUs with gates per channel: XLA lays the small blocks in which
    these decays meet out anew, and for many chunks that takes three times as long as the rest, by its own estimate.
    """
    per_channel = arrays.g is not None and arrays.g.ndim == arrays.q.ndim
    parallel = device.accelerator() and not (per_channel and device.platform() == "tpu")
    return containment.run(CHUNKWISE[parallel], arrays, options)


@functools.cache
def _triton_passes() -> containment.Passes:
    """The chunkwise form of accelerators with its state's pass as a Triton kernel, imported when it is first needed."""
    from pallas_kernels.triton import states

    return _chunkwise_passes(states.states_before)


def _triton_unavailable() -> str | None:
    if device.platform() != "gpu":
        return f"triton runs on GPUs, and this is a {device.platform()}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: it is the extra `triton` of this package"
    from pallas_kernels.triton import launch

    return launch.unavailable()


def _triton_unsupported(given: Arguments) -> str | None:
    from pallas_kernels.triton import states

    return states.unsupported(given.q, given.v)


# The automatic choice is the first that may be and can run.
IMPLEMENTATIONS = (
    _of_kernels("mosaic_tpu", mosaic_tpu, "TPUs", lambda: device.platform() == "tpu", in_place=True, proven=True),
    _of_kernels("mosaic_gpu", mosaic_gpu, "Hopper GPUs", lambda: _runs(mosaic_gpu), in_place=False),
    _of_kernels("mosaic_mma", mosaic_mma, "NVIDIA GPUs since Ampere", lambda: _runs(mosaic_mma), in_place=False),
    _of_xla("xla", _chunkwise),
    _of_xla(
        "triton", lambda *given: containment.run(_triton_passes(), *given), automatic="no GPU has run it yet"
    )._replace(unavailable=_triton_unavailable, unsupported=_triton_unsupported, cut_by_compiler=False),
    _of_xla("recurrent", jax.jit(recurrence.recurrent, static_argnums=1), automatic="it goes token by token"),
)


def implementations() -> dict[str, str | None]:
    """What `implementation=` accepts here: None beside a name that can run, else the sentence that says why it cannot.

    Examples:
        >>> implementations()["xla"] is None  # it runs everywhere
        True
    """
    return {name: _why_not(_called(name), None) for name in _names()}


def choose(wanted: str | None, given: Arguments, *, cut_by_compiler: bool = False) -> Implementation:
    """The implementation that runs; with `cut_by_compiler` the automatic choice is among those that XLA can cut by itself.

    Raises:
      ValueError: one that is asked for by name cannot; the sentence says why.
    """
    candidates = (
        _called(wanted) if wanted is not None else [one for one in IMPLEMENTATIONS if one.automatic(given) is None]
    )
    candidates = [one for one in candidates if one.cut_by_compiler or not cut_by_compiler]
    if not candidates:
        raise ValueError(f"implementation={wanted!r} cannot run here: the names are {', '.join(_names())}.")
    for one in candidates:
        if _why_not([one], given) is None:
            return one
    raise ValueError(f"implementation={wanted!r} cannot run here: {_why_not(candidates, given)}.")


def _names() -> list[str]:
    groups = {one.group for one in IMPLEMENTATIONS if one.group is not None}
    return [one.name for one in reversed(IMPLEMENTATIONS)] + sorted(groups)


def _called(name: str) -> list[Implementation]:
    return [one for one in IMPLEMENTATIONS if name in (one.name, one.group)]


def _why_not(candidates: list[Implementation], given: Arguments | None) -> str | None:
    """Why none of some implementations can run here, with these arguments if there are such; None if one can."""
    reasons = [one.unavailable() for one in candidates]
    here = [one for one, reason in zip(candidates, reasons, strict=True) if reason is None]
    if here:
        reasons = [None if given is None else one.unsupported(given) for one in here]
    return None if None in reasons else "; ".join(filter(None, reasons))
