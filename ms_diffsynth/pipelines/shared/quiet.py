"""Importing mindone without its chatter: it prints and warns about packages and models that play no part here."""
from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what is printed and warned inside; exceptions pass."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # not one logger's level: transformers sets its own while it is imported
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
