"""Handwritten digits with Lightning: clipping in the optimizer, mixed precision, resuming.

python examples/lightning_digits.py --output a.ckpt, then --epochs 9 --resume a.ckpt
"""

from argparse import ArgumentParser, RawTextHelpFormatter

from needs import needs

with needs("pytorch-lightning", "scikit-learn"):
    import pytorch_lightning as pl
    from digits_data import load_digits

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusedopt


class Classifier(pl.LightningModule):
    def __init__(self, **options) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.options = options  # the optimizer's

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        self.optimizer = fusedopt.FusedAdamW(self.parameters(), lr=2e-3, **self.options)
        return self.optimizer

    def on_train_epoch_end(self):
        accuracy, norm = self.trainer.callback_metrics["accuracy"], self.optimizer.grad_norm
        print(f"epoch {self.current_epoch + 1}: accuracy {accuracy:.1%}, gradient norm {norm:.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="how many in all (default: 5)")
    parser.add_argument("--trainer-clips", action="store_true", help="clip there, not in the step")
    parser.add_argument("--output", help="file for a checkpoint (default: none is written)")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from here")
    args = parser.parse_args(argv)
    pl.seed_everything(0, verbose=False)
    own, clip = (None, 1.0) if args.trainer_clips else (1.0, None)
    rest: dict = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest |= {"max_epochs": args.epochs, "enable_checkpointing": False, "precision": "bf16-mixed"}
    digits = load_digits()
    data = TensorDataset(digits.train_images, digits.train_labels)
    train = DataLoader(data, 32, sampler=DistributedSampler(data, 1, 0))  # shuffles by epoch number
    test = DataLoader(TensorDataset(digits.test_images, digits.test_labels), 512)
    trainer = pl.Trainer(gradient_clip_val=clip, **rest)
    trainer.fit(Classifier(max_grad_norm=own, nonfinite="skip"), train, test, ckpt_path=args.resume)
    if args.output:
        trainer.save_checkpoint(args.output)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
