"""What the server of tests.dist imports once for all ranks."""

import mmtrain.parallel.engine
import mmtrain.train  # noqa: F401
