"""The errors a user can act on. Every message says where, what, why and what to do now."""


class UserError(Exception):
    """A mistake outside the code. Entry points print it as one line and exit with code 2, without a traceback."""


class ConfigError(UserError, ValueError):
    """A recipe, an override or a layout that cannot run."""


class DataError(UserError, ValueError):
    """Shards, indexes, documents or images that cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is damaged, belongs to another model, or cannot be written."""
