"""Does the aligned model answer better? Held-out prompts, judged by the rule that no annotator or reward model saw."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.feedback import parse_prompt
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.eval.best_of import best_of as choose_best
from fastrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.quickstart.content import WORDINGS, shipped
from fastrlhf.quickstart.judge import about_what_was_asked, considerate, rule
from fastrlhf.rl.evaluation import best_of_n_kl
from fastrlhf.rl.scorers import score_texts
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime.batching import derive_seed
from fastrlhf.runtime.metrics import distinct_2

CUT = " …"  # marks a reply that never ended; the rule demands a proper end
KL_ROWS = 32
SIDES = ("chosen", "rejected")  # of a held-out pair
BEST_OF = 8  # replies of the SFT model, among which the reward model chooses: what PPO has to beat
BEST_OF_KL = best_of_n_kl(BEST_OF)
ON_TOPIC_LOST = 0.03  # the most that PPO may give away of the share of replies about what was asked


def _considerate(prompt: str, response: str) -> bool:
    return considerate(response)


PARTS = {"on_topic": about_what_was_asked, "considerate": _considerate}  # of the rule: content and manner
SPLIT = {"rate": rule, **PARTS}


def _say(step: str) -> None:
    """What is measured from now on: seconds pass between these lines."""
    print(f"verdict: {step}", flush=True)


@dataclass(frozen=True)
class Replies:
    """What one model said to the held-out prompts, sampled as in PPO, the same random numbers for every model."""

    model: PreTrainedModel | None  # None: not asked again
    prompts: list[str]
    wordings: list[str]  # of WORDINGS
    texts: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]

    def share(self, test: Any, wording: str | None = None) -> float:
        """Share of the replies for which test(prompt, reply) holds, all or those to prompts of a wording."""
        said = zip(self.prompts, self.texts, self.wordings, strict=True)
        held = [test(prompt, text) for prompt, text, own in said if wording in (None, own)]
        return sum(held) / len(held)

    @property
    def length(self) -> float:
        """Mean reply in tokens, the stop token included."""
        return sum(map(len, self.response_ids)) / len(self.response_ids)


def reply(folder: Path, rows: list[dict], config: PPOConfig, who: str, about: str = "") -> Replies:
    """Answer each prompt once with the model in folder, and say on the console who answers."""
    _say(f"the {who} answers {len(rows)} held-out prompts{about}")
    return answer(load_policy(str(folder)), load_tokenizer(str(folder)), rows, config)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], config: PPOConfig) -> Replies:
    """Answer each prompt once."""
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=stop_token_ids(tokenizer, model.generation_config),
        seed=derive_seed(config.seed, "verdict"),
    )
    out = RolloutEngine(model, tokenizer).generate(ids, params)
    said = zip(out.response_ids, out.finished, strict=True)
    texts = [tokenizer.decode(r, skip_special_tokens=True) + ("" if done else CUT) for r, done in said]
    prompts, wordings = [row["prompt"][0]["content"] for row in rows], [row["wording"] for row in rows]
    return Replies(model, prompts, wordings, texts, ids, out.response_ids)


@torch.no_grad()
def sequence_kl(policy: Replies, reference: Path, config: PPOConfig) -> float:
    """KL(policy || reference) in nats a reply: mean over the policy's own replies of the summed log-ratio."""
    _say("the KL from the SFT model, on replies of the PPO model")
    other, total = load_policy(str(reference)), 0.0
    for start in range(0, len(policy.texts), KL_ROWS):
        rows = TokenRows(policy.prompt_ids, policy.response_ids)[start : start + KL_ROWS]
        batch = rows.batch(range(len(rows)), other.device)
        log_probs = target_log_probs(policy.model, batch, config.temperature)
        ref_log_probs = target_log_probs(other, batch, config.temperature)
        total += float((log_probs - ref_log_probs).double().sum())
    return total / len(policy.texts)


def pair_accuracy(folder: Path, rows: list[dict]) -> dict[str, float]:
    """Share of clean pairs that the reward model ranks right, for each kind of fault of the worse reply and "all"."""
    _say(f"the reward model ranks {len(rows)} held-out pairs")
    model, tokenizer = load_reward_model(str(folder)), load_tokenizer(str(folder))
    prompts = [row["prompt"] for row in rows]
    better, worse = (score_texts(model, tokenizer, prompts, [row[side] for row in rows]) for side in SIDES)
    right: dict[str, list[bool]] = defaultdict(list)
    for row, a, b in zip(rows, better, worse, strict=True):
        right[row["fault"]].append(a > b)
        right["all"].append(a > b)
    return {fault: sum(hits) / len(hits) for fault, hits in sorted(right.items())}


