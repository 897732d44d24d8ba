"""What a transaction changes, whatever version it comes upon: the assets it puts, and the paths it claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mandapa.content.tree import Located, differences, same_asset
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.repository.base import Base
from mandapa.repository.paths import above, folders_of

__all__ = ["Changes", "folders_of"]


class Changes:
    """Assets that are put, and paths that are claimed: what is claimed and not put is gone."""

    def __init__(self) -> None:
        self.puts: dict[str, Located] = {}
        self._claims: dict[str, bool] = {}  # path -> whether it claims all below it too
        self._overrides: set[str] = set()

    def put(self, path: str, located: Located) -> None:
        """Put one asset, and claim its path."""
        self.puts[path] = located
        self._claims.setdefault(path, False)

    def keep(self, rows: Iterable[Located]) -> None:
        """Put rows of the base again, where nothing is claimed."""
        for located in rows:
            if not self.claims(located.row.path):
                self.put(located.row.path, located)

    def claim(self, path: str, *, below: bool) -> None:
        """Claim a path; with ``below`` it is a folder, or becomes one, and all below it is claimed too."""
        self._claims[path] = below or self._claims.get(path, False)

    def claims(self, path: str) -> bool:
        """Whether a path is claimed, by itself or with a folder that it is in."""
        return path in self._claims or any(self._claims.get(folder, False) for folder in above(path))

    def remove(self, at: str, base: Base) -> None:
        """Drop what is at or below a path, and claim it.

        Raises:
            NotFoundError: Nothing is there, in the base or put.
        """
        below = f"{at}/" if at else ""
        mine = [path for path in self.puts if path == at or path.startswith(below)]
        file = at and base.row(at) is not None
        folder = next(base.under(at), None) is not None
        if not (mine or file or folder):
            raise NotFoundError(f"nothing is at {at!r}")
        for path in mine:
            del self.puts[path]
        self.claim(at, below=folder or any(path != at for path in mine))

    def upon(self, base: Base) -> dict[str, Located | None]:
        """What this changes in a base: path -> row, or None where it is dropped."""
        edits: dict[str, Located | None] = {}
        for path, located in self.puts.items():
            old = base.row(path)
            if old is not located and not same_asset(old, located):
                edits[path] = located
        for path in (*self._claims, *self._overrides):
            if path and path not in self.puts and base.row(path) is not None:
                edits[path] = None
        for claim, below in self._claims.items():
            for located in base.under(claim) if below else ():
                if located.row.path not in self.puts:
                    edits[located.row.path] = None
        return edits

    def check(self, base: Base, edits: Mapping[str, Located | None]) -> None:
        """Refuse, as `InvalidInputError`, a file where the version would also have a folder."""
        for path in folders_of(self.puts) & self.puts.keys():
            raise InvalidInputError(f"{path!r} cannot be a file and a folder in one version")
        # Where the base has a file, it has no folder of that name, and no file above.
        new = [path for path, located in edits.items() if located is not None and base.row(path) is None]
        for path in folders_of(new):
            if base.row(path) is not None and edits.get(path, path) is not None:
                raise InvalidInputError(f"{path!r} is a file in the base: remove it before something is added below it")
        for path in new:
            below = next((item for item in base.under(path) if edits.get(item.row.path, item) is not None), None)
            if below is not None:
                raise InvalidInputError(f"{path!r} is a folder in the base: remove it before a file takes its place")

    def clashes(self, old: Base, new: Base) -> list[str]:
        """Paths where what turned ``old`` into ``new`` does not go together with this; from now on this wins there."""
        folders = folders_of(self.puts)
        clash = []
        for before, after in differences(old.tree, new.tree):
            located = after or before
            assert located is not None
            path = located.row.path
            if self.claims(path):
                if not same_asset(self.puts.get(path), after):
                    clash.append(path)
            elif after is not None and (path in folders or any(folder in self.puts for folder in above(path))):
                clash.append(path)
                self._overrides.add(path)
        return clash
