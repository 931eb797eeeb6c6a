"""Made-up sources for tests of the plan: sizes only, no files."""

from collections.abc import Sequence

from mmtrain.config.tokens import TokenKind
from mmtrain.data.columns import Columns, Index
from mmtrain.data.image import Canvas
from mmtrain.data.index import Shard
from mmtrain.data.ordering import Planned, Sizer
from mmtrain.data.record import IndexEntry, IndexHeader, Segment

IMAGE_TOKENS = 4
SIZER = Sizer(Canvas(16, 16), IMAGE_TOKENS)
IMAGE = Segment(TokenKind.IMAGE, width=10, height=10)


def text(tokens: int) -> Segment:
    """A text of so many tokens."""
    return Segment(TokenKind.TEXT, tokens, tokens)


def room(segment: Segment, sizer: Sizer = SIZER) -> tuple[int, int]:
    """Positions and panels of one segment."""
    panels = sizer.canvas.panels(segment.width, segment.height) if segment.is_image else 0
    return segment.tokens + panels * sizer.image_tokens, panels


def source(name: str, documents: Sequence[Sequence[Segment] | None], per_shard: int = 3) -> list[Shard]:
    """Shards of documents, given as segments; None is an unusable sample. Register them for `read`."""
    shards = []
    for start in range(0, len(documents), per_shard):
        rows = documents[start : start + per_shard]
        entries = tuple(
            IndexEntry(f"{name}-{start + at}", 0, 0, "text", (), tuple(row or ()), "" if row else "broken")
            for at, row in enumerate(rows)
        )
        path = f"{name}/{start}"
        header = IndexHeader(2, "tokenizer", f"{start}.tar", 0, repr(entries), len(rows), 0, 0, 0, 0)
        _INDEXES[f"{path}.index"] = Index(f"{path}.tar", header, Columns.of(entries))
        shards.append(Shard(f"{path}.tar", header, f"{path}.index"))
    return shards


_INDEXES: dict[str, Index] = {}


def read(path: str) -> Index:
    """What `read_index` is for files; of sources with one name, the last one made."""
    return _INDEXES[path]


def entry_of(planned: Planned) -> IndexEntry:
    """The sample behind a planned document."""
    return read(planned.index).columns.entry(planned.row)


def names(packs: Sequence[Sequence[Planned]]) -> list[list[tuple[str, object]]]:
    """Packs as comparable values."""
    return [[(entry_of(planned).key, planned.cut) for planned in pack] for pack in packs]
