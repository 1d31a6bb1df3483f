"""What XLA runs around the kernels, from the compiled program and the dump of its instructions."""

import re
from collections.abc import Collection, Mapping

from benchmarks.tpu_schedule.llo import Kernel


def around(programs: Mapping[str, tuple[str, str, int]], text: str, kernels: Collection[str]) -> dict[str, int]:
    """The instructions of a compiled program that are no Pallas kernel, in bundles.

    Args:
      programs: the dump.
      text: the compiled HLO, which says what runs inside a while loop and how often.
      kernels: names in the dump that are kernels.

    Returns:
      "bundles": of all instructions, loops by trip counts; "instructions"; "unread": how many are not in the dump or have a
      loop whose trip count could not be read. Equal fusions are dumped once: one that is missing takes the bundles of
      another with its type and opcode.
    """
    computations = re.findall(r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    times = {name: 1 for name, _ in computations}
    for condition, body in re.findall(r"condition=%([^,\s]+), body=%([^,\s]+)", text):
        times[body] = int(re.findall(r"constant\((\d+)\)", dict(computations)[condition])[0])
    found: dict[str, tuple[int, int]] = {}
    bundles = instructions = unread = 0
    for _ in range(2):  # the first time only to know every type
        bundles = instructions = unread = 0
        for computation, body in computations:
            for name, kind, opcode in re.findall(r"^ +(?:ROOT )?%(\S+) = (\S+) ([a-z-]+)\(", body, re.M):
                if name in programs and name not in kernels:
                    kernel = Kernel(*programs[name][:2], gridded=False)
                    found[kind + opcode] = kernel.bundle_count, any(loop.trips is None for loop in kernel.loops)
                elif opcode != "fusion" or computation.startswith("fused_computation"):
                    continue
                count, incomplete = found.get(kind + opcode, (0, 1))
                bundles += count * times[computation]
                instructions += 1
                unread += incomplete
    return {"bundles": bundles, "instructions": instructions, "unread": unread}
