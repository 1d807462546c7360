"""Groups and margins of LGLA on your class counts, before training.

``python -m lgla_losses inspect`` shows them (``pip install typer rich``). This module
computes them and needs PyTorch and NumPy only.
"""

from lgla_losses.inspection._entries import SourceError
from lgla_losses.inspection.report import (
    ClassInfo,
    Group,
    Grouping,
    Inspection,
    Margin,
    Notice,
    Shot,
    Suggestion,
    gini_coefficient,
    inspect_counts,
)
from lgla_losses.inspection.sources import ClassCounts, Kind, read_class_counts

__all__ = [
    "ClassCounts",
    "ClassInfo",
    "Group",
    "Grouping",
    "Inspection",
    "Kind",
    "Margin",
    "Notice",
    "Shot",
    "SourceError",
    "Suggestion",
    "gini_coefficient",
    "inspect_counts",
    "read_class_counts",
]
