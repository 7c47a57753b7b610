"""A small GPT-2 learns Python's own documentation, by characters, with Hugging Face's Trainer.

python examples/transformers_gpt2.py --output runs, then --steps 400 --resume runs/checkpoint-200
"""

import pydoc_data.topics
import sys
import tempfile
from argparse import ArgumentParser, RawTextHelpFormatter
from typing import Any

import torch
from needs import needs

with needs("transformers", "accelerate"):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import fusedopt

TEXT = "".join(pydoc_data.topics.topics.values())
CHARACTERS = sorted(set(TEXT))
LENGTH = 64  # of the context, in characters


def make_model() -> Any:
    shape: Any = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    shape |= {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(CHARACTERS), **shape))


def make_data() -> Any:
    number = {character: index for index, character in enumerate(CHARACTERS)}
    ids = torch.tensor([number[character] for character in TEXT])
    return [{"input_ids": block, "labels": block} for block in ids.split(LENGTH)[:-1]]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="how many in all (default: 200)")
    parser.add_argument("--trainer-clips", action="store_true", help="clip there, not in the step")
    parser.add_argument("--output", help="folder for a checkpoint (default: none is kept)")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from here")
    args = parser.parse_args(argv)
    own, clip = (None, 1.0) if args.trainer_clips else (1.0, 0.0)
    adamw: Any = (fusedopt.FusedAdamW, {"lr": 3e-3, "max_grad_norm": own, "nonfinite": "skip"})
    no_gpu = not torch.cuda.is_available()
    rest: Any = {"report_to": "none", "disable_tqdm": not sys.stderr.isatty(), "use_cpu": no_gpu}
    rest |= {"max_steps": args.steps, "save_steps": args.steps, "logging_steps": 20, "bf16": True}
    set_seed(0)  # for the weights
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        setup = TrainingArguments(args.output or folder, max_grad_norm=clip, **rest)
        trainer = Trainer(model, setup, train_dataset=make_data(), optimizer_cls_and_kwargs=adamw)
        optimizer: Any = trainer.create_optimizer()
        optimizer.name_params(model)  # the Trainer makes param groups without names
        trainer.train(resume_from_checkpoint=args.resume)
    start = torch.tensor([[CHARACTERS.index("T")]], device=model.device)
    drawn = model.eval().generate(start, max_length=LENGTH, do_sample=True, pad_token_id=0)
    print("".join(CHARACTERS[index] for index in drawn[0]))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
