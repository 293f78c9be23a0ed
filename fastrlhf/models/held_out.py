"""What reward training measured on held-out rows: kept in the model's folder, where PPO looks for what to doubt."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fastrlhf.data.sources import modelscope_folder

FILE = "held_out.json"
LEAST_ACCURACY = 0.6  # of ordered pairs; 0.5 is chance
LEAST_CORRELATION = 0.31  # where rows have scores only: of two normal variables so correlated, 0.6 of all pairs agree


@dataclass
class HeldOut:
    """rows: held out, 0 where none were. step: of the last evaluation. accuracy: share of the pairs in the right order;
    correlation: with given scores; None where the rows have no such thing, or were never evaluated."""

    rows: int = 0
    step: int = 0
    pairs: int = 0
    accuracy: float | None = None
    correlation: float | None = None

    def doubt(self) -> str | None:
        """Why a policy should not be trained against this reward model, behind its name; None: nothing known is."""
        if not self.rows:
            return "has no held-out rows, so nobody knows whether it ranks what it has not seen"
        if self.accuracy is not None and self.accuracy < LEAST_ACCURACY:
            pairs = f"{self.accuracy:.1%} of {self.pairs} held-out pairs"
            return f"ranks {pairs} as people did (50% is chance, an alarm below {LEAST_ACCURACY:.0%})"
        if self.accuracy is None and self.correlation is not None and self.correlation < LEAST_CORRELATION:
            return f"gives held-out replies scores that correlate {self.correlation:.2f} with people's"
        if self.accuracy is None and self.correlation is None:
            return f"is not measured on its {self.rows} held-out rows, so nobody knows whether it ranks them"
        return None

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def text(self) -> str:
        """The content of FILE."""
        return json.dumps(self.state(), indent=1) + "\n"


def held_out_of(source: str | PreTrainedModel) -> HeldOut | None:
    """What lies in a reward model's folder (of a loaded model: the one it came from); None: no record that we know."""
    name = source.config._name_or_path if isinstance(source, PreTrainedModel) else source
    folder = modelscope_folder(str(name), "reward") or name
    try:
        return _read(json.loads((Path(folder) / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read(record: dict[str, Any]) -> HeldOut:
    """Raises TypeError, ValueError for what `text` did not write."""
    held_out = HeldOut(**record)
    counts = (held_out.rows, held_out.step, held_out.pairs)
    shares = [share for share in (held_out.accuracy, held_out.correlation) if share is not None]
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not all(map(math.isfinite, shares)):
        raise ValueError(f"no record of held-out rows: {record}")
    return held_out
