"""Labels are counted as the data set gives them, wherever it keeps them."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision import datasets as vision

from lgla_losses import count_classes
from lgla_losses.data import ClassBalancedSampler, long_tailed_indices


@pytest.fixture
def root(tmp_path):
    """Images of class 0, 1, 1, 2."""
    for path in ("ant/0.png", "bee/0.png", "bee/1.png", "cat/0.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / path)
    return tmp_path


def yielded(dataset, num_classes=3):
    """The counts of what the data set yields, in plain loops."""
    labels = [int(dataset[i][1]) for i in range(len(dataset))]
    return [labels.count(j) for j in range(num_classes)]


@pytest.mark.parametrize("options", [{}, {"transform": np.asarray}])
def test_a_target_transform_is_applied(root, options):
    folder = vision.ImageFolder(root, target_transform={0: 2, 1: 0, 2: 2}.get, **options)
    assert count_classes(folder, 3).tolist() == yielded(folder) == [2, 0, 2]
    assert count_classes(Subset(folder, [0, 1]), 3).tolist() == [1, 0, 1]
    assert sorted(long_tailed_indices(Subset(folder, [1, 2]), [2]).tolist()) == [0, 1]


def test_a_target_transform_set_later_is_applied(root):
    folder = vision.ImageFolder(root)
    folder.target_transform = torch.tensor([2, 2, 0]).__getitem__
    assert count_classes(folder, 3).tolist() == yielded(folder) == [1, 0, 3]


class Faulty:
    """Changes to a folder after which targets are not what it yields."""

    def fewer_samples(self):
        self.samples = self.samples[:2]

    def other_samples(self):
        self.samples = [(path, 2 - label) for path, label in self.samples]

    def other_targets(self):
        self.targets = [2 - label for label in self.targets]

    def joint_transforms(self):
        self.transforms = lambda image, label: (image, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "fewer_samples",
            r"one per sample, 2 in the ImageFolder, got shape \[4\] in its targets",
        ),
        ("other_samples", "the same in targets and samples of the ImageFolder, got different"),
        ("other_targets", "the same in targets and samples of the ImageFolder, got different"),
        ("joint_transforms", "target_transform, got ImageFolder with transforms of another kind"),
    ],
)
def test_targets_that_are_not_what_the_folder_yields_are_refused(root, change, words):
    folder = vision.ImageFolder(root)
    getattr(Faulty, change)(folder)
    with pytest.raises(ValueError, match=f"labels: expected .*{words}.*pass the labels.*iterate=True"):
        count_classes(folder, 3)
    assert count_classes(folder, 3, iterate=True).tolist() == yielded(folder)


class Endless(Dataset):
    """Four samples; an index beyond them raises nothing."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __getitem__(self, index):
        return torch.zeros(2), (0, 1, 1, 2)[index % 4]

    def __len__(self):
        return 4


def test_labels_that_are_the_class_ids_are_refused():
    with pytest.raises(ValueError, match=r"one per sample, 4 in the Endless, got shape \[3\] in its labels"):
        count_classes(Endless(labels=[0, 1, 2]), 3)


KEPT = {
    "targets": Endless(targets=[0, 1, 1, 2]),
    "labels beside no targets": Endless(targets=None, labels=torch.tensor([0, 1, 1, 2])),
    "a column": Endless(labels=pd.Series([0, 1, 1, 2], index=[7, 7, 3, 1])),
    "Flowers102, DTD": Endless(_labels=[0, 1, 1, 2]),
    "Caltech256": Endless(y=[0, 1, 1, 2]),
    "Caltech101": Endless(y=[0, 1, 1, 2], target_type=["category"]),
    "a target type of its own": Endless(targets=[0, 1, 1, 2], target_type="attr"),
    "GTSRB": Endless(_samples=[("a.png", 0), ("b.png", 1), ("c.png", 1), ("d.png", 2)]),
    "video folders": Endless(samples=[("a.avi", 0), ("b.avi", 1), ("c.avi", 1), ("d.avi", 2)]),
    "Omniglot": Endless(_flat_character_images=[("a.png", 0), ("b.png", 1), ("c.png", 1), ("d.png", 2)]),
    "OxfordIIITPet": Endless(
        _labels=[3, 4, 5, 6], _bin_labels=[0, 1, 1, 2], _target_types=["binary-category"]
    ),
    "CelebA": Endless(identity=torch.tensor([[0], [1], [1], [2]]), target_type=["identity"]),
    "INaturalist": Endless(index=[(0, "a"), (1, "b"), (1, "c"), (2, "d")], target_type=["full"]),
    "attributes": Endless(
        attr=torch.tensor([[0, 0], [5, 1], [0, 1], [0, 2]]),
        target_type="attr",
        target_transform=lambda row: row[1],
    ),
    "TensorDataset": TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 1, 2])),
}


