"""The sides of the comparison of formats: each trains weights of its own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.peers import OURS, Contender, attribute, load


@dataclass(frozen=True)
class FormatSide:
    """An optimizer and the dtype of the weights that it is given."""

    contender: Contender
    dtype: torch.dtype = torch.bfloat16
    is_ours: bool = False


def ours(dtype: torch.dtype = torch.bfloat16, **formats: Any) -> FormatSide:
    def make(case: Case, params: list[Parameter]) -> Optimizer:
        return peers.ours(case, params, **formats)

    return FormatSide(Contender(make, clips=True), dtype, is_ours=True)


def bitsandbytes(bits: int) -> FormatSide:
    def make(case: Case, params: list[Parameter]) -> Optimizer:
        name = case.recipe.name + ("8bit" if bits == 8 else "")
        return attribute(load("bitsandbytes").optim, name)(params, **case.recipe.options)

    return FormatSide(Contender(make))


def torchao(**options: Any) -> FormatSide:
    def make(case: Case, params: list[Parameter]) -> Optimizer:
        cls = attribute(load("torchao.optim"), f"{case.recipe.name}8bit")
        return cls(params, **case.recipe.options, **options)

    return FormatSide(Contender(make))


FORMAT_SIDES: Mapping[str, FormatSide] = {
    OURS: ours(torch.float32),
    "float32 + 8bit": ours(torch.float32, state_dtype="8bit"),
    "exact + float32": ours(master_weights="exact", state_dtype=torch.float32),
    "exact + bfloat16": ours(master_weights="exact", state_dtype=torch.bfloat16),
    "24bit + bfloat16": ours(master_weights="24bit", state_dtype=torch.bfloat16),
    "24bit + 8bit": ours(master_weights="24bit", state_dtype="8bit"),
    "stochastic + 8bit": ours(rounding="stochastic", state_dtype="8bit"),
    "naive bfloat16": ours(),
    "torch fused": FormatSide(Contender(peers.torchs(fused=True)), torch.float32),
    "torch fused, bfloat16": FormatSide(Contender(peers.torchs(fused=True))),
    "bitsandbytes, bfloat16 + float32": bitsandbytes(32),
    "bitsandbytes, bfloat16 + 8 bits": bitsandbytes(8),
    "torchao, bfloat16 + 8 bits": torchao(),
    "torchao, stochastic + 8 bits": torchao(bf16_stochastic_round=True),
    "optimi, bfloat16 + Kahan sums": FormatSide(Contender(peers.optimi)),
}
