"""Door to Weights & Biases. Only this file imports wandb, and only when a recipe asks for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Log

_RUN_ID = "wandb_id"  # file in the run folder: a resumed run goes on with its own curves


class WandbLog:
    """Rank 0's. `disabled` does nothing, `offline` needs no account, `online` uses the account that wandb knows."""

    def __init__(self, log: Log, name: str, run_dir: Path, config: Mapping[str, Any]):
        self._run = None
        if log.wandb == "disabled":
            return
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"log.wandb={log.wandb}: the package wandb is missing. `pip install wandb`, or log.wandb=disabled"
            ) from None
        id_file = run_dir / _RUN_ID
        known = id_file.read_text().strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=log.project,
                name=name,
                id=known,
                resume="allow",
                mode=log.wandb,
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"log.wandb={log.wandb}: {error}. `wandb login`, or log.wandb=offline") from None
        id_file.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl; nested maps become `loss_by_source/captions`."""
        if self._run is not None:
            self._run.log(flat(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one level of slash-joined names; lists get their index as a name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(index): inner for index, inner in enumerate(value)}
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}/"))
        elif value is not None and value != "":
            found[f"{prefix}{key}"] = value
    return found