@pytest.mark.parametrize("name", KEPT)
def test_labels_are_found_where_data_sets_keep_them(name):
    dataset = KEPT[name]
    assert count_classes(dataset, 3).tolist() == [1, 2, 1]
    twice = ConcatDataset([dataset, ConcatDataset([Subset(dataset, torch.tensor([3, 0]))])])
    assert count_classes(twice, 3).tolist() == [2, 2, 2]
    part, rest = random_split(dataset, [1, 3])
    assert (count_classes(part, 3) + count_classes(rest, 3)).tolist() == [1, 2, 1]
    sampler = WeightedRandomSampler([1.0, 1.0, 1.0, 1.0], 100)
    assert count_classes(DataLoader(dataset, 2, sampler=sampler), 3).tolist() == [1, 2, 1]
    assert count_classes(DataLoader(twice, 2, shuffle=True, drop_last=True), 3).tolist() == [2, 2, 2]


def warned(loader, num_classes=3):
    """The counts, and the warning."""
    with pytest.warns(UserWarning, match="labels: these are the counts of the data set, but") as record:
        counts = count_classes(loader, num_classes)
    assert len(record) == 1
    assert record[0].filename == __file__
    return counts.tolist(), str(record[0].message)


def test_counts_of_a_loader_whose_sampler_balances_classes_are_told_to_be_the_data_sets():
    dataset, subset = KEPT["targets"], Subset(KEPT["targets"], [1, 2, 3])
    sampler = ClassBalancedSampler(dataset)
    counts, told = warned(DataLoader(dataset, 2, sampler=sampler))
    assert counts == [1, 2, 1]
    assert "the ClassBalancedSampler" in told
    assert told.endswith("the losses need sampler.class_counts")
    assert warned(DataLoader(dataset, 2, sampler=sampler), 5)[0] == [1, 2, 1, 0, 0]
    assert warned(DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, True)))[0] == [1, 2, 1]
    part = ClassBalancedSampler(subset, num_classes=5, power=0.5)
    assert warned(DataLoader(subset, None, sampler=part))[0] == [0, 2, 1]

    weighted = WeightedRandomSampler([1.0, 0.5, 0.5, 1.0], 4)
    counts, told = warned(DataLoader(dataset, 2, sampler=weighted))
    assert counts == [1, 2, 1]
    assert "the WeightedRandomSampler" in told
    assert "torch.bincount(labels, weights=sampler.weights), or use lgla_losses.data.ClassBal" in told


@pytest.mark.parametrize(
    "sampler",
    [
        ClassBalancedSampler([0, 1, 1, 2], power=1),
        WeightedRandomSampler([0.3, 0.3, 0.3, 0.3], 100),
        WeightedRandomSampler([3.0, 5.0, 1.0, 3.0], 100),  # no class gains by it
        WeightedRandomSampler([1.0, 0.1, 0.1, 1.0], 4, replacement=False),  # an order of all samples
    ],
)
def test_samplers_that_leave_the_prior_are_not_told_of(sampler):
    assert count_classes(DataLoader(KEPT["targets"], 2, sampler=sampler), 3).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 1], "got one with 3 labels for 4 samples"),
        ([0, 1, 2, 1], "got one with label 2 for sample 2 of class 1"),
    ],
)
def test_a_sampler_of_another_data_set_is_refused(labels, words):
    loader = DataLoader(KEPT["targets"], 2, sampler=ClassBalancedSampler(labels, power=1))
    with pytest.raises(
        ValueError, match=f"labels: expected a ClassBalancedSampler for the data set .*{words}; construct it"
    ):
        count_classes(loader, 3)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"x": 1, "label": label} for label in (0, 1, 1, 2))


