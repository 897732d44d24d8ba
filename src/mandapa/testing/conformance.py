"""The suite that every object store has to pass.

::

    class TestMyStore(ObjectStoreConformance):
        @pytest.fixture
        def store(self):
            return MyStore(...)         # empty, and fresh for each test
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from random import Random

import pytest

from mandapa.errors import AlreadyExistsError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.object_store import Buffer, ObjectInfo, ObjectStore

__all__ = ["ObjectStoreConformance"]

_PACK = 16 * 1024 * 1024
_BAD_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    ".tmp/x",
    "a/.b",
    "A",
    "ä",
    "a b",
    "a\\b",
    "a\0",
]


def _keys(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, start_after=start_after)]


class ObjectStoreConformance:
    """What the docstrings of `mandapa.object_store.ObjectStore` promise, a test each; subclasses give ``store``."""

    racers = 16
    """Threads that create the same key; fewer where a server is slow at it."""
    clock_skew = timedelta(minutes=5)
    """Between this machine and the store."""

    # What is written is read

    def test_store_has_the_interface(self, store: ObjectStore) -> None:
        """It is an ObjectStore, and its URL is stable and names no credentials."""
        assert isinstance(store, ObjectStore)
        assert "://" in store.url
        assert store.url == store.url
        assert "@" not in store.url

    def test_put_is_read_at_once(self, store: ObjectStore) -> None:
        """get, head and list see an acknowledged put."""
        store.put("a/b", b"hello")
        assert store.get("a/b") == b"hello"
        assert store.head("a/b").size == 5
        assert _keys(store, "a/") == ["a/b"]

    def test_get_gives_a_buffer(self, store: ObjectStore) -> None:
        """The bytes that come back have a length, slices and equality like bytes."""
        store.put("a", b"hello")
        data = store.get("a")
        assert isinstance(data, bytes | bytearray | memoryview)
        assert len(data) == 5
        assert bytes(data[1:3]) == b"el"

    def test_what_is_too_large_is_not_read(self, store: ObjectStore) -> None:
        """With a limit, get gives an object of just as many bytes, and of one that has more it takes none."""
        store.put("a", bytes(1000))
        assert len(store.get("a", limit=1000)) == 1000
        with pytest.raises(CorruptionError, match="1000 bytes, more than the 999"):
            store.get("a", limit=999)

    def test_put_replaces(self, store: ObjectStore) -> None:
        """The second put of a key is what readers see, at once, by get, range, head and list."""
        store.put("a", b"a longer first value")
        store.put("a", b"second")
        assert store.get("a") == b"second"
        assert store.get_ranges("a", [(0, 6)])[0] == b"second"
        assert store.head("a").size == 6
        assert [info.size for info in store.list("")] == [6]

    def test_empty_object(self, store: ObjectStore) -> None:
        """An object of no bytes is an object."""
        store.put("put", b"")
        store.create("create", b"")
        for key in ("put", "create"):
            assert store.get(key) == b""
            assert store.head(key).size == 0
        assert _keys(store) == ["create", "put"]
        with pytest.raises(AlreadyExistsError):
            store.create("create", b"x")

    def test_large_object(self, store: ObjectStore) -> None:
        """A pack of 16 MiB comes back as it was, by put and by create, whole and in ranges."""
        data = Random(0).randbytes(_PACK)
        store.put("packs/0", data)
        store.create("packs/1", data)
        assert store.get("packs/0") == data
        assert store.get("packs/1") == data
        (piece,) = store.get_ranges("packs/1", [(_PACK - 7, 7)])
        assert piece == data[-7:]

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview], ids=lambda kind: kind.__name__)
    def test_buffers_are_taken_and_not_kept(self, store: ObjectStore, kind: type) -> None:
        """Any buffer may be given, and be changed by its owner after the call."""
        original = bytearray(b"0123456789" * 100)
        given: Buffer = kind(original)
        store.put("put", given)
        store.create("create", given)
        original[:] = b"x" * len(original)
        if isinstance(given, bytearray):
            given[:] = original
        assert store.get("put") == b"0123456789" * 100
        assert store.get("create") == b"0123456789" * 100

    def test_part_of_a_buffer(self, store: ObjectStore) -> None:
        """A slice of a memoryview is stored as what it shows."""
        store.put("a", memoryview(b"0123456789")[2:5])
        store.create("b", memoryview(bytearray(b"0123456789"))[5:])
        assert store.get("a") == b"234"
        assert store.get("b") == b"56789"

    # What is not there

    def test_missing_key(self, store: ObjectStore) -> None:
        """get, get_ranges and head of a key that is not there raise NotFoundError; so does one above an object."""
        store.put("a/b", b"1")
        for key in ("missing", "a/missing", "a"):
            with pytest.raises(NotFoundError):
                store.get(key)
            with pytest.raises(NotFoundError):
                store.get_ranges(key, [(0, 1)])
            with pytest.raises(NotFoundError):
                store.head(key)

    @pytest.mark.parametrize("key", _BAD_KEYS)
    def test_bad_key(self, store: ObjectStore, key: str) -> None:
        """What is not a key raises InvalidInputError, whatever the call."""
        for call in (
            lambda: store.get(key),
            lambda: store.get_ranges(key, [(0, 1)]),
            lambda: store.head(key),
            lambda: store.put(key, b"x"),
            lambda: store.create(key, b"x"),
            lambda: store.delete([key]),
        ):
            with pytest.raises(InvalidInputError):
                call()
        assert _keys(store) == []

    def test_odd_keys(self, store: ObjectStore) -> None:
        """Every allowed character, long segments and long keys come back as they are."""
        keys = ["a-b_c.d", "-", "_x", "0", "a..b", "x" * 255, "/".join(["y" * 63] * 8), "a.b/c.d/e-f"]
        for key in keys:
            store.put(key, key.encode())
        assert _keys(store) == sorted(keys)
        for key in keys:
            assert store.get(key) == key.encode()

    # Ranges

    def test_ranges(self, store: ObjectStore) -> None:
        """In the order asked for: adjacent, overlapping, repeated, whole, at both ends."""
        data = bytes(range(256)) * 8
        store.put("a", data)
        ranges = [(5, 10), (15, 10), (0, 1), (3, 8), (3, 8), (0, 2048), (2047, 1), (1000, 1)]
        assert [bytes(piece) for piece in store.get_ranges("a", ranges)] == [data[o : o + n] for o, n in ranges]

    def test_far_apart_ranges(self, store: ObjectStore) -> None:
        """Ranges too far apart to be joined come back right, too."""
        data = Random(1).randbytes(3_000_000)
        store.put("a", data)
        ranges = [(2_900_000, 100_000), (0, 10), (1_500_000, 1)]
        assert [bytes(piece) for piece in store.get_ranges("a", ranges)] == [data[o : o + n] for o, n in ranges]

    def test_no_ranges(self, store: ObjectStore) -> None:
        """No range gives no bytes, and a range of length 0 is empty wherever it starts."""
        store.put("a", b"0123")
        assert store.get_ranges("a", []) == []
        assert [bytes(piece) for piece in store.get_ranges("a", [(1, 0), (2, 2), (99, 0)])] == [b"", b"23", b""]
        assert [bytes(piece) for piece in store.get_ranges("a", [(1, 0)])] == [b""]

    @pytest.mark.parametrize("ranges", [[(0, 5)], [(3, 2)], [(4, 1)], [(100, 1)], [(0, 1), (2, 3)], [(0, 1 << 30)]])
    def test_range_beyond_the_end(self, store: ObjectStore, ranges: list[tuple[int, int]]) -> None:
        """Never short: CorruptionError, which names the key."""
        store.put("a/b", b"0123")
        with pytest.raises(CorruptionError) as caught:
            store.get_ranges("a/b", ranges)
        assert caught.value.key == "a/b"

    def test_range_of_an_empty_object(self, store: ObjectStore) -> None:
        """There is no byte to give."""
        store.put("a", b"")
        with pytest.raises(CorruptionError):
            store.get_ranges("a", [(0, 1)])

    @pytest.mark.parametrize("bad", [(-1, 1), (0, -1)])
    def test_negative_range(self, store: ObjectStore, bad: tuple[int, int]) -> None:
        """A mistake of the caller."""
        store.put("a", b"0123")
        with pytest.raises(InvalidInputError):
            store.get_ranges("a", [bad])

    # Create

    def test_create_only_if_absent(self, store: ObjectStore) -> None:
        """The second create of a key is refused and changes nothing, whatever its bytes."""
        store.create("log/0", b"first")
        for data in (b"second", b"first", b""):
            with pytest.raises(AlreadyExistsError):
                store.create("log/0", data)
        assert store.get("log/0") == b"first"

    def test_create_after_put(self, store: ObjectStore) -> None:
        """An object that was put is there, too."""
        store.put("a", b"first")
        with pytest.raises(AlreadyExistsError):
            store.create("a", b"second")
        assert store.get("a") == b"first"

    def test_create_after_delete(self, store: ObjectStore) -> None:
        """What was deleted is absent."""
        store.create("a", b"first")
        store.delete(["a"])
        store.create("a", b"second")
        assert store.get("a") == b"second"

    def test_create_is_read_at_once(self, store: ObjectStore) -> None:
        """get, head and list see an acknowledged create."""
        store.create("log/0", b"first")
        assert store.get("log/0") == b"first"
        assert store.head("log/0").size == 5
        assert _keys(store, "log/") == ["log/0"]

    def test_exactly_one_racer_wins(self, store: ObjectStore) -> None:
        """Of racing creates of one key one is acknowledged, the others are refused, and the winner's bytes stand.

        A refused racer finds the winner's bytes when it reads the key.
        """
        barrier = threading.Barrier(self.racers)

        def run(number: int, key: str) -> tuple[bytes, bool, bytes]:
            mine = f"racer {number}".encode() * 10
            barrier.wait(60)
            try:
                store.create(key, mine)
                won = True
            except AlreadyExistsError:
                won = False
            return mine, won, bytes(store.get(key))

        with ThreadPoolExecutor(self.racers) as pool:
            for race in range(3):
                key = f"log/{race}"
                results = list(pool.map(run, range(self.racers), [key] * self.racers))
                winners = [mine for mine, won, _ in results if won]
                assert len(winners) == 1
                assert {found for _, _, found in results} == {winners[0]}
                assert store.get(key) == winners[0]

    def test_replacing_is_atomic(self, store: ObjectStore) -> None:
        """While one thread replaces an object, readers see one of its values, whole."""
        values = [bytes([n]) * (1000 + 500 * n) for n in range(8)]
        store.put("head/a", values[0])
        done = threading.Event()

        def read() -> set[bytes]:
            seen = set()
            while not done.is_set():
                seen.add(bytes(store.get("head/a")))
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            for value in values * 4:
                store.put("head/a", value)
            done.set()
            seen = set.union(*(reader.result() for reader in readers))
        assert seen
        assert seen <= set(values)

    # List

    def test_list_is_in_byte_order(self, store: ObjectStore) -> None:
        """Of whole keys: '-' and '.' come before '/', so a folder's keys do not stand where its name would."""
        keys = ["a", "b-c/d", "b.c", "b.d/e", "b/c", "b/c0", "b0", "b_c", "c/d/e/f", "c/d/g", "c/d.x/y"]
        for key in reversed(keys):
            store.put(key, b"x")
        assert _keys(store) == sorted(keys)

    def test_list_prefix_is_a_plain_string(self, store: ObjectStore) -> None:
        """A prefix may end inside a segment, be a whole key, and match nothing."""
        keys = ["log/00", "log/01", "log/10", "log.x", "log0/1", "lo", "meta/0"]
        for key in keys:
            store.put(key, b"x")
        for prefix in ("", "l", "lo", "log", "log/", "log/0", "log/00", "log/000", "m", "x", "log0/", "log."):
            assert _keys(store, prefix) == sorted(key for key in keys if key.startswith(prefix)), prefix

    def test_list_start_after(self, store: ObjectStore) -> None:
        """Only keys that sort after it, whether it is a key, lies between keys, or before or after all."""
        keys = ["a", "b.c", "b/c", "b/d", "b/e/f", "b0", "c"]
        for key in keys:
            store.put(key, b"x")
        starts = ["", "0", "a", "b", "b.", "b/", "b/c", "b/c0", "b/d", "b/e", "b/e/", "b/e/f", "b/z", "b0", "c", "z"]
        for prefix in ("", "b", "b/", "b/e/"):
            for start in starts:
                expected = sorted(key for key in keys if key.startswith(prefix) and key > start)
                assert _keys(store, prefix, start) == expected, (prefix, start)

    @pytest.mark.parametrize("prefix", ["/", "//", "a//", "..", "../", "A", "a/../", ".tmp", ".tmp/"])
    def test_list_bad_prefix(self, store: ObjectStore, prefix: str) -> None:
        """A prefix that no key can have is a mistake of the caller."""
        with pytest.raises(InvalidInputError):
            list(store.list(prefix))

    def test_list_nothing(self, store: ObjectStore) -> None:
        """An empty store, and a prefix without objects."""
        assert _keys(store) == []
        assert _keys(store, "log/") == []

    def test_list_many(self, store: ObjectStore) -> None:
        """More than one page of 1,000: all of them, once, in order, with sizes; and the end by start_after."""
        keys = [f"log/{number:016}" for number in range(1100)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.put(key, key.encode()[:5]), keys))
        found = list(store.list("log/"))
        assert [info.key for info in found] == keys
        assert {info.size for info in found} == {5}
        assert _keys(store, "log/", keys[-4]) == keys[-3:]
        assert _keys(store, "log/", keys[9]) == keys[10:]

    def test_list_tells_what_head_tells(self, store: ObjectStore) -> None:
        """Key, size and time agree, to the second that some services round to."""
        store.put("a", b"12345")
        (listed,) = store.list("")
        head = store.head("a")
        assert (listed.key, listed.size) == (head.key, head.size) == ("a", 5)
        assert abs(listed.last_modified - head.last_modified) <= timedelta(seconds=1)

    def test_last_modified(self, store: ObjectStore) -> None:
        """Aware, UTC, and about now; a later put is not earlier."""
        store.put("a", b"1")
        first = store.head("a")
        store.put("b", b"2")
        second = store.head("b")
        assert isinstance(first, ObjectInfo)
        assert first.last_modified.utcoffset() == timedelta(0)
        assert abs(first.last_modified - datetime.now(UTC)) < self.clock_skew
        assert second.last_modified >= first.last_modified

    # Delete

    def test_delete(self, store: ObjectStore) -> None:
        """Gone at once, for get, head and list; the others stay."""
        for key in ("a/b", "a/c", "d"):
            store.put(key, b"x")
        store.delete(["a/b", "d"])
        for key in ("a/b", "d"):
            with pytest.raises(NotFoundError):
                store.get(key)
            with pytest.raises(NotFoundError):
                store.head(key)
        assert _keys(store) == ["a/c"]

    def test_delete_missing(self, store: ObjectStore) -> None:
        """No error, and it does not keep the others from going, wherever in the list it stands."""
        for key in ("a", "b", "c/d"):
            store.put(key, b"x")
        store.delete(["0", "a", "b", "c", "c/d", "c/d/e", "x/y/z"])
        assert _keys(store) == []
        store.delete(["a"])

    def test_delete_nothing(self, store: ObjectStore) -> None:
        """No keys, no change."""
        store.put("a", b"x")
        store.delete([])
        store.delete(iter(()))
        assert _keys(store) == ["a"]

    def test_delete_many(self, store: ObjectStore) -> None:
        """Any iterable of keys, also more than one bulk request holds."""
        keys = [f"packs/{number:04}" for number in range(1100)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.put(key, b"x"), keys))
        store.delete(key for key in keys[1:])
        assert _keys(store) == keys[:1]

    def test_put_after_delete(self, store: ObjectStore) -> None:
        """A folder that was emptied can be filled again."""
        store.put("a/b/c", b"1")
        store.delete(["a/b/c"])
        store.put("a/b/c", b"2")
        assert store.get("a/b/c") == b"2"

    # Threads

    def test_threads(self, store: ObjectStore) -> None:
        """Many threads write, read and delete their own keys through one store."""

        def work(number: int) -> None:
            for step in range(5):
                key = f"t{number}/{step}"
                store.put(key, key.encode())
                assert store.get(key) == key.encode()
                assert store.head(key).size == len(key)
                if step % 2:
                    store.delete([key])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert _keys(store) == [f"t{number}/{step}" for number in range(8) for step in (0, 2, 4)]
