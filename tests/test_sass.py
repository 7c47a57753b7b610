"""nvcc's machine code of the kernels: it accesses 16 bytes at a time, uses no local memory, and has
no more instructions per element than stated here."""

from __future__ import annotations

import re

import pytest
from built_kernels import built_kernels
from sass import Code, loops
from test_build import ROOT

ARCHITECTURE = "90"

# With nvcc 13.0 there are at most 74.4, and 88 for float64. Some more are allowed for other
# versions. docs/kernels.md tells how many instructions a GPU has time for.
MAX_INSTRUCTIONS_PER_ELEMENT = {"MUFU.RSQ": 82, "MUFU.RSQ64H": 100}

# nvcc's time grows with them. With nvcc 13.0, RMSprop has 30,168, and AdEMAMix 30,120.
MAX_INSTRUCTIONS_PER_KERNEL = 33_000


@pytest.fixture(scope="module")
def kernels() -> dict[str, Code]:
    found = built_kernels(ARCHITECTURE)
    assert len(main_kernels(found)) >= 4
    return found


def main_kernels(kernels: dict[str, Code]) -> dict[str, Code]:
    return {n: code for n, code in kernels.items() if "update_kernel" in n or "grad_norm" in n}


def update_kernels(kernels: dict[str, Code]) -> dict[str, Code]:
    return {n: code for n, code in kernels.items() if "update_kernel" in n}


def test_a_rule_is_one_kernel(kernels):
    """It selects dtypes, states and limits at run time: each further kernel would cost compile time
    for every architecture."""
    rules = re.findall(r"DO\((\w+)\)", (ROOT / "csrc/rules/all.h").read_text())
    assert len(update_kernels(kernels)) == len(rules)


def test_a_kernel_has_so_many_instructions(kernels):
    """Each loop is compiled once for as many formats as possible."""
    sizes = {name: len(code) for name, code in kernels.items()}
    print("\n".join(f"{name}: {size}" for name, size in sizes.items()))
    assert max(sizes.values()) <= MAX_INSTRUCTIONS_PER_KERNEL, max(sizes, key=sizes.__getitem__)


def count(code: Code, pattern: str) -> int:
    return sum(re.match(pattern, it.op) is not None for it in code)


def test_arrays_are_read_16_bytes_at_a_time(kernels):
    for name, code in main_kernels(kernels).items():
        assert count(code, r"LDG\.E\.128") >= 4, name


def test_arrays_are_written_16_bytes_at_a_time(kernels):
    for name, code in update_kernels(kernels).items():
        assert count(code, r"STG\.E\.128") >= 4, name


def test_the_compiler_knows_that_arrays_are_in_global_memory(kernels):
    """LD and ST (without a G) are generic: they check the address at each access."""
    for name, code in main_kernels(kernels).items():
        assert count(code, r"(LD|ST)\.E\.128") == 0, name


def test_nothing_lies_in_local_memory(kernels):
    for name, code in kernels.items():
        assert count(code, r"(LDL|STL)\b") == 0, name


def test_arguments_are_not_read_one_thread_after_the_other(kernels):
    """Constant memory would serve addresses that differ between threads one after the other."""
    for name, code in kernels.items():
        by_register = [it for it in code if re.search(r"c\[0x0\]\s*\[U?R\d", it.operands)]
        assert not [it for it in by_register if it.op.startswith("LDC")], name


def test_one_instruction_rounds_two_elements_to_16_bits(kernels):
    for name, code in update_kernels(kernels).items():
        counts = [count(code, rf"F2FP\.{kind}\.F32") for kind in ("BF16", "F16")]
        assert counts[0] == counts[1] > 0, name


def test_an_element_takes_so_many_instructions(kernels):
    """These rules take one root per element: the roots in a loop tell its number of elements."""
    rules = ("Adam", "NAdam", "RMSprop")
    found = 0
    for name, code in update_kernels(kernels).items():
        if not any(f"{len(rule)}{rule}E" in name for rule in rules):
            continue
        for ops in loops(code):
            if sum(op.startswith("LDG.E.128") for op in ops) < 3:
                continue
            for root, limit in MAX_INSTRUCTIONS_PER_ELEMENT.items():
                if elements := ops.count(root):
                    found += 1
                    print(f"{name}: {len(ops) / elements:.1f} instructions per element, {root}")
                    assert len(ops) / elements <= limit, name
    loops_over_rows = 4  # float32, float64, 16 bits, and one for arrays of mixed formats
    assert found == len(rules) * loops_over_rows
