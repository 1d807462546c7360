"""Texts of three topics, whose words tell them."""

import csv
import itertools

TOPICS = {
    "fruit": ("apple", "pear", "plum"),
    "metal": ("iron", "zinc", "gold"),
    "river": ("nile", "rhine", "ganges"),
}
COUNTS = {"fruit": 40, "metal": 20, "river": 10}


def topic_rows():
    """A text and its topic, ``COUNTS`` of each."""
    words = {name: itertools.cycle(topic) for name, topic in TOPICS.items()}
    filler = itertools.cycle(["the old", 'a, "new"', "one of"])
    return [
        (f"{next(filler)} {next(words[name])} " * (1 + i % 4), name)
        for name, count in COUNTS.items()
        for i in range(count)
    ]


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path
