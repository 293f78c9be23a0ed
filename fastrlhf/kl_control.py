"""How strongly the KL to the reference weighs from step to step."""

from __future__ import annotations

from fastrlhf.config import PPOConfig

CLIP = 0.2  # the error is clipped to +-20%, as in the paper


class KLController:
    """kl_coef, fixed or adaptive (Ziegler et al. 2019, sec. 2.2): after each step

        coef *= 1 + clip(kl / kl_target - 1, +-0.2) * responses / kl_horizon

    with kl in nats a response (`kl/ref`) and the responses of all devices.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config, self.coef = config, config.kl_coef

    def update(self, kl: float) -> None:
        """kl: `kl/ref` of the step, measured before its updates."""
        if self.config.kl_controller == "fixed":
            return
        error = min(max(kl / self.config.kl_target - 1.0, -CLIP), CLIP)
        self.coef *= 1.0 + error * self.config.rollout_batch_size / self.config.kl_horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
