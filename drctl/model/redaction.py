"""Takes secrets out of texts that leave the house: keys, passwords, tokens, what follows a command's name. Pure.

It errs on the side of taking too much. What it takes out it names, so that a reader knows that something was there."""

from __future__ import annotations

import re

REMOVED = "[removed]"
_WORDS = r"passw(?:or)?d|passphrase|passcode|secret|token|api[_-]?key|credential|private[_-]?key|auth[_-]?key"
_STRING = r"\"(?:\\.|[^\"\\])*\"|'[^']*'"

#: A key in PEM; one whose end is cut off goes to the text's end.
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)
#: What is left of one whose beginning is cut off.
_PEM_END = re.compile(r"\A(?:[A-Za-z0-9+/=]{20,}\s+)*[A-Za-z0-9+/=]*\s*-----END [A-Z0-9 ]*PRIVATE KEY-----")
#: `fence = ["program", …]` and the like: what stands behind the program may be anything.
_COMMAND = re.compile(
    rf"(?m)^([ \t]*(?:fence|notify|command|argv|run)[ \t]*=[ \t]*\[\s*(?:{_STRING}))(?:[^\]\"']|{_STRING})*\]"
)
#: `environment` and headers of scripts, as inline tables.
_TABLE = re.compile(rf"(?m)^([ \t]*(?:env|environment|headers)[ \t]*=[ \t]*)\{{(?:[^}}\"']|{_STRING})*\}}")
# All that may repeat is bounded below: a log is long, and a pattern must not go back and forth over it.
#: `password = "x"`, `"token": "x"`, `passwd='x'`, `DB_PASSWORD=x`.
_PAIR = re.compile(
    rf"(?i)((?:(?:{_WORDS})[\w.-]{{0,40}}|(?<![\w.-])pass)([\"']?)\s{{0,8}}[:=]\s{{0,8}})"
    rf"({_STRING}|[^\s,;\[\]{{}}\"'<>]+)"
)
#: `--password x`, `"--password", "x"`.
_OPTION = re.compile(
    rf"(?i)(-(?:[\w-]{{0,24}}(?:{_WORDS})[\w-]{{0,24}}|pass))([\"']?\s{{0,8}},\s{{0,8}}[\"']|\s{{1,8}})(?!-)([^\s\"',\]]+)"
)
_USER = re.compile(r"(\w{1,20}://[^\s/@:]{0,200}):[^\s/@]{1,200}@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s{1,8}[A-Za-z0-9._~+/=-]{8,}")


def redact(text: str) -> str:
    """The text without what looks like a secret."""
    text = _PEM.sub(f"{REMOVED}: a private key", text)
    text = _PEM_END.sub(f"{REMOVED}: a private key", text)
    text = _COMMAND.sub(rf'\1, "{REMOVED}"]', text)
    text = _TABLE.sub(rf'\1{{ "{REMOVED}" = "" }}', text)
    text = _BEARER.sub(rf"\1 {REMOVED}", text)
    text = _PAIR.sub(lambda found: found[1] + _like(found[2], found[3]), text)
    text = _OPTION.sub(rf"\1\2{REMOVED}", text)
    return _USER.sub(rf"\1:{REMOVED}@", text)


def _like(quote: str, value: str) -> str:
    """In the value's quotes, or its key's, so that TOML and JSON stay what they are."""
    quote = value[0] if value[0] in "\"'" else quote
    return f"{quote}{REMOVED}{quote}"
