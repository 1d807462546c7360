"""Draw the gallery's thumbnails from the notebooks that the last ``make docs`` has run."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1]
#: Pixels: a card is 280 wide, and screens have two pixels for one.
SIZE = (560, 266)


def thumbnail(notebook: Path) -> Image.Image:
    """Shrink the picture of the cell with the tag "thumbnail", on white."""
    (cell,) = (
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if "thumbnail" in cell["metadata"].get("tags", [])
    )
    (png,) = (output["data"]["image/png"] for output in cell["outputs"] if "data" in output)
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail(SIZE)
    canvas = Image.new("RGB", SIZE, "white")
    canvas.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
    return canvas.quantize(64)


if __name__ == "__main__":
    for path in sorted((DOCS / "gallery").glob("*.ipynb")):
        executed = DOCS / "_build" / "jupyter_execute" / "gallery" / path.name
        thumbnail(executed).save(DOCS / "images" / f"gallery_{path.stem}.png", optimize=True)
