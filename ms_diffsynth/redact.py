"""Takes tokens and passwords out of text before it is written: messages, logs, model cards, command lines.

Two nets. What is known to be secret is found by its value, also percent-encoded or in base64: environment variables
with such a name, and the token of huggingface_hub's login. What only looks secret is found by its form: ``hf_...``,
``ms-...``, ``Bearer ...``, ``user:password@`` in an address, ``password=...``. It is the one place outside `runtime`
that reads the environment, and nothing of it is kept.

Text leaves a run by two doors, and is redacted there: log records (`redact_logs`), and writers: of the terminal
(`redacted_terminal`), of files (`without_secrets` before they are made, since JSON and YAML escape what is in them).
"""
from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote

from ms_diffsynth.errors import OutputError

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


def without_secrets(value: Any, name: str = "") -> Any:
    """A value that is written as JSON, YAML or metadata, with every secret taken out, in the names of a mapping too.

    Args:
        name: what the value is called: ``api_key`` gives away that it is a secret.
    """
    if isinstance(value, Mapping):
        return {redact(str(key)): without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, name) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return redact(f"{redact(name)}={redact(str(value))}").removeprefix(f"{redact(name)}=")


def redact_logs() -> None:
    """From now on no secret is in a log record, of this package or of any library, nor in a traceback of one.

    The record is redacted when it is made: mindone, imported late, brings a handler and does not hand its records on,
    and a hub's client logs addresses that are signed.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "is_redacting", False):
        return

    def record(*given: Any, **named: Any) -> logging.LogRecord:
        made = make(*given, **named)
        try:
            message = made.getMessage()
        except (TypeError, ValueError, KeyError):  # of a library whose arguments do not fit its text
            message = f"{made.msg} {made.args}"
        made.msg, made.args = redact(message), None
        if made.exc_info:
            made.exc_text = redact(made.exc_text or logging.Formatter().formatException(made.exc_info))
        if made.stack_info:
            made.stack_info = redact(made.stack_info)
        return made

    record.is_redacting = True
    logging.setLogRecordFactory(record)


@contextlib.contextmanager
def redacted_terminal() -> Iterator[None]:
    """Inside the block, and in tracebacks that end the process after it, no secret is written to stdout or stderr."""
    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show
    with contextlib.redirect_stdout(_Redacted.of(sys.stdout)), contextlib.redirect_stderr(_Redacted.of(sys.stderr)):
        yield


class _Redacted:
    """A stream that redacts what is written to it, and is the one it was made of in all else.

    What the encoding of the terminal has not is written as an escape; of a process without a terminal nothing is said.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @classmethod
    def of(cls, stream: TextIO | None) -> Any:
        return stream if isinstance(stream, cls) else cls(stream)

    def write(self, text: str) -> int:
        if self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with _writing():
                self._stream.write(redact(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with _writing():
                self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written: {errno.errorcode.get(error.errno, 'unknown error')} "
                          f"({error.strerror}). Free some space, or send it elsewhere.") from error


def _known() -> Iterator[str]:
    """Values that are secret whatever they look like."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and name.upper() not in _HARMLESS_NAMES and not os.path.isabs(value):
            yield value
    if token := _login():
        yield token


def _login() -> str | None:
    """The token of huggingface_hub's login. The package takes 0.2 s to import, and is asked where there is a token."""
    from huggingface_hub import constants  # light

    if not os.path.isfile(constants.HF_TOKEN_PATH):  # one of the environment has been found
        return None
    from huggingface_hub import get_token

    return get_token()


def _forms(secret: str) -> Iterator[str]:
    """A value as it is, percent-encoded, and inside base64 text, where it begins at one of three positions."""
    secret = secret.strip()
    if len(secret) < SHORTEST:
        return
    yield secret
    yield quote(secret, safe="", errors="surrogateescape")
    data = secret.encode(errors="surrogateescape")  # an environment may hold any bytes
    for shift, begin in ((0, 0), (1, 2), (2, 3)):
        whole = (shift + len(data)) * 8 // 6  # characters whose six bits all are the value's
        encoded = base64.b64encode(bytes(shift) + data).decode()[begin:whole]
        if len(encoded) >= SHORTEST:
            yield encoded
            yield encoded.replace("+", "-").replace("/", "_")
