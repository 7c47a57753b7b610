"""Large states on the CPU use huge pages, if the operating system has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import fusedopt

SMAPS = Path("/proc/self/smaps")


def flags_of_memory_at(address: int) -> list[str]:
    """Linux's flags of the mapping that holds an address. "hg": huge pages are wanted."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(bound, 16) for bound in words[0].split("-"))
            inside = first <= address < last
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not SMAPS.exists(),
    reason="the operating system has no transparent huge pages",
)
@pytest.mark.parametrize("loaded", [False, True])
def test_large_states_ask_for_huge_pages(loaded):
    param = Parameter(torch.zeros(16 * 2**20))
    optimizer = fusedopt.FusedAdam([param], backend="cpu")
    param.grad = torch.ones_like(param)
    optimizer.step()
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    middle = 4 * param.numel() // 2
    for name in ("exp_avg", "exp_avg_sq"):
        address = optimizer.state[param][name].data_ptr()
        assert "hg" in flags_of_memory_at(address + middle), name
    assert "hg" not in flags_of_memory_at(param.data_ptr() + middle)
