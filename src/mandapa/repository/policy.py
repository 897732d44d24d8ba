"""A policy: which versions of an artifact stay when it is cleaned up. Source: docs/format.md §8.2, "Policies"."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast

import msgspec

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format.strict import INT_MAX, METADATA_MAX, shown, told
from mandapa.repository.best import Contest, Mode
from mandapa.repository.state import ArtifactState, VersionState

__all__ = ["DEFAULT", "Policy", "duration", "keeps", "policy_of", "setting_of", "stored_policies"]

DEFAULT = "policy"
"""The setting that holds the policy of all artifacts that have none of their own."""

_OWN = "policy/"
"""Before an artifact's id: the setting that holds its own policy."""

_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def duration(text: str) -> int:
    """Seconds of ``90m``, ``12h``, ``14d``, ``2w`` or ``30s``.

    Raises:
        InvalidInputError: Written otherwise.

    Example:
        >>> duration("2w") == duration("14d") == 14 * 86_400
        True
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidInputError(
            f"{shown(text)} is no time: write a whole number and s, m, h, d or w, as in 90m, 12h, 14d, 2w"
        )
    return int(match[1]) * _SECONDS[match[2]]


class Best(NamedTuple):
    """So many of the best by a metric."""

    many: int
    contest: Contest

    @classmethod
    def of(cls, text: str) -> Best:
        """From ``K:METRIC:min`` or ``K:METRIC:max``; a metric may hold ``:``. Raises `InvalidInputError`."""
        count, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        metric, _, mode = rest.rpartition(":")
        if not re.fullmatch("[1-9][0-9]{0,8}", count, re.ASCII) or not metric or mode not in ("min", "max"):
            raise InvalidInputError(
                f"{shown(text)} says not which are best: write how many, the metric, and min or max, as in "
                "3:val/loss:min"
            )
        return cls(int(count), Contest.of(metric, cast("Mode", mode)))


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules for what stays: a version that any of them keeps, stays; what none keeps may go.

    The newest live version always stays, and the checkpoint that the run which made it would go on from. At least one
    of ``keep_last``, ``keep_best``, ``keep_every`` and ``newer_than`` is needed.

    Raises:
        InvalidInputError: No rule, or one that cannot be; the message says what can.

    Example:
        >>> policy = Policy(keep_last=5, keep_best=("3:val/loss:min",), newer_than="14d")
        >>> Policy.from_json(policy.to_json()) == policy
        True
    """

    format: Literal[1] = 1
    keep_last: int = 0
    """The so many newest; 0: no such rule."""
    keep_best: tuple[str, ...] = ()
    """Each ``K:METRIC:min`` or ``K:METRIC:max``: the K versions whose metadata has the least, or greatest, finite
    numbers; of equal ones the oldest."""
    keep_every: int = 0
    """Those whose ``step`` in the metadata is a multiple; without a whole number there, the version's own number is."""
    newer_than: str = ""
    """Those made, or brought back, less than that ago by the store's clock: ``90m``, ``12h``, ``14d``, ``2w``."""
    keep_aliased: bool = True
    """Those that an alias names. If not, the alias is dropped with its version."""
    keep_tagged: bool = True
    """Those that a tag names. If not, the tag is dropped with its version, and its name is never used again."""
    keep_used: bool = True
    """Those that a version of another artifact, which stays, names as used."""

    def __post_init__(self) -> None:
        if isinstance(self.keep_best, str) or not isinstance(self.keep_best, tuple | list):
            raise InvalidInputError(
                f"keep_best={shown(self.keep_best)}: give a tuple of texts such as '3:val/loss:min'"
            )
        msgspec.structs.force_setattr(self, "keep_best", tuple(dict.fromkeys(map(_best_text, self.keep_best))))
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT_MAX:
                raise InvalidInputError(f"{name}={shown(value)}: a whole number above 0")
        if self.newer_than != "":
            duration(self.newer_than)
        for name in ("keep_aliased", "keep_tagged", "keep_used"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name}={shown(getattr(self, name))}: True or False")
        if not (self.keep_last or self.keep_best or self.keep_every or self.newer_than):
            raise InvalidInputError(
                "a policy says what stays, by keep-last, keep-best, keep-every or newer-than: without any of them "
                "nearly all would go (if that is meant: keep-last 1)"
            )
        if len(self.to_json()) > METADATA_MAX:
            raise InvalidInputError(f"a policy of {len(self.to_json()):,} bytes; {METADATA_MAX:,} at most")

    def to_json(self) -> bytes:
        """One line of JSON."""
        try:
            return msgspec.json.encode(self) + b"\n"
        except UnicodeEncodeError:
            raise InvalidInputError("a policy whose text cannot be written as UTF-8") from None

    @classmethod
    def from_json(cls, data: bytes) -> Policy:
        """A policy from what `to_json` gave.

        Raises:
            InvalidInputError: It is none, or says what this mandapa does not know.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInputError(f"not a policy: {told(error)}") from None

    def as_setting(self) -> dict[str, Any]:
        """The same as a value that a record holds."""
        return cast("dict[str, Any]", msgspec.to_builtins(self))

    def words(self) -> list[str]:
        """The rules as arguments of the command line."""
        words = ["--keep-last", str(self.keep_last)] if self.keep_last else []
        words += [word for rule in self.keep_best for word in ("--keep-best", rule)]
        words += ["--keep-every", str(self.keep_every)] if self.keep_every else []
        words += ["--newer-than", self.newer_than] if self.newer_than else []
        return words + [
            f"--no-keep-{name}" for name in ("aliased", "tagged", "used") if not getattr(self, f"keep_{name}")
        ]

    def __str__(self) -> str:
        """The same in one line, for people."""
        return shlex.join(self.words())


def _best_text(text: str) -> str:
    Best.of(text)
    return text


# -- what a policy keeps -----------------------------------------------------------------------------------------------


def keeps(
    policy: Policy, state: ArtifactState, *, age: Callable[[int], float], used: Mapping[int, str]
) -> dict[int, list[str]]:
    """The live versions that stay by a policy, each with the rules that keep it, in words.

    Args:
        policy: The rules.
        state: The versions, as the log tells of them.
        age: Seconds since a version was made or last brought back; asked only when ``newer_than`` is a rule.
        used: Version -> address of one that names it as used.
    """
    live = [state.versions[number] for number in state.live()]
    found: dict[int, list[str]] = {}

    def keep(numbers: Iterable[int], why: str) -> None:
        for number in numbers:
            found.setdefault(number, []).append(why)

    if live:
        keep([live[-1].op.number], "newest")
    point = _resume_point(live, state)
    if point is not None:
        keep([point.op.number], f"run {point.record.run} goes on from it")
    if policy.keep_last:
        keep([version.op.number for version in live[-policy.keep_last :]], f"keep-last {policy.keep_last}")
    for rule in policy.keep_best:
        many, contest = Best.of(rule)
        keep([version.op.number for version in contest.ranked(live)[:many]], f"keep-best {rule}")
    if policy.keep_every:
        for version in live:
            step = _step(version.op.metadata)
            if (version.op.number if step is None else step) % policy.keep_every == 0:
                keep([version.op.number], f"keep-every {policy.keep_every}" + (" by number" if step is None else ""))
    if policy.newer_than:
        limit = duration(policy.newer_than)
        keep([v.op.number for v in live if age(v.op.number) < limit], f"newer-than {policy.newer_than}")
    for wanted, names, kind in (
        (policy.keep_aliased, state.aliases, "alias"),
        (policy.keep_tagged, state.tags, "tag"),
    ):
        for name, number in sorted(names.items()) if wanted else ():
            keep([number], f"{kind} {name}")
    if policy.keep_used:
        for number, address in used.items():
            if number in state.versions and state.versions[number].deleted is None:
                keep([number], f"used by {address}")
    return found


def _step(metadata: Mapping[str, Any]) -> int | None:
    """The training step that a version says it is of, if that is a whole number."""
    step = metadata.get("step")
    if isinstance(step, float) and step.is_integer():
        return int(step)
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _resume_point(live: list[VersionState], state: ArtifactState) -> VersionState | None:
    """The checkpoint that the run which made the newest version would go on from, when that is not the newest.

    Between two checkpoints a run commits what it logs: its newest version may hold none.
    """
    newest = live[-1] if live else None
    if newest is None or not newest.record.run:
        return None
    best: tuple[int, int] | None = None
    at: int | None = newest.op.number
    while at is not None:
        version = state.versions[at]
        step = version.op.metadata.get("step")
        if version.deleted is None and version.record.run == newest.record.run and type(step) is int:
            best = max(best or (step, at), (step, at))
        at = version.op.parent
    return None if best is None or best[1] == newest.op.number else state.versions[best[1]]


# -- policies that the repository keeps --------------------------------------------------------------------------------


def setting_of(artifact_id: str | None) -> str:
    """The setting that holds the policy of an artifact, or (None) that of those without one of their own."""
    return DEFAULT if artifact_id is None else f"{_OWN}{artifact_id}"


def policy_of(settings: Mapping[str, Any], artifact_id: str, name: str) -> Policy | None:
    """The stored policy that holds for an artifact: its own, else the default, else None.

    Raises:
        FormatVersionError: A newer mandapa has written it.
        CorruptionError: It is no policy.
    """
    own = setting_of(artifact_id)
    if own in settings:
        return _read(settings[own], name)
    return _read(settings[DEFAULT], "all artifacts") if DEFAULT in settings else None


def stored_policies(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str | None, Policy]:
    """Stored policies by the name of their artifact, the default under None; raises as `policy_of`."""
    found: dict[str | None, Policy] = {}
    if DEFAULT in settings:
        found[None] = _read(settings[DEFAULT], "all artifacts")
    for name, id_ in sorted(names.items()):
        if setting_of(id_) in settings:
            found[name] = _read(settings[setting_of(id_)], name)
    return found


def _read(value: Any, whose: str) -> Policy:
    """A stored policy. One that is not understood in full is never taken for less than it says."""
    format_ = value.get("format") if isinstance(value, dict) else None
    try:
        if type(format_) is int and format_ != 1:
            raise FormatVersionError(f"the policy of {whose} is of format {format_}: upgrade mandapa")
        return msgspec.convert(value, Policy)
    except msgspec.ValidationError as error:
        if str(error).startswith("Object contains unknown field"):
            raise FormatVersionError(f"the policy of {whose} was written by a newer mandapa: upgrade") from None
        raise CorruptionError(
            f"the policy that is stored for {whose} is none ({told(error)}): set it again with 'mandapa policy set'",
            key="catalog",
        ) from None
