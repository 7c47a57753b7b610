"""The formats that a param group asks for: master weights, states of fewer bits, random rounding.

A group without any of `FORMAT_OPTIONS` stores every array in its dtype, rounded to nearest.

* A float32 master of a 16-bit parameter is the parameter and, in `state["param_rest"]`, 16 more
  bits ("exact"). `split` and `join` are exact for bfloat16. For float16 they are exact from 2^-17
  to 65536; a smaller number is rounded to a multiple of 2^-40. "24bit" keeps 8 more bits: the same
  bits, rounded to nearest, ties to even.
* Stochastic rounding to 16 bits adds 16 random bits below the last bit and cuts them off. The bits
  are a function of the seed, the parameter's step, its number among all parameters, and the
  element's index in memory: there is no state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.reference import blocks
from fusedopt.reference.arithmetic import compute_dtype
from fusedopt.reference.groups import Group
from fusedopt.reference.rule import REST, Rule

FORMAT_OPTIONS = ("master_weights", "state_dtype", "rounding", "seed")
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Averages of squares, and the like: rounded to nearest, one that falls slowly would never fall.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "sum"})
STATE_SHIFT, PARAM_SHIFT = 0, 16  # where the 16 of an element's 32 random bits begin
MASTER_BITS = {"exact": 32, "24bit": 24}  # by the value of `master_weights`
REST_DTYPES = {"exact": torch.int16, "24bit": torch.int8}
KEY_BITS = 14  # elements with the same index >> KEY_BITS share a key

State = dict[str, Tensor]  # a parameter's
_M32, _M64 = 2**32 - 1, 2**64 - 1


class Formats(NamedTuple):
    """What a param group asks for."""

    master_weights: str | None = None
    state_dtype: torch.dtype | str | None = None
    rounding: str | None = None
    seed: int | None = None

    @property
    def are_default(self) -> bool:
        """Whether every array is stored in its dtype, rounded to nearest."""
        return self[:3] == (None, None, None)

    def has_rest(self, param: Tensor) -> bool:
        """Whether a parameter's master has bits in `state["param_rest"]`."""
        return self.master_weights is not None and param.dtype in HALF_DTYPES

    def rest_dtype(self) -> torch.dtype:
        """The dtype of `state["param_rest"]`, of a group with masters."""
        assert self.master_weights is not None
        return REST_DTYPES[self.master_weights]

    def rounds_param(self, param: Tensor) -> bool:
        """Whether a parameter itself is rounded at random."""
        is_stochastic = self.rounding == "stochastic" and param.dtype == torch.bfloat16
        return is_stochastic and not self.has_rest(param)

    def rounds_state(self, name: str) -> bool:
        """Whether a state, if it has 16 bits, is rounded at random."""
        return name in SECOND_MOMENTS and not self.are_default and self.rounding != "nearest"

    def dtype_of_state(self, param: Tensor) -> torch.dtype:
        """The dtype of a new state."""
        return self.asked_dtype or param.dtype

    @property
    def asked_dtype(self) -> torch.dtype | None:
        """The dtype that is asked for, of states that don't have 8 bits."""
        return self.state_dtype if isinstance(self.state_dtype, torch.dtype) else None

    @property
    def in_blocks(self) -> bool:
        """Whether the states have 8 bits."""
        return self.state_dtype == "8bit"

    def for_kernels(self, rule: Rule) -> tuple[int, bool, list[str], int, bool]:
        """The formats as a compiled backend takes them."""
        stochastic = [name for name in rule.tensors if self.rounds_state(name)]
        bits = MASTER_BITS.get(self.master_weights or "", 0)
        at_random = self.rounding == "stochastic"
        return bits, at_random, stochastic, self.seed or 0, self.in_blocks


def formats_of(group: Group) -> Formats:
    return Formats(*map(group.get, FORMAT_OPTIONS))


