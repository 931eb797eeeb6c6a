"""The words of the questions that an evaluation puts itself. Training data that should match imports them from here."""

MATCHING = "Is this statement about the image true or false? {statement} Answer with true or false."
"""Image-text matching, as the NLVR conversations ask it."""

ANSWERS = {True: "true", False: "false"}
"""Label of a statement -> the answer in words."""


def matching_question(statement: str) -> str:
    """The question whether `statement` is true of the image."""
    return MATCHING.format(statement=statement.strip())
