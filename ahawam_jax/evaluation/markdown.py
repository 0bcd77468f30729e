"""Tables that can be read as text, too."""

from collections.abc import Sequence


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table whose columns are aligned. rows: the first is its head."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, row, wide)) + " |" for row in rows]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in wide) + "|", *text[1:]]
