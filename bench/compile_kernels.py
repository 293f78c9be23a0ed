"""Compile every Triton kernel for chips that are not here, and count what the compiler made of it.

    python -m bench.compile_kernels [--all] [--target sm_90] [--kernel _forward] [--json FILE] [--triton 3.6.0]

The launchers run on `meta` tensors while a recorder takes the place of the GPU: what is compiled is what they would
start, with the tiles of `tuning.py` for that chip. One line a kernel and target: registers, stack bytes (spills),
shared memory, tensor-core instructions, 16-byte global loads, the mean bytes of a thread's global store, the blocks
(CTAs) that a multiprocessor holds at once, and the instructions outside the loops of tensor-core products over the
logits that a thread has of a block (over 1 where a kernel has no blocks of logits).

Exit code 1 when a kernel has a stack, needs more shared memory than the chip has, or holds a matrix product that does
not reach the tensor cores (IEEE fp32 cannot); and when, beside bench/results/compile_kernels.json for this version of
Triton, its stores are narrower or its instructions more by over 10 %, or fewer blocks fit. --record writes that file.
CI compiles one shape of each kernel and kind of product; --all all of them, not compared. --triton installs another
version beside this one (once, in bench/.venvs) and compiles with it. One process a core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.peers import environment
from fastrlhf_kernels.gpu import (
    attention,
    gae,
    layers,
    linear_log_probs,
    linear_ppo_loss,
    log_probs,
    ppo_losses,
    sampling,
    scaling,
    tuning,
)
from fastrlhf_kernels.gpu.launch import Launch, recorded
from fastrlhf_kernels.operands import Head, LossOptions, Need, Rows, Shaping, Tokens

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
STORE = re.compile(r"\bSTG(\.\S*)?")
MMA = r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA|IMMA|QGMMA|DMMA)\b"
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}  # of an access in SASS, in bytes
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
RECORD = Path(__file__).parent / "results/compile_kernels.json"
REGISTERS, THREADS, BLOCKS = 65536, {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048}, 32  # of an NVIDIA multiprocessor
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shapes() -> Iterator[Callable[[], Any]]:
    """Calls of the launchers, at the sizes that matter: a long batch, and one too small to fill a chip by rows."""
    for n, columns, dtype in ((8192, 151936, torch.bfloat16), (4, 151936, torch.bfloat16), (8192, 1000, torch.float32)):
        rows = Rows(meta(n, columns, dtype=dtype), meta(n, dtype=torch.int64), None, 1.0)
        row, options, count = meta(n), LossOptions(0.2, 0.2, 3.0, 0.1, "k3", 0.01), meta()
        tokens = Tokens(row, row, meta(n, dtype=torch.bool), None, row)

        def forward(rows=rows):
            log_probs.rows_forward(rows, -100, True)

        def backward(rows=rows, row=row):
            log_probs.rows_backward(rows, -100, row, row, row, row, row)

        def ppo(rows=rows, tokens=tokens, count=count, options=options):
            log_probs.rows_ppo(rows, tokens, count, options, rows.logits)

        yield forward
        yield backward
        yield ppo
    for n, vocabulary, width, dtype in (
        (8192, 151936, 1536, torch.bfloat16),
        (8, 151936, 1536, torch.bfloat16),
        (8192, 49152, 576, torch.bfloat16),
        (8192, 49152, 576, torch.float32),
    ):
        operands = (meta(n, width, dtype=dtype), meta(vocabulary, width, dtype=dtype), meta(n, dtype=torch.int64))
        row, adapter = meta(n), (meta(16, width, dtype=dtype), meta(vocabulary, 16, dtype=dtype), 2.0)
        for bias, softcap, lora in ((None, None, (None, None, 1.0)), (meta(vocabulary, dtype=dtype), 30.0, adapter)):
            head = Head(*operands, bias, None, 1.0, 1.0, softcap, *lora)

            def linear_forward(head=head):
                for entropy in (False, True):
                    linear_log_probs.linear_forward(head, entropy=entropy)

            def linear_ppo(head=head, row=row):
                options = LossOptions(0.2, 0.2, 3.0, 0.1, "k3")
                need = Need(True, True, head.bias is not None, head.lora_a is not None)
                tokens = Tokens(row, row, meta(len(row), dtype=torch.bool), None, row)
                linear_ppo_loss.linear_ppo(head, tokens, meta(), options, need)

            def linear_backward(head=head, row=row, ge=row if softcap else None):
                need = Need(True, True, head.lora_a is not None, head.lora_a is not None)
                linear_log_probs.linear_backward(head, row, ge, row, row, row, need)

            yield linear_forward
            yield linear_backward
            yield linear_ppo


def several_labels() -> Iterator[Callable[[], Any]]:
    """What `linear_loss` starts for eight labels a row, with the logits of half the rows kept."""
    for n, vocabulary, width, dtype, softcap in (
        (8192, 151936, 1536, torch.bfloat16, None),
        (300, 49152, 576, torch.float32, 30.0),
    ):
        operands = (meta(n, width, dtype=dtype), meta(vocabulary, width, dtype=dtype), meta(n, 8, dtype=torch.int64))
        head = Head(*operands, None, None, 1.0, 1.0, softcap, None, None, 1.0)
        kept, row, each = meta(n // 2, -(-vocabulary // 64) * 64)[:, :vocabulary], meta(n), meta(n, 8)

        def linear_loss(head=head, kept=kept, row=row, each=each, ge=row if softcap else None):
            linear_log_probs.linear_forward(head, entropy=ge is not None, kept=kept)
            need = Need(True, True, False, False)
            linear_log_probs.linear_backward(head, each, ge, row, row, row, need, kept, each)

        yield linear_loss


def token_shapes() -> Iterator[Callable[[], Any]]:
    """The kernels on [B, T] tensors of tokens."""
    for batch, length in ((64, 1024), (8, 8000), (256, 60)):
        tokens, mask = meta(batch, length), meta(batch, length, dtype=torch.bool)
        shaping = Shaping(meta(batch), tokens, tokens, 0.1, "k3")

        def advantages(tokens=tokens, mask=mask, shaping=shaping):
            for rewards in (None, tokens):
                gae.gae_rows(rewards, tokens, mask, 1.0, 0.95, shaping.scores, shaping, 1e-8, 8)

        def losses(tokens=tokens, mask=mask):
            for weights, dual_clip, value_clip in ((tokens, 3.0, 0.2), (None, None, None)):
                policy = Tokens(tokens, tokens, mask, weights, None)
                ppo_losses.policy_loss(tokens, policy, meta(), LossOptions(0.2, 0.2, dual_clip))
                ppo_losses.value_loss(tokens, tokens, tokens, mask, weights, meta(), value_clip)

        def alone(tokens=tokens, mask=mask, shaping=shaping):
            gae.shape_rewards(shaping, mask)
            gae.masked_whiten(tokens, mask, False, 1e-8)

        yield advantages
        yield losses
        yield alone


def decode_shapes() -> Iterator[Callable[[], Any]]:
    """The kernels of a step of generation."""
    for batch, vocabulary, dtype in ((64, 151936, torch.bfloat16), (8, 49152, torch.float32)):
        rows, logits = meta(batch, dtype=torch.int64), meta(batch, vocabulary, dtype=dtype)
        for top_k, top_p in ((0, 1.0), (50, 0.9), (256, 1.0), (0, 0.9), (20_000, 1.0)):

            def sample(logits=logits, top_k=top_k, top_p=top_p, rows=rows):
                sampling.draw(logits, 0.7, top_k, top_p, 1, rows, rows)

            yield sample
    for batch, heads, groups, size, dtype in (
        (64, 12, 2, 128, torch.bfloat16),
        (256, 14, 2, 64, torch.bfloat16),
        (2, 16, 8, 256, torch.bfloat16),
        (4, 8, 8, 80, torch.float16),
        (16, 9, 3, 64, torch.float32),
        (16, 4, 4, 256, torch.float32),
    ):
        q, cache = meta(batch, heads, size, dtype=dtype), meta(batch, 1024, groups, size, dtype=dtype)
        lengths = meta(batch, dtype=torch.int32)
        for softcap, window in ((None, None), (50.0, 512)):

            def attend(q=q, cache=cache, lengths=lengths, softcap=softcap, window=window):
                attention.attend(q, cache, cache, lengths, 0.1, softcap, window)

            yield attend


def layer_shapes() -> Iterator[Callable[[], Any]]:
    """What stands between a decoder layer's products, and the gradients that are scaled in a backward."""
    for heads, groups, size, wide, dtype in ((14, 2, 64, 4864, torch.bfloat16), (9, 3, 64, 1536, torch.float32)):
        q, k = (meta(64, 1, count, size, dtype=dtype).transpose(1, 2) for count in (heads, groups))
        x, inner, turn = (meta(64, 1, n, dtype=dtype) for n in (heads * size, wide, size))
        store, place = meta(64, 1024, groups, size, dtype=dtype), meta(64, dtype=torch.int64)

        def layer(q=q, k=k, x=x, inner=inner, turn=turn, store=store, place=place):
            layers.rms_norm(x, x[0, 0], 1e-6)
            layers.silu_mul(inner, inner)
            layers.rotate(q, k, turn, turn)
            layers.store_tokens(k[:, :, 0], k[:, :, 0], store, store, place, place)

        def scale(dtype=dtype):
            for wanted in (dtype, torch.bfloat16):
                scaling.scaled(meta(8192, 49152, dtype=dtype), meta(), wanted)

        yield layer
        yield scale


