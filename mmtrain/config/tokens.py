"""What a position of a pack is: shared by the data that fills packs and the model that reads them."""

from enum import IntEnum


class TokenKind(IntEnum):
    """The three kinds of positions in a pack."""

    PADDING = 0
    TEXT = 1
    IMAGE = 2
