"""Made-up sources for tests of the plan: sizes only, no files."""

from collections.abc import Sequence

from mmtrain.config.tokens import TokenKind
from mmtrain.data.image import Canvas
from mmtrain.data.index import Shard
from mmtrain.data.ordering import Sizer
from mmtrain.data.record import Index, IndexEntry, IndexHeader, Segment
from mmtrain.data.window import Planned

IMAGE_TOKENS = 4
SIZER = Sizer(Canvas(16, 16), IMAGE_TOKENS)
IMAGE = Segment(TokenKind.IMAGE, width=10, height=10)


def text(tokens: int) -> Segment:
    """A text of so many tokens."""
    return Segment(TokenKind.TEXT, tokens, tokens)


def source(name: str, documents: Sequence[Sequence[Segment] | None], per_shard: int = 3) -> list[Shard]:
    """Shards of documents, given as segments; None is an unusable sample. Register them for `read`."""
    shards = []
    for start in range(0, len(documents), per_shard):
        rows = documents[start : start + per_shard]
        entries = tuple(
            IndexEntry(f"{name}-{start + at}", 0, 0, "text", (), tuple(row or ()), "" if row else "broken")
            for at, row in enumerate(rows)
        )
        path = f"{name}/{start}.tar"
        digest = repr(entries)
        header = IndexHeader(1, "tokenizer", path, 0, digest, len(rows), sum(not row for row in rows), 0, 0, 0)
        _INDEXES[path, digest] = Index(path, header, entries)
        shards.append(Shard(path, header))
    return shards


_INDEXES: dict[tuple[str, str], Index] = {}


def read(shard: Shard) -> Index:
    """What `read_index` is for files."""
    return _INDEXES[shard.path, shard.header.members_sha256]


def names(packs: Sequence[Sequence[Planned]]) -> list[list[tuple[str, object]]]:
    """Packs as comparable values."""
    return [[(planned.entry.key, planned.cut) for planned in pack] for pack in packs]
