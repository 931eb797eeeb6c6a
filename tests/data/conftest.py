"""What every test of the data stream may ask for."""

from tests.data.streams import folder, remote

__all__ = ["folder", "remote"]
