"""What a kernel has to know of the GPU that it is for."""

from typing import Literal, NamedTuple

KB = 1024


class Machine(NamedTuple):
    """A generation of GPUs, and which of its instructions the kernels use.

    "wgmma" multiplies tiles of shared memory by themselves, beside what the threads do; "mma" multiplies registers, on every
    generation from sm_80 on. "tma" is a unit that copies tiles and says at a barrier when they are there; "cp.async" copies
    them by the threads, which wait for their own.
    """

    products: Literal["wgmma", "mma"]
    copies: Literal["tma", "cp.async"]
    shared_bytes: int  # shared memory that one block of threads may use
    multiprocessors: int  # of the largest GPUs of its kind

    @property
    def fetching(self) -> bool:
        """Whether a warpgroup of its own fetches what another computes with."""
        return self.products == "wgmma"

    @property
    def places(self) -> int:
        """Of what a program fetches or stores again and again: with two, one is copied while the other is at work."""
        return 2 if self.products == "wgmma" or self.shared_bytes > 128 * KB else 1


HOPPER = Machine("wgmma", "tma", 227 * KB, 132)
# By compute capability; also Hopper by the instructions that all have.
PORTABLE = {
    "sm_80": Machine("mma", "cp.async", 163 * KB, 108),
    "sm_86": Machine("mma", "cp.async", 99 * KB, 84),
    "sm_89": Machine("mma", "cp.async", 99 * KB, 142),
    "sm_90": HOPPER._replace(products="mma"),
    "sm_100": Machine("mma", "tma", 227 * KB, 148),
    "sm_103": Machine("mma", "tma", 227 * KB, 160),
    "sm_120": Machine("mma", "tma", 99 * KB, 188),
}
