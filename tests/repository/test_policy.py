"""Policies: rules keep what they say, and what is not understood in full is refused."""

from __future__ import annotations

import msgspec
import pytest
from expiring import add, goes, live, oracle, why
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.records import AliasOp, DeleteOp, Record, Root, SettingsOp, TagOp, VersionOp
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.policy import Policy, duration, keeps
from mandapa.repository.repository import Repository
from mandapa.repository.retention import ExpirePlan
from mandapa.repository.state import ArtifactState


@pytest.fixture
def repo() -> Repository:
    return Repository.create(MemoryObjectStore())


# -- rules -------------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, -1.0, 1e300, 2.0, "NaN", "Infinity", None, True, "1", [1], 1 << 62]),
)
metadata = st.fixed_dictionaries({}, optional={"loss": numbers, "acc:top/1": numbers, "step": numbers})
policies = st.builds(
    lambda **rules: Policy(**rules if any(list(rules.values())[:4]) else {**rules, "keep_last": 1}),
    keep_last=st.integers(0, 4),
    keep_best=st.lists(st.sampled_from(["1:loss:min", "2:loss:max", "2:acc:top/1:max", "3:step:min"]), max_size=3),
    keep_every=st.integers(0, 4),
    newer_than=st.sampled_from(["", "5s", "1m"]),
    keep_aliased=st.booleans(),
    keep_tagged=st.booleans(),
    keep_used=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_rules_keep_what_they_say(data):
    """Against a second saying of the same rules, over any metadata, names, ages and deletions."""
    versions = data.draw(st.lists(metadata, min_size=1, max_size=9))
    count = len(versions)
    some = st.integers(0, count - 1)
    dead = data.draw(st.sets(some, max_size=count - 1))
    alive = [n for n in range(count) if n not in dead]
    ages = data.draw(st.lists(st.sampled_from([0, 4, 5, 59, 60, 99]), min_size=count, max_size=count))
    names = data.draw(
        st.dictionaries(st.sampled_from("abcd"), st.tuples(st.sampled_from(["alias", "tag"]), st.sampled_from(alive)))
    )
    used = data.draw(st.sets(some))
    policy = data.draw(policies)

    state = ArtifactState()
    record = Record(seq=0, txn="", prev="", at="", by="", ops=())
    root = Root("meta/" + "0" * 32, 16, 1, "0" * 64)
    for number, facts in enumerate(versions):
        made = VersionOp(
            number=number, parent=None, root=root, digest="0" * 64, assets=0, bytes=0, added=0, metadata=facts
        )
        state.apply(made, record)
    if dead:
        state.apply(DeleteOp(sorted(dead)), record)
    for name, (kind, number) in names.items():
        state.apply(AliasOp(name, number) if kind == "alias" else TagOp(name, number), record)

    found = keeps(policy, state, age=lambda n: ages[n], used=dict.fromkeys(used, "other:v1"))
    assert set(found) == oracle(policy, versions, ages, names, used, dead)
    assert all(found.values())
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"keep_aliased": False},
        {"keep_last": -1},
        {"keep_last": True},
        {"keep_last": "5"},
        {"keep_last": 1 << 53},
        {"keep_every": 1.5},
        {"keep_best": "3:loss:min"},
        {"keep_best": ("3:loss",)},
        {"keep_best": ("0:loss:min",)},
        {"keep_best": ("x:loss:min",)},
        {"keep_best": ("1::min",)},
        {"keep_best": ("1:loss:best",)},
        {"keep_best": (5,)},
        {"keep_best": ("1:\ud800:min",)},
        {"keep_best": tuple(f"1:{'m' * 500}{n}:min" for n in range(40))},
        {"newer_than": "14"},
        {"newer_than": "14 d"},
        {"newer_than": "0d"},
        {"newer_than": "1.5h"},
        {"newer_than": "-1d"},
        {"newer_than": 14},
        {"keep_last": 1, "keep_tagged": "no"},
    ],
)
def test_what_is_no_policy(wrong):
    """A rule that cannot be, and no rule at all, are refused; so are they as JSON."""
    with pytest.raises(InvalidInputError):
        Policy(**wrong)
    try:
        data = msgspec.json.encode(wrong)
    except (UnicodeEncodeError, msgspec.EncodeError):
        return
    with pytest.raises(InvalidInputError):
        Policy.from_json(data)


