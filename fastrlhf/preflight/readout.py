"""What a reward model's head reads, and who can go on with it: checked before weights are loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import RewardConfig
from fastrlhf.models.heads import Readout
from fastrlhf.models.loading import Source, is_scalar_model
from fastrlhf.models.reward_folder import kept_readout, learnt_bias_of
from fastrlhf.reward.features import NEEDS_HELD_OUT

ANEW = "or start from a causal LM"


def asked_readout(config: RewardConfig) -> Readout:
    """What the config says of a new head, where it is not auto."""
    layer = config.readout_layer
    return Readout(config.readout or "last", -1 if layer is None else layer)


def check_readout(config: RewardConfig, source: Source, model: PreTrainedModel | None, *, held_out: bool) -> None:
    """UserError where the model that learns cannot be read so. model: `source` without its weights, None where they
    have to be loaded first; held_out: whether there are held-out rows."""
    if config.readout == "auto" and not held_out:
        raise UserError(NEEDS_HELD_OUT)
    if not is_scalar_model(source):
        if model is not None:
            asked_readout(config).check(model.config.get_text_config().num_hidden_layers, "readout_layer")
        return
    name = repr(source) if isinstance(source, str) else type(source).__name__
    kept, asked = kept_readout(source), asked_readout(config)
    given = config.readout is not None or config.readout_layer is not None
    if given and (config.readout == "auto" or asked != kept):
        what = "auto" if config.readout == "auto" else str(asked)
        raise UserError(
            f"readout: {what} is not what the head of {name} reads, {kept}; leave readout and readout_layer out, {ANEW}"
        )
    if kept != Readout() and not config.head_only:
        raise UserError(f"model: the head of {name} reads {kept}; use head_only = true to go on with it, {ANEW}")
    if config.lora is not None and isinstance(source, str) and learnt_bias_of(source) is not None:
        raise UserError(f"model: the head of {name} has a bias, which an adapter does not hold; leave lora out, {ANEW}")
