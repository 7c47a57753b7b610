"""Trainers over two ranks: Lightning's DDP and ModelParallelStrategy, and Accelerate."""

from __future__ import annotations

import os
import warnings
from typing import Any

import over_ranks
import pytest
import torch
from cases import same_bits
from rank_tensors import full, same_on_all
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

STEPS, BATCH = 4, 8


def as_torchrun(rank):
    """The variables by which trainers know of the ranks."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    warnings.simplefilter("ignore")


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))


def batches():
    inputs = torch.randn(2 * STEPS * BATCH, 20, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs[:, :5].argmax(1)), BATCH)


def expected():
    """One process over both ranks' samples, as their samplers deal them: in turn."""
    net = make_net()
    opt = fusedopt.FusedAdamW(net.parameters(), lr=1e-2, max_grad_norm=0.1)
    inputs, classes = batches().dataset.tensors
    for step in range(STEPS):
        rows = slice(2 * step * BATCH, 2 * (step + 1) * BATCH)
        opt.zero_grad()
        nn.functional.cross_entropy(net(inputs[rows]), classes[rows]).backward()
        opt.step()
    return net, opt


def check(params, opt):
    net, other = expected()
    for a, b in zip(params, net.parameters(), strict=True):
        torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-4, atol=1e-5)
        assert same_on_all(full(a.detach()).double().sum().item())
    torch.testing.assert_close(opt.grad_norm, other.grad_norm, rtol=1e-4, atol=1e-6)
    assert same_on_all(opt._readings().tolist())


def accelerate_ddp(rank):
    from accelerate import Accelerator

    as_torchrun(rank)
    results = []
    for shards in (False, True):
        net = make_net()
        inner = fusedopt.FusedAdamW(net.parameters(), lr=1e-2, max_grad_norm=0.1)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        model, opt, loader = accelerator.prepare(net, inner, batches())
        if shards:
            fusedopt.shard_states(inner)
        for inputs, classes in loader:
            opt.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), classes))
            opt.step()
        results.append(([p.detach() for p in net.parameters()], inner._readings()))
        check(list(net.parameters()), inner)
    assert all(map(same_bits, results[0][0], results[1][0]))
    assert same_bits(results[0][1], results[1][1])


def lightning_fit(strategy: Any, shards: bool):
    import pytorch_lightning as pl
    from torch.distributed.fsdp import fully_shard

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def configure_model(self) -> None:
            if shards and self.device_mesh is not None:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: Any) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return fusedopt.FusedAdamW(self.net.parameters(), lr=1e-2, max_grad_norm=0.1)

    quiet: Any = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **quiet)
    model = Model()
    trainer.fit(model, batches())
    return list(model.net.parameters()), trainer.optimizers[0]


def lightning_ddp(rank):
    from pytorch_lightning.strategies import DDPStrategy

    as_torchrun(rank)
    params, opt = lightning_fit(DDPStrategy(process_group_backend="gloo"), shards=False)
    assert int(opt.state[params[0]]["step"]) == STEPS
    assert same_on_all(opt._readings().tolist())
    assert same_on_all([p.detach().double().sum().item() for p in params])


def lightning_fsdp(rank):
    from pytorch_lightning.strategies import ModelParallelStrategy

    as_torchrun(rank)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    params, opt = lightning_fit(strategy, shards=True)
    assert type(params[0]).__name__ == "DTensor"
    assert int(opt.state[params[0]]["step"]) == STEPS
    assert same_on_all(opt._readings().tolist())


@pytest.mark.parametrize("body", [accelerate_ddp, lightning_ddp, lightning_fsdp])
def test_two_ranks(body):
    pytest.importorskip("accelerate" if body is accelerate_ddp else "pytorch_lightning")
    over_ranks.run(body, 2)
