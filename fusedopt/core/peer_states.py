"""The states of other libraries' checkpoints, as float32 values under our names.

The layouts were read from bitsandbytes 0.50, torchao 0.18, FlashOptim 8b2d966, TransformerEngine
d0067d0 and apex 6424da3. A state that doesn't have its library's layout is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.distributed import local_of
from fusedopt.reference.formats import HALF_DTYPES

State = dict[str, Any]

MASTER = "master_param"  # TransformerEngine's key of a float32 master, or of the rest of one

# bitsandbytes: its keys, and our names of what a rule keeps under them; two names are stacked.
BITSANDBYTES = {
    "adam": {"state1": ("exp_avg",), "state2": ("exp_avg_sq",)},
    "cautious_adamw": {"state1": ("exp_avg",), "state2": ("exp_avg_sq",)},
    "cautious_lion": {"state1": ("exp_avg",)},
    "ademamix": {"state1": ("exp_avg_fast", "exp_avg_slow"), "state2": ("exp_avg_sq",)},
    "lion": {"state1": ("exp_avg",)},
    "rmsprop": {"state1": ("square_avg",)},
    "sgd": {"state1": ("momentum_buffer",)},
}
BITSANDBYTES_BLOCK = 256
_WRAPPER = "__bnb_optimizer_quant_state__"  # around all but the step, since version 0.49

_FLASHOPTIM_BLOCK = 32
_CODES, _SCALES = "::quantized", "::scales"
_ERRORS, _ERROR_RANGES = "error_bits", {torch.int8: 127, torch.int16: 32767}
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}

_TORCHAO_CLASSES = ("OptimState8bit", "OptimState4bit", "OptimStateFp8")


def is_bitsandbytes(state: Mapping[str, Any]) -> bool:
    return _WRAPPER in state or "state1" in state


def is_torchaos(state: Mapping[str, Any]) -> bool:
    return any(type(local_of(value)).__name__ in _TORCHAO_CLASSES for value in state.values())


def is_flashoptims(state: Mapping[str, Any]) -> bool:
    return _ERRORS in state or any(str(key).endswith(_CODES) for key in state)


def from_bitsandbytes(rule: str, state: State, name: str) -> State:
    state = {**state, **state.get(_WRAPPER, {})}
    result: State = {"step": state["step"]} if "step" in state else {}
    for key, ours in BITSANDBYTES[rule].items():
        if key not in state:
            continue
        what = f"state {key!r} of {name}"
        values = _plain(state[key], what)
        if values.dtype == torch.uint8:
            qmap, scales = (state.get(it + key[-1]) for it in ("qmap", "absmax"))
            values = _looked_up(values, qmap, scales, what, len(ours))
        elif values.dtype != torch.float32:
            raise TypeError(f"{what} is {values.dtype}; expected torch.uint8 or torch.float32")
        result.update(zip(ours, values if len(ours) > 1 else [values], strict=False))
    return result


def _looked_up(codes: Tensor, qmap: Any, scales: Any, what: str, stacked: int) -> Tensor:
    """Codes as numbers of a table, times the scales of their blocks."""
    blocks = stacked * -(-codes.numel() // stacked // BITSANDBYTES_BLOCK)
    for it, numbers, word in ((qmap, 256, "table 'qmap'"), (scales, blocks, "scales 'absmax'")):
        if not isinstance(it, Tensor) or it.numel() != numbers or it.dtype != torch.float32:
            found = (
                f"{it.dtype}, {tuple(it.shape)}" if isinstance(it, Tensor) else type(it).__name__
            )
            raise RuntimeError(
                f"{what} is torch.uint8, and its {word} is {found}; expected {numbers} float32"
            )
    values = qmap.to(codes.device)[codes.reshape(stacked, -1).int()]
    scales = scales.to(codes.device).view(stacked, -1)
    spread = scales.repeat_interleave(BITSANDBYTES_BLOCK, 1)[:, : values.shape[1]]
    return (values * spread).view(codes.shape)


def from_torchao(state: State, name: str) -> State:
    for key, value in state.items():
        if isinstance(value, Tensor):
            _refuse_shards(value, f"state {key!r} of {name}")
    is_coded = {key: is_torchaos({key: value}) for key, value in state.items()}
    return {key: it.dequantize().float() if is_coded[key] else it for key, it in state.items()}


def from_flashoptim(state: State, param: Tensor, master_bytes: int, name: str) -> State:
    result = {key: it for key, it in state.items() if _CODES not in key and _SCALES not in key}
    for key in (key for key in state if key.endswith(_CODES)):
        short = key.removesuffix(_CODES)
        what = f"state {key!r} of {name}"
        result[short] = _unsquashed(_plain(state[key], what), state.get(short + _SCALES), what)
    errors = result.pop(_ERRORS, None)
    if errors is not None and param.dtype in HALF_DTYPES:
        what = f"state {_ERRORS!r} of {name}"
        result[MASTER] = _corrected(param, _errors(_plain(errors, what), master_bytes), what)
    return result


def _unsquashed(codes: Tensor, scales: Any, what: str) -> Tensor:
    """int8: softsigns of shares of a block's largest number; uint8: shares of its largest root."""
    blocks = -(-codes.numel() // _FLASHOPTIM_BLOCK)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{what} is {codes.dtype}; expected torch.int8 or torch.uint8")
    if not isinstance(scales, Tensor) or scales.shape != (blocks,):
        raise RuntimeError(f"{what} has no scales of shape ({blocks},) in {_SCALES!r}")
    is_signed = codes.dtype == torch.int8
    shares = codes.float() / (127 if is_signed else 255)
    if is_signed:
        shares = shares / (2 - shares.abs())
    spread = scales.to(codes.device).float().repeat_interleave(_FLASHOPTIM_BLOCK)
    values = shares * spread[: codes.numel()].view(codes.shape)
    return values if is_signed else values * values


def _errors(errors: Tensor, master_bytes: int) -> Tensor:
    """As integers: its state_dict has them in the parameter's dtype."""
    if master_bytes == 3:
        return errors.to(torch.int8)
    return errors if errors.dtype == torch.int16 else errors.view(torch.int16)


def _corrected(param: Tensor, errors: Tensor, what: str) -> Tensor:
    """The float32 of a 16-bit number and its error, a share of half a unit of its last bit."""
    if errors.shape != param.shape:
        raise RuntimeError(
            f"{what} has shape {tuple(errors.shape)}; expected the parameter's {tuple(param.shape)}"
        )
    mantissa = _MANTISSA_BITS[param.dtype]
    bits = param.detach().view(torch.int16).to(torch.int64) & 0x7FFF
    bias = (1 << 14 - mantissa) - 1
    unit = (bits >> mantissa).clamp(min=1) - (bias + mantissa + 1)
    share = errors.to(param.device).double() / _ERROR_RANGES[errors.dtype]
    return (param.detach().double() + torch.ldexp(share, unit)).float()


def _plain(value: Any, what: str) -> Tensor:
    """A tensor whose elements have the order that all of a library's functions agree on."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a tensor")
    _refuse_shards(value, what)
    if not value.is_contiguous():
        raise RuntimeError(
            f"{what} has strides {value.stride()}, and its library's functions differ on what "
            "order its elements have; expected a contiguous tensor"
        )
    return value.detach()


def _refuse_shards(value: Tensor, what: str) -> None:
    if local_of(value) is not value:
        raise TypeError(
            f"{what} is a {type(value).__name__}; expected a plain tensor, as other libraries' "
            "formats are read for whole parameters only"
        )
