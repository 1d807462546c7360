"""Write a few images of noise, long-tailed in ten classes, for a dry run of what trains on small images."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from arguments import record_file

#: Training images a class, then test images.
TRAIN, VAL = (40, 30, 20, 16, 12, 10, 8, 6, 5, 4), (4,) * 10


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=record_file, metavar="OUT.npz")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, counts in {"train": TRAIN, "val": VAL}.items():
        arrays[f"{part}_images"] = generator.integers(0, 256, (sum(counts), 32, 32, 3), np.uint8)
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(counts)), counts)
    with options.output.open("wb") as file:
        np.savez(file, **arrays)
    print(options.output)


if __name__ == "__main__":
    main()
