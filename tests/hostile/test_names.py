"""Names and paths that are allowed, and those that never are."""

from __future__ import annotations

import pytest

from mandapa.errors import InvalidInputError
from mandapa.format.strict import check_label, check_name, check_path, check_prefix, check_url, is_id

NAMES = ["a", "_", "0", "resnet-7", "Llama_3.1", "a..b", "x" * 128, "con", "latest", "v1", "A-", "a."]
NO_NAMES = [
    "",
    "-a",
    ".a",
    "a/b",
    "a:b",
    "a b",
    "a\n",
    "\na",
    "a\0",
    "é",
    "\uff41",
    "a\u0301",
    "x" * 129,
    "a~1",
    "@a",
    "a\\b",
    "..",
    "a\x7f",
    "\u0661",
    "🙂",
    "a\ud800",
    None,
    1,
    b"a",
    ["a"],
]
LABELS = ["best", "prod", "V", "v", "v1a", "version1", "latest-1", "v1.0", "v-1", "vv1"]
NO_LABELS = ["latest", "LATEST", "Latest", "v0", "V12", "v007", "v" + "9" * 50]

PATHS = [
    "a",
    "a/b",
    "a b",
    ".a",
    "a.",
    "...",
    "a/.../b",
    "-",
    "~",
    "a:b",
    "con",
    "nul.txt",
    "é",
    "e\u0301",
    "महल/अ",
    "🙂",
    "a" * 255,
    "/".join(["a" * 200] * 5) + "/x" * 9,
    "a\u00a0b",
    "\u200b",
    "*?<>|\"'",
    "%2e%2e",
    "C:x",
    "$HOME",
    "a;rm -rf b",
    ".mandapa-x",
    "x/.mandapa/y",
    "\ufeff",
    "\U0010ffff",
    "a\u202eb",
    ".git/config",
    "é" * 127,
]
NO_PATHS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "./a",
    "a/.",
    "a/..",
    "../a",
    "a/../b",
    "a/./b",
    "\\",
    "a\\b",
    "..\\a",
    "a\0",
    "\0",
    "a\nb",
    "a\r",
    "\ta",
    "\x1b[2J",
    "a\x7f",
    "\x85",
    "a\x9fb",
    "\u2028",
    "a\u2029",
    "\ud800",
    "a\udcff",
    "\udc80.txt",
    "a" * 256,
    "é" * 128,
    "/".join(["a" * 200] * 6),
    "a/" * 512 + "b",
    ".mandapa",
    ".mandapa/x",
    ".mandapa/tensors.json",
    None,
    1,
    b"a",
    ("a",),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_allowed(name):
    """They come back as they are."""
    assert check_name(name) is name


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_names_that_are_refused(name):
    """For artifacts, and for aliases and tags as well."""
    with pytest.raises(InvalidInputError):
        check_name(name)
    with pytest.raises(InvalidInputError):
        check_label(name)


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_allowed(name):
    """They come back as they are."""
    assert check_label(name) is name


@pytest.mark.parametrize("name", NO_LABELS)
def test_labels_that_are_refused(name):
    """`latest` and numbers of versions always mean something else; artifacts may be called so."""
    with pytest.raises(InvalidInputError, match="number or age"):
        check_label(name)
    assert check_name(name) is name


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_paths_that_are_allowed(path):
    """Whatever some system could not hold is that system's to refuse, when a version is restored there."""
    assert check_path(path) is path
    assert check_prefix(path) is path


@pytest.mark.parametrize("path", NO_PATHS, ids=ascii)
def test_paths_that_are_refused(path):
    """With an error whose message can be printed."""
    with pytest.raises(InvalidInputError) as caught:
        check_path(path)
    str(caught.value).encode()
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("check", [check_name, check_label, check_path, check_prefix, check_url])
def test_messages_stay_short_and_printable(check):
    """However long the text is, and whatever is in it."""
    for text in (
        "\x1b" * 100_000,
        "/" + "x" * 100_000,
        "x" * 100_000 + "\\",
        "x" * 100_000 + "/..",
        "\ud800" * 100_000,
    ):
        with pytest.raises(InvalidInputError) as caught:
            check(f"\0{text}" if check is check_url else text)
        assert len(str(caught.value)) < 1000
        assert str(caught.value).isprintable()


def test_prefixes_are_paths_or_the_root_or_reserved():
    """What only a prefix may be."""
    for path in ("", ".mandapa", ".mandapa/tensors.json"):
        assert check_prefix(path) == path


@pytest.mark.parametrize("path", [p for p in NO_PATHS if p != "" and not str(p).startswith(".mandapa")], ids=ascii)
def test_prefixes_that_are_refused(path):
    """All other rules of paths hold for prefixes."""
    with pytest.raises(InvalidInputError):
        check_prefix(path)


def test_limits_are_in_bytes():
    """1,024 bytes of path pass and 1,025 do not, however few characters they are."""
    path = "/".join(["é" * 100] * 5) + "/" + "x" * 18
    assert len(path.encode()) == 1023
    check_path(path + "x")
    with pytest.raises(InvalidInputError, match="longer"):
        check_path(path + "xx")
    check_path("é" * 127 + "x")
    with pytest.raises(InvalidInputError, match="longer"):
        check_path("🙂" * 64)


@pytest.mark.parametrize(
    ("url", "checksum"),
    [
        ("", ""),
        ("a\nb", ""),
        ("a\0", ""),
        ("\ud800", ""),
        ("u" * 4097, ""),
        ("é" * 2049, ""),
        ("u", "a\n"),
        ("u", "c" * 256),
        ("u", "\udcff"),
    ],
    ids=ascii,
)
def test_urls_that_are_refused(url, checksum):
    """Empty, too long, or with control characters; a checksum likewise."""
    check_url("https://example.org/a b?c=d#é\\", 'etag:"x"')
    with pytest.raises(InvalidInputError):
        check_url(url, checksum)


def test_ids():
    """32 lower-case hexadecimal digits of ASCII and nothing else."""
    assert is_id("00112233445566778899aabbccddeeff")
    for text in ("", "0" * 31, "0" * 33, "0" * 32 + "\n", "A" * 32, "g" * 32, "\u0660" * 32, " " + "0" * 31):
        assert not is_id(text)