@pytest.mark.parametrize("dataset", [Endless(), Stream(), DataLoader(Stream()), Subset(Endless(), range(4))])
def test_other_data_sets_are_read_on_request_only(dataset):
    with pytest.raises(TypeError, match=r"got (Endless|Stream); pass the labels themselves, or iterate=True"):
        count_classes(dataset, 3)
    assert count_classes(dataset, 3, iterate=True).tolist() == [1, 2, 1]


@pytest.mark.parametrize("sample", [5, (1, 2, 3), {"x": 1}])
def test_samples_without_a_label_are_refused(sample):
    with pytest.raises(TypeError, match=r"labels: expected samples \(input, label\), .* at 0"):
        count_classes([sample], 3, iterate=True)


class HuggingFace:
    """As ``datasets.Dataset`` answers; its columns are no attributes."""

    def __init__(self, kind=None, name="label"):
        self.column_names = ["image", name]
        self.format = {"type": kind}

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return [0, 1, 1, 2] if isinstance(key, str) else {"image": None, "label": (0, 1, 1, 2)[key]}


def test_the_label_column_of_a_hugging_face_data_set_is_counted():
    assert count_classes(HuggingFace(), 3).tolist() == [1, 2, 1]
    assert count_classes(DataLoader(HuggingFace("torch", "labels")), 3).tolist() == [1, 2, 1]
    with pytest.raises(
        TypeError, match=r"got one with a transform; .* dataset.with_format\(None\)\['label'\]"
    ):
        count_classes(HuggingFace("custom"), 3)
    assert count_classes(HuggingFace("custom"), 3, iterate=True).tolist() == [1, 2, 1]
    with pytest.raises(TypeError, match="got HuggingFace; pass the labels themselves"):
        count_classes(HuggingFace(name="intent"), 3)


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series([9, 0, 1, 1, 2])[1:],
        pd.Series([0, 1, 1, 2], index=["targets", "labels", "y", "samples"]),
        pd.Series([0, 1, 1, 2], dtype="Int64"),
        pd.Series([0, 1, 1, 2], dtype="category"),
        pd.Series(["ant", "bee", "bee", "cat"], dtype="category").cat.codes,
        np.array([0, 1, 1, 2], dtype=object),
        np.array([0, 1, 1, 2], dtype=np.uint64),
    ],
)
def test_the_index_of_a_column_of_labels_means_nothing(labels):
    assert count_classes(labels, 3).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (pd.Series([0, None], dtype="Int64"), TypeError, "got float64; leave out samples without a label"),
        (pd.Series(["ant"], dtype="category"), TypeError, "map names .* or .cat.codes of pandas"),
        ({0: 5, 1: 3}, TypeError, "one label per sample, got a mapping; if it holds counts by class"),
        (
            Subset(Endless(targets=[0, 1, 1, 2]), [4]),
            ValueError,
            "a Subset of existing samples, got index 4",
        ),
        (TensorDataset(torch.zeros(4)), TypeError, "got TensorDataset; pass the labels themselves"),
    ],
)
def test_what_has_no_labels_is_refused(labels, error, words):
    with pytest.raises(error, match=f"labels: expected .*{words}"):
        count_classes(labels, 3)


class Renumbered(Subset):
    """As people give one part of a random split transforms of its own."""

    target_transform = staticmethod(lambda label: (label + 1) % 3)

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs, self.target_transform(label)

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Relabelled(Subset):
    def __init__(self, dataset, indices, targets):
        super().__init__(dataset, indices)
        self.targets = targets


def test_a_subset_with_labels_of_its_own_is_not_counted_by_those_inside():
    inside = TensorDataset(torch.zeros(4), torch.tensor([0, 0, 1, 2]))
    with pytest.raises(
        TypeError, match=r"labels: expected labels, or a data set that holds them.*iterate=True"
    ):
        count_classes(Renumbered(inside, [0, 1, 2]), 3)
    assert count_classes(Renumbered(inside, [0, 1, 2]), 3, iterate=True).tolist() == [0, 2, 1]
    assert count_classes(Relabelled(inside, [0, 1, 2], [2, 2, 2]), 3).tolist() == [0, 0, 3]
