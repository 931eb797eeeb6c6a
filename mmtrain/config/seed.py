"""Seeds for random draws. There is no random state in a run: every draw has its own key (seed, site...)."""

import hashlib
import json


def derive(seed: int, *site: str | int) -> int:
    """A seed for the draw at `site`, for torch.Generator().manual_seed or random.Random: 0 <= seed < 2**63.

    Two sites differ when any component differs, in value or in type: ("init", "a", 1) is neither ("init", "a1") nor
    ("init", "a", "1"). The value is the same on every machine, Python and PyTorch version.
    """
    key = json.dumps([seed, *site], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
