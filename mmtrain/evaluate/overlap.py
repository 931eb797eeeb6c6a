"""Has an evaluation image been trained on? Compares the images' bytes, not their names."""

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config.errors import DataError
from mmtrain.data.documents import IMAGE_SUFFIXES
from mmtrain.evaluate.files import image_names

EXAMPLES = 10


def overlap(shard_folders: Sequence[Path], data: Path, images: Path) -> dict[str, Any]:
    """Which images of the evaluation file `data` (paths relative to `images`) lie in the shards, byte for byte.

    Returns counts of different images: {"evaluation_images", "training_images", "shared", "examples": [{"image",
    "shard", "member"}]}. DataError: no shards in a folder, or an image that does not exist.
    """
    trained: dict[bytes, tuple[str, str]] = {}
    for folder in shard_folders:
        shards = sorted(Path(folder).glob("*.tar"))
        if not shards:
            raise DataError(f"{folder}: no .tar shards in it; name the folders that the training read")
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isfile() and member.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                        digest = hashlib.sha256(tar.extractfile(member).read()).digest()
                        trained.setdefault(digest, (str(shard), member.name))
    asked: dict[bytes, str] = {}
    for name in image_names(data):
        try:
            asked.setdefault(hashlib.sha256((images / name).read_bytes()).digest(), name)
        except OSError as error:
            raise DataError(f"{data}: image {name!r} cannot be read from {images} ({error.strerror})") from None
    shared = [digest for digest in asked if digest in trained]
    examples = [
        {"image": asked[digest], "shard": trained[digest][0], "member": trained[digest][1]}
        for digest in shared[:EXAMPLES]
    ]
    return {
        "evaluation_images": len(asked),
        "training_images": len(trained),
        "shared": len(shared),
        "examples": examples,
    }
