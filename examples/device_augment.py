# Needs no other file.
"""The CIFAR recipe's augmentation on the training device: whole batches, no wait, in a CUDA graph.

It has the same distribution as `cifar-weak` and `cifar-strong` of ``augment.py`` on tensors. Every operation
of the policy gives the same pixels as torchvision. It is a table look-up: of a source pixel, of a level, or
of a pair of levels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Mean and deviation of the channels, copied from augment.py, which needs torchvision.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

#: AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019): two operations, each with probability and level.
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)

#: The largest magnitude of the operations whose direction is random; the smallest is 0, in ten equal steps.
SIGNED = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150.0 / 331.0,  # share of the image's side
    "TranslateY": 150.0 / 331.0,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

#: The operations that depend on the image content; constant tables do the others.
OTHER, CONTRAST, AUTOCONTRAST, EQUALIZE, COLOR = range(5)
KINDS = {"Contrast": CONTRAST, "AutoContrast": AUTOCONTRAST, "Equalize": EQUALIZE, "Color": COLOR}

#: More images than this are processed in parts: on a CPU the parts stay in its cache, elsewhere the
#: intermediate values take a few hundred megabytes.
MOST_ON_CPU, MOST_AT_ONCE = 128, 4096

#: Constants are computed on the same device as torchvision's, whatever the default device.
CPU = torch.device("cpu")


def magnitude_of(name: str, level: int, size: int, negative: bool = False) -> float:
    """Give an operation's magnitude at a level of 0..9, for square images of a size."""
    if name in SIGNED:
        largest = SIGNED[name] * (size if name.startswith("Translate") else 1)
        magnitude = float(torch.linspace(0.0, largest, 10, dtype=torch.float32, device=CPU)[level])
        return -magnitude if negative else magnitude

    if name == "Posterize":
        return round(8 - level / (9 / 4))
    if name == "Solarize":
        return float(torch.linspace(1.0, 0.0, 10, dtype=torch.float32, device=CPU)[level])
    return 0.0


def _inverse_matrix(name: str, magnitude: float, size: int) -> list[float]:
    """Give the 2 x 3 matrix that maps a pixel to its source, with the image's centre at 0."""
    angle = -math.radians(magnitude % 360) if name == "Rotate" else 0.0
    # Convert to degrees and back, with the centre at the corner, to match torchvision to the last bit.
    shear = math.radians(math.degrees(math.atan(magnitude)))
    shear_x, shear_y = (shear if name == axis else 0.0 for axis in ("ShearX", "ShearY"))
    centre = -0.5 * size if name.startswith("Shear") else 0.0
    shifted_x, shifted_y = (
        centre + (int(magnitude) if name == axis else 0) for axis in ("TranslateX", "TranslateY")
    )

    a = math.cos(angle - shear_y) / math.cos(shear_y)
    b = -(a * math.tan(shear_x) + math.sin(angle))
    c = math.sin(angle - shear_y) / math.cos(shear_y)
    d = math.cos(angle) - c * math.tan(shear_x)
    x = centre - d * shifted_x + b * shifted_y
    y = centre + c * shifted_x - a * shifted_y
    return [d, -b, x, -c, a, y]


