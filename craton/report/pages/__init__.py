"""The pages as they lie here, each NAME.html with NAME.css and perhaps NAME.js, filled into one self-contained file."""

from pathlib import Path
from typing import Any

from craton.base import count

FOLDER = Path(__file__).parent


def filled(page: str, /, style: str = "", **values: Any) -> str:
    """The text of a page with its style and script inside, behind the style of another page where one is named. Values
    are escaped unless the page marks them as safe."""
    import jinja2  # a tenth of a second that the other commands need not wait

    environment = jinja2.Environment(autoescape=True)
    environment.filters["count"] = count
    inside = {kind: (FOLDER / f"{page}.{kind}") for kind in ("css", "js")}
    parts = {kind: path.read_text(encoding="utf-8") if path.exists() else "" for kind, path in inside.items()}
    if style:
        parts["css"] = (FOLDER / f"{style}.css").read_text(encoding="utf-8") + parts["css"]
    return environment.from_string((FOLDER / f"{page}.html").read_text(encoding="utf-8")).render(**parts, **values)
