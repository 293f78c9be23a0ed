"""Whether a model can read the token rows of a run: ids of its vocabulary, as many positions as the longest needs."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError


def vocabulary_of(model: PreTrainedModel) -> int:
    """Tokens that the model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the model's configuration allows; None where it sets no end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_ids(model: PreTrainedModel, highest: int, role: str = "model") -> None:
    """UserError where the tokenizer writes a token that the model has not."""
    if highest >= vocabulary_of(model):
        raise UserError(
            f"tokenizer: it writes token {highest} and the {role} has {vocabulary_of(model)}; use the {role}'s own "
            "tokenizer"
        )


def check_limit(model: PreTrainedModel, longest: int, field: str, limit: int, role: str = "model") -> None:
    """UserError where the longest row has more tokens than the model positions. field, limit: what bounds the rows."""
    positions = positions_of(model)
    if positions is not None and longest > positions:
        raise UserError(
            f"{field} = {limit}: the longest row has {longest} tokens and the {role} has {positions} positions; set "
            f"{field}={positions}"
        )
