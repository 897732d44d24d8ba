"""Everything that a user can do to a repository, in any order, against a model made of dicts."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mandapa.errors import ConflictError, InvalidInputError, NotFoundError
from mandapa.format.keys import CATALOG, MARKER
from mandapa.format.records import SettingsOp, encode_marker
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import CatalogState

SOAK = bool(os.environ.get("MANDAPA_SOAK"))
NAMES = ["model", "data", "Model"]
LABELS = ["best", "prod", "Best", "paper"]
PATHS = ["a", "b", "d", "d/x", "d/y", "d/e/z", "ü/long name.bin"]
FOLDERS = ["", "d", "d/e", "e"]
BYTES = {"none": b"", "one": b"1", "two": b"two", "some": b"three" * 100, "many": bytes(range(256)) * 300}

Value = tuple[bytes, bool] | str
"""Bytes and x bit of a file, or a URL."""
Content = dict[str, Value]
Change = tuple[str, str, object]


def below(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


@dataclass
class ModelVersion:
    content: Content
    message: str
    parent: int | None
    digest: str = ""


@dataclass
class ModelArtifact:
    versions: list[ModelVersion] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    burned: set[str] = field(default_factory=set)

    @property
    def live(self) -> list[int]:
        return [number for number in range(len(self.versions)) if number not in self.deleted]

    def free(self, name: str) -> bool:
        """Whether an alias of that name may be set."""
        if name in self.aliases:
            return True
        return name.lower() not in {*self.burned, *(alias.lower() for alias in self.aliases)}


class ModelTransaction:
    """What a transaction means."""

    def __init__(self, base: Content | None) -> None:
        self.base = base or {}
        self.puts: Content = {}
        self.claims: list[str] = []

    def put(self, path: str, value: Value) -> None:
        self.puts[path] = value

    def put_folder(self, at: str, content: Content) -> None:
        self.claims.append(at)
        self.puts.update({f"{at}/{path}" if at else path: value for path, value in content.items()})

    def remove(self, at: str) -> bool:
        mine = [path for path in self.puts if below(path, at)]
        if not mine and not any(below(path, at) for path in self.base):
            return False
        for path in mine:
            del self.puts[path]
        self.claims.append(at)
        return True

    @property
    def content(self) -> Content:
        kept = {p: v for p, v in self.base.items() if not any(below(p, claim) for claim in self.claims)}
        return {**kept, **self.puts}

    @property
    def possible(self) -> bool:
        """No file is a folder, too."""
        paths = sorted(self.content)
        return not any(other.startswith(f"{path}/") for path in paths for other in paths)


names = st.sampled_from([NAMES[0], *NAMES])
labels = st.sampled_from(LABELS)
paths = st.sampled_from(PATHS)
contents = st.sampled_from(sorted(BYTES))
folders = st.dictionaries(st.sampled_from(["x", "y", "e/z", "w"]), st.tuples(contents, st.booleans()), max_size=3)
picks = st.integers(0, 20)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("bytes"), paths, contents),
        st.tuples(st.just("file"), paths, st.tuples(contents, st.booleans())),
        st.tuples(st.just("folder"), st.sampled_from(FOLDERS), folders),
        st.tuples(st.just("remove"), st.sampled_from([*PATHS, "d/e", ""]), st.none()),
        st.tuples(st.just("copy"), st.sampled_from([*PATHS, ""]), st.tuples(names, picks, st.sampled_from(FOLDERS))),
        st.tuples(st.just("url"), paths, st.sampled_from(["s3://elsewhere/x", "https://example.org/y"])),
    ),
    max_size=4,
)


class Machine(RuleBasedStateMachine):
    """Each rule does the same to the repository and to the model, and compares what both say."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryObjectStore()
        author = Author("model")
        self.store.put(MARKER, encode_marker(author.new_id().hex()))
        made = [SettingsOp({"writers": "many"})]
        Log(self.store, CATALOG, CatalogState).append(author.new_id().hex(), lambda _: made, author)
        self.model: dict[str, ModelArtifact] = {}
        self.digests: dict[str, Content] = {}

    @initialize()
    def open(self) -> None:
        self.repo = Repository(self.store, threads=0)

    @rule()
    def reopen(self) -> None:
        """Another process, which remembers nothing."""
        self.repo = Repository(self.store, threads=0)

    # -- versions

    # Several rules, as each is drawn as often as any other.

    @rule(changes=changes)
    def transact_with_message(self, changes: list[Change]) -> None:
        self.transact("model", changes, "m")

    @rule(changes=changes)
    def transact_quietly(self, changes: list[Change]) -> None:
        self.transact("model", changes, "")

    @rule(name=names, changes=changes)
    def transact_anywhere(self, name: str, changes: list[Change]) -> None:
        self.transact(name, changes, "m")

    @rule(changes=changes, message=st.sampled_from(["", "m"]))
    def transact_upon_nothing(self, changes: list[Change], message: str) -> None:
        self.transact("model", changes, message, empty=True)

    @rule(changes=changes, label=labels)
    def transact_and_name(self, changes: list[Change], label: str) -> None:
        self.transact("model", changes, "", label=label)

    def transact(
        self, name: str, changes: list[Change], message: str, *, empty: bool = False, label: str | None = None
    ) -> None:
        artifact = self.model.get(name)
        taken = artifact is None and any(other.lower() == name.lower() for other in self.model)
        base = artifact.live[-1] if artifact and artifact.live and not empty else None
        meant = ModelTransaction(artifact.versions[base].content if artifact and base is not None else None)
        if taken:
            # Nothing can be put: no artifact of that name can be.
            with pytest.raises(ConflictError), self.repo.artifact(name).transaction("m") as txn:
                txn.add_bytes("a", b"1")
            return
        metadata = {"number": len(artifact.versions) if artifact else 0} if message else None
        txn = self.repo.artifact(name).transaction(message, metadata, base=None if empty else "latest")
        try:
            with txn:
                for change in changes:
                    self.change(txn, meant, *change)
                if label is not None:
                    txn.alias(label)
        except InvalidInputError:
            assert not meant.possible
            return
        except ConflictError:
            assert label is not None
            assert artifact is not None
            assert not artifact.free(label)
            return
        assert meant.possible
        unchanged = meant.content == meant.base if base is not None else not meant.puts
        if unchanged and not message and label is None:
            assert (txn.version.number if txn.version else None) == base
            assert not txn.made
            return
        assert txn.made
        artifact = self.model.setdefault(name, ModelArtifact())
        if label is not None:
            assert artifact.free(label)
            artifact.aliases[label] = len(artifact.versions)
        artifact.versions.append(ModelVersion(meant.content, message, base))
        assert txn.version is not None
        assert txn.version.number == len(artifact.versions) - 1
        artifact.versions[-1].digest = txn.version.digest
        assert self.digests.setdefault(txn.version.digest, meant.content) == meant.content

    def change(self, txn, meant: ModelTransaction, kind: str, path: str, what) -> None:
        match kind:
            case "bytes":
                txn.add_bytes(path, BYTES[what])
                meant.put(path, (BYTES[what], False))
            case "file":
                txn.add(self.write(*what), at=path)
                meant.put(path, (BYTES[what[0]], what[1]))
            case "folder":
                folder = self.fresh()
                for name, value in what.items():
                    self.write(*value, at=folder / name)
                txn.add(folder, at=path)
                meant.put_folder(path, {name: (BYTES[data], mode) for name, (data, mode) in what.items()})
            case "url":
                txn.add_url(path, what, size=7)
                meant.put(path, what)
            case "remove":
                try:
                    txn.remove(path)
                except NotFoundError:
                    assert not meant.remove(path)
                else:
                    assert meant.remove(path)
            case "copy":
                name, pick, at = what
                artifact = self.model.get(name)
                if artifact is None or not artifact.live:
                    return
                number = artifact.live[pick % len(artifact.live)]
                source = artifact.versions[number].content
                if path in source:
                    target = f"{at}/copy" if at else "copy"
                    txn.copy(f"{name}:v{number}", path, at=target)
                    meant.put(target, source[path])
                elif found := {p[len(path) + 1 if path else 0 :]: v for p, v in source.items() if below(p, path)}:
                    txn.copy(f"{name}:v{number}/{path}" if path else f"{name}:v{number}", at=at)
                    meant.put_folder(at, found)
                else:
                    with pytest.raises(NotFoundError):
                        txn.copy(f"{name}:v{number}", path, at=at)

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def write(self, data: str, executable: bool, at: Path | None = None) -> Path:
        path = at or self.fresh() / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BYTES[data])
        path.chmod(0o755 if executable else 0o644)
        return path

    @rule(name=names, picks=st.lists(picks, min_size=1, max_size=2))
    def delete(self, name: str, picks: list[int]) -> None:
        artifact = self.model.get(name)
        if artifact is None or not artifact.versions:
            with pytest.raises(NotFoundError):
                self.repo.artifact(name).delete(*picks)
            return
        numbers = {pick % len(artifact.versions) for pick in picks}
        delete = self.repo.artifact(name).delete
        if numbers & artifact.deleted:
            with pytest.raises(NotFoundError):
                delete(*numbers)
        elif numbers & {*artifact.aliases.values(), *artifact.tags.values()}:
            with pytest.raises(ConflictError):
                delete(*numbers)
        else:
            assert delete(*numbers) == sorted(numbers)
            artifact.deleted |= numbers

    @precondition(lambda self: any(artifact.deleted for artifact in self.model.values()))
    @rule(pick=picks)
    def undelete(self, pick: int) -> None:
        name, artifact = next((name, artifact) for name, artifact in self.model.items() if artifact.deleted)
        number = sorted(artifact.deleted)[pick % len(artifact.deleted)]
        assert [version.number for version in self.repo.artifact(name).deleted()] == sorted(artifact.deleted)
        assert self.repo.artifact(name).undelete(number) == [number]
        artifact.deleted.discard(number)
        with pytest.raises(InvalidInputError):
            self.repo.artifact(name).undelete(number)

    # -- names

    @rule(name=names, label=labels, pick=picks, drop=st.sampled_from([False, False, True]))
    def alias(self, name: str, label: str, pick: int, drop: bool) -> None:
        artifact = self.model.get(name)
        move = self.repo.artifact(name).alias
        if artifact is None or not artifact.live or (drop and label not in artifact.aliases):
            with pytest.raises(NotFoundError):
                move(label, None if drop else "latest")
        elif drop:
            move(label, None)
            del artifact.aliases[label]
        elif not artifact.free(label):
            with pytest.raises(ConflictError):
                move(label, "latest")
        else:
            number = artifact.live[pick % len(artifact.live)]
            move(label, number)
            artifact.aliases[label] = number

    @rule(name=names, label=labels, pick=picks)
    def tag(self, name: str, label: str, pick: int) -> None:
        artifact = self.model.get(name)
        if artifact is None or not artifact.live:
            return
        number = artifact.live[pick % len(artifact.live)]
        if label in artifact.aliases or not artifact.free(label):
            with pytest.raises(ConflictError):
                self.repo.artifact(name).tag(label, number)
        else:
            self.repo.artifact(name).tag(label, number)
            artifact.tags[label] = number
            artifact.burned.add(label.lower())

    @precondition(lambda self: self.model)
    @rule(pick=picks, to=names)
    def rename(self, pick: int, to: str) -> None:
        name = sorted(self.model)[pick % len(self.model)]
        if any(other.lower() == to.lower() and other != name for other in self.model):
            with pytest.raises(ConflictError):
                self.repo.artifact(name).rename(to)
        else:
            self.repo.artifact(name).rename(to)
            self.model[to] = self.model.pop(name)

    @precondition(lambda self: len(self.model) > 1)
    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        name = sorted(self.model)[pick % len(self.model)]
        held = self.repo.artifact(name).versions()
        self.repo.artifact(name).remove()
        del self.model[name]
        with pytest.raises(NotFoundError):
            self.repo[name]
        assert all(version.number >= 0 for version in held)

    # -- looking

    @rule(name=names, pick=picks, back=st.integers(0, 3))
    def resolve(self, name: str, pick: int, back: int) -> None:
        """Every way to name a version names the same one, or none."""
        artifact = self.model.get(name)
        if artifact is None or not artifact.versions:
            with pytest.raises(NotFoundError):
                self.repo[name]
            return
        number = pick % len(artifact.versions)
        refs = [f"v{number}", *[label for label, at in {**artifact.aliases, **artifact.tags}.items() if at == number]]
        if artifact.live and number == artifact.live[-1]:
            refs.append("latest")
        for ref in refs:
            if number in artifact.deleted:
                with pytest.raises(NotFoundError, match="was deleted"):
                    self.repo[f"{name}:{ref}"]
                continue
            at = artifact.live.index(number) - back
            if at < 0:
                with pytest.raises(NotFoundError):
                    self.repo[f"{name}:{ref}~{back}"]
            else:
                assert self.repo[f"{name}:{ref}~{back}"].number == artifact.live[at]
        digest = artifact.versions[number].digest
        twins = [n for n in artifact.live if artifact.versions[n].digest == digest]
        if twins:
            assert self.repo[f"{name}:@{digest[:16]}"].number == twins[-1]

    @precondition(lambda self: any(artifact.live for artifact in self.model.values()))
    @rule(pick=picks, other=picks)
    def compare(self, pick: int, other: int) -> None:
        """A diff names exactly the paths that differ."""
        known = [(name, n) for name, artifact in sorted(self.model.items()) for n in artifact.live]
        (name1, one), (name2, two) = known[pick % len(known)], known[other % len(known)]
        old, new = self.model[name1].versions[one], self.model[name2].versions[two]
        before, after = old.content, new.content
        diff = self.repo[f"{name1}:v{one}"].diff(self.repo[f"{name2}:v{two}"])
        assert [asset.path for asset in diff.added] == sorted(after.keys() - before.keys())
        assert [asset.path for asset in diff.removed] == sorted(before.keys() - after.keys())
        common = before.keys() & after.keys()
        assert [a.path for a, _ in diff.changed] == sorted(path for path in common if before[path] != after[path])
        numbers = one if old.message else None, two if new.message else None
        assert diff.metadata == ({} if numbers[0] == numbers[1] else {"number": numbers})
        assert bool(diff) == (before != after or bool(diff.metadata))

    @precondition(lambda self: any(artifact.live for artifact in self.model.values()))
    @rule(pick=picks, path=st.sampled_from([*PATHS, "d/e"]))
    def trace(self, pick: int, path: str) -> None:
        """The versions of a path are those in which it, or something below it, is not as in the live one before."""
        name = min(name for name, artifact in self.model.items() if artifact.live)
        artifact = self.model[name]
        expected, before = [], {}
        for number in artifact.live:
            now = {p: value for p, value in artifact.versions[number].content.items() if below(p, path)}
            if now != before:
                expected.append(number)
            before = now
        assert [version.number for version in self.repo.artifact(name).versions(path)] == expected

    @precondition(lambda self: any(artifact.live for artifact in self.model.values()))
    @rule(pick=picks, only=st.sampled_from([None, "d/*", ["a", "b"]]))
    def download(self, pick: int, only: str | list[str] | None) -> None:
        """What is downloaded is what was added, x bits included; a second time nothing is written."""
        known = [(name, n) for name, artifact in sorted(self.model.items()) for n in artifact.live]
        name, number = known[pick % len(known)]
        content = self.model[name].versions[number].content
        if only == "d/*":
            content = {path: value for path, value in content.items() if path.startswith("d/")}
        elif only:
            content = {path: value for path, value in content.items() if path in only}
        files = {path: value for path, value in content.items() if not isinstance(value, str)}
        to = self.fresh()
        result = self.repo[f"{name}:v{number}"].download(to, only)
        assert sorted(result.urls) == sorted(content.keys() - files.keys())
        assert result.files == len(files)
        found = {str(p.relative_to(to)): p for p in to.rglob("*") if p.is_file()}
        assert {p: (f.read_bytes(), os.access(f, os.X_OK)) for p, f in found.items()} == files
        assert self.repo[f"{name}:v{number}"].download(to, only).skipped == len(files)

    @invariant()
    def names_are_the_same(self) -> None:
        if not hasattr(self, "repo"):
            return
        assert [artifact.name for artifact in self.repo.artifacts()] == sorted(self.model)
        for name, artifact in self.model.items():
            state = self.repo.artifact(name).state()
            assert state.live() == artifact.live
            assert (state.aliases, state.tags) == (artifact.aliases, artifact.tags)

    def teardown(self) -> None:
        """A new process reads everything as it was meant, and the repository is whole."""
        repo = Repository(self.store, threads=0)
        assert fsck(repo, deep=True).findings == []
        for name, artifact in self.model.items():
            for version in repo.artifact(name).versions():
                expected = artifact.versions[version.number]
                assert (version.message, version.parent) == (expected.message, expected.parent)
                assert version.metadata == ({"number": version.number} if expected.message else {})
                assert version.asset_count == len(expected.content)
                found: Content = {}
                for path, asset in version.assets.items():
                    if asset.kind == "url":
                        found[path] = asset.url
                    else:
                        with version.open(path) as file:
                            found[path] = (file.read(), asset.executable)
                assert found == expected.content


def test_machine(tmp_path: Path) -> None:
    """Whatever is done in whatever order: repository and model agree, and a new process reads what was meant."""

    class Here(Machine):
        folder = tmp_path

    case = Here.TestCase
    case.settings = settings(
        max_examples=4000 if SOAK else 400,
        stateful_step_count=50 if SOAK else 30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
