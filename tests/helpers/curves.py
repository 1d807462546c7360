"""Reads what was written for TensorBoard."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curves(folder):
    """Steps and values of every scalar in the event files below a folder."""
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found
