"""Which generation of GPUs the code being traced is for."""

import re
from typing import Any

import jax

# Names that drivers give to devices, where there is only a name: GPUs that are described, not present.
KINDS = (
    (r"\bG?B(20|100|200)\b|\bHGX B200\b", "sm_100"),
    (r"\bG?B300\b", "sm_103"),
    (r"\bG?H(20|100|200|800)\b", "sm_90"),
    (r"\bA(100|800|30)\b", "sm_80"),
    (r"RTX PRO \d+|RTX 50\d\d", "sm_120"),
    (r"\bL(4|20|40|40S)\b|RTX 40\d\d|RTX \d+ Ada|RTX 6000 Ada", "sm_89"),
    (r"\bA(2|10|10G|16|40)\b|RTX A\d+|RTX 30\d\d", "sm_86"),
    (r"\bMI2[15]0", "gfx90a"),
    (r"\bMI3(00|08|25)", "gfx942"),
    (r"\bMI35[05]", "gfx950"),
)


def generation() -> str | None:
    """`generation_of` that device: of the current mesh if it names a device, else the first one."""
    named, here = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    return generation_of(here if named is None or named.device_kind == here.device_kind else named)


def generation_of(device: Any) -> str | None:
    """The architecture that is compiled for, `"sm_90"` or `"gfx942"`; None where it is no GPU or its name says nothing."""
    if device.platform == "cpu":
        return None
    capability = str(getattr(device, "compute_capability", ""))
    if re.fullmatch(r"\d+\.\d", capability):
        return "sm_" + capability.replace(".", "")
    if capability.startswith("gfx"):
        return capability.split(":")[0]
    return next((found for kind, found in KINDS if re.search(kind, device.device_kind)), None)
