"""Seconds from a list of rows to the token ids of a run, with every check before its first step, for each stage.

    python -m bench.encode [--json FILE] [--rows 10000 30000 100000] [--words 13 40]     on this CPU, with all its cores

Rows are a prompt and a reply (reward: two replies) of so many words each, drawn from the words of LICENSE, as
messages through a chat template of a byte-level BPE that is trained on them: 13 make a pair of 40 words in all, 40 one
of 120. `text by text` encodes the first rows one text at a time, as a reply in a rollout is; `ratio` compares the two a
row. `growth` is the time a row at the largest size over that at the smallest: 1 is linear. `cpu` counts the seconds of
all cores: on a machine with other work it says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.gpu_kernels import about
from fastrlhf import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.templates import PRESETS, encode_prompt, encode_response
from fastrlhf.preflight.stages import prepare_ppo, prepare_supervised

ONE_BY_ONE = 1000  # rows encoded text by text
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def words() -> list[str]:
    """Every word of the licence, as often as it stands there: plain English that is in every checkout."""
    return (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()


def tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=SPECIAL, show_progress=False)
    bpe.train_from_iterator([" ".join(corpus)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.chat_template = PRESETS["chatml"]
    return made


def rows_of(stage: str, count: int, corpus: list[str], words: int) -> list[dict[str, Any]]:
    draw = random.Random(count)

    def text() -> str:
        return " ".join(draw.choices(corpus, k=words))

    replies = {"sft": ("response",), "reward": ("chosen", "rejected"), "ppo": ()}[stage]
    return [
        {"prompt": [{"role": "user", "content": text()}], **{name: text() for name in replies}} for _ in range(count)
    ]


def timed(work: Callable[[], Any]) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    kept = work()  # as a run keeps it: to let go of it is no part of the wait
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    del kept
    return spent


def prepared(stage: str, rows: list[dict[str, Any]], tok: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> Any:
    if stage == "ppo":
        inputs = {"policy": model, "tokenizer": tok, "prompts": rows, "reward": lambda prompts, responses: responses}
        return prepare_ppo(PPOConfig(), **inputs)
    config = SFTConfig() if stage == "sft" else RewardConfig()
    return prepare_supervised(config, model=model, tokenizer=tok, data=rows)


def text_by_text(rows: list[dict[str, Any]], tok: PreTrainedTokenizerFast) -> None:
    for row in rows:
        encode_prompt(tok, row["prompt"])
        for name in ("response", "chosen", "rejected"):
            if name in row:
                encode_response(tok, row["prompt"], row[name])


def measured(
    sizes: list[int], words: int, corpus: list[str], tok: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> dict[str, Any]:
    """The figures of each stage, for texts of so many words."""
    results = {}
    for stage in ("sft", "reward", "ppo"):
        one = timed(lambda s=stage: text_by_text(rows_of(s, ONE_BY_ONE, corpus, words), tok))
        runs = {}
        for count in sizes:
            rows = rows_of(stage, count, corpus, words)
            runs[count] = run = timed(lambda s=stage, r=rows: prepared(s, r, tok, model))
            print(
                f"{words:3} words {stage:7}{count:8} rows {run['seconds']:7.1f} s {run['cpu']:7.1f} s cpu", flush=True
            )
        first, last = min(runs), max(runs)
        growth = runs[last]["cpu"] / last / (runs[first]["cpu"] / first)
        ratio = one["seconds"] / ONE_BY_ONE / (runs[last]["seconds"] / last)
        results[stage] = {"runs": runs, "text_by_text": one, "growth": growth, "ratio": ratio}
        print(f"{words:3} words {stage:7}growth {growth:.2f}, text by text {ratio:.1f}x as long a row")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.encode", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--words", type=int, nargs="+", default=[13, 40], help="of a prompt, and of each reply")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    corpus = words()
    tok = tokenizer(corpus)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=2048, **sizes))
    machine = about(torch.device("cpu")) | {"cores": os.cpu_count(), "load before": os.getloadavg()[0]}
    print(machine)
    results = {count: measured(options.rows, count, corpus, tok, model) for count in options.words}
    machine["load after"] = os.getloadavg()[0]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
