"""The version of the installed distribution, of which pyproject.toml is the only source."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("altermoma-pl")
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "0+unknown"
