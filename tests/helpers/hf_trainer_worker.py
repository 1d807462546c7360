"""One rank of a job of examples/train_hf_trainer.py with a tiny encoder, or the one process."""

import functools
import sys

import torch
import torchvision_shim  # noqa: F401
from scripts import ROOT

import lgla_losses

sys.path.append(str(ROOT / "examples"))
import train_hf_trainer

#: Without dropout, which ranks and micro-batches would draw otherwise.
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

#: Adjustment with weights, and in two micro-batches without.
CASES = {"aaw": (True, 1), "accumulated": (False, 2)}


def train(case, data, folder, batch_size, accumulate):
    """An epoch of plain gradient descent."""
    aaw, _ = CASES[case]
    train_hf_trainer.SMALL_BERT = TINY
    train_hf_trainer.LGLALoss = functools.partial(lgla_losses.LGLALoss, aaw=aaw)
    options = {
        "output_dir": f"{folder}/{case}",
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "vocabulary": 120,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    train_hf_trainer.main([str(data), *(f"--{name}={value}" for name, value in options.items())])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, (_, accumulate) in CASES.items():
        train(case, *sys.argv[1:], batch_size=7, accumulate=accumulate)
    torch.distributed.destroy_process_group()
