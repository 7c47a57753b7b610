"""The kernels as custom calls of compiled programs, and what such a call refuses."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from fusedopt.core import jax_calls
from fusedopt.jax.ranks import in_shard_map, spread, varying


class Operand(NamedTuple):
    """An operand of a call.

    Attributes:
        name: for errors. Operands of one shape that belong together share the part before "[".
        result: the index of the result that lies in its memory, or None.
    """

    name: str
    value: jax.Array
    result: int | None = None


def custom_call(
    target: str, operands: Sequence[Operand], results: Sequence[jax.Array], **attributes: Any
) -> list[jax.Array]:
    """Calls a function of the library.

    Args:
        results: arrays that the results are like: in shape, dtype, and the axes along which the
            ranks' arrays differ.

    Raises:
        NotImplementedError: under `jax.vmap`.
        ValueError: an operand is sharded, outside of `jax.shard_map`.
    """
    jax_calls.register()
    values = [it.value for it in operands]
    axes = frozenset[str]().union(*map(varying, values))
    in_place = {k: it.result for k, it in enumerate(operands) if it.result is not None}
    types = [jax.typeof(it) for it in results]

    def run(*values: jax.Array) -> list[jax.Array]:
        call = jax.ffi.ffi_call(target, types, input_output_aliases=in_place)
        return [*call(*values, **attributes)]

    guarded = custom_vmap(run if in_shard_map() else _refuse_sharded(run, operands, len(types)))
    guarded.def_vmap(_refuse_vmap)
    return guarded(*(spread(it, axes) for it in values))


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "fusedopt.jax can't be used under jax.vmap: a step has one norm and one count. Expected "
        "one model; use jax.lax.map for several"
    )


def check_not_sharded(name: str, value: Any) -> None:
    """Refuses an array that is sharded over devices, outside of `jax.shard_map`.

    Inside `jax.jit`, a mesh with automatic axes shows only to XLA what is sharded.
    """
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        _check_sharding(name, value.sharding)
    else:
        sharding = jax.typeof(value).sharding
        if not sharding.mesh.empty:
            _check_sharding(name, sharding)


def _check_sharding(name: str, sharding: jax.sharding.Sharding) -> None:
    if not sharding.is_fully_replicated:
        raise ValueError(
            f"{name} is sharded: {getattr(sharding, 'spec', sharding)}; expected a whole array on "
            "every device: every device would gather all of it. Take the step inside of "
            "jax.shard_map, where fusedopt.jax works on the shards"
        )


def _refuse_sharded(
    run: Callable[..., list[jax.Array]], operands: Sequence[Operand], num_results: int
) -> Callable[..., Any]:
    """`run` over whole arrays alone. XLA asks when it compiles, if there are several devices."""

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        for operand, it in zip(operands, arguments, strict=True):
            _check_sharding(operand.name, it.sharding)
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, run, [whole] * num_results, tuple(it.sharding for it in arguments)

    def infer(mesh: Any, *_: Any) -> Any:
        return [NamedSharding(mesh, PartitionSpec())] * num_results

    guarded = custom_partitioning(run)
    guarded.def_partition(partition, infer, sharding_rule=functools.partial(_rule, operands))
    return guarded


def _rule(operands: Sequence[Operand], _: Any, arguments: Any, results: Any) -> SdyShardingRule:
    """A result is sharded as the operand that it lies in. Without a rule, XLA gathers first."""

    def dims(array: str, value: Any) -> ArrayMapping:
        return ArrayMapping(*(f"{array}d{k}" for k in range(len(value.shape))))

    names = [f"o{k}" if it.result is None else f"r{it.result}" for k, it in enumerate(operands)]
    of_results = (dims(f"r{k}", value) for k, value in enumerate(results))
    return SdyShardingRule(tuple(map(dims, names, arguments)), tuple(of_results))
