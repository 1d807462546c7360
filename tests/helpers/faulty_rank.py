"""One rank of a job of torchrun: examples/train_ddp.py, whose rank 1 dies or hangs before a step.

Arguments: dies or hangs, then those of the script.
"""

import os
import sys
import time

import torch
import torchvision_shim  # noqa: F401
import train_ddp

#: Of the second epoch, with a checkpoint of the first.
STEP = 6


class FaultyLoss(train_ddp.LGLALoss):
    step = 0

    def forward(self, *arguments, **keywords):
        self.step += 1
        if os.environ["RANK"] == "1" and self.step == STEP:
            fault()
        return super().forward(*arguments, **keywords)


def fault():
    if KIND == "hangs":
        time.sleep(600)
    os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, KIND, *arguments = sys.argv
    train_ddp.LGLALoss = FaultyLoss
    train_ddp.main(arguments)
