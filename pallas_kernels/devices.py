"""Which generation of NVIDIA GPUs the code being traced is for."""

import re

import jax

# Names that a driver gives to devices, where there is only a name: GPUs that are described, not present.
KINDS = (
    (r"\bG?B(20|100|200)\b|\bHGX B200\b", "sm_100"),
    (r"\bG?B300\b", "sm_103"),
    (r"\bG?H(20|100|200|800)\b", "sm_90"),
    (r"\bA(100|800|30)\b", "sm_80"),
    (r"RTX PRO \d+|RTX 50\d\d", "sm_120"),
    (r"\bL(4|20|40|40S)\b|RTX 40\d\d|RTX \d+ Ada|RTX 6000 Ada", "sm_89"),
    (r"\bA(2|10|10G|16|40)\b|RTX A\d+|RTX 30\d\d", "sm_86"),
)


def generation() -> str | None:
    """The compute capability of that device, `"sm_90"`: of the current mesh if it names a device, else the first one.

    None where it is no GPU of NVIDIA's, or one whose name says nothing.
    """
    named, here = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if named is None or named.device_kind == here.device_kind:
        capability = getattr(here, "compute_capability", None)
        if isinstance(capability, str) and re.fullmatch(r"\d+\.\d", capability):
            return "sm_" + capability.replace(".", "")
        named = here if named is None else named
    return next((found for kind, found in KINDS if re.search(kind, named.device_kind)), None)
