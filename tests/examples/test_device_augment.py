"""examples/device_augment.py: the pixels and the distribution of torchvision's pipeline, without a wait."""

import math
from collections import Counter
from itertools import product

import augment
import device_augment
import pytest
import torch
from device_augment import DeviceAugment, Operations, magnitude_of, normalised
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

AUTOAUGMENT = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
SPACE = AUTOAUGMENT._AUGMENTATION_SPACE

#: Kernels that give the host a value, and functions that bring one from there.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
COPIES = ("tensor", "as_tensor", "asarray", "from_numpy")


def magnitudes(name, size):
    """Those of an operation in torchvision, by level and sign."""
    levels, signed = SPACE[name]
    table = levels(10, size, size)
    of_levels = [0.0] * 10 if table is None else [float(magnitude) for magnitude in table]
    return {
        (level, negative): -magnitude if negative and signed else magnitude
        for level, magnitude in enumerate(of_levels)
        for negative in (False, True)
    }


def various_images(size):
    """Ramps, smooth and noisy images, low contrast, greys, few values, one colour, a mean grey of 127."""
    line = torch.arange(size) * 255 // (size - 1)
    ramp = torch.stack(
        [line.expand(size, size), line[:, None].expand(size, size), line.flip(0).expand(size, size)]
    )
    coarse = torch.rand(6, 3, 4, 4) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255)
    balanced = torch.full((size * size,), 128)
    each = torch.arange(1, 256).repeat(size * size // 255)
    balanced[: len(each)] = each
    images = [
        ramp[None],
        smooth,
        torch.randint(256, (6, 3, size, size)),
        torch.randint(100, 130, (3, 3, size, size)),
        torch.randint(256, (3, 1, size, size)).expand(-1, 3, -1, -1),
        (torch.rand(2, 3, size, size) < 0.9) * 200,
        torch.full((1, 3, size, size), 77),
        balanced.view(1, 1, size, size).expand(-1, 3, -1, -1),
    ]
    return torch.cat([some.to(torch.uint8) for some in images])


def assert_frequent_as(drawn, probabilities):
    """Fail where chi-square lies six deviations above its mean, and a little more for its skew."""
    assert set(drawn) <= {outcome for outcome, probability in probabilities.items() if probability > 0}
    total = sum(drawn.values())
    assert math.isclose(sum(probabilities.values()), 1.0)
    expected = {
        outcome: total * probability for outcome, probability in probabilities.items() if probability > 0
    }
    chi_square = sum((drawn[outcome] - count) ** 2 / count for outcome, count in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("name", SPACE)
@pytest.mark.parametrize("size", [32, 17])
def test_every_operation_at_every_magnitude_gives_torchvisions_pixels(name, size, device):
    images = various_images(size)
    operations = [(name, magnitude) for magnitude in magnitudes(name, size).values()]
    operate = Operations(operations, size).to(device)
    for index, (_, magnitude) in enumerate(operations):
        expected = AUTOAUGMENT._apply_image_or_video_transform(
            images, name, magnitude, AUTOAUGMENT.interpolation, AUTOAUGMENT._fill
        )
        chosen = torch.full((len(images),), index, device=device)
        actual = operate(images.flatten(2).to(device), chosen).view(images.shape).cpu()
        assert torch.equal(actual, expected), magnitude


def test_images_of_a_batch_each_get_their_own_operation(device):
    images = various_images(32).flatten(2).to(device)
    operations = [(name, magnitude_of(name, 7, 32)) for name in SPACE]
    operate = Operations(operations, 32).to(device)
    chosen = torch.arange(len(images), device=device) % len(operations)
    alone = [operate(images[i : i + 1], chosen[i : i + 1]) for i in range(len(images))]
    assert torch.equal(operate(images, chosen), torch.cat(alone))


def test_constants_are_those_of_the_pipeline():
    assert augment.CIFAR == (device_augment.MEAN, device_augment.DEVIATION)
    policies = tuple(
        tuple((name, chance, level or 0) for name, chance, level in pair) for pair in AUTOAUGMENT._policies
    )
    assert policies == device_augment.POLICY
    for name, size in product(SPACE, (32, 17)):
        ours = {key: magnitude_of(name, key[0], size, key[1]) for key in magnitudes(name, size)}
        assert ours == magnitudes(name, size)


def test_the_policy_is_drawn_as_often_as_in_torchvision(device):
    augmenter = DeviceAugment().to(device)
    chosen = augmenter._choose(200_000).tolist()
    names = [name if magnitude == 0 else (name, magnitude) for name, magnitude in augmenter.operations]
    drawn = Counter((names[first], names[second]) for first, second in chosen)

    probabilities = Counter()
    for policy in AUTOAUGMENT._policies:
        outcomes = []
        for name, chance, level in policy:
            of_sign = [magnitudes(name, 32)[level or 0, negative] for negative in (False, True)]
            done = [(name if magnitude == 0 else (name, magnitude), chance / 2) for magnitude in of_sign]
            outcomes.append([("Identity", 1 - chance), *done])
        for (first, p), (second, q) in product(*outcomes):
            probabilities[first, second] += p * q / len(AUTOAUGMENT._policies)
    assert_frequent_as(drawn, probabilities)


def test_every_crop_and_flip_is_as_likely(device):
    size, padding = 32, 4
    # Each pixel says its row and column, from 1 on: the frame is 0.
    place = torch.arange(1, size + 1, dtype=torch.uint8)
    image = torch.stack(
        [place[:, None].expand(size, size), place.expand(size, size), place.expand(size, size)]
    )
    framed = functional.pad(image, [padding])
    cases = {}
    for top, left, flip in product(range(9), range(9), (False, True)):
        crop = functional.crop(framed, top, left, size, size)
        cases[(functional.hflip(crop) if flip else crop).numpy().tobytes()] = (top, left, flip)

    weak = DeviceAugment(strong=False).to(device)
    results = weak(image.expand(20_000, -1, -1, -1).to(device)).cpu()
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in augment.CIFAR)
    pixels = ((results * deviation + mean) * 255).round().to(torch.uint8).numpy()
    drawn = Counter(cases[crop.tobytes()] for crop in pixels)
    assert_frequent_as(drawn, dict.fromkeys(cases.values(), 1 / len(cases)))
    for part, values in enumerate((range(9), range(9), (False, True))):
        of_part = Counter()
        for case, count in drawn.items():
            of_part[case[part]] += count
        assert_frequent_as(of_part, dict.fromkeys(values, 1 / len(values)))


def test_every_centre_of_the_black_square_is_as_likely(device):
    size = 8
    strong = DeviceAugment(size).to(device)
    masks = strong._outside_square(20_000).view(-1, size, size).cpu().numpy()
    drawn = Counter(mask.tobytes() for mask in masks)

    cutout = augment.Cutout(size // 2)
    theirs = {(cutout(torch.ones(1, size, size))[0] > 0).numpy().tobytes() for _ in range(2000)}
    assert len(theirs) == size * size
    assert_frequent_as(drawn, dict.fromkeys(theirs, 1 / len(theirs)))


@pytest.mark.parametrize("strong", [False, True])
def test_pixels_are_distributed_as_those_of_the_pipeline(strong, device):
    size, ours, theirs = 16, 20_000, 2000
    image = various_images(size)[1]
    pipeline = v2.Compose(augment.TRAINING["cifar-strong" if strong else "cifar-weak"](size))
    expected = torch.stack([pipeline(image) for _ in range(theirs)]).double()
    augmenter = DeviceAugment(size, strong).to(device)
    actual = augmenter(image.expand(ours, -1, -1, -1).to(device)).cpu().double()

    # Of each pixel mean and mean square, and of each image its mean and spread.
    for statistic in (
        lambda batch: batch,
        lambda batch: batch**2,
        lambda batch: batch.mean((1, 2, 3)),
        lambda batch: batch.std((1, 2, 3)),
    ):
        one, other = statistic(actual), statistic(expected)
        error = (one.var(0) / ours + other.var(0) / theirs).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 5.5 * error + 1e-9).all()


def test_nothing_waits_for_the_device():
    """On tensors without values: what reads one raises, and what comes from the host is seen."""
    kernels, functions = [], []

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = tree_leaves((args, kwargs, result))
            devices = {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}
            kernels.append((function.__name__, devices))
            return result

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            functions.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    images = torch.empty(128, 3, 32, 32, dtype=torch.uint8, device="meta")
    augmenter = DeviceAugment().to("meta")
    with Kernels(), Functions():
        results = augmenter(images), normalised(images)

    assert all(result.shape == images.shape for result in results)
    assert len(kernels) > 100
    assert [name for name, devices in kernels if devices != {"meta"}] == []
    assert [name for name, _ in kernels if name.startswith(WAITS)] == []
    assert "randint" in functions
    assert [name for name in functions if name in COPIES] == []


def test_a_seed_gives_a_batch_again(device):
    augmenter = DeviceAugment().to(device)
    images = various_images(32).to(device)
    torch.manual_seed(1)
    first, next_one = augmenter(images), augmenter(images)
    torch.manual_seed(1)
    assert torch.equal(first, augmenter(images))
    assert not torch.equal(first, next_one)


def test_many_images_go_through_in_parts_and_stay_in_order(device, monkeypatch):
    for most in ("MOST_ON_CPU", "MOST_AT_ONCE"):
        monkeypatch.setattr(device_augment, most, 3)
    images = (10 * torch.arange(1, 9, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(device)
    results = DeviceAugment(strong=False).to(device)(images)
    assert torch.equal(results[..., 16, 16], normalised(images)[..., 16, 16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_normalises_as_the_pipeline_does(dtype, device):
    images = various_images(32)
    _, whole = augment.transforms("cifar-strong", 32)
    actual = normalised(images.to(device), dtype)
    assert torch.equal(actual.cpu(), whole(images).to(dtype))
    assert actual.dtype == DeviceAugment(dtype=dtype).to(device)(images.to(device)).dtype == dtype


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="size: expected at least 3 pixels, got 2"):
        DeviceAugment(2)
    for wrong in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images: expected uint8 \[N, 3, 32, 32\], got torch\."):
            DeviceAugment()(wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_draws_anew_at_each_replay():
    augmenter = DeviceAugment().to("cuda")
    images = various_images(32).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        augmenter(images)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = augmenter(images)

    def replayed():
        graph.replay()
        return result.clone()

    torch.cuda.manual_seed(1)
    first, next_one = replayed(), replayed()
    torch.cuda.manual_seed(1)
    assert torch.equal(first, replayed())
    assert not torch.equal(first, next_one)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_call_waits_on_a_gpu():
    augmenter = DeviceAugment().to("cuda")
    images = various_images(32).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmenter(images)
        normalised(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
