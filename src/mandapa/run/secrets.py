"""Secrets in hyperparameters, metadata and command lines: found by the name of a key and by their own shape."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mandapa.errors import InvalidInputError

__all__ = ["HIDDEN", "is_secret_key", "redact", "redact_arguments"]

HIDDEN = "[redacted]"
"""What stands where a secret stood."""

_DEPTH = 100

# -- names -------------------------------------------------------------------------------------------------------------

_NONE, _LOOSE, _TOKEN, _SURE = range(4)
"""How much a name says: nothing; secret if a string; secret if a string or number; the same, in running text too."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_HINT = re.compile(
    r"pass|pwd|secret|token|key|auth|cred|cookie|jwt|bearer|conn|phrase|signature|docker|pat", re.IGNORECASE
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_TAILS = frozenset(
    _words(
        "value text plain plaintext raw data json b base hex hash old new current previous prod "
        "production dev staging primary secondary backup default"
    )
)
"""Words after a name that leave it what it is: ``password_old``, ``api_key_base64``."""

_COUNTS = frozenset(("num", "n", "nb", "max", "min", "count", "total"))

_ENDS = _words(
    "password passwd passphrase passcode pwd seedphrase mnemonicphrase secret secretid credential authorization bearer "
    "cookie jwt apikey apitoken accesskey accesskeyid accesstoken secretkey secretaccesskey privatekey signingkey "
    "encryptionkey decryptionkey masterkey accountkey storagekey sharedkey subscriptionkey authkey customerkey saskey "
    "licensekey sshkey deploykey servicekey appkey applicationkey consumerkey clientkey serverkey fernetkey hmackey "
    "gpgkey pgpkey jwtkey cryptkey tlskey sslkey webhookkey wandbkey openaikey anthropickey authtoken sessiontoken "
    "refreshtoken bearertoken sastoken securitytoken hftoken hubtoken githubtoken gitlabtoken githubpat gitlabpat "
    "extpat connectionstring connectionstr connstring connstr sharedaccesssignature amzsignature googsignature "
    "secretkeybase secretstring dockerconfigjson"
)
"""How the words of a secret's name end, written together: one list for snake, camel, kebab, dotted and glued names."""

_VOCABULARY = frozenset(
    _words(
        "pad padding eos bos cls class sep separator mask masked unk unknown image images img video audio speech "
        "text special start begin end stop first last next prev previous per each query target source src tgt "
        "prompt new line newline added add extra additional register prefix suffix middle sentence word sub "
        "subword byte char character input output max min num n nb no sequence seq decoder encoder patch visual "
        "vision vis learnable latent object memory think thinking reasoning tool action state reward control blank "
        "empty space time step distill distillation dist mean avg pool pooling lang language sot eot eom eoh eod "
        "boi eoi fim fill hole sentinel turn assistant system human role global local context ctx dummy random "
        "positive negative noise draft accepted generated predicted compression summary gist anchor bridge soft "
        "hard virtual discrete vq quantized codebook motion point box region frame domain task label concept "
        "placeholder initializer trigger instance modifier style cross modal modality expert top routing drop keep "
        "regular any this one answer question response reply instruction yes good bad correct wrong score entity "
        "relation head tail chunk document passage tag delimiter split merge fusion bottleneck temporal spatial vocab"
    )
)
"""Words that make a token one of a vocabulary: ``pad_token``, ``use_cls_token``."""

_PASSES = frozenset(_words("forward backward single multi render first second num n by one two per max"))


def is_secret_key(name: str) -> bool:
    """Whether what is called ``name`` is a secret, in snake, camel, kebab, dotted or upper-case spelling.

    >>> [is_secret_key(name) for name in ("hubToken", "AWS_SECRET_ACCESS_KEY", "pad_token", "account_name")]
    [True, True, False, False]
    """
    return _level(name) > _NONE


def _level(name: str) -> int:
    return _level_of(name if len(name) <= 256 else name[-256:])