def set_formats(param_groups: list[Group]) -> list[Formats]:
    """The formats of every group; an empty list if no group has an option of formats."""
    if not any(key in group for group in param_groups for key in FORMAT_OPTIONS):
        return []
    return [formats_of(group) for group in param_groups]


class RandomBits(NamedTuple):
    """The random bits of a parameter's elements in one step."""

    seed: int
    step: int
    number: int  # of the parameter, among all of the optimizer's
    first: int = 0  # the index of element 0 in the whole tensor, if the parameter is a part of it

    def of(self, param: Tensor, shift: int) -> Tensor:
        """16 random bits for every element: int64, shaped as the parameter."""
        bits = torch.empty_like(param, dtype=torch.int64, memory_format=torch.preserve_format)
        flat = bits.as_strided((param.numel(),), (1,))
        index = self.first + torch.arange(param.numel(), device=param.device)
        first_key, last_key = self.first >> KEY_BITS, self.first + param.numel() >> KEY_BITS
        keys = [self._key(i) for i in range(first_key, last_key + 1)]
        key = torch.tensor(keys, device=param.device)[(index >> KEY_BITS) - first_key]
        flat.copy_(lowbias32((index * 0x9E3779B1 + key) & _M32) >> shift & 0xFFFF)
        return bits

    def _key(self, index: int) -> int:
        of_tensor = splitmix64(splitmix64(splitmix64(self.seed) ^ self.step) ^ self.number)
        return splitmix64(of_tensor ^ index) & _M32


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"."""
    x = (x + 0x9E3779B97F4A7C15) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)


def lowbias32(x: Tensor) -> Tensor:
    """Wellons, 2018, "Prospecting for hash functions"; of integers below 2^32 in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _M32
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & _M32
    return x ^ (x >> 16)


def split(
    values: Tensor, dtype: torch.dtype, rest_dtype: torch.dtype = torch.int16
) -> tuple[Tensor, Tensor]:
    """A float32 as the nearest number of a 16-bit dtype, ties away from zero, and the rest.

    Rounded to nearest even, 32,640 numbers could not be restored. With a rest of int8, the float32
    is rounded to 24 bits before, ties to even.
    """
    bits = extended(values, dtype)
    if rest_dtype == torch.int8:
        bits = (bits + 0x7F + (bits >> 8 & 1)) & 0xFFFFFF00
        return _from_bits(bits + 0x8000 >> 16, dtype), (bits >> 8).to(torch.int8)
    return _from_bits(bits + 0x8000 >> 16, dtype), bits.to(torch.int16)


def rest_beside(values: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The rests of int16 with which 16-bit numbers that exist are nearest to float32 values.

    Returns:
        The rests, and whether each number is one of its value's two neighbors, rounded to nearest.
        A number that isn't finite needs no rest.
    """
    bits = number.detach().view(torch.int16).to(torch.int64) << 16
    rest = ((extended(values, number.dtype) - bits + 2**31) & _M32) - 2**31
    rest = torch.where(number.detach().isfinite(), rest, 0)
    return rest.clamp(-0x8000, 0x7FFF).to(torch.int16), rest.abs() <= 0x8000


def convert_rest(rest: Tensor, dtype: torch.dtype) -> Tensor:
    """A rest of int8 as one of int16, or the other way.

    The 16-bit number stays as it is. So 8 bits are rounded to nearest, but to no rest above 127.
    """
    if rest.dtype == dtype:
        return rest
    if dtype == torch.int16:
        return rest.to(torch.int16) * 256
    return (rest.float() / 256).round().clamp_(max=127).to(torch.int8)


def join(number: Tensor, rest: Tensor) -> Tensor:
    """The float32 of two parts.

    Somebody may have changed the 16-bit number since the split. If it is 0 or inf now, the rest may
    not fit it; then the number counts alone.
    """
    bits = (number.detach().view(torch.int16).to(torch.int64) << 16) + convert_rest(
        rest, torch.int16
    )
    values = _from_extended(bits & _M32, number.dtype)
    return torch.where(values.isnan(), number.detach().to(torch.float32), values)


