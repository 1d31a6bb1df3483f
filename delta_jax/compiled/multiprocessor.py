"""A GPU's streaming multiprocessors, the latencies that are assumed of them, and how cycles of a program become time.

**Cycles of a program** (a block of threads of one place on the grid) are read from its machine code by
`compiled.sass`: what lies outside of loops once, the body of a loop as often as the jaxpr says. *Issue* cycles are
the stall counts alone, which no warp can beat; *estimated* cycles add the waits for results, by the latencies below,
and for the tensor cores. Warpgroups that take different ways through the code (one fetches, one computes) are one way
after another outside of loops; loops without products, in which a warpgroup fetches or waits, count nothing.

**Milliseconds of a kernel** (`Multiprocessor.milliseconds`) are the largest of three times. By latency: programs that
fit a multiprocessor together run beside each other as if each were alone, so the grid takes programs /
(multiprocessors x programs together) turns, rounded up where they are at most four, of the estimated cycles of one
and of START. By throughput: the busiest multiprocessor has ceil(programs / multiprocessors) programs, and its tensor
cores, its shared memory, and each of its four schedulers, which issue one instruction a cycle, serve one after
another. By memory: what the kernel reads and writes, each array once, at REACHED of the bandwidth that the GPU's
description states. Cycles are those of `clock`. A call is the sum of its kernels; what XLA runs around them and the
launches are left out.

**Calibration.** WAITS, DRAIN, START and REACHED are fitted to the kernels that have been measured one by one on an
H200 (`MEASURED` in benchmarks/gpu_schedule/measured.py): 14 times, of which the estimates are off by 7 % on average
and by 15 % at most. With the latencies as published, and the bandwidth as stated, times were 1.5 to 2 times the
estimates. Kernels of others, to which nothing was fitted, took 0.77 times the estimate (`python -m
benchmarks.gpu_schedule.published`). Nothing has been measured on other GPUs.
"""

import math
from dataclasses import dataclass

from delta_jax.parallel import Gpu
from delta_jax.parallel.gpus import description

LATENCY = {
    "LDSM": 33,
    "LDS": 30,
    "STSM": 24,
    "STS": 20,
    "LDL": 38,
    "STL": 20,
    "MUFU": 22,
    "SHFL": 24,
    "BAR": 22,
    "MEMBAR": 30,
    "SYNCS": 24,
    "UTMA": 30,
    "LDC": 30,
    "S2": 25,
    "LDGSTS": 25,
    "LDG": 200,
    "R2UR": 12,
}
"""Cycles from the issue of an instruction whose name begins so until what waits for it goes on, for one warp alone: of
Hopper, from published microbenchmarks where there are some, and assumed of the other generations too."""
OTHER_LATENCY = 25
WAITS = 3.0  # times that, in a kernel: the warps of a warpgroup do the same at the same time, and wait for each other
DRAIN = 160  # cycles from the end of a group's last product until the wait for the group lets go
START = 2000  # cycles of a program until its first data is there, and after it has begun to store its last
REACHED = 0.7  # of the bandwidth
SPREAD = (0.89, 1.15)  # the smallest and the largest measured time over the estimated one

# Multiply-adds of bfloat16, summed in float32, that the tensor cores of one multiprocessor do in a cycle.
_MULTIPLY_ADDS = {(8, 0): 1024, (8, 6): 512, (8, 9): 256, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096, (12, 0): 512}
RESERVED = 1024  # shared memory that the system takes of every program


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """A multiprocessor of a kind of GPU, and how many there are.

    Attributes:
        count: multiprocessors of the GPU.
        registers: 32-bit registers.
        shared: bytes of shared memory.
        threads: threads it holds at once.
        programs: programs it holds at once.
        multiply_adds: of bfloat16 in a cycle of its tensor cores.
        clock: hertz, at which all of them reach the published peak.
        bandwidth: bytes a second between the GPU and its memory.
    """

    count: int
    registers: int
    shared: int
    threads: int
    programs: int
    multiply_adds: int
    clock: float
    bandwidth: float

    def together(self, registers: int, threads: int, shared: int) -> tuple[int, str]:
        """How many programs fit beside each other, and what limits them, by registers a thread and shared memory of one."""
        of_warp = -(-registers * 32 // 256) * 256
        limits = {
            "registers": self.registers // (of_warp * (threads // 32)),
            "shared memory": self.shared // (shared + RESERVED),
            "threads": self.threads // threads,
            "programs": self.programs,
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit

    def milliseconds(
        self, *, programs: int, together: int, cycles: float, busy: float, memory_bytes: int
    ) -> tuple[float, str]:
        """What a kernel should take, and what sets it.

        Args:
            programs: of the grid.
            together: how many fit a multiprocessor.
            cycles: estimated, of a program alone.
            busy: of a program, cycles of the unit that it keeps busy longest.
            memory_bytes: of arguments and results.
        """
        turns = programs / (self.count * together)
        times = {
            "latency": (turns if turns > 4 else math.ceil(turns)) * (cycles + START) * 1e3 / self.clock,
            "throughput": -(-programs // self.count) * busy * 1e3 / self.clock,
            "memory": 1e3 * memory_bytes / (REACHED * self.bandwidth),
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit


def multiprocessor(gpu: Gpu) -> Multiprocessor:
    """That of a kind of GPU, by the description in the CUDA plugin.

    Raises:
        ValueError: the compiler is not installed.
    """
    told = description(gpu)
    multiply_adds = _MULTIPLY_ADDS[told.capability]
    return Multiprocessor(
        count=told.cores,
        registers=int(told.number("registers_per_core_limit")),
        shared=int(told.number("shared_memory_per_core")),
        threads=int(told.number("threads_per_core_limit")),
        programs=int(told.number("max_blocks_per_multiprocessor")) or 32,
        multiply_adds=multiply_adds,
        clock=gpu.flops / (told.cores * 2 * multiply_adds),
        bandwidth=told.bandwidth,
    )
