"""Changes anything that Python code can change between steps, at random, and steps.

    python tests/fuzz_step.py [--mutations 1000000] [--seed 0] [--trace] [--emulated VARIANT]

A step either gives the reference's bits, or raises an error that Python code can catch and has
changed nothing. Nothing crashes the interpreter.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import math
import random
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fuzz.optimizers  # adds its mutations to the list, as fuzz.tensors does
import fuzz.tensors
import torch
from cases import same_bits
from fuzz.world import MUTATIONS, World, is_sound, memory_of, tensors_of
from torch import Tensor

import fusedopt
from fusedopt.core import backends


# --- clipping by itself
def clip(world: World, rng: random.Random) -> Any:
    backend = world.optimizer._backend
    params = [param for param in world.params if isinstance(param, Tensor)]
    max_norm = rng.choice([1.0, 1e-3, math.inf, 0.0])
    which = rng.randrange(3)
    if which == 0:
        norm = fusedopt.clip_grad_norm_(
            params, max_norm, rng.choice([2, math.inf, 1]), backend=backend
        )
    elif which == 1:
        grads = [param.grad for param in params if param.grad is not None]
        norm = fusedopt.get_total_norm(grads, rng.choice([2, math.inf]), backend=backend)
    else:
        total = rng.choice([2.0, torch.tensor(3.0), torch.tensor(3), torch.ones(0)])
        norm = fusedopt.clip_grads_with_norm_(params, max_norm, total, backend=backend)
    return norm


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


class Failure(AssertionError):
    pass


def expect_unchanged(before, world, error) -> None:
    for tensor, memory in before:
        now = memory_of(tensor)
        if memory is not None and (now is None or not torch.equal(now, memory)):
            raise Failure(f"changed, though it raised {error!r}")


def expect_same(worlds: tuple[World, World]) -> None:
    fused, reference = (tensors_of(world) for world in worlds)
    for one, other in zip(fused, reference, strict=True):
        if not (is_sound(one) and is_sound(other)):
            continue
        if not same_bits(one.detach().resolve_neg(), other.detach().resolve_neg()):
            raise Failure(f"other bits than the reference's: {one} and {other}")


def may_refuse_alone(reference: World, error: Exception) -> bool:
    """Whether only the reference meets this error.

    It reads the options of groups that have no gradients, and lazy clones whose memory was resized,
    which torch itself can't read.
    """
    if isinstance(error, ValueError | ZeroDivisionError | OverflowError):  # of its arithmetic
        return True
    if found := re.match(r"param group (\d+)'s ", str(error)):
        group = list(reference.optimizer.param_groups)[int(found[1])]
        return all(param.grad is None for param in group["params"])
    return "COW.cpp" in str(error)


def run(worlds: tuple[World, World], function: Callable[[World], Any], acts: bool) -> bool:
    """Whether the worlds may go on."""
    fused, reference = worlds
    before = [(tensor, memory_of(tensor)) for tensor in tensors_of(fused)]
    changes_meanwhile = not isinstance(fused.mode, nullcontext)
    with fused.mode:
        result, error = attempt(lambda: function(fused))
    fused.mode = nullcontext()
    if error is not None:
        if "please report" in str(error) and "fusedopt" in str(error) and not changes_meanwhile:
            raise Failure(repr(error))
        if not changes_meanwhile:
            expect_unchanged(before, fused, error)
        return False
    for kept in fused.kept:
        if isinstance(kept, tuple) and not same_bits(*kept):
            raise Failure("a lazy clone was written to")
    if not fused.comparable:
        return False
    with reference.mode:
        expected, other = attempt(lambda: function(reference))
    reference.mode = nullcontext()
    if other is not None:
        if not may_refuse_alone(reference, other):
            raise Failure(f"only the reference raised {other!r}")
        return False
    if isinstance(result, Tensor) and not same_bits(result, expected):
        raise Failure(f"norm {result}; expected {expected}")
    expect_same(worlds)
    return True


def fuzz(mutations: int, seed: int, trace: bool, backend: str | None) -> collections.Counter:
    done: collections.Counter = collections.Counter()
    rng = random.Random(seed)
    while done["mutations"] < mutations:
        world_seed = rng.randrange(2**31)
        worlds = World(backend, world_seed), World("reference", world_seed)
        history = [f"world {world_seed}"]
        for _ in range(20):
            for world in worlds:
                world.new_grads()
            number = rng.choice([0, 1, 1, 2])
            for _ in range(number):
                change, change_seed = rng.choice(MUTATIONS), rng.randrange(2**31)
                history.append(f"{change.__name__}({change_seed})")
                if trace:
                    print(history[-1], flush=True)
                # A change itself may be refused by torch; then by both.
                for world in worlds:
                    attempt(lambda: change(world, random.Random(change_seed)))  # noqa: B023
                worlds[1].comparable = worlds[0].comparable
            clip_seed = rng.randrange(2**31) if rng.random() < 0.2 else None
            history.append("step" if clip_seed is None else f"clip({clip_seed})")
            if trace:
                print(history[-1], flush=True)
            done["mutations"] += number
            done["steps"] += 1
            try:
                if clip_seed is not None:
                    goes_on = run(worlds, lambda w: clip(w, random.Random(clip_seed)), False)  # noqa: B023
                else:
                    goes_on = run(worlds, lambda w: w.optimizer.step(), True)
            except Failure as failure:
                raise Failure(f"{failure}\nafter {', '.join(history)}") from failure
            if not goes_on:
                done["refused, or not comparable"] += 1
                break
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--trace", action="store_true", help="print every change before it is made")
    parser.add_argument("--emulated", metavar="VARIANT", help="the CUDA kernels, emulated")
    arguments = parser.parse_args()
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    backend = "cpu"
    if arguments.emulated:
        sys.path.insert(0, str(Path(__file__).parent / "emulator"))
        import build

        backends._C = build.load(arguments.emulated)
        backend = "cuda"
    print(dict(fuzz(arguments.mutations, seed, arguments.trace, backend)))


if __name__ == "__main__":
    main()
