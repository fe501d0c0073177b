"""Importing mindone without its chatter: it prints and warns about packages and models that play no part here."""
from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from ms_diffsynth.errors import DeviceError


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what is printed and warned inside.

    Raises: DeviceError when a package cannot be imported: one that does not fit the others, say.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # not one logger's level: transformers sets its own while it is imported
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        remedy = ("pyarrow 26 needs NumPy 2, which MindSpore does not work with: pip install 'pyarrow<26'"
                  if "pyarrow" in str(error) else "install the package in a version that fits, or remove it")
        raise DeviceError(f"mindone cannot be imported in this environment: {type(error).__name__}: {error}. Expected "
                          f"packages that fit each other; {remedy}.") from error
    finally:
        logging.disable(level)