@dataclass(frozen=True)
class Before:
    """What PPO starts from: a folder with base, sft/final and reward/final, and what they are worth."""

    folder: Path
    rows: list[dict]
    base: Replies
    sft: Replies
    accuracy: dict[str, float]

    @classmethod
    def of(cls, folder: Path, config: PPOConfig) -> Before:
        """config: how to sample, and the seed."""
        rows, pairs = shipped("heldout_prompts"), shipped("heldout_pairs")
        base = reply(folder / "base", rows, config, "base model")
        sft = reply(folder / "sft/final", rows, config, "SFT model")
        return cls(folder, rows, base, sft, pair_accuracy(folder / "reward/final", pairs))


def best_of(before: Before, config: PPOConfig) -> Replies:
    """Of BEST_OF replies of the SFT model to each held-out prompt, sampled as in PPO, the reward model's choice."""
    _say(f"the SFT model's best of {BEST_OF} replies to each, by the reward model")
    prompts = [parse_prompt(row, f"heldout_prompts, row {n}") for n, row in enumerate(before.rows)]
    sampling = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    sampling |= {"seed": derive_seed(config.seed, "verdict"), "raw": False}
    source, reward = str(before.folder / "sft/final"), str(before.folder / "reward/final")
    made = choose_best(source, prompts, n=BEST_OF, reward=reward, say=_say, **sampling)
    replies = [winner.reply for winner in made.winners]
    texts = [reply.text + ("" if reply.finished else CUT) for reply in replies]
    return replace(before.sft, model=None, texts=texts, response_ids=[reply.ids for reply in replies])


def best_of_figures(best: Replies) -> dict[str, Any]:
    """The figures of `best_of` in verdict.json; its KL is the bound that `best_of_n_kl` gives."""
    return {
        "best_of": BEST_OF,
        "rate_best_of": best.share(rule),
        "on_topic_best_of": best.share(about_what_was_asked),
        "kl_best_of": BEST_OF_KL,
        "length_best_of": best.length,
    }


def new_topic_figures(folder: Path, config: PPOConfig) -> dict[str, float]:
    """Figures of verdict.json on prompts about a thing that no training prompt names and that only plain text of the
    SFT data tells of. folder: a quickstart's, with sft/final and final."""
    rows, figures = shipped("heldout_topic_prompts"), {}
    for name, model, who in (("sft", "sft/final", "SFT model"), ("ppo", "final", "PPO model")):
        said = reply(folder / model, rows, config, who, " about a thing that no training prompt names")
        figures |= {f"{key}_{name}_new_topic": said.share(test) for key, test in SPLIT.items()}
    return figures


def compare(before: Before, ppo: Path, config: PPOConfig) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """-> (the figures of `measure`, prompt and replies a held-out prompt) of the model in ppo."""
    after = reply(ppo, before.rows, config, "PPO model")
    kl = sequence_kl(after, before.folder / "sft/final", config)
    answers = [
        {"prompt": p, "response_sft": a, "response_ppo": b}
        for p, a, b in zip(before.sft.prompts, before.sft.texts, after.texts, strict=True)
    ]
    return measure(before.base, before.sft, after, kl, before.accuracy, config.seed), answers


def measure(
    base: Replies, sft: Replies, ppo: Replies, kl: float, accuracy: dict[str, float], seed: int
) -> dict[str, Any]:
    """The figures of verdict.json; rates and accuracies are shares, KL in nats, lengths in tokens."""
    others = shuffled(len(ppo.texts), seed)
    return {
        "seed": seed,
        "rate_before_sft": base.share(rule),
        "rate_sft": sft.share(rule),
        "rate_ppo": ppo.share(rule),
        **{f"rate_ppo_{wording}": ppo.share(rule, wording) for wording in WORDINGS},
        "rate_ppo_shuffled": sum(rule(ppo.prompts[i], text) for i, text in zip(others, ppo.texts)) / len(others),
        "kl_sequence_mean": kl,
        "distinct2_sft": distinct_2(sft.texts),
        "distinct2_ppo": distinct_2(ppo.texts),
        "rm_pair_accuracy": accuracy["all"],
        "rm_pair_accuracy_by_fault": {fault: value for fault, value in accuracy.items() if fault != "all"},
        **{f"{key}_sft": sft.share(test) for key, test in PARTS.items()},
        **{f"{key}_ppo": ppo.share(test) for key, test in PARTS.items()},
        "length_sft": sft.length,
        "length_ppo": ppo.length,
    }