@lru_cache(maxsize=4096)
def _level_of(name: str) -> int:
    if not _HINT.search(name):
        return _NONE
    words = [word.lower() for word in _WORD.findall(name)]
    count = len(words)
    while len(words) > 1 and words[-1] in _TAILS:
        words.pop()
    last, before = words[-1] if words else "", words[-2] if len(words) > 1 else ""
    if last == "token":
        if before in _VOCABULARY:
            return _NONE
        if not before:
            return _TOKEN if count == 1 else _NONE
    elif last == "auth" or (last == "pass" and before not in _PASSES):
        return _LOOSE
    glued = "".join(words)
    if glued.endswith("s"):
        glued = glued[:-1]
        if words[0] in _COUNTS or glued.endswith("applicationcredential"):  # a number; the path of a file
            return _NONE
    if glued.endswith(_ENDS):
        return _SURE
    return _LOOSE if last == "token" else _NONE


# -- values ------------------------------------------------------------------------------------------------------------

# An empty value, a word that switches, a token of a vocabulary or a place to fill in, a reference to a setting.
_PUBLIC = r"(?i:true|false|none|null|str)|<[^<>\s]{1,40}>|\[\w{1,20}\]|\$?\{{1,2}[\w.: ]{1,80}\}{1,2}"
_PUBLIC_VALUE = re.compile(rf"\s*|{_PUBLIC}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,5}(?:\.[0-9]{0,8})?")
_FOLDER = re.compile(r"/|~|[A-Za-z]:[\\/]")


def _is_secret(value: Any, name: str, level: int) -> bool:
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, str):
        if _PUBLIC_VALUE.fullmatch(value) or (level == _LOOSE and _NUMBER.fullmatch(value)):
            return False
        return not (name.lower() in ("pwd", "oldpwd") and _FOLDER.match(value))
    if isinstance(value, bytes | bytearray):
        return bool(value)
    return level > _LOOSE or not isinstance(value, int | float)


