"""Every causal architecture of transformers that can be made tiny: is generation exact, or refused with a reason?

    python -m bench.architectures [NAME ...] [--json FILE]         all names, two to three minutes of one CPU core

Each model has random weights, windows of 6 tokens and a process of its own, with a limit of memory and time. It is
loaded as a policy, answers prompts of several lengths, most longer than the windows, and what it says of its own tokens
is compared with one plain forward of each row alone, by transformers' own model.

    exact     no log-prob is off by more than 1e-4 nats; `cached`: over keys and values, else anew for each token
    refused   one sentence of ours (UserError)
    wrong     off by more
    crashed   any other exception
    stopped   not done in the processor time that a model has here: no verdict
    unbuilt   transformers makes no tiny model of it here: a package that is missing, a shape that it does not take

The exit code is 1 where anything is wrong or crashed, or fewer than 90 are exact in the whole survey.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from bench.processes import imported_for_forks
from fastrlhf.config.errors import UserError
from fastrlhf.config.limits import address_space
from fastrlhf.models.loading import load_policy
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.parity import known_parity
from fastrlhf.rollout.sampling import SamplingParams

EXACT = 1e-4  # nats
LEAST_EXACT = 90
SECONDS, BYTES = 20, 6 << 30  # of a model: processor seconds, address space beyond what the process came with
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")  # of a traceback
WINDOW = 6
PROMPTS = ([7], [9, 40, 30, 12, 5, 77, 8, 30, 21, 6, 44, 60, 3, 18], [50, 3], [11, 4, 60, 4, 90], [30] * 9)
SIZES: dict[str, Any] = {  # by the names that configs use; a config takes those it knows
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 96),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim", "state_size"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **{"vocab_size": 96, "num_key_value_heads": 2, "num_experts_per_tok": 2, "qk_rope_head_dim": 8, "rotary_dim": 4},
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **{"mamba_n_groups": 1, "n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 16, "chunk_size": 16},
    **{"conv_kernel": 4, "expand": 2, "is_decoder": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
}
CHANGES: dict[str, dict[str, Any]] = {  # what single architectures need beside that
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96},
    "gemma4_text": {"vocab_size_per_layer_input": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": 96},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 12]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(name: str) -> PreTrainedModel:
    """A model of the architecture with random weights; raises whatever transformers does where it makes none."""
    kind = CONFIG_MAPPING[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**_fields(kind, CHANGES.get(name, {})))).eval()


def _fields(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config class knows, and those of the configs inside it."""
    names, other = set(), dict(kind.attribute_map or {})
    for part in kind.__mro__:
        names |= {*getattr(part, "__annotations__", {}), *inspect.signature(part.__init__).parameters}
    fields = {k: v for k, v in SIZES.items() if k in names or (k in other and other[k] not in SIZES)}
    if "kv_lora_rank" in names and "num_key_value_heads" in fields:  # latent attention has no groups
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for key, inner in (kind.sub_configs or {}).items():
        if isinstance(inner, type) and issubclass(inner, PreTrainedConfig):
            fields[key] = _fields(inner, changes.get(key, {}))
    fields |= {k: v for k, v in changes.items() if not isinstance(fields.get(k), dict)}
    return {k: v for k, v in fields.items() if v is not None}


def survey(name: str, result: Connection) -> None:
    """Send what is known of an architecture, more of it each time; whatever is raised goes to stderr."""
    limit = address_space() + BYTES  # a copy of a process has all that the other had mapped
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    row: dict[str, Any] = {"verdict": "unbuilt"}
    result.send(row)
    model = tiny(name)
    row = {"verdict": "crashed", "class": type(model).__name__}
    result.send(row)
    try:
        policy = load_policy(model)
        params = SamplingParams(8, n=2, temperature=0.8, stop_token_ids=[], seed=1)
        out = RolloutEngine(policy).generate([list(prompt) for prompt in PROMPTS], params)
    except UserError as error:
        result.send(row | {"verdict": "refused", "reason": str(error)})
        return
    off = max(_off(model, i, out, params) for i in range(len(out.response_ids)))
    known = known_parity(policy)
    row |= {"verdict": "exact" if off <= EXACT else "wrong", "nats": off, "cached": known.cached}
    result.send(row | ({} if known.cached else {"reason": known.reason}))


@torch.no_grad()
def _off(model: PreTrainedModel, row: int, out: Any, params: SamplingParams) -> float:
    """Nats that the sampled log-probs of a reply are off by, at most."""
    prompt, reply = list(PROMPTS[row // params.n]), out.response_ids[row]
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    table = (logits.double() / params.temperature).log_softmax(-1)
    plain = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
    return float((plain - out.policy_log_probs[row].double()).abs().max())


def _child(name: str, result: Connection, errors: str) -> None:
    sys.stderr = open(errors, "w")  # noqa: SIM115 - until the process ends
    survey(name, result)


def apart(name: str) -> dict[str, Any]:
    """`survey` in a process of its own, a copy of this one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as errors:
        child = context.Process(target=_child, args=(name, theirs, errors.name))
        child.start()
        theirs.close()
        row: dict[str, Any] = {}
        with suppress(EOFError):
            while True:
                row = ours.recv()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            row |= {"verdict": "stopped", "reason": f"not done in {SECONDS} processor seconds"}
        elif row["verdict"] in ("unbuilt", "crashed"):
            lines = [line.strip() for line in errors.read().split("Traceback")[-1].splitlines()]
            raised = [line for line in lines if ERROR_LINE.match(line)] or [f"exit code {child.exitcode}"]
            row["reason"] = raised[0][:240]
    return row


def run(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The verdict of each, printed as it comes."""
    rows = {}
    for name in names:
        row = rows[name] = apart(name)
        how = "" if row.get("cached", True) else "anew: "
        nats = f"{row['nats']:.1e} nats " if "nats" in row else ""
        print(f"{name:26}{row['verdict']:9}{nats}{how}{row.get('reason', '')}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.architectures", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; none: all")
    parser.add_argument("--json", type=Path, help="also write the verdicts there")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no causal architecture of transformers {transformers.__version__}: {unknown[0]}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny("llama")  # what all need is imported before the first fork
    imported_for_forks()
    began = time.process_time()
    rows = run(options.names or NAMES)
    seconds = time.process_time() - began + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    counts = Counter(row["verdict"] for row in rows.values())
    counts["cached"] = sum(row["verdict"] == "exact" and row["cached"] for row in rows.values())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    print(dict(counts), versions, f"{seconds:.0f} processor seconds")
    if options.json:
        report = {"versions": versions, "counts": dict(counts), "processor_seconds": round(seconds), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    bad = counts["wrong"] + counts["crashed"]
    return int(bad > 0 or (not options.names and counts["exact"] < LEAST_EXACT))


if __name__ == "__main__":
    sys.exit(main())
