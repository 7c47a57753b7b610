"""torchrun --nproc-per-node 2 examples/fsdp_gpt.py --output runs, then the same with --steps 40"""

import pydoc_data.topics
from argparse import ArgumentParser
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer, lr_scheduler

import fusedopt

TEXT = "".join(pydoc_data.topics.topics.values())
IDS = torch.tensor([ord(character) % 128 for character in TEXT])
LENGTH, WIDTH, BATCH, ACCUMULATE = 64, 64, 8, 2
MASK = nn.Transformer.generate_square_subsequent_mask(LENGTH)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 256, 0.0, batch_first=True) for _ in "ab"]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.places(torch.arange(LENGTH))
        for layer in self.layers:
            hidden = layer(hidden, src_mask=MASK, is_causal=True)
        return self.head(hidden)


def state_of(model: nn.Module, optimizer: Optimizer, schedule: lr_scheduler.LambdaLR) -> dict:
    states = get_state_dict(model, optimizer)
    return {"model": states[0], "optimizer": states[1], "schedule": schedule.state_dict()}


def main() -> None:
    parser = ArgumentParser(description="A small GPT on FSDP2, with everything around a step")
    parser.add_argument("--steps", type=int, default=20, help="how many in all (default: 20)")
    parser.add_argument("--output", help="folder for a checkpoint; if one is there, go on from it")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = GPT()
    for layer in model.layers:
        fully_shard(layer)
    root = fully_shard(model)
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    if args.output and Path(args.output, ".metadata").exists():
        load(saved := state_of(model, optimizer, schedule), checkpoint_id=args.output)
        model.load_state_dict(saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    for step in range(schedule.last_epoch, args.steps):
        for part in range(ACCUMULATE):
            torch.manual_seed(dist.get_rank() + 100 * (step * ACCUMULATE + part))
            starts = torch.randint(len(IDS) - LENGTH - 1, (BATCH, 1))
            ids = IDS[starts + torch.arange(LENGTH + 1)]
            root.set_requires_gradient_sync(part == ACCUMULATE - 1)
            logits = model(ids[:, :-1]).transpose(1, 2)
            (nn.functional.cross_entropy(logits, ids[:, 1:]) / ACCUMULATE).backward()
        optimizer.step()  # one norm over all ranks: all clip, and all skip, alike
        schedule.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: gradient norm {optimizer.grad_norm:.6f}")
    if args.output:
        save(state_of(model, optimizer, schedule), checkpoint_id=args.output)


if __name__ == "__main__":
    main()
