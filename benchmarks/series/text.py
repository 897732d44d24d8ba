"""Text to train on, and its tokens: the sources of the standard library of the Python that runs."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

PIECE = re.compile(rb" ?[A-Za-z]+|\n *| +|[0-9]|[^\sA-Za-z0-9]|\s")


def sources(tests: bool, most: int) -> Iterator[bytes]:
    """The modules in order of their names, ``most`` bytes or little more; the library's own tests, or all else."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inner = path.relative_to(library).parts
        if "site-packages" not in inner and bool({"test", "tests", "idle_test"} & set(inner)) == tests:
            text = path.read_bytes()
            yield text
            most -= len(text)
        if most <= 0:
            return


class Tokens:
    """The commonest pieces of the text, and single bytes for what is none of them."""

    def __init__(self, texts: list[bytes], vocabulary: int) -> None:
        counts = Counter(piece for text in texts for piece in PIECE.findall(text) if len(piece) > 1)
        common = [piece for piece, _ in sorted(counts.items(), key=lambda found: (-found[1], found[0]))]
        self.ids = {piece: 256 + number for number, piece in enumerate(common[: vocabulary - 256])}

    def of(self, texts: list[bytes]) -> torch.Tensor:
        """Token by token, int64."""
        pieces = (piece for text in texts for piece in PIECE.findall(text))
        known = ((self.ids[piece],) if piece in self.ids else piece for piece in pieces)
        return torch.tensor([token for some in known for token in some])
