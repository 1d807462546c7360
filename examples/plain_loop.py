# Needs no other file.
"""Train LGLA in a plain PyTorch loop on long-tailed digits, and print the accuracy of the rare ones.

Three parts belong to LGLA: the experts at the end of the network, the loss, and the ensemble that predicts.
With clipped gradients several experts learn at a usual learning rate. The digits are scikit-learn's: pip
install scikit-learn
"""

import torch
from torch import nn

try:
    from sklearn.datasets import load_digits

    from lgla_losses import GroupConvExperts, LGLALoss
    from lgla_losses.data import long_tailed_counts, long_tailed_indices
except ImportError as error:
    way_out = "pip install scikit-learn"
    if error.name == "lgla_losses":
        way_out = "run `pip install .` in the clone of lgla-losses"
    raise SystemExit(f"plain_loop.py: error: {error}: {way_out}") from None

torch.manual_seed(0)

# Scikit-learn's digits: 24 of each to test, and from the rest 150 zeros, 97 ones, ... and 3 nines to train.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
labels = torch.tensor(digits.target)
test = long_tailed_indices(labels, [24] * 10)
rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False).nonzero()[:, 0]
class_counts = long_tailed_counts(150, num_classes=10, imbalance_factor=50)
train = rest[long_tailed_indices(labels[rest], class_counts)]

trunk = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
stage = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
experts = GroupConvExperts(stage, num_experts=3, num_classes=10, scale=16.0, reset=True)
model = nn.Sequential(trunk, experts)
criterion = LGLALoss(class_counts, num_experts=3, scale=16.0)

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
for epoch in range(50):
    model.train()
    total = 0.0
    for batch in train[torch.randperm(len(train))].split(64):
        loss = criterion(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(batch)
    schedule.step()
    if epoch % 10 == 9:
        print(f"epoch {epoch + 1}: loss {total / len(train):.3f}")

model.eval()
with torch.no_grad():
    predicted = model(images[test]).ensemble().argmax(1)
right = (predicted == labels[test]).float()
print("digit  training images  accuracy (%)")
for digit, count in enumerate(class_counts.tolist()):
    print(f"{digit:5} {count:16} {100 * right[labels[test] == digit].mean():13.1f}")
rare = class_counts[labels[test]] < 20
print(f"all: {100 * right.mean():.1f} %; fewer than 20 images: {100 * right[rare].mean():.1f} %")
