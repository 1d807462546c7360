"""What the groups and margins of LGLA are on class counts of one's own, before anything is trained.

``python -m lgla_losses inspect`` shows it (``pip install typer rich``); here is what it computes,
which needs PyTorch and NumPy only.
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
