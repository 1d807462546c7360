"""Long-tailed data sets: how many samples each class keeps, which ones, their files, and a sampler.

Only opening images needs more than PyTorch: ``pip install pillow``, and torchvision for CIFAR.
"""

from lgla_losses.data.files import read_cifar, read_inaturalist, read_list, read_npz
from lgla_losses.data.images import ImageData, read_image
from lgla_losses.data.long_tail import long_tailed_counts, long_tailed_indices
from lgla_losses.data.sampling import ClassBalancedSampler

__all__ = [
    "ClassBalancedSampler",
    "ImageData",
    "long_tailed_counts",
    "long_tailed_indices",
    "read_cifar",
    "read_image",
    "read_inaturalist",
    "read_list",
    "read_npz",
]
