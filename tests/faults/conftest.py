"""The tiny shards of the training tests."""

from tests.train.conftest import shards

__all__ = ["shards"]
