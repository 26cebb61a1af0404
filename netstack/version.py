"""The one place of the version; pyproject.toml reads it from here without importing the package."""

from typing import Final

__version__: Final = "0.1.0"
