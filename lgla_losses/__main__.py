"""``python -m lgla_losses``: the command line, which is an extra."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from lgla_losses.inspection.command import app
    except ModuleNotFoundError as error:
        # Anything but a missing extra is a fault of our own and keeps its traceback.
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f'python -m lgla_losses needs {error.name}: pip install "lgla-losses[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="python -m lgla_losses")


if __name__ == "__main__":
    main()
