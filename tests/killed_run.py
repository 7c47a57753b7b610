"""A sharded run whose ranks are killed at random moments, and which goes on from its checkpoints.

By hand, so many rounds: python tests/killed_run.py 50
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedopt
from fusedopt.distributed import Exchange

WORLD = 3
SAVE_EVERY = 20
PATIENCE = 60.0  # seconds until a rank that still runs counts as hanging
SURVIVED, DONE = 7, 0  # exit codes
MOMENTS = ("before", "during", "after")  # of the message, in which a rank kills itself


def make_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.Linear(30, 7))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return model


def set_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        local = param._local_tensor
        whole = torch.randn(param.shape, generator=generator)
        param.grad = torch.zeros_like(param)
        first = dist.get_rank() * -(-param.shape[0] // dist.get_world_size())
        param.grad._local_tensor.copy_(whole[first : first + local.shape[0]])


def bits(model, optimizer):
    """This rank's parameters and states."""
    found = [param._local_tensor.clone() for param in model.parameters()]
    for param in model.parameters():
        state = optimizer.state.get(param, {})
        found += [getattr(it, "_local_tensor", it).clone() for it in state.values()]
    return found


def newest(folder):
    """The number of steps of the last complete checkpoint; 0: there is none."""
    return max([int(it.parent.name) for it in Path(folder).glob("*/.metadata")], default=0)


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load(model, optimizer, folder):
    steps = [newest(folder)]
    dist.broadcast_object_list(steps)
    if steps[0] > 0:
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{steps[0]}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    return steps[0]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """This rank ends before, in or after its next message."""
    original = Exchange._send

    def send(exchange, message):
        if moment == "before":
            die()
        if moment == "during":
            threading.Timer(0.0003, die).start()
        total = original(exchange, message)
        die()
        return total

    Exchange._send = send


def train(rank, folder, steps, moment, ready):
    """Returns what a rank that survives has to say."""
    model = make_model()
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)
    try:
        first = load(model, optimizer, folder)
    except Exception as error:  # torch's own, of several types
        return f"whole step, while loading: {error}"
    ready.touch()
    for step in range(first, steps):
        if moment is not None and rank == WORLD - 1 and step % SAVE_EVERY == SAVE_EVERY // 2:
            die_at(moment)
        set_grads(model, step)
        before = bits(model, optimizer)
        try:
            optimizer.step()
        except fusedopt.PeerError as error:
            same = all(map(torch.equal, before, bits(model, optimizer)))
            kept = same and len(bits(model, optimizer)) == len(before)
            return f"{'old bits' if kept else 'CHANGED'} at step {step}: {error}"
        if (step + 1) % SAVE_EVERY == 0:
            try:
                dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{step + 1}")
            except Exception as error:  # torch's own, of several types
                return f"whole step {step}, while saving: {error}"
    with open(f"{folder}/bits{rank}", "wb") as file:
        pickle.dump(bits(model, optimizer), file)
    return None


def run_rank(rank, folder, store, steps, moment, timeout):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=WORLD,
        store=dist.FileStore(store, WORLD),
        timeout=timedelta(seconds=timeout),
    )
    try:
        said = train(rank, folder, steps, moment, Path(f"{store}.ready{rank}"))
    except BaseException as error:
        said = f"FAILED: {type(error).__name__}: {error}"
    if said is not None:
        Path(f"{store}.said{rank}").write_text(said)
    os._exit(DONE if said is None else SURVIVED)


class World:
    """So many processes, the ranks of one run, and what they say at their end."""

    def __init__(self, context, folder, steps, moment=None, timeout=PATIENCE):
        self.store = tempfile.mktemp(dir=folder)
        arguments = (folder, self.store, steps, moment, timeout)
        self.ranks = [
            context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(WORLD)
        ]
        for process in self.ranks:
            process.start()

    def wait_until_ready(self):
        deadline = time.monotonic() + PATIENCE
        while not all(Path(f"{self.store}.ready{rank}").exists() for rank in range(WORLD)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def signal(self, rank, number):
        process = self.ranks[rank]
        if process.is_alive():
            os.kill(process.pid, number)

    def end(self):
        """What each rank has said; nothing of those that were killed or are done."""
        deadline = time.monotonic() + PATIENCE
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} hang"
        said = {rank: Path(f"{self.store}.said{rank}") for rank in range(WORLD)}
        return {rank: path.read_text() for rank, path in said.items() if path.exists()}


def fork_server():
    """Processes that start fast: torch is loaded once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fusedopt", "killed_run"])
    return context


def check_said(said):
    for rank, words in said.items():
        assert words.startswith(("old bits", "whole step")), f"rank {rank}: {words}"
        if words.startswith("old bits"):
            assert "a rank is gone, or doesn't answer" in words


def killed_rounds(context, folder, rounds, steps, seed=0, log=lambda line: None):
    """Kills one rank or all of them, and goes on; returns how many survivors had old bits."""
    rng = random.Random(seed)
    old = 0
    for number in range(rounds):
        world = World(context, folder, steps)
        world.wait_until_ready()
        time.sleep(rng.uniform(0.0, 0.5))
        victims = range(WORLD) if rng.random() < 0.25 else [rng.randrange(WORLD)]
        for rank in victims:
            world.signal(rank, signal.SIGKILL)
        said = world.end()
        check_said(said)
        old += sum(words.startswith("old bits") for words in said.values())
        log(f"round {number}: killed {list(victims)}, checkpoint {newest(folder)}, said {said}")
    return old


def final_bits(context, folder, steps):
    """The run to its end, and all ranks' bits there."""
    world = World(context, folder, steps)
    assert world.end() == {}
    found = []
    for rank in range(WORLD):
        with open(f"{folder}/bits{rank}", "rb") as file:
            found += pickle.load(file)
    return found


def main(rounds):
    steps = 200 * rounds
    with tempfile.TemporaryDirectory() as killed, tempfile.TemporaryDirectory() as undisturbed:
        context = fork_server()
        old = killed_rounds(context, killed, rounds, steps, seed=int(time.time()), log=print)
        steps = newest(killed) + SAVE_EVERY
        pairs = zip(
            final_bits(context, killed, steps),
            final_bits(context, undisturbed, steps),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
        print(f"{rounds} rounds, {old} survivors with old bits, {steps} steps: the same bits")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from killed_run import main as imported_main

    imported_main(int(sys.argv[1]))
