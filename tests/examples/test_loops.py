"""What docs/guides/loops.md says of several processes and of callbacks, with the code of the page."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lgla_losses import ExpertModel

PAGE = (ROOT / "docs" / "guides" / "loops.md").read_text()
COUNTS = [500, 100, 20, 5]

#: What the callbacks are to set in epochs 0 to 6.
TAUS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 2.5]

#: What the loop of accelerate takes as given. One process has the batches of two together.
GIVEN = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
labels = torch.randint(4, (32,))
images = torch.randn(4, 3, 8, 8)[labels] + 0.3 * torch.randn(32, 3, 8, 8)
loader = val_loader = DataLoader(TensorDataset(images, labels), batch_size=int(sys.argv[1]))
network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))
"""


def block(words):
    """The Python block of the page that has these words."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if words in code)
    return found


def launch(folder, processes):
    """The weights that the loop of accelerate saves, and what it prints of its accuracy."""
    folder.mkdir()
    script = folder / "loop.py"
    script.write_text(GIVEN + block("Accelerator(") + 'accelerator.print(f"{accuracy:.4f}")\n')
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), script, str(8 // processes)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "checkpoint" / "model.safetensors"), done.stdout


@pytest.mark.slow
def test_two_processes_of_accelerate_take_the_steps_of_one(tmp_path):
    (alone, accuracy), (together, printed) = (launch(tmp_path / str(n), n) for n in (1, 2))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert printed == accuracy
    assert float(accuracy) > 0.9


class Model(nn.Module):
    """As Trainer wants it: with a dict of outputs."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.experts = ExpertModel.from_model(nn.Linear(8, 4), num_experts=3)

    def forward(self, features):
        return {"logits": self.experts(features).logits}


@pytest.fixture
def callbacks():
    """The names of the page's last blocks, and the tau of every call of its loss."""
    names, taus = {}, []
    exec(block("def tau_at(") + block("class LightningTau("), names)
    names["criterion"].register_forward_hook(lambda loss, *_: taus.append(float(loss.adjuster.tau)))
    return names, taus


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_the_callback_for_lightning(callbacks, monkeypatch):
    import lightning

    names, taus = callbacks

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = Model(), names["criterion"]

        def training_step(self, batch, batch_index):
            return self.criterion(self.model(batch[0])["logits"], batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    lightning.Trainer(
        max_epochs=7,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[names["LightningTau"]()],
    ).fit(Module(), DataLoader(TensorDataset(torch.randn(4, 8), torch.arange(4)), batch_size=4))
    assert taus == TAUS


def test_the_callback_for_trainer(callbacks, tmp_path):
    """With three batches an epoch, in steps of two and of one."""
    from transformers import Trainer, TrainingArguments

    names, taus = callbacks
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        num_train_epochs=7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(
        Model(),
        arguments,
        train_dataset=[{"features": torch.randn(8), "labels": j % 4} for j in range(6)],
        compute_loss_func=lambda outputs, labels, **_: names["criterion"](outputs["logits"], labels),
        callbacks=[names["TrainerTau"]()],
    ).train()
    assert taus == [tau for tau in TAUS for _ in range(3)]


def test_the_callback_for_skorch(callbacks):
    import skorch

    names, taus = callbacks
    net = skorch.NeuralNetClassifier(
        ExpertModel.from_model(nn.Linear(8, 4), num_experts=3),
        criterion=names["criterion"],
        train_split=None,
        max_epochs=7,
        callbacks=[names["SkorchTau"]()],
        verbose=0,
    )
    net.fit(torch.randn(4, 8), torch.arange(4))
    assert taus == TAUS
