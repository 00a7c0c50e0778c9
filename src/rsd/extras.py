"""Optional dependencies: groups of pyproject.toml that one line of an error names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rsd.types import RsdError


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """The imports inside need the extra `name`: RsdError with what to install where a package is missing or broken."""
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise RsdError(f"expected the package {package}, found none: pip install 'rsd-vla[{name}]'") from error