def _source_pixels(name: str, magnitude: float, size: int) -> Tensor:
    """Give the source pixel ``[size * size]`` of each pixel: size * size means outside."""
    identity = torch.arange(size * size, device=CPU)
    if name not in GEOMETRIC or magnitude == 0:
        return identity

    numbers = torch.tensor(_inverse_matrix(name, magnitude, size), dtype=torch.float32, device=CPU)
    matrix = numbers.view(1, 2, 3).transpose(1, 2).div(0.5 * size)
    line = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, dtype=torch.float32, device=CPU)
    base = torch.ones(1, size, size, 3, dtype=torch.float32, device=CPU)
    base[..., 0], base[..., 1] = line, line[:, None]
    grid = base.view(1, -1, 3).bmm(matrix).view(1, size, size, 2)

    # The sampler itself shows where it reads: 0 means outside.
    places = (identity + 1).to(torch.float32).view(1, 1, size, size)
    found = F.grid_sample(places, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    source = found.flatten().long() - 1
    return source.masked_fill(source < 0, size * size)


def _levels(name: str, magnitude: float) -> Tensor:
    """Give the value ``[256]``, uint8, that an operation turns each value into, for any image."""
    levels = torch.arange(256, dtype=torch.uint8, device=CPU)
    if name == "Brightness":
        return levels.mul(1.0 + magnitude).clamp(0, 255).to(torch.uint8)
    if name == "Posterize":
        return levels & (256 - (1 << (8 - int(magnitude))))
    if name == "Solarize":
        return torch.where(levels >= 255 * magnitude, 255 - levels, levels)
    return 255 - levels if name == "Invert" else levels


def _take(images: Tensor, source: Tensor) -> Tensor:
    """Give images ``[N, C, P]`` whose pixels come from pixels ``[N, P]``: 0 from the one after the last."""
    padded = F.pad(images, (0, 1))
    return padded.gather(2, source[:, None].expand(-1, images.shape[1], -1))


def _grey(images: Tensor) -> Tensor:
    """Compute the luminance ``[N, 1, P]`` in whole numbers of images ``[N, 3, P]``, float32."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _mixtures(name: str, magnitude: float) -> Tensor:
    """Give the mixture ``[256 * 256]``, uint8, of each pair of another value and the pixel's own value.

    If the sum is a whole number, its rounding decides; so the same sum of two tensors as in torchvision is
    used.
    """
    own = torch.arange(256, dtype=torch.float32, device=CPU).repeat(256)
    other = torch.arange(256, dtype=torch.float32, device=CPU).repeat_interleave(256)
    factor = 1.0 + magnitude
    if name == "Color":
        own = own.mul(factor).add_(other, alpha=1.0 - factor)
    elif name == "Sharpness":
        own = own.add(other.sub(own), alpha=1.0 - factor)
    return own.clamp_(0, 255).to(torch.uint8)


def _blurred(images: Tensor) -> Tensor:
    """Give images ``[N, C, H, W]``, float32, blurred by ``[1 1 1, 1 5 1, 1 1 1] / 13``; the frame stays.

    The sums are whole numbers, exact in float32, and no thirteenth lies half-way: any order gives the same
    result.
    """
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = images[:, :, 1:-1, 1:-1].mul(4.0).add_(square).div_(13.0).round_()

    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = middle
    return blurred


class Operations(nn.Module):
    """Do one of several operations to each image of a batch; results are torchvision's, bit for bit.

    Args:
        operations: name and magnitude of each; an unknown name leaves images unchanged.
        size: of the images, which are square.
    """

    pixels: Tensor
    mixtures: Tensor
    mixers: Tensor
    levels: Tensor
    kinds: Tensor
    scales: Tensor
    weights: Tensor
    every_level: Tensor

    def __init__(self, operations: list[tuple[str, float]], size: int) -> None:
        super().__init__()
        self.size = size
        mixing = [("Identity", 0.0), *(one for one in operations if one[0] in ("Color", "Sharpness"))]
        mixers = [mixing.index(one) if one in mixing else 0 for one in operations]
        factors = [1.0 + magnitude for _, magnitude in operations]
        constants = {
            "pixels": torch.stack([_source_pixels(*one, size) for one in operations]),
            "mixtures": torch.cat([_mixtures(*one) for one in mixing]),
            "mixers": torch.tensor(mixers, device=CPU) * 256**2,
            "levels": torch.stack([_levels(*one) for one in operations]),
            "kinds": torch.tensor([KINDS.get(name, OTHER) for name, _ in operations], device=CPU),
            "scales": torch.tensor(factors, dtype=torch.float32, device=CPU),
            "weights": torch.tensor([1.0 - factor for factor in factors], dtype=torch.float32, device=CPU),
            "every_level": torch.arange(256, dtype=torch.float32, device=CPU),
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Apply operation ``chosen[i]`` to image i, in three steps, of which two leave it unchanged.

        Args:
            images: ``[N, 3, P]``, uint8, of P = size * size pixels.
            chosen: ``[N]``, int64, indices of operations.

        Returns:
            ``[N, 3, P]``, uint8.
        """
        kind = self.kinds[chosen][:, None, None]
        images = _take(images, self.pixels[chosen])
        grey = _grey(images)
        tables = self._tables(images, grey, kind, chosen)

        images = self._mixed(images, grey, kind, chosen)
        return tables.gather(2, images.long())

    def _mixed(self, images: Tensor, grey: Tensor, kind: Tensor, chosen: Tensor) -> Tensor:
        """Mix each value with the grey or blurred value of its pixel."""
        square = images.to(torch.float32).unflatten(2, (self.size, self.size))
        other = torch.where(kind == COLOR, grey, _blurred(square).flatten(2))
        place = other.mul_(256.0).add_(images).long() + self.mixers[chosen][:, None, None]
        return self.mixtures.take(place)

    def _tables(self, images: Tensor, grey: Tensor, kind: Tensor, chosen: Tensor) -> Tensor:
        """Give the tables ``[N, 3, 256]``, uint8, that map each value to its new value."""
        lowest, highest = images.amin(2, keepdim=True), images.amax(2, keepdim=True)
        tables = self.levels[chosen][:, None]
        tables = torch.where(kind == CONTRAST, self._contrasted(grey, chosen), tables)
        tables = torch.where(kind == AUTOCONTRAST, self._stretched(lowest, highest), tables)
        return torch.where(kind == EQUALIZE, self._equalized(images, highest), tables)

    def _contrasted(self, grey: Tensor, chosen: Tensor) -> Tensor:
        """Give the table that moves values away from the mean grey, or towards it."""
        own = self.every_level * self.scales[chosen][:, None, None]
        # Divide in float64: a GPU multiplies by a rounded reciprocal, which may give the next level.
        mean = grey.sum(2, keepdim=True).double().div_(grey.shape[2]).to(torch.float32).double()
        # A fused multiply-add rounds once: in float64 the product is exact.
        contrasted = (own + mean * self.weights[chosen][:, None, None]).to(torch.float32)
        return contrasted.clamp_(0, 255).to(torch.uint8)

    def _stretched(self, lowest: Tensor, highest: Tensor) -> Tensor:
        """Give the table that maps the lowest value to 0 and the highest to 255."""
        flat = highest == lowest
        start, end = lowest.to(torch.float32), highest.to(torch.float32)
        width = (end - start).mul_(1.0 / 255.0).masked_fill_(flat, 1.0)
        stretched = (self.every_level - start.masked_fill(flat, 0.0)).div_(width)
        return stretched.clamp_(0, 255).to(torch.uint8)

    def _equalized(self, images: Tensor, highest: Tensor) -> Tensor:
        """Give the table that makes all values equally frequent, in Pillow's integer arithmetic."""
        count, channels, num_pixels = images.shape
        histogram = torch.zeros((count, channels, 256), dtype=torch.int32, device=images.device)
        histogram.scatter_add_(2, images.long(), histogram.new_ones(1).expand_as(images))
        below = histogram.cumsum(2, dtype=torch.int32) - histogram

        step = (num_pixels - histogram.gather(2, highest.long())).div_(255, rounding_mode="floor")
        half = step.div(2, rounding_mode="floor")
        equalized = (below + half).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
        return torch.where(step == 0, self.every_level, equalized).to(torch.uint8)


def _policy_operations(size: int) -> tuple[list[tuple[str, float]], Tensor]:
    """Give an operation that does nothing, then the policy's operations in both directions, and their places.

    Returns:
        Name and magnitude of each, and the index ``[25, 2, 2]`` by row of the policy, turn and sign.
    """
    operations = [("Identity", 0.0)]
    places = torch.zeros(len(POLICY), 2, 2, dtype=torch.int64, device=CPU)
    for row, pair in enumerate(POLICY):
        for turn, (name, _, level) in enumerate(pair):
            for sign, negative in enumerate((False, True)):
                operation = name, magnitude_of(name, level, size, negative)
                if operation not in operations:
                    operations.append(operation)
                places[row, turn, sign] = operations.index(operation)
    return operations, places


class DeviceAugment(nn.Module):
    """Augment and normalise whole batches on the device that holds them.

    It does the same as `cifar-strong` (or `cifar-weak`): a crop from a frame of ``size // 8`` zeros, a flip,
    AutoAugment's policy for CIFAR-10, a black square of half the side (Cutout), and normalisation by the
    channels' mean and deviation. Every image has its own random draws, from the default generator of the
    images' device. In evaluation mode images are only normalised.

    There are no parameters, no reads by the host and no shapes that depend on data, so a CUDA graph can hold
    it, and each replay draws new random numbers. A call takes about 200 small kernels, for ten images or
    thousands.

    Args:
        size: of the images, which are square.
        strong: whether the policy and the black square are applied.
        dtype: of the result; the arithmetic is float32's.

    Raises:
        ValueError: ``size`` is below 3, too small for a 3 x 3 filter.
    """

    actions: Tensor
    chances: Tensor
    line: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, size: int = 32, strong: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if size < 3:
            raise ValueError(f"size: expected at least 3 pixels, got {size}")
        self.size = size
        self.strong = strong
        self.dtype = dtype
        self.padding = size // 8

        operations, actions = _policy_operations(size)
        chances = [[chance for _, chance, _ in pair] for pair in POLICY]
        self.operations = operations
        self.operate = Operations(operations, size)
        constants = {
            "actions": actions,
            "chances": torch.tensor(chances, dtype=torch.float32, device=CPU),
            "line": torch.arange(size, device=CPU),
            "mean": torch.tensor(MEAN, dtype=torch.float32, device=CPU).view(3, 1),
            "deviation": torch.tensor(DEVIATION, dtype=torch.float32, device=CPU).view(3, 1),
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Augment and normalise each image by its own random draws.

        Args:
            images: ``[N, 3, size, size]``, uint8, on the device of this module.

        Returns:
            ``[N, 3, size, size]``, of ``dtype``.

        Raises:
            ValueError: dtype or shape of the images differ.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"images: expected uint8 [N, 3, {self.size}, {self.size}], got {images.dtype} "
                f"{list(images.shape)}; for another size make DeviceAugment(size=...)"
            )
        if not self.training:
            return normalised(images, self.dtype)
        most = MOST_ON_CPU if images.device.type == "cpu" else MOST_AT_ONCE
        parts = [self._augmented(part) for part in images.split(most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _augmented(self, images: Tensor) -> Tensor:
        """Augment one part of the images."""
        pixels = _take(images.flatten(2), self._crop(len(images)))
        if not self.strong:
            return self._finished(pixels).view(images.shape)

        for chosen in self._choose(len(images)).unbind(1):
            pixels = self.operate(pixels, chosen)
        return self._finished(pixels * self._outside_square(len(images))).view(images.shape)

    def _crop(self, count: int) -> Tensor:
        """Draw crops and flips: the source ``[count, size * size]`` of each pixel."""
        size, device = self.size, self.line.device
        offset = torch.randint(2 * self.padding + 1, (2, count, 1), device=device) - self.padding
        flip = torch.rand((count, 1), device=device) < 0.5

        rows = self.line + offset[0]
        columns = torch.where(flip, self.line.flip(0), self.line) + offset[1]
        rows_outside, columns_outside = ((side < 0) | (side >= size) for side in (rows, columns))
        source = rows[:, :, None] * size + columns[:, None]
        outside = rows_outside[:, :, None] | columns_outside[:, None]
        return source.masked_fill_(outside, size * size).flatten(1)

    def _choose(self, count: int) -> Tensor:
        """Draw the two operations ``[count, 2]`` of each image; 0 does nothing."""
        device = self.line.device
        row = torch.randint(len(POLICY), (count,), device=device)
        draws = torch.rand((2, count, 2), device=device)
        positive, negative = self.actions[row].unbind(2)
        action = torch.where(draws[1] <= 0.5, negative, positive)
        return action * (draws[0] <= self.chances[row])

    def _outside_square(self, count: int) -> Tensor:
        """Draw Cutout's squares: a mask ``[count, 1, size * size]``, false inside."""
        side = self.size // 2
        centre = torch.randint(self.size, (2, count, 1), device=self.line.device)
        from_top = self.line - (centre - side // 2)
        inside = (from_top >= 0) & (from_top < side)
        return ~(inside[0][:, :, None] & inside[1][:, None]).flatten(1)[:, None]

    def _finished(self, pixels: Tensor) -> Tensor:
        """Scale to 0..1, then by the channels' mean and deviation."""
        scaled = pixels.to(torch.float32).mul_(1.0 / 255.0)
        return scaled.sub_(self.mean).div_(self.deviation).to(self.dtype)


def normalised(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise images as they are, for evaluation.

    Args:
        images: ``[N, 3, H, W]``, uint8.
        dtype: of the result; the arithmetic is float32's.

    Returns:
        ``[N, 3, H, W]``, on the images' device.
    """
    # Filled on the device, not copied to it: a copy waits, and a CUDA graph refuses it.
    mean, deviation = (
        torch.cat([images.new_full((1, 1, 1), value, dtype=torch.float32) for value in of_channels])
        for of_channels in (MEAN, DEVIATION)
    )
    return images.to(torch.float32).mul_(1.0 / 255.0).sub_(mean).div_(deviation).to(dtype)
