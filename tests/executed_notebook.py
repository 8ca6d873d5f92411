"""What every executed notebook must show."""

import json
from pathlib import Path


def check_shown(executed: Path, pictures: int = 1) -> None:
    """Assert that a notebook shows at least `pictures` pictures, each figure as a picture, and progress as plain text."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    texts = ["".join(data.get("text/plain", "")) for data in shown if "image/png" not in data]
    assert not [text for text in texts if "<Figure" in text], executed
    assert sum("image/png" in data for data in shown) >= pictures, executed
    assert not any("IProgress not found" in "".join(output.get("text", "")) for output in outputs), executed
