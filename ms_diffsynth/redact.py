"""Takes tokens and passwords out of text before it is written: messages, logs, model cards, command lines.

Two nets. What is known to be secret is found by its value, also percent-encoded or in base64: environment variables
with such a name, and the token of huggingface_hub's login. What only looks secret is found by its form: ``hf_...``,
``ms-...``, ``Bearer ...``, ``user:password@`` in an address, ``password=...``. It is the one place outside `runtime`
that reads the environment, and nothing of it is kept.
"""
from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from huggingface_hub import get_token

HIDDEN = "[redacted]"
SHORTEST = 8  # characters of a value worth hiding: a shorter one would be found in innocent words

_SECRET_NAME = re.compile(r"(?i)token|secret|passw(or)?d|credential|(api|access|private|auth)_?key")
_HARMLESS_NAMES = frozenset({"TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_TOKEN_PATH"})
_OWNERS = "hub|hf|hugging_?face(?:_hub)?|modelscope(?:_api|_sdk)?|access|auth|api|bearer|refresh|git|wandb|security"
_KEYS = (rf"(?:{_OWNERS})[_-]token|(?:\w+[_-])?(?:passw(?:or)?d|secret|(?:api|access|secret)[_-]?key)|"
         r"x-amz-\w[\w-]*|signature|m_session_id")
_WORD = r"[\w+/=~.-]"
_FORMS = tuple((re.compile(pattern, re.IGNORECASE | re.MULTILINE), replacement) for pattern, replacement in (
    (r"\b(?:hf|api_org)_(?:(?:jwt|oauth|app)_)?[a-z0-9]{16,}[\w.-]*", HIDDEN),
    (r"\bms-(?=[0-9a-f-]*\d)[0-9a-f-]{16,}", HIDDEN),
    (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+", HIDDEN),  # a JSON web token
    (r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", rf"\1 {HIDDEN}"),
    (r"(?<=://)[^/\s\"'<>]*@", f"{HIDDEN}@"),
    (r"([?&]\w*token=)[^&\s\"']+", rf"\1{HIDDEN}"),
    (rf"(--(?:\w+[_-])?(?:token|{_KEYS})[=\s]\s*[\"']?)[^\s\"']+", rf"\1{HIDDEN}"),
    (rf"((?<![\w-])(?:{_KEYS})[\"']?\s*[=:]\s*[\"']?)(?!\[redacted\])[^\s\"',;&{{}}<>]{{6,}}", rf"\1{HIDDEN}"),
    # "token" alone is a word of language models too: its value must look random
    (rf"((?<![\w-])token[\"']?\s*[=:]\s*[\"']?)(?={_WORD}*\d){_WORD}{{12,}}(?![\w+/=~.([-])", rf"\1{HIDDEN}"),
))


def redact(text: str, *secrets: str) -> str:
    """``text`` with every secret replaced by ``[redacted]``; redacting twice changes nothing more.

    Args:
        secrets: further values to hide, as they are.
    """
    for value in sorted({form for secret in (*secrets, *_known()) for form in _forms(secret)}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


class RedactFilter(logging.Filter):
    """Redacts log records, tracebacks included: ``handler.addFilter(RedactFilter())``."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record in place and let it pass."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # of a library whose arguments do not fit its text
            message = f"{record.msg} {record.args}"
        record.msg, record.args = redact(message), None
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


@contextlib.contextmanager
def redacted_logs(name: str) -> Iterator[None]:
    """Redact what the library ``name`` logs: a hub's client names addresses, and those of its storage are signed."""
    redacting, handlers = RedactFilter(), list(logging.getLogger(name).handlers)
    for handler in handlers:
        handler.addFilter(redacting)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redacting)


def _known() -> Iterator[str]:
    """Values that are secret whatever they look like."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and name.upper() not in _HARMLESS_NAMES and not os.path.isabs(value):
            yield value
    if token := get_token():
        yield token


def _forms(secret: str) -> Iterator[str]:
    """A value as it is, percent-encoded, and inside base64 text, where it begins at one of three positions."""
    secret = secret.strip()
    if len(secret) < SHORTEST:
        return
    yield secret
    yield quote(secret, safe="")
    data = secret.encode()
    for shift, begin in ((0, 0), (1, 2), (2, 3)):
        whole = (shift + len(data)) * 8 // 6  # characters whose six bits all are the value's
        encoded = base64.b64encode(bytes(shift) + data).decode()[begin:whole]
        if len(encoded) >= SHORTEST:
            yield encoded
            yield encoded.replace("+", "-").replace("/", "_")
