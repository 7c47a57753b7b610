"""A GRU reads handwritten digits row by row, with Accelerate: clipping, accumulation, resuming.

python examples/accelerate_gru.py --output runs/gru, and then --epochs 20 --resume runs/gru
"""

from argparse import ArgumentParser, RawTextHelpFormatter

from needs import needs

with needs("accelerate", "scikit-learn"):
    from accelerate import Accelerator
    from digits_data import load_digits

from torch import Tensor, manual_seed, nn, optim, set_num_threads
from torch.utils.data import DataLoader, TensorDataset

import fusedopt


class RowReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.gru(images.squeeze(1))[0][:, -1])


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="how many in all (default: 10)")
    parser.add_argument("--trainer-clips", action="store_true", help="clip there, not in the step")
    parser.add_argument("--output", help="folder for a checkpoint (default: none is written)")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from here")
    args = parser.parse_args(argv)
    manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    digits, network = load_digits().to(accelerator.device), RowReader()
    clip = None if args.trainer_clips else 1.0
    fused = fusedopt.FusedRMSprop(network.parameters(), 2e-3, max_grad_norm=clip, nonfinite="skip")
    schedule = optim.lr_scheduler.ExponentialLR(fused, 0.9)  # by epochs: it counts them, too
    train = DataLoader(TensorDataset(digits.train_images, digits.train_labels), 16, shuffle=True)
    model, optimizer, train = accelerator.prepare(network, fused, train)
    accelerator.register_for_checkpointing(schedule)
    if args.resume:
        accelerator.load_state(args.resume)
    for epoch in range(schedule.last_epoch + 1, args.epochs + 1):
        for images, labels in train:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                if args.trainer_clips and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
        print(f"epoch {epoch}: accuracy {accuracy:.1%}, gradient norm {fused.grad_norm:.3f}")
    if args.output:
        accelerator.save_state(args.output)


if __name__ == "__main__":
    set_num_threads(1)  # the matrices are small
    main()
