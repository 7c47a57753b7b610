"""A model of GPUs: how long a loop's instructions take, against how long its bytes take.

It is a model, not a measurement. A multiprocessor issues four instructions a clock cycle, each for
32 threads. Each pipe finishes so many results a cycle as the table "Throughput of Native Arithmetic
Instructions" of NVIDIA's CUDA C++ Programming Guide says. All else runs at the same time, and
caches, latencies and clock speeds below the boost clock are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ISSUED = 4 * 32  # instructions of single threads that a multiprocessor issues per cycle


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        name: as NVIDIA sells it.
        capability: its compute capability.
        code: the architecture of the machine code that runs on it, as in "sm_90": "90".
        bandwidth: of its memory, GB/s.
        multiprocessors: how many it has.
        clock: the boost clock, GHz.
        float32, float64: results of additions and multiplications per cycle of a multiprocessor.
    """

    name: str
    capability: str
    code: str
    bandwidth: float
    multiprocessors: int
    clock: float
    float32: int
    float64: int

    @property
    def bytes_per_cycle(self) -> float:
        """What the memory delivers to one multiprocessor."""
        return self.bandwidth / self.multiprocessors / self.clock

    def rates(self) -> dict[str, tuple[str, float]]:
        """By pipe: which instructions it runs, and their results per cycle."""
        return {
            "float32": (r"F(ADD|MUL|FMA)|HADD2|HMUL2|HFMA2", self.float32),
            "float64": (r"D(ADD|MUL|FMA|SETP)", self.float64),
            "integer multiply": (r"IMAD|IMUL", 64),
            "integer": (
                r"IADD|VIADD|LOP|PLOP|SHF|SHL|SHR|LEA|ISETP|FSETP|F?SEL|F2FP|PRMT|[IF]MNMX|VIMNMX|BFE|SGXT",
                64,
            ),
            "special functions": (r"MUFU|F2F\b|F2I|I2F", 16),
            "issue": (r"", ISSUED),
        }


# The B300's float64 is by its data sheet: 1.25 TFLOP/s. It runs the machine code of 10.0,
# and cards of 8.9 run that of 8.6.
CARDS = [
    Card("T4", "7.5", "75", 320, 40, 1.59, 64, 2),
    Card("A100 80GB", "8.0", "80", 2039, 108, 1.41, 64, 32),
    Card("RTX 3090", "8.6", "86", 936, 82, 1.70, 128, 2),
    Card("RTX 4090", "8.9", "86", 1008, 128, 2.52, 128, 2),
    Card("L40S", "8.9", "86", 864, 142, 2.52, 128, 2),
    Card("H100 SXM", "9.0", "90", 3350, 132, 1.98, 128, 64),
    Card("H200", "9.0", "90", 4800, 132, 1.98, 128, 64),
    Card("B200", "10.0", "100", 8000, 148, 1.97, 128, 64),
    Card("B300", "10.3", "100", 8000, 160, 1.92, 128, 2),
    Card("RTX 5090", "12.0", "120", 1792, 170, 2.41, 128, 2),
]


def bytes_of(ops: Sequence[str]) -> int:
    """What a loop's instructions of 16 bytes load and store."""
    return 16 * sum(bool(re.match(r"(LDG|STG)\.E\.128", op)) for op in ops)


def busiest(ops: Sequence[str], card: Card) -> tuple[float, str]:
    """The pipe that takes longest, as a share of the time that the bytes take: (share, pipe)."""
    cycles = bytes_of(ops) / card.bytes_per_cycle
    shares = [
        (sum(bool(re.match(pattern, op)) for op in ops) / rate / cycles, pipe)
        for pipe, (pattern, rate) in card.rates().items()
    ]
    return max(shares)
