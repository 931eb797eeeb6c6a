"""Rules of the stream: sources, packs and the packing window."""

from collections.abc import Iterator

from mmtrain.config.layout import lane_problems
from mmtrain.config.schema import CURSOR_BYTES, Recipe


def stream_problems(recipe: Recipe) -> Iterator[str]:
    """The mixture and the packs."""
    data, tokens = recipe.data, recipe.model.connector.num_tokens
    if not data.sources:
        yield "data.sources is empty; name at least one folder of shards, data.sources.NAME.shards=FOLDER"
    elif not any(source.weight for source in data.sources.values()):
        yield f"data.sources: every weight is 0 ({', '.join(data.sources)}); give one of them a weight above 0"
    weights = data.loss_weights
    if not weights.after_image and not weights.text_only:
        yield "data.loss_weights: after_image and text_only are both 0, so nothing would be learnt; raise one of them"
    frames = 1 + data.sub_images
    if data.sequence_length <= tokens * frames:
        yield (
            f"data.sequence_length={data.sequence_length} holds no text beside one image of "
            f"{frames} x {tokens} = {frames * tokens} tokens (1 + data.sub_images={data.sub_images}, "
            f"model.connector.num_tokens={tokens}); the least is {frames * tokens + 1}"
        )
    window = recipe.model.decoder.sliding_window
    if 0 < window < data.sequence_length:
        yield (
            f"data.sequence_length={data.sequence_length} is longer than the {window} positions that the decoder "
            f"attends back to (model.decoder.sliding_window); the nearest is {window}"
        )
    if data.max_images < frames:
        yield (
            f"data.max_images={data.max_images} is less than the {frames} pieces of one image "
            f"(1 + data.sub_images={data.sub_images}); the nearest is {frames}"
        )
    yield from lane_problems(data)
    yield from _window(recipe)


def _window(recipe: Recipe) -> Iterator[str]:
    """Bounds of the packing window: the promises of the plan need them."""
    data = recipe.data
    sources = sum(source.weight > 0 for source in data.sources.values())
    if not sources:
        return
    if data.max_wait < data.least_wait(sources):
        yield (
            f"data.max_wait={data.max_wait}: {sources} sources need at least {data.least_wait(sources)} packs to keep "
            "their mixture"
        )
    most = data.most_window(sources)
    if data.window > most:
        yield (
            f"data.window={data.window}: with {sources} sources at most {most} documents, so that the state of the "
            f"stream stays below {CURSOR_BYTES // 1024} KiB"
        )