def judge(figures: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """(what, measured, bar, met) of every bar that the recipes of the papers have to meet too (`python -m
    bench.verdict`); the quickstart passes when these and `judge_parts` are met."""
    f = figures
    diversity, length = f["distinct2_ppo"] / max(f["distinct2_sft"], 1e-9), f["length_ppo"] / f["length_sft"]
    return [
        ("rule holds after SFT", f["rate_sft"], "<= 0.65", f["rate_sft"] <= 0.65),
        ("rule holds after PPO", f["rate_ppo"], ">= 0.88", f["rate_ppo"] >= 0.88),
        ("... when prompts are shuffled", f["rate_ppo_shuffled"], "<= 0.10", f["rate_ppo_shuffled"] <= 0.1),
        ("KL to the SFT model, nats a reply", f["kl_sequence_mean"], "<  10", f["kl_sequence_mean"] < 10),
        ("distinct-2 against SFT's", diversity, ">= 0.60", diversity >= 0.6),
        ("mean length against SFT's", length, "<= 1.30", 1 / 1.3 <= length <= 1.3),
        ("reward model, clean held-out pairs", f["rm_pair_accuracy"], ">= 0.85", f["rm_pair_accuracy"] >= 0.85),
    ]


def judge_parts(figures: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """The quickstart's other bars, in the same form: PPO by wording, and what it does to content alone."""
    new = figures["rate_ppo_new"]
    gained = figures["on_topic_ppo"] - figures["on_topic_sft"]
    return [
        ("rule holds after PPO, wording that no training prompt has", new, ">= 0.84", new >= 0.84),
        ("about what was asked, share after PPO less before", gained, f">= {-ON_TOPIC_LOST}", gained >= -ON_TOPIC_LOST),
    ]


def aims(figures: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """What should be reached but decides nothing: PPO by wording, and of the reward model what PPO rests on; shown
    beside the bars, in the same form."""
    familiar, new = (figures[f"rate_ppo_{wording}"] for wording in WORDINGS)
    worst = min(figures["rm_pair_accuracy_by_fault"].values())
    return [
        ("rule holds after PPO, frames that training has", familiar, ">= 0.95", familiar >= 0.95),
        ("... wording that no training prompt has", new, ">= 0.88", new >= 0.88),
        ("reward model, its worst kind of fault", worst, ">= 0.85", worst >= 0.85),
    ]


def beside(figures: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(what, measured, beside what it stands): the baseline that needs no training, content and manner apart, and a
    topic that no training prompt has."""
    f, n = figures, figures["best_of"]
    topic = f"SFT {f['on_topic_sft']:.3f}, best of {n} {f['on_topic_best_of']:.3f}"
    unasked, manner = f["rate_ppo_new_topic"], f["considerate_ppo_new_topic"]
    return [
        (f"rule holds, best of {n} SFT replies by the reward model", f["rate_best_of"], f"PPO {f['rate_ppo']:.3f}"),
        ("... its KL to the SFT model, nats a reply at most", f["kl_best_of"], f"PPO {f['kl_sequence_mean']:.3f}"),
        ("PPO replies about what was asked, either manner", f["on_topic_ppo"], topic),
        ("PPO replies considerate, whatever they say", f["considerate_ppo"], f"SFT {f['considerate_sft']:.3f}"),
        ("rule holds, a topic that no training prompt has", unasked, f"SFT {f['rate_sft_new_topic']:.3f}"),
        ("... considerate there, whatever they say", manner, f"SFT {f['considerate_sft_new_topic']:.3f}"),
    ]


def shuffled(count: int, seed: int) -> list[int]:
    """A permutation without fixed points: every reply meets another prompt."""
    order = list(range(count))
    Random(seed).shuffle(order)
    moved = [0] * count
    for a, b in zip(order, order[1:] + order[:1], strict=True):
        moved[a] = b
    return moved