def redact(value: Any) -> Any:
    """A copy of a plain value in which ``"[redacted]"`` stands for every secret; anything else is as it was.

    A secret is what stands under a key that names one (a string or number, or every one below a container), and within
    any string what has the shape of one; the rest of such a string stays. ``True``, ``False``, ``None`` and empty
    strings are never secrets. Keys that hold a secret are redacted too; of two that become equal the last one stays.
    Linear in the size of the value; redacting twice changes nothing more.

    >>> redact({"lr": 0.1, "hub": {"apiKey": "hunter2"}, "data": "https://me:hunter2@host/x", "pad_token": "x"})
    {'lr': 0.1, 'hub': {'apiKey': '[redacted]'}, 'data': 'https://me:[redacted]@host/x', 'pad_token': 'x'}

    Raises:
        InvalidInputError: Nested more than 100 deep, as what contains itself is.
    """
    return _redact(value, 0)


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command line without their secrets: ``--token X``, ``--token=X``, ``API_KEY=X``, and shapes.

    >>> redact_arguments(["train.py", "--lr", "0.1", "--api-key", "hunter2", "hub.token=hunter2"])
    ['train.py', '--lr', '0.1', '--api-key', '[redacted]', 'hub.token=[redacted]']
    """
    return [_argument(item) if isinstance(item, str) else item for item in _after_flags(argv)]


def _redact(value: Any, depth: int, name: str = "", level: int = _NONE) -> Any:
    """``value`` without its secrets; below a key ``name`` that says so (``level``), everything in it is one."""
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if depth > _DEPTH:
            raise InvalidInputError(f"nested more than {_DEPTH} deep: hand over plain values, none inside itself")
        if isinstance(value, Mapping):
            return _mapping(value, depth, name, level)
        items = [_redact(item, depth + 1, name, level) for item in _after_flags(value)]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else type(value)(items)
    if level:
        return HIDDEN if _is_secret(value, name, level) else value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return _text(value.decode("latin-1")).encode("latin-1")
    return value


def _mapping(value: Mapping[Any, Any], depth: int, name: str, level: int) -> dict[Any, Any]:
    said = value.get("name", value.get("key"))  # as in {"name": "HF_TOKEN", "value": "..."}
    result = {}
    for key, item in value.items():
        own = said if key == "value" and isinstance(said, str) else key
        own_level = _level(own) if isinstance(own, str) and not level else _NONE
        clean = _SHAPES.sub(HIDDEN, key) if isinstance(key, str) else key
        result[clean] = _redact(item, depth + 1, *((own, own_level) if own_level else (name, level)))
    return result


# -- command lines -----------------------------------------------------------------------------------------------------

_ARGUMENT = re.compile(r"([-+~]*([\w.-]+)=)(.*)", re.DOTALL)
_NEXT_IS_SECRET = re.compile(r"--?[A-Za-z][\w.-]*")


def _after_flags(items: Iterable[Any]) -> Iterable[Any]:
    """The items, each hidden that follows a flag such as ``--token``."""
    flag, level = "", _NONE
    for item in items:
        is_flag = isinstance(item, str) and _NEXT_IS_SECRET.fullmatch(item) is not None
        if level and not is_flag and isinstance(item, str | int | float) and _is_secret(item, flag, level):
            yield HIDDEN
        else:
            yield item
        flag = item if is_flag else ""
        level = _level(flag)


def _argument(text: str) -> str:
    named = _ARGUMENT.fullmatch(text)
    if named:
        level = _level(named[2])
        if level:
            return named[1] + HIDDEN if _is_secret(named[3], named[2], level) else text
    return _text(text)


# -- shapes ------------------------------------------------------------------------------------------------------------
# Every pattern is linear: what may be long is possessive or ends the match, and starts only where it cannot overlap.

_SHAPES = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f][0-9A-Fa-f])|(?<=\\[nrt]))(?:"
    + "|".join(
        (
            r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS: key ids, session tokens, Bedrock
            r"(?:FwoGZXIvYXdz|IQoJb3JpZ2lu)[A-Za-z0-9+/=%]{20,}",
            r"ABSK[A-Za-z0-9+/]{100,}=*",
            r"gh[pousr]_[A-Za-z0-9]{20,}",  # GitHub, GitLab, Bitbucket, Atlassian
            r"github_pat_\w{20,}",
            r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-[\w-]{20,}",
            r"ATBB[A-Za-z0-9]{24,}",
            r"ATATT3[\w=-]{20,}",
            r"hf_[A-Za-z0-9]{30,}",  # Hugging Face, W&B, Neptune, Kaggle
            r"api_org_[A-Za-z0-9]{30,}",
            r"wandb_v1_\w{20,}",
            r"eyJhcGlf[\w+/-]{40,}={0,2}",
            r"KGAT_[0-9a-f]{32}",
            r"sk-(?:ant|proj|svcacct|admin|or|lf)-[\w-]{20,}",  # OpenAI, Anthropic and the like
            r"sk-[A-Za-z0-9]{32,}",
            r"(?:gsk_|r8_|xai-|pplx-)[A-Za-z0-9]{30,}",
            r"(?:nvapi-|pcsk_)[\w-]{40,}",
            r"lsv2_(?:pt|sk)_\w{30,}",
            r"esecret_[A-Za-z0-9]{20,}",
            r"rpa_[A-Z0-9]{40,}",
            r"xox[abeoprs]-[\w.-]{10,}",  # Slack, Discord
            r"xapp-[\w-]{10,}",
            r"[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}",
            r"AIza[\w-]{35}",  # Google
            r"ya29\.[\w.-]{20,}",
            r"GOCSPX-[\w-]{20,}",
            r"1//0[\w-]{30,}",
            r"(?:eyJ0eXBlIjog?I|ewogICJ0eXBlIjogI)[\w+/-]{40,}={0,2}",
            r"(?<![\w-])eyJ[\w-]{8,}+\.[\w-]{4,}+(?:\.[\w-]*+){1,3}",  # JWT
            r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}",  # Stripe, Twilio, SendGrid, Mailgun, Square, Shopify
            r"whsec_[A-Za-z0-9+/=]{16,}",
            r"SK[0-9a-f]{32}(?![0-9a-f])",
            r"SG\.[\w-]{16,}+\.[\w-]{16,}",
            r"key-[0-9a-f]{32}(?![0-9a-f])",
            r"sq0(?:atp|csp)-[\w-]{22,}",
            r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
            r"dapi[0-9a-f]{32}(?:-[0-9])?",  # Databricks, package registries, clouds, vaults, monitors
            r"pypi-Ag[\w-]{30,}",
            r"npm_[A-Za-z0-9]{30,}",
            r"rubygems_[0-9a-f]{48}",
            r"dckr_[po]at_[\w-]{20,}",
            r"do[opr]_v1_[0-9a-f]{64}",
            r"[A-Za-z0-9]{14}\.atlasv1\.[\w-]{40,}",
            r"hv[sbr]\.[\w-]{20,}",
            r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9]{40,}",
            r"tskey-[\w-]{15,}",
            r"AGE-SECRET-KEY-1[0-9A-Z]{50,}",
            r"gl(?:c|sa)_[\w+/=]{30,}",
            r"NRAK-[A-Z0-9]{27}",
            r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
            r"lin_api_[A-Za-z0-9]{40}",
            r"(?:ntn_|secret_)[A-Za-z0-9]{43}",
            r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",
            r"figd_[\w-]{40}",
            r"sbp_[0-9a-f]{40}",
            r"sb_secret_[\w-]{20,}",
        )
    )
    + ")",
    re.ASCII,
)

_WITHIN = tuple(
    (needle, re.compile(pattern))  # looked for only where the text, in lower case, has the needle
    for needle, pattern in (
        (
            "private key",
            r"(?P<head>-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)(?s:.*?)(?P<tail>-----END |\Z)",
        ),
        ("://", r"(?<=://)(?P<head>[^\s/?#@:\"'<>]*+:)(?![0-9]{1,5}[/?#])[^\s/\"'<>]+(?P<tail>@)"),
        ("http", r"(?:(?<=http://)|(?<=https://))(?P<head>)[\w.~%-]{20,}+(?P<tail>@)"),
        ("sig", r"(?P<head>(?i:(?:^|[?&;])(?:x-(?:amz|goog)-signature|sig)=))[^&\s\"'#<>]+(?P<tail>)"),
        ("signature=", r"(?P<head>(?i:(?<![\w-])signature=))[\w%+/=-]{16,}(?P<tail>)"),
        ("hooks.slack", r"(?P<head>hooks\.slack\.com/(?:services|workflows|triggers)/)[\w/-]+(?P<tail>)"),
        ("/webhooks/", r"(?P<head>discord(?:app)?\.com/api/webhooks/[0-9]{1,32}/)[\w-]+(?P<tail>)"),
        ("webhookb2", r"(?P<head>webhook\.office\.com/webhookb2/)[\w@/-]+(?P<tail>)"),
        (":aa", r"(?<![0-9])(?P<head>)[0-9]{8,10}:AA[\w-]{30,}(?P<tail>)"),  # Telegram
        ("cookie:", r"(?P<head>(?i:(?<![\w-])(?:set-)?cookie:\s{0,8}))[^\s\"'][^\r\n\"']*+(?P<tail>)"),
        ("login", r"(?P<head>(?i:\blogin\s{1,8}\S{1,256}\s{1,8}password\s{1,8}))\S+(?P<tail>)"),  # ~/.netrc
        ("wandb login", r"(?P<head>\bwandb login\s{1,8}(?:--[a-z-]{1,20}\s{1,8}){0,4})[0-9a-f]{40}(?P<tail>)\b"),
        ("wandb.login", r"(?P<head>\bwandb\.login\((?:key\s?=\s?)?[\"'])[0-9a-f]{40}(?P<tail>)\b"),
    )
)
_DIGIT = re.compile(r"[0-9]", re.ASCII)
_BEARER = re.compile(r"(?i:(\bbearer\s{1,8}))([\w.~+/-]{8,}+=*)", re.ASCII)
_BASIC = re.compile(r"(?i:(\bbasic\s{1,8}))([A-Za-z0-9+/]{6,}+={0,2})")


def _text(text: str) -> str:
    """``text`` without what has the shape of a secret, and without values of secret names."""
    if len(text) < 5:
        return text
    lower = text.lower()
    for needle, pattern in _WITHIN:
        if needle in lower:
            text = pattern.sub(_hidden_within, text)
    text = _SHAPES.sub(HIDDEN, text)
    if "bearer" in lower:
        text = _BEARER.sub(_hidden_bearer, text)
    if "basic" in lower:
        text = _BASIC.sub(_hidden_basic, text)
    if _HINT.search(lower):
        text = _assigned(text, _ASSIGNMENT)
        if "-" in text:
            text = _assigned(text, _FLAG)
    return text


def _hidden_within(found: re.Match[str]) -> str:
    return found["head"] + HIDDEN + found["tail"]


def _hidden_bearer(found: re.Match[str]) -> str:
    return found[1] + HIDDEN if _looks_random(found[2]) else found[0]


def _hidden_basic(found: re.Match[str]) -> str:
    try:
        is_login = b":" in binascii.a2b_base64(found[2], strict_mode=True)
    except binascii.Error:
        is_login = False
    return found[1] + HIDDEN if is_login else found[0]


def _looks_random(value: str) -> bool:
    return len(value) >= 24 or (len(value) >= 8 and _DIGIT.search(value) is not None)


# -- names and values in running text ----------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(
    r"(?<![\w.-])(?P<name>(?i:api|access|secret|private|account|auth|session|refresh) (?i:key|token|secret)|[\w.-]++)"
    r"(?P<quote>\\*+[\"']?\]?)[ \t]{0,8}(?P<sign>:=|=>|==?|:(?!:))(?P<blank>[ \t]{0,8})"
)
_FLAG = re.compile(r"(?<![\w.-])(?P<name>--?[A-Za-z][\w.-]*+)(?P<quote>)(?P<sign>)(?P<blank>[ \t]{1,8})(?=[^\s-])")
_SCHEME = r"(?:(?i:bearer|basic|token|digest|apikey)\s{1,8}(?=[^\s\"']))?"
_HEAD = re.compile(rf"{_SCHEME}(?:(\\*+)(\"\"\"|'''|[\"']){_SCHEME})?")
_QUOTED = {quote: re.compile(rf"(?:[^{quote}\\\n]|\\.)*+") for quote in "\"'"}
_PUBLIC_HERE = re.compile(rf"(?:{_PUBLIC}|[|>][-+]?)(?![^\s,;&\"'<>)\]}}\\])")
# To the next blank. What may close something around the value belongs to it where it goes on behind.
_GOES_ON = r"(?=[^\s,;&\"'<>)\]}\\.])"
_BARE = {
    stops: re.compile(
        rf"(?:[^\s,{stops}\"'<>)\]}}\\]|,{_GOES_ON}(?![\w.-]{{1,64}}[\"']?[=:])|[\"'<>)\]}}\\]{_GOES_ON})++"
    )
    for stops in (";&", "")
}


def _assigned(text: str, pattern: re.Pattern[str]) -> str:
    """``text`` without the values that ``pattern`` finds assigned to secret names."""
    pieces, done, at = [], 0, 0
    unclosed: dict[str, int] = {}
    while found := pattern.search(text, at):
        at = found.end()
        level = _level(found["name"])
        if not (level and _is_assigned(text, found)):
            continue
        start, end = _extent(text, found, unclosed)
        if end > start and _is_told(text, found, text[start:end], level):
            pieces += [text[done:start], HIDDEN]
            done = at = end
        elif end - start > 64:  # not read twice; what is not told is nearly always short
            at = end
    return "".join(pieces) + text[done:] if pieces else text


def _extent(text: str, found: re.Match[str], unclosed: dict[str, int]) -> tuple[int, int]:
    """Where the value that follows stands; empty when it is none that could be secret.

    A quote that is not closed is looked for once only: ``unclosed`` remembers how far.
    """
    head = _HEAD.match(text, found.end())
    assert head is not None  # it matches nothing too
    start = head.end()
    escapes, quote = head.groups()
    if quote:
        closing = escapes + quote
        if start >= unclosed.get(closing, 0):
            if escapes or len(quote) > 1:
                end = text.find(closing, start)
                end = len(text) if end < 0 else end
            else:
                content = _QUOTED[quote].match(text, start)
                end = content.end() if content else start
            if text.startswith(closing, end):
                return start, end
            unclosed[closing] = end
    if _PUBLIC_HERE.match(text, start):
        return start, start
    bare = _BARE["" if found["sign"] == ":" else ";&"].match(text, start)
    return start, bare.end() if bare else start


def _is_assigned(text: str, found: re.Match[str]) -> bool:
    """Whether a colon assigns: not that of ``secret:v1`` or ``token://x``."""
    at = found.end()
    if found["sign"] != ":" or found["blank"] or found["quote"] or text[at : at + 1] in ("'", '"'):
        return True
    name = found["name"].lower()
    if found.start() and text[found.start() - 1] in "{,":
        return True
    return ("pass" in name or name.endswith("key")) and not text.startswith("//", at)


def _is_told(text: str, found: re.Match[str], value: str, level: int) -> bool:
    """Whether running text gives away the secret ``value`` here: less certain than the member of a mapping."""
    name = found["name"]
    if not _is_secret(value, name, level):
        return False
    if (
        level == _SURE
        or found["quote"]
        or name.startswith("-")
        or name.isupper()
        or text[max(found.start() - 1, 0)] in "?&"
    ):
        return True
    return _looks_random(value)
