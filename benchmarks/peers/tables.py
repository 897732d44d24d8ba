"""The tables: what is measured for each, and how it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import measure
from measure import Options
from series import CHECKPOINTS, Plan, load

MEGABITS = 100
SMALL = ("mandapa, raw", "mandapa", "mandapa, dense", "mandapa, repacked", "hf_xet")
CODECS = tuple(name for name in CHECKPOINTS if not name.startswith("frozen"))
DECODED = ("adam", "bf16-1e-5")

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the page."""

    title: str
    measure: Callable[[Options], Result]
    columns: dict[str, Callable[[dict[str, Any]], str]]
    note: str = ""


def number(key: str, digits: int = 2, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """A column of numbers, empty where there is none."""
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:,.{digits}f}"


def text(key: str) -> Callable[[dict[str, Any]], str]:
    """A column of words."""
    return lambda row: str(row[key])


def asked(row: dict[str, Any]) -> str:
    """Requests of the first commit, a later one, the restore and the read of a part."""
    if not row.get("requests"):
        return ""
    first, *later, restore, piece = row["requests"]
    return f"{first}, {max(later)}, {restore}, {piece}"


PEERS = {
    "tool": lambda row: f"{row['tool']} {row['release']}".strip(),
    "a version adds, MB": number("added", 2, 1e-6),
    "of raw": number("of_raw", 3),
    "first commit, s": number("first", 3),
    "a later one, s": number("later", 3),
    "restore, s": number("restore", 3),
    "one tensor, ms": number("piece", 1, 1e3),
    "memory, MiB": number("peak_mib", 0),
    "requests": asked,
}


def peers(series: str) -> Callable[[Options], Result]:
    """All tools, with one series."""
    return lambda options: measure.compare(series, options)


def frozen(options: Options) -> Result:
    """The same, and how many bytes of tensors changed in truth."""
    return peers("frozen-pt")(options) | measure.child(["changed", "frozen"], options)[0]


def codecs(options: Options) -> Result:
    """Every series of checkpoints with each codec, and with other ways to compress floats."""
    rows, left_out = [], {}
    once = replace(options, rounds=1, tools=tuple(name for name in SMALL if name in options.tools))
    for series in DECODED if options.quick else CODECS:
        found = measure.compare(series, once)
        left_out |= found["left_out"]
        row: Result = {"series": series, "title": CHECKPOINTS[series][0]}
        for tool in found["rows"]:
            row |= {tool["tool"]: tool["of_raw"], f"{tool['tool']}: s": tool["later"]}
        if CHECKPOINTS[series][1] == ".safetensors":
            row |= {name: way["of_raw"] for name, way in measure.child(["anchors", series], options)[0].items()}
        rows.append(row)
    return {"rows": rows, "left_out": left_out}


def decode(options: Options) -> Result:
    """Rates of one core."""
    rows = []
    for series in DECODED:
        for job in ("read", "anchors"):
            for name, rates in measure.child([job, series], options)[0].items():
                what = f"mandapa, {name}: fetched, decoded, verified" if job == "read" else name
                rows.append({"series": series, "title": CHECKPOINTS[series][0], "what": what, **rates})
    return {"rows": rows, "left_out": {}}


def link(options: Options) -> Result:
    """Commits over a slow link."""
    import alone

    found = load(options.data, Plan.quick() if options.quick else Plan())
    return {"rows": [row for name in DECODED for row in alone.link(found[name], MEGABITS)], "left_out": {}}


TABLES = {
    "adam": Table("Weights and Adam in fp32, saves 100 steps apart", peers("adam"), PEERS),
    "bf16": Table(
        "A fine-tuning's weights in bf16, learning rate 1e-5, saves 20 steps apart", peers("bf16-1e-5"), PEERS
    ),
    "frozen": Table("A frozen backbone and what trains on it, as torch.save writes them", frozen, PEERS),
    "log": Table("A log that grows by 50 MB a version, from 300 to 500 MB", peers("log"), PEERS),
    "folder": Table("10,000 files of 10 KiB of which 1% change, on tmpfs", peers("folder"), PEERS),
    "codecs": Table(
        "What is left of a later version",
        codecs,
        {
            "series": text("title"),
            **{name: number(name, 3) for name in (*SMALL, "integers, pcodec", "XOR, planes, zstd", "ZipNN", "zstd-3")},
            "commit raw / auto / dense, s": lambda row: " / ".join(number(f"{name}: s")(row) for name in SMALL[:3]),
        },
    ),
    "decode": Table(
        "GB a second and core, of raw bytes",
        decode,
        {
            "series": text("title"),
            "what": text("what"),
            "in": number("encode", 2, 1e-9),
            "out": number("decode", 2, 1e-9),
        },
    ),
    "link": Table(
        f"A later commit over a link of {MEGABITS} Mbit/s",
        link,
        {
            "series": text("title"),
            "codec": text("codec"),
            "sent, of raw": number("sent", 3),
            "seconds": number("seconds"),
            "as fast as the bytes": number("of_raw"),
        },
    ),
}
"""By name, in the order of the page."""