def launches(chip: tuning.Chip, everything: bool) -> list[Launch]:
    """What the launchers would start on `chip`; without `everything` the first of each kernel and kind of product."""
    found: list[Launch] = []
    with tuning.pretend(chip), recorded() as records:
        for call in (*shapes(), *several_labels(), *token_shapes(), *decode_shapes(), *layer_shapes()):
            call()
        for record in records:
            same = [other for other in found if other.kernel is record.kernel]
            if everything:
                new = specialised(record) not in [specialised(other) for other in same]
            else:
                new = _variant(record) not in [_variant(other) for other in same]
            if new:
                found.append(record)
    return found


def _variant(launch: Launch) -> tuple[Any, ...]:
    """What makes another kernel of it: an adapter, operands in fp32, tensor descriptors, a first or a last pass."""
    constants = tuple(launch.constants.get(name) for name in ("PRECISION", "DESCRIPTORS", "COUNT", "NUCLEUS"))
    absent = [place for place, value in enumerate(launch.arguments) if value is None]
    return *constants, absent, adapted(launch)


def adapted(launch: Launch) -> bool:
    """Whether it multiplies by an adapter too."""
    return any(getattr(value, "lora_b", None) is not None for value in launch.arguments)


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(signature, constants, attributes) of a launch as Triton's launcher has them: None, 1 and multiples of 16 are
    known, in named tuples too.
    """
    signature, constants, attributes = {}, {}, {}

    def kind(path: tuple[int, ...], value: Any, special: bool) -> Any:
        if isinstance(value, tuple):
            members = [kind((*path, place), member, special) for place, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if value is None or (special and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            return f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        if isinstance(value, float):
            return "fp32"
        if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    given = iter(launch.arguments)
    for place, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", launch.constants[parameter.name]
        else:
            signature[parameter.name] = kind((place,), next(given), not parameter.do_not_specialize)
    return signature, constants, attributes


def source(launch: Launch) -> ASTSource:
    return ASTSource(launch.kernel, *specialised(launch))


def compile_one(launch: Launch, chip: tuning.Chip) -> dict[str, Any]:
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    made = triton.compile(source(launch), target=TARGETS[chip.name], options=options)
    tile = "x".join(str(launch.constants[k]) for k in ("ROWS", "COLUMNS", "DEPTH", "TILE") if k in launch.constants)
    row = {"kernel": launch.kernel.__name__, "target": chip.name, "tile": f"{tile}w{launch.warps}s{launch.stages}"}
    shared = made.metadata.shared
    if "amdgcn" in made.asm:
        row |= _amd(made.asm["amdgcn"]) | {"shared": shared, "ctas": None}
    else:
        row |= _nvidia(made.asm["cubin"]) | {"shared": shared}
        row["ctas"] = resident(chip, row["regs"], shared, launch.warps)
    logits = launch.constants.get("ROWS", 1) * launch.constants.get("COLUMNS", 1)
    row["per_logit"] = round(row.pop("instructions") / max(1, logits / (launch.warps * chip.warp)), 1)
    allowed, _ = tuning.STACK_ALLOWED.get((row["kernel"], chip.name), (0, ""))
    exact = (launch.constants.get("PRECISION") == "ieee" or _fp32_operands(launch)) and not adapted(launch)
    dots = "tt.dot" in made.asm["ttir"] and not exact
    row["ok"] = row["stack"] <= allowed and row["shared"] <= chip.shared and (row["mma"] > 0 or not dots)
    return row


def resident(chip: tuning.Chip, registers: int, shared: int, warps: int) -> int:
    """How many blocks of a kernel an NVIDIA multiprocessor holds: registers go to warps by 256, 1 KiB a block is the
    system's.
    """
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS // (of_warp * warps),
        THREADS[chip.name] // (32 * warps),
        (chip.shared + 1024) // (shared + 1024),
        BLOCKS,
    )


def worse(row: dict[str, Any], record: dict[str, Any]) -> str:
    """Why a row is worse than its recorded one by more than 10 %, or ''; of a target without a record nothing is."""
    recorded_row = record.get(row["name"])
    if recorded_row is None:
        known = any(f" {row['target']} " in name for name in record)
        return "not recorded: python -m bench.compile_kernels --record" if known else ""
    reasons = []
    if row["stg"] < 0.9 * recorded_row["stg"]:
        reasons.append(f"stores of {row['stg']} bytes, {recorded_row['stg']} recorded")
    if row["ctas"] is not None and row["ctas"] < recorded_row["ctas"]:
        reasons.append(f"{row['ctas']} blocks a multiprocessor, {recorded_row['ctas']} recorded")
    if row["per_logit"] > 1.1 * recorded_row["per_logit"]:
        reasons.append(f"{row['per_logit']} instructions a logit, {recorded_row['per_logit']} recorded")
    return "; ".join(reasons)


def _fp32_operands(launch: Launch) -> bool:
    """Whether it attends over fp32 numbers, for whose IEEE products there is no tensor core."""
    operand = launch.arguments[0]
    return isinstance(operand, attention.Strided) and operand.data.dtype == torch.float32


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "regs": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "mma": len(re.findall(MMA, sass)),
        "ldg128": len(re.findall(r"\bLDG\.E\.\S*128|\bLDGSTS\.E\.\S*128|\bUTMALDG", sass)),
        "stg": mean(
            [next((WIDTHS[part] for part in found.split(".") if part in WIDTHS), 4) for found in STORE.findall(sass)]
        ),
        "instructions": outside_products(sass),
    }


def mean(widths: list[int]) -> float:
    return round(sum(widths) / max(1, len(widths)), 1)


def outside_products(sass: str) -> int:
    """Instructions outside the shortest loops (jumps backwards) around tensor-core products, without NOPs.

    The shortest: waits for a barrier stand behind the program's end and jump back into it, over all that lies between.
    """
    lines = [(int(place, 16), text) for place, text in INSTRUCTION.findall(sass)]
    index = {place: number for number, (place, _) in enumerate(lines)}
    loops: list[range] = []
    for number, (place, text) in enumerate(lines):
        jump = JUMP.search(text)
        target = int(jump[1], 16) if jump else place
        if target < place and target in index:
            loops.append(range(index[target], number + 1))
    inside: set[int] = set()
    for number, (_, text) in enumerate(lines):
        if re.search(MMA, text):
            inside |= set(min((loop for loop in loops if number in loop), key=len, default=()))
    return sum(number not in inside and "NOP" not in text for number, (_, text) in enumerate(lines))


def _amd(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    return {
        "regs": number("vgpr_count"),
        "stack": number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma_", assembly)),
        "ldg128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        "stg": mean(
            [
                AMD_WIDTHS[kind]
                for kind in re.findall(rf"\b(?:global|buffer)_store_({'|'.join(AMD_WIDTHS)})\b", assembly)
            ]
        ),
        "instructions": len(re.findall(r"^\t(?:v|s|ds|global|buffer|flat)_\w+", assembly, re.MULTILINE)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(BINARIES / tool), *arguments], capture_output=True, text=True, check=True).stdout


Job = tuple[str, Launch, tuning.Chip]  # its name in the record
_jobs: list[Job] = []  # of the processes that compile: they are forked, so that kernels need not be sent to them


def jobs(targets: list[str], everything: bool, part: str) -> list[Job]:
    """What is to be compiled: kernels whose name contains `part`, named by kernel, target, tile and number."""
    found: list[Job] = []
    for target in targets:
        chip, seen = tuning.CHIPS[target], Counter()
        for launch in launches(chip, everything):
            name = f"{launch.kernel.__name__} {target}"
            seen[name] += 1
            if part in launch.kernel.__name__:
                found.append((f"{name} {seen[name]}", launch, chip))
    return found


def compile_job(number: int) -> dict[str, Any]:
    name, launch, chip = _jobs[number]
    return {"name": name} | compile_one(launch, chip)


def compile_all(everything: list[Job]) -> Iterator[dict[str, Any]]:
    """The rows of all jobs, in their order, compiled in a process a core."""
    _jobs[:] = everything
    processes = min(len(everything), len(os.sched_getaffinity(0)))
    with multiprocessing.get_context("fork").Pool(max(1, processes)) as pool:
        yield from pool.imap(compile_job, range(len(everything)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every shape, not the first of each kernel")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this chip; may be repeated")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--record", action="store_true", help=f"write what later runs are compared with, {RECORD.name}")
    parser.add_argument("--triton", metavar="VERSION", help="compile with this version of Triton")
    args = parser.parse_args()
    if args.triton and args.triton != triton.__version__:
        python = environment(f"triton-{args.triton}", f"triton=={args.triton}")
        return subprocess.run([str(python), "-m", "bench.compile_kernels", *sys.argv[1:]]).returncode
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    compared = None if args.all or args.record else record.get(triton.__version__)
    columns = ("kernel", "target", "tile", "regs", "stack", "shared", "mma", "ldg128", "stg", "ctas", "per_logit", "ok")
    print(f"triton {triton.__version__}\n" + " ".join(columns))
    rows = []
    for row in compile_all(jobs(args.target or list(TARGETS), args.all, args.kernel)):
        reason = "" if compared is None else worse(row, compared)
        row["ok"] = row["ok"] and not reason
        rows.append(row)
        print(" ".join(str(row[c]) for c in columns), reason, flush=True)
    if compared is None and not (args.all or args.record):
        print(f"{RECORD.name} has no rows of triton {triton.__version__}: nothing compared")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    if args.record:
        counts = {row["name"]: {key: row[key] for key in ("stg", "ctas", "per_logit")} for row in rows}
        record[triton.__version__] = record.get(triton.__version__, {}) | counts
        lines = {version: dict(sorted(of_version.items())) for version, of_version in sorted(record.items())}
        RECORD.write_text(json.dumps(lines, indent=1) + "\n")
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