def test_rules_as_they_are_typed():
    """Every rule, and nothing that is as it is anyway."""
    policy = Policy(keep_last=1, keep_best=("2:a b:max",), keep_every=3, newer_than="4h", keep_tagged=False)
    typed = "--keep-last 1 --keep-best '2:a b:max' --keep-every 3 --newer-than 4h --no-keep-tagged"
    assert str(policy) == typed
    assert str(Policy(keep_every=2)) == "--keep-every 2"


def test_times_as_people_write_them():
    """Seconds, minutes, hours, days, weeks; an error names them."""
    assert [duration(text) for text in ("30s", "90m", "12h", "14d", "2w")] == [30, 5400, 43_200, 1_209_600, 1_209_600]
    with pytest.raises(InvalidInputError, match="90m, 12h, 14d, 2w"):
        duration("a fortnight")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"keep_last":1,"more":2}',
        b'{"keep_last":1,"format":2}',
        b'{"keep_last":"1"}',
    ],
)
def test_json_that_is_no_policy(data):
    """Strict: nothing is guessed, and nothing is left out."""
    with pytest.raises(InvalidInputError):
        Policy.from_json(data)


# -- stored policies ---------------------------------------------------------------------------------------------------


def test_stored_policies(repo):
    """An artifact's own before the default; it follows the artifact when that is renamed; dropped it is gone."""
    for name in ("m", "n"):
        for _ in range(4):
            add(repo, name)
    own, default = Policy(keep_last=3), Policy(keep_last=2, keep_best=("1:loss:min",))
    repo.set_policy("m", own)
    repo.set_policy(None, default)
    other = Repository(repo.place)
    assert other.policies() == {None: default, "m": own}
    plan = other.plan_expire()
    assert (goes(plan), goes(plan, "n")) == ([0], [0, 1])
    other.artifact("m").rename("q")
    assert repo.policies() == {None: default, "q": own}
    repo.set_policy("q", None)
    assert goes(repo.plan_expire("q"), "q") == [0, 1]
    repo.set_policy(None, None)
    assert repo.policies() == {}
    for name in (None, "q"):
        with pytest.raises(NotFoundError, match="no policy is stored"):
            repo.set_policy(name, None)
    with pytest.raises(NotFoundError):
        repo.set_policy("nobody", own)
    repo.set_policy("q", own)
    assert [part.name for part in repo.plan_expire().artifacts] == [
        "q"
    ]  # the others have no policy, and are left alone
    assert fsck(repo).ok


def test_a_stored_policy_is_a_floor(repo):
    """Rules that are given keep more, never less."""
    for n in range(5):
        add(repo, loss=float(n))
    repo.set_policy("m", Policy(keep_last=3))
    plan = repo.plan_expire("m", policy=Policy(keep_best=("1:loss:min",)))
    assert goes(plan) == [1]
    assert why(plan)[3] == ("keep-last 3 (stored policy)",)
    assert goes(repo.plan_expire("m", policy=Policy(keep_last=1, keep_best=("1:loss:min",)))) == [1]


@pytest.fixture
def planned(repo) -> ExpirePlan:
    """A plan by which the first of six versions would go."""
    for n in range(6):
        add(repo, loss=float(n))
    return repo.plan_expire("m", policy=Policy(keep_last=5))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"format": 2, "keep_last": 1}, FormatVersionError),
        ({"format": 1, "keep_last": 1, "keep_weekly": 4}, FormatVersionError),
        ({"format": 1}, CorruptionError),
        ({"format": 1, "keep_last": "1"}, CorruptionError),
        ({"format": "1", "keep_last": 1}, CorruptionError),
        (5, CorruptionError),
        ({"format": 1, "keep_last": 1, "newer_than": "\x1b[2J"}, CorruptionError),
    ],
)
def test_a_stored_policy_that_is_not_understood(repo, planned, value, error):
    """Nothing goes by it, nor beside it; it can be replaced, and an artifact of another policy is free of it."""
    key = f"policy/{repo.artifact('m').open_log().id}"
    repo.catalog.append(repo.author.new_id().hex(), lambda state: [SettingsOp({key: value})], repo.author)
    for call in (
        lambda: repo.plan_expire("m"),
        lambda: repo.plan_expire("m", policy=Policy(keep_last=1)),
        lambda: repo.expire(planned),
        repo.policies,
    ):
        with pytest.raises(error) as caught:
            call()
        assert "\x1b" not in str(caught.value)
    assert live(repo) == [0, 1, 2, 3, 4, 5]
    add(repo, "n")
    add(repo, "n")
    assert goes(repo.plan_expire("n", policy=Policy(keep_last=1)), "n") == [0]
    repo.set_policy("m", Policy(keep_last=5))
    assert goes(repo.plan_expire("m")) == [0]
