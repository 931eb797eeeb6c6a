"""Door to Weights & Biases. Only this file imports wandb, and only when a recipe asks for it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Log

told = logging.getLogger("mmtrain.run")

_FINISH = 60.0  # seconds to send the rest in at the end, while the other ranks wait
_RUN_ID = "wandb_id"  # file in the run folder: a resumed run goes on with its own curves


class WandbLog:
    """Rank 0's. `disabled` does nothing, `offline` needs no account, `online` uses the account that wandb knows.

    A run that goes on does so offline when wandb does not answer. ConfigError: no account, or none yet that answers.
    """

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

        def start(mode: str) -> Any:
            return wandb.init(
                project=log.project,
                name=name,
                id=known,
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH),
            )

        try:
            self._run = start(log.wandb)
        except wandb.errors.Error as error:
            if known is None or log.wandb == "offline":
                raise ConfigError(f"log.wandb={log.wandb}: {error}. `wandb login`, or log.wandb=offline") from None
            told.warning("log.wandb=%s: %s. Going on offline; `wandb sync` sends what is kept", log.wandb, error)
            wandb.teardown()  # or the id would be in use, by the start that failed
            self._run = start("offline")
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