def extended(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in a 16-bit dtype with 16 more bits of mantissa: its 32 bits, in int64.

    bfloat16 with 16 more bits is float32. float16 with 16 more bits has 5 bits of exponent and 26
    of mantissa.
    """
    bits = values.view(torch.int32).to(torch.int64) & _M32
    if dtype == torch.bfloat16:
        return bits.masked_fill(values.isnan(), 0x7FC00000)
    sign, magnitude = bits & 0x80000000, values.abs()
    subnormal = (magnitude.double() * 2.0**40).nan_to_num(0, 0, 0).round().to(torch.int64)
    normal = (bits & 0x7FFFFFFF) - (112 << 23) << 3
    result = torch.where(magnitude < 2.0**-14, subnormal, normal)
    result = result.masked_fill(magnitude >= 2.0**16, 0x7C000000)
    return result.masked_fill(values.isnan(), 0x7E000000) | sign


def _from_extended(bits: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return _from_bits(bits, torch.float32)
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    subnormal = (magnitude.double() * 2.0**-40).to(torch.float32)
    normal = _from_bits((magnitude >> 3) + (112 << 23), torch.float32)
    values = torch.where(magnitude < 1 << 26, subnormal, normal)
    values = values.masked_fill(magnitude == 0x7C000000, torch.inf)
    values = values.masked_fill(magnitude > 0x7C000000, torch.nan)
    return torch.where(sign > 0, -values, values)


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    integer = torch.int16 if dtype in HALF_DTYPES else torch.int32
    return bits.to(integer).view(dtype)


def rounded_at_random(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 rounded to a 16-bit dtype. `random`: 16 bits for every element."""
    return _from_bits(extended(values, dtype) + random >> 16, dtype)


def param_values(group: Group, param: Tensor, state: dict[str, Any] | None) -> Tensor:
    """A parameter, or its master if it has one, in the dtype that it is computed in."""
    if formats_of(group).has_rest(param) and state and state.get(REST) is not None:
        return join(param, state[REST])
    return param.detach().to(compute_dtype(param.dtype), copy=True)


def store_param(
    group: Group, param: Tensor, state: State, values: Tensor, random: RandomBits
) -> None:
    """Writes new values to a parameter, and to its rest if it has a master."""
    formats = formats_of(group)
    if formats.has_rest(param):
        number, rest = split(values, param.dtype, formats.rest_dtype())
        state[REST].copy_(rest)
    elif formats.rounds_param(param):
        number = rounded_at_random(values, param.dtype, random.of(param, PARAM_SHIFT))
    else:
        number = values.to(param.dtype)
    param.copy_(number)  # of the same dtype: copy_ takes it wrong into another, negative one


def state_values(rule: Rule, group: Group, name: str, param: Tensor, state: State) -> Tensor:
    """A state in the dtype that it is computed in."""
    if formats_of(group).in_blocks:
        codes, scales = (state[key] for key in blocks.keys_of(name))
        return blocks.decode(rule.codings[name], codes, scales)
    return state[name].to(compute_dtype(param.dtype))


def store_state(
    rule: Rule,
    group: Group,
    name: str,
    param: Tensor,
    state: State,
    values: Tensor,
    random: RandomBits,
) -> None:
    """Writes new values to a state."""
    formats = formats_of(group)
    at_random = formats.rounds_state(name)
    if formats.in_blocks:
        bits = random.of(param, STATE_SHIFT) & blocks.RANDOM_MASK if at_random else blocks.NEAREST
        values = torch.empty_like(param, dtype=torch.float32).copy_(values)
        codes, scales = blocks.encode(rule.codings[name], values, bits)
        for key, value in zip(blocks.keys_of(name), (codes, scales), strict=True):
            state[key].copy_(value)
        return
    if at_random and state[name].dtype in HALF_DTYPES:
        values = rounded_at_random(values, state[name].dtype, random.of(param, STATE_SHIFT))
    state[name].copy_(values)
