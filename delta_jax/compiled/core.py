"""One TensorCore of each generation, as its compiler sees it, and how its figures become milliseconds."""

from dataclasses import dataclass, replace

from delta_jax.parallel import CHIPS, Chip


@dataclass(frozen=True, kw_only=True)
class Core:
    """A TensorCore of a generation.

    The latencies are the compiler's own, in cycles: differences of "Length to end" in the critical-path files of
    libtpu 0.0.50.1, of small kernels that consist of one operation each.
    """

    chip: Chip
    cores: int  # TensorCores a chip
    together: int = 1  # of them that are one device, over which the compiler cuts every instruction and a kernel's grid
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
    factor: float = (
        1.05  # time on hardware over cycles by the clock; where nobody has published times, that of the others
    )
    spread: tuple[float, float] = (0.90, 1.20)  # the smallest and the largest factor to be expected
    measured: bool = False  # whether factor and spread are those of published times on this generation

    @property
    def clock(self) -> float:
        """Hertz, implied by the published peak."""
        return self.chip.flops / self.cores / (2 * self.mxus * self.mxu_size**2 * 16 / self.rows)

    @property
    def bandwidth(self) -> float:
        """Bytes a second between HBM and this core."""
        return self.chip.hbm_bytes / self.cores

    def memory_cycles(self, size: int | float) -> float:
        """Cycles in which a device of these cores moves so many bytes to or from HBM, at the published peak."""
        return size / (self.together * self.bandwidth) * self.clock


CORES = {
    "v5e": Core(
        chip=CHIPS["v5e"],
        cores=1,
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
    "v5p": Core(
        chip=CHIPS["v5p"],
        cores=2,
        together=2,
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
    "v6e": Core(
        chip=CHIPS["v6e"],
        cores=1,
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
        factor=1.03,
        spread=(0.96, 1.10),
        measured=True,
    ),
    "tpu7x": Core(
        chip=CHIPS["tpu7x"],
        cores=2,
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
        factor=1.06,
        spread=(1.02, 1.15),
        measured=True,
    ),
}
CORES["v4"] = replace(CORES["v5p"], chip=CHIPS["v4"])  # of the same build; its own latencies have not been read
