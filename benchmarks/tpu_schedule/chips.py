"""The chips the kernels are compiled for: published figures, and the latencies that the compiler itself assumes."""

from dataclasses import dataclass

SOURCE = (
    "Peak and bandwidth of a chip: Google Cloud TPU documentation, the pages of v5e, v5p, v6e and TPU7x. TensorCores a "
    "chip and MXU sizes: the same pages and the architecture page. A clock is not published there for any of them: it is "
    "the one at which the MXUs reach the published peak."
)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation, as a single TensorCore sees it.

    The latencies are the compiler's own, in cycles: differences of "Length to end" in the critical-path files of
    libtpu 0.0.50.1, of small kernels that consist of one operation each.
    """

    topology: str
    cores: int  # TensorCores a chip
    peak: float  # bfloat16 FLOP/s a chip
    bandwidth: float  # HBM bytes/s a chip
    mxus: int  # a core
    mxu_size: int
    rows: int  # cycles that 16 rows of bfloat16 keep an MXU busy
    matmul: int  # from a vmatmul to its first vpop (on v5e and v5p 6 less for half of the MXUs)
    matmul_pop: int  # between the vpops of one vmatmul
    weights: int  # cycles a register of weights keeps the loading path of an MXU busy
    transpose: int  # from the end of a vxpose to its first vpop
    permute: int  # from vperm.lane or vrot.lane to vpop
    reduce: int  # from a reduction across lanes to vpop
    lane: int  # cycles an operation keeps an XLU busy
    eup: int  # from vpow2 and the like to vpop

    @property
    def clock(self) -> float:
        """Hertz, implied by the published peak."""
        return self.peak / self.cores / (2 * self.mxus * self.mxu_size**2 * 16 / self.rows)


CHIPS = {
    "v5e": Chip(
        topology="v5e:2x2",
        cores=1,
        peak=197e12,
        bandwidth=819e9,
        mxus=4,
        mxu_size=128,
        rows=16,
        matmul=131,
        matmul_pop=8,
        weights=4,
        transpose=44,
        permute=114,
        reduce=115,
        lane=8,
        eup=7,
    ),
    "v5p": Chip(
        topology="v5p:2x2x1",
        cores=2,
        peak=459e12,
        bandwidth=2765e9,
        mxus=4,
        mxu_size=128,
        rows=16,
        matmul=131,
        matmul_pop=8,
        weights=4,
        transpose=44,
        permute=114,
        reduce=115,
        lane=8,
        eup=9,
    ),
    "v6e": Chip(
        topology="v6e:2x2",
        cores=1,
        peak=918e12,
        bandwidth=1638e9,
        mxus=2,
        mxu_size=256,
        rows=8,
        matmul=192,
        matmul_pop=2,
        weights=4,
        transpose=64,
        permute=123,
        reduce=137,
        lane=4,
        eup=14,
    ),
    "tpu7x": Chip(
        topology="tpu7x:2x2x1",
        cores=2,
        peak=2307e12,
        bandwidth=7380e9,
        mxus=2,
        mxu_size=256,
        rows=8,
        matmul=211,
        matmul_pop=1,
        weights=4,
        transpose=68,
        permute=127,
        reduce=141,
        lane=4,
        eup=11,
    ),
}
