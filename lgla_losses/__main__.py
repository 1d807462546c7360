"""``python -m lgla_losses``: the command line. It needs typer and rich."""

import sys


def main() -> None:
    """Run the command line, or say which packages it needs."""
    try:
        from lgla_losses.inspection.command import app
    except ModuleNotFoundError as error:
        # Any other error is a fault of the library and keeps its traceback.
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"python -m lgla_losses needs {error.name}: pip install typer rich", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="python -m lgla_losses")


if __name__ == "__main__":
    main()
