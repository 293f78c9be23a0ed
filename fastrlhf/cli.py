"""The command line: parse, call, print. torch is imported inside a verb, after the first line is on the screen.

Exit codes: 0 done, 1 a bug, a lost rank or a verdict not met, 2 the user's mistake, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from fastrlhf._version import __version__
from fastrlhf.config.errors import UserError
from fastrlhf.config.limits import collector_paused
from fastrlhf.runtime import launch
from fastrlhf.runtime.launch import RankLost
from fastrlhf.runtime.library_output import make_safe

if TYPE_CHECKING:
    from fastrlhf.data.feedback import Prompt

EXIT_DONE, EXIT_BUG, EXIT_USER_ERROR, EXIT_KILLED = 0, 1, 2, 130
MESSAGE_LINES, LINE_CHARS = 4, 2000
STAGES = {"sft": "sft", "reward": "reward_model", "ppo": "ppo"}  # verb -> module


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argv defaults to the process's arguments. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sys.excepthook = _print_traceback  # of a bug
        threading.excepthook = _end_of_thread
        make_safe()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a reply that the terminal cannot show is no crash
    try:
        return _run(arguments)
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_KILLED
    except RankLost as error:
        if _speaks():
            _print_error(f"{error}; go on with: fastrlhf resume RUN_DIR")
        return EXIT_BUG
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if "--debug" in arguments:
            _print_traceback()
        if _speaks():
            _print_error(sentence)
        return EXIT_USER_ERROR


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE
    if verb in ("-V", "--version"):
        print(f"fastrlhf {__version__}")
        return EXIT_DONE
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(VERBS)}"
        raise UserError(f"{verb}: no such command; {hint}")
    run, _ = VERBS[verb]
    return run(verb, arguments[1:])


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, (_, text) in VERBS.items())
    return (
        f"fastrlhf {__version__}: human feedback in, aligned model out\n\nusage: fastrlhf COMMAND ...\n\n{verbs}\n\n"
        "fastrlhf COMMAND --help shows a command's fields, defaults and options. --version shows the version.\n"
        "Exit codes: 0 done, 1 bug or verdict not met, 2 user error, 75 interrupted and resumable."
    )


# --------------------------------------------------------------------------------------------------------------- verbs


def _stage(verb: str, arguments: list[str]) -> int:
    """`fastrlhf sft|reward|ppo [RECIPE_OR_FILE] [field=value ...]`"""
    from fastrlhf.config import recipe

    parser = _parser(verb, "[RECIPE] [field=value ...] [options]")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _fields_help(verb)
    # One list for both: argparse would take the first field=value for the recipe.
    parser.add_argument(
        "overrides",
        metavar="RECIPE, field=value",
        nargs="*",
        default=[],
        help="RECIPE: a YAML file or the name of a packaged recipe (`fastrlhf recipes` lists them); may be left out. "
        "field=value replaces what the recipe says",
    )
    parser.add_argument("--dry-run", action="store_true", help="check fields, data and models, print the recipe, stop")
    _add_flags(parser, "overwrite", "skip_bad_rows")
    _add_accept_changed(parser)
    if verb == "reward":
        _add_cross_fit(parser)
    args = _parse(parser, arguments)
    source, overrides = _recipe_and_overrides(args.overrides)
    inputs, config = recipe.load_recipe(verb, source, overrides + args.flags + _accepted(args))
    if _restarted() and os.path.isfile(f"{config.output_dir}/run.json"):
        config = config.replace(resume=True, overwrite=False)  # torchrun does not change the command that it repeats
    recipe.check_paths(verb, inputs, config)
    if getattr(args, "cross_fit", None) is not None:
        _first_line(verb, f"{source or inputs['data']} -> {args.cross_fit}")
        tell = partial(print, file=sys.stderr, flush=True)
        return _load("eval.cross_fit").main(inputs, config, args.cross_fit, args.folds, config.overwrite, tell)
    if args.dry_run:
        for line in _load("preflight.dry_run").check_inputs(inputs, config):
            print("\n".join(f"# {part}" for part in line.splitlines()))
        print(f"# {_memory_of(verb, inputs, config)}")
        print(recipe.resolved_yaml(verb, inputs, config), end="")
        return EXIT_DONE
    model = inputs["policy" if verb == "ppo" else "model"]
    _first_line(verb, f"{source or model} -> {config.output_dir}")
    return _run_stage(verb, inputs, config)


def _restarted() -> bool:
    """Whether torchrun has started the run anew. Each of its machines counts its own failures alone."""
    if launch.world_size() == 1 or launch.most_restarts() == 0:
        return launch.restarts() > 0
    return _load("runtime.distributed").largest(launch.restarts()) > 0


def _add_cross_fit(parser: _Parser) -> None:
    parser.add_argument(
        "--cross-fit",
        metavar="FILE.jsonl",
        help="train no model to keep: write the rows of data with the strength that an ensemble which has learnt the "
        "other rows gives each, weakest first",
    )
    parser.add_argument("--folds", type=int, default=2, help="of --cross-fit: parts of the data (default 2)")


def _run_stage(verb: str, inputs: dict[str, Any], config: Any) -> int:
    """The run; on a GPU, the peak that it will have is printed before weights are loaded, and the run takes from it the
    size of its micro-batches and whether it checkpoints, where these are auto and no run before it has settled them."""
    stage = _load(STAGES[verb])
    if not _load("runtime.hardware").gpu_alone():
        return stage.main(inputs, config)

    @cache
    def plan() -> Any:
        report = _load("plan.report")
        line, found = report.before_a_run(verb, inputs, config, report.target_of(None))
        print(line, flush=True)
        return found

    def tokens() -> int | None:
        return None if plan() is None else plan().tokens

    open_question = config.gradient_checkpointing is None and not getattr(config, "head_only", False)
    settled = config
    if (open_question or not config.resume) and plan() is not None and open_question:
        settled = config.replace(gradient_checkpointing=plan().checkpointing)
    return stage.main(inputs, settled, tokens)


def _memory_of(verb: str, inputs: dict[str, Any], config: Any) -> str:
    """The peak that a run will have, in a line; why it is not known, where it is not."""
    report = _load("plan.report")
    return report.before_a_run(verb, inputs, config, report.target_of(None))[0]


def _plan(verb: str, arguments: list[str]) -> int:
    """`fastrlhf plan RECIPE [field=value ...]`"""
    from fastrlhf.config import recipe

    parser = _parser(verb, "RECIPE [field=value ...] [--stage sft|reward|ppo] [options]")
    parser.add_argument("overrides", metavar="RECIPE, field=value", nargs="*", default=[], help="as sft, reward, ppo")
    parser.add_argument("--stage", choices=STAGES, help="what the recipe is for (default: what its fields say)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of each GPU, such as 24GiB (default: this machine's)")
    parser.add_argument("--gpus", metavar="N", type=int, default=1, help="GPUs that share a step's rows (default 1)")
    parser.add_argument("--device", metavar="NAME", help="what a step takes on it at its published peaks, such as h100")
    parser.add_argument("--calibrate", action="store_true", help="what a step takes at the rates of this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object, all sizes in bytes")
    args = _parse(parser, arguments)
    if args.gpus < 1:
        raise UserError(f"--gpus: {args.gpus}; expected at least 1")
    source, overrides = _recipe_and_overrides(args.overrides)
    stage = args.stage or recipe.stage_of(source, overrides)
    unread = [f"{name}=unread" for name, spec in recipe.INPUTS[stage].items() if spec.required and spec.kind == "data"]
    inputs, config = recipe.load_recipe(stage, source, [*overrides, *unread, "output_dir=unwritten"])
    sizes = (args.gpu_memory, args.gpus, args.json, args.device, args.calibrate)
    text, too_large = _load("plan.report").planned(stage, inputs, config, *sizes)
    print(text)
    return EXIT_BUG if too_large else EXIT_DONE


def _doctor(verb: str, arguments: list[str]) -> int:
    """`fastrlhf doctor [MODEL]`"""
    parser = _parser(verb, "[MODEL] [--data FILE] [options]")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder or hub id: its kernels, numbers and words")
    parser.add_argument("--data", metavar="FILE", help="rows that the model's stages are to read")
    parser.add_argument("--peers", action="store_true", help="whether a GPU is ready for the bench commands, and these")
    parser.add_argument("--json", action="store_true", help="print one JSON list, an object a line of the table")
    args = _parse(parser, arguments)
    if args.model is not None:
        _check_model("MODEL", args.model)
    doctor = _load("doctor")
    lines = doctor.examine(args.model, args.data, peers=args.peers)
    print(json.dumps([line._asdict() for line in lines], indent=1) if args.json else doctor.table(lines))
    return EXIT_BUG if any(line.fault for line in lines) else EXIT_DONE


def _recipe_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A recipe is the first argument that is no field=value; a file may have "=" in its name."""
    source = next((a for a in arguments if "=" not in a or os.path.isfile(a)), None)
    if source is None:
        return None, arguments
    index = arguments.index(source)
    return source, arguments[:index] + arguments[index + 1 :]


def _recipes(verb: str, arguments: list[str]) -> int:
    """`fastrlhf recipes [NAME]`"""
    from fastrlhf.config import recipe

    parser = _parser(verb, "[NAME]")
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe, to be saved and changed")
    args = _parse(parser, arguments)
    if args.name is not None:
        print(recipe.packaged_recipe(args.name), end="")
        return EXIT_DONE
    rows = [
        f"{recipe.packaged_stage(name):6}  {name:16}  {recipe.packaged_recipe(name).splitlines()[0].removeprefix('# ')}"
        for name in recipe.packaged_recipes()
    ]
    print("\n".join(rows))
    return EXIT_DONE


def _quickstart(verb: str, arguments: list[str]) -> int:
    parser = _parser(verb, "[field=value ...] [options]")
    parser.add_argument("overrides", metavar="field=value", nargs="*", default=[], help="for example seed=1")
    _add_flags(parser, "overwrite")
    args = _parse(parser, arguments)
    _first_line(verb, "embedded data, no network")
    return _load("quickstart").main(args.overrides + args.flags)


def _resume(verb: str, arguments: list[str]) -> int:
    from fastrlhf.config import recipe

    parser = _parser(verb, "RUN_DIR")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of the run")
    _add_accept_changed(parser)
    args = _parse(parser, arguments)
    _first_line(verb, args.run_dir)
    stage = _load("checkpoint.run_folder").read_run_json(args.run_dir)["verb"]
    as_before = ["resume=true", "overwrite=false", f"output_dir={args.run_dir}"]
    if stage == "quickstart":
        return _load("quickstart").main(as_before + _accepted(args))
    recipe_file = f"{args.run_dir}/config.yaml"
    if not os.path.isfile(recipe_file):
        remedy = "put it back, or resume from Python: the same trainer with resume=True"
        raise UserError(f"{recipe_file} is missing, which says what the run was started with; {remedy}")
    inputs, config = recipe.load_recipe(stage, recipe_file, as_before + _accepted(args))
    recipe.check_paths(stage, inputs, config)
    return _run_stage(stage, inputs, config)


def _generate(verb: str, arguments: list[str]) -> int:
    parser = _parser(verb, "FOLDER (--prompt TEXT | --prompts FILE) [options]")
    parser.add_argument("model", metavar="FOLDER", help="model folder, hub id or GGUF file")
    parser.add_argument("--prompt", action="append", help="what to reply to; may be repeated")
    _add_sampling(parser, samples=1)
    parser.set_defaults(n=None)  # so that one that is given is known
    parser.add_argument(
        "--best-of", metavar="N", type=int, help="sample N replies and keep the one that --reward prefers"
    )
    parser.add_argument("--reward", help=f"of --best-of: {_REWARD}")
    _add_files(parser, "a prompt")
    args = _parse(parser, arguments)
    if args.best_of is not None or args.reward is not None:
        return _generate_best(parser, args)
    args.n = 1 if args.n is None else args.n
    rows = _asked(parser, args, "--prompt")
    inference = _load("inference")
    options = {name: getattr(args, name) for name in _SAMPLING}
    sampled = inference.sample(args.model, rows, at_once=_SHOWN_AT_ONCE, **options)
    replies = ((row, reply.text) for row, several in zip(rows, sampled) for reply in several)
    if args.output is not None:
        tell = partial(print, file=sys.stderr, flush=True)
        return _write(args.output, inference.rows_of_replies(replies, tell))
    for row, reply in replies:
        if len(rows) * args.n > 1:
            _print_asked(row)
        print(_shown(reply), flush=True)
    return EXIT_DONE


def _generate_best(parser: _Parser, args: argparse.Namespace) -> int:
    best = _load("eval.best_of")
    best.check(args.best_of, args.reward, args.n, args.temperature, args.top_k)
    reward = _reward_of(args)
    rows = _asked(parser, args, "--prompt")
    args.n = args.best_of
    tell = partial(print, file=sys.stderr, flush=True)
    options = {name: getattr(args, name) for name in _SAMPLING}
    made = best.best_of(args.model, rows, reward=reward, say=tell, **options)
    if args.output is None:
        for winner in made.winners:
            _print_asked(winner.prompt, f" [reward {winner.reward:.6g}, mean of {args.n} {winner.mean:.6g}]")
            print(_shown(winner.reply.text), flush=True)
    for line in made.lines(args.model):
        tell(line)
    return EXIT_DONE if args.output is None else _write(args.output, made.rows(tell))


def _print_asked(row: Prompt, note: str = "") -> None:
    from fastrlhf.runtime.console import redact

    text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    print(f"--- {redact(_shown(text))}{note}")


def _score(verb: str, arguments: list[str]) -> int:
    parser = _parser(verb, "FOLDER (--prompt TEXT --response TEXT [...] | --prompts FILE) [options]")
    parser.add_argument("model", metavar="FOLDER", help="reward model: a folder or hub id")
    parser.add_argument("--prompt", action="append", help="may be repeated, each with a --response")
    parser.add_argument("--response", action="append", help="the response to judge")
    _add_files(parser, "a prompt and a response, or responses")
    args = _parse(parser, arguments)
    if args.prompts is not None and args.response:
        raise UserError("--response: the rows of --prompts have their own; give --prompt with it, or neither")
    rows = _asked(parser, args, "--prompt and --response")
    inference = _load("inference")
    from fastrlhf.data.feedback import responses_of

    if args.prompts is None:
        replies = [inference.checked(text, "--response") for text in args.response or []]
        if not replies:
            raise UserError(f"the following arguments are required: --response; see {parser.prog} --help")
        if len(rows) != len(replies):
            raise UserError(f"{len(rows)} --prompt but {len(replies)} --response: give one of each per score")
        pairs = list(zip(rows, replies))
    else:
        pairs = [(row, reply) for row in rows for reply in responses_of(row)]
    scores = inference.score(args.model, [row.prompt for row, _ in pairs], [r for _, r in pairs], raw=args.raw)
    if args.output is not None:
        return _write(args.output, [_scored(*pair, score) for pair, score in zip(pairs, scores)])
    for score in scores:
        print(f"{score:.6g}")
    return EXIT_DONE


def _scored(row: Prompt, response: str, score: float) -> dict[str, Any]:
    columns = {name: value for name, value in row.columns.items() if name not in ("responses", "completion")}
    return {**columns, "prompt": row.prompt, "response": response, "score": score}


_REWARD = "reward model, FILE.py:FUNCTION, or {model: CLASSIFIER, label: LABEL}"
_SHOWN_AT_ONCE = 32  # prompts whose replies are sampled together and printed before the next
_SAMPLING = ("n", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "raw")  # arguments of inference.sample


def _add_sampling(parser: _Parser, *, samples: int) -> None:
    parser.add_argument(
        "--samples", dest="n", type=int, default=samples, help=f"replies to a prompt (default {samples})"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest reply (default 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default 0: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")


def _add_language(parser: _Parser, of: str) -> None:
    from fastrlhf.config.language import LANGUAGES

    parser.add_argument("--lang", choices=LANGUAGES, help=f"language of {of}")


def _add_files(parser: _Parser, row: str) -> None:
    """Options of prompts that come from a file and of what is made of them."""
    parser.add_argument(
        "--prompts", metavar="FILE", help=f"rows with {row}: whatever ppo's prompts take; - reads stdin"
    )
    _add_reading(parser, "--prompts")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write rows here instead of printing")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")


_READING = ("columns", "ignore_columns", "skip_bad_rows")  # arguments of inference.read_prompts


def _add_reading(parser: _Parser, prompts: str) -> None:
    """How rows are read; prompts: the argument that names them."""
    parser.add_argument("--raw", action="store_true", help="take texts as they are, without the chat template")
    parser.add_argument("--columns", metavar="{prompt: NAME}", help=f"columns of {prompts} under other names")
    parser.add_argument(
        "--ignore-columns", metavar="NAMES", help=f"columns of {prompts} that are no part of the prompt"
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help=f"leave out malformed rows of {prompts}")


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `_add_reading`, typed as a config types them."""
    config = _load("config.stages").PPOConfig(**{name: getattr(args, name) for name in _READING})
    return {name: getattr(config, name) for name in _READING}


def _asked(parser: _Parser, args: argparse.Namespace, options: str) -> list[Prompt]:
    """The prompts given, once everything that needs no model is checked."""
    if (args.prompt is None) == (args.prompts is None):
        problem = "the following arguments are required" if args.prompt is None else "one is enough"
        raise UserError(f"{problem}: {options} or --prompts FILE; see {parser.prog} --help")
    _check_model("FOLDER", args.model)
    inference = _load("inference")
    if args.output is not None:
        inference.check_output(args.output, args.overwrite)
    if args.prompts is not None:
        return inference.read_prompts(args.prompts, **_reading(args))
    return [inference.Prompt(inference.checked(text, "--prompt")) for text in args.prompt]


def _eval(verb: str, arguments: list[str]) -> int:
    from fastrlhf.config.recipe import path_problem

    parser = _parser(verb, "FOLDER PROMPTS [--reward REWARD] [--against FOLDER] [options]")
    parser.add_argument("model", metavar="FOLDER", help="model folder, hub id or GGUF file")
    parser.add_argument(
        "prompts", metavar="PROMPTS", help="rows with a prompt: whatever ppo's prompts take; - is stdin"
    )
    parser.add_argument("--reward", help=_REWARD)
    parser.add_argument("--against", metavar="FOLDER", help="another model: win rate, with --reward as the judge")
    parser.add_argument("--refusals", metavar="FILE", help="patterns of a refusal, a regular expression a line")
    parser.add_argument("--keywords", metavar="FILE", help="words to look for in replies, one a line")
    parser.add_argument("--json", metavar="FILE", help="write figures and replies here")
    parser.add_argument("--report", metavar="FILE.html", help="write a page that opens offline")
    parser.add_argument("--overwrite", action="store_true", help="replace files of --json and --report that exist")
    _add_reading(parser, "PROMPTS")
    _add_sampling(parser, samples=1)
    args = _parse(parser, arguments)
    _check_model("FOLDER", args.model)
    if args.against is not None:
        _check_model("--against", args.against)
    reward = _reward_of(args)
    if args.prompts != "-" and (problem := path_problem(args.prompts, "data")):
        raise UserError(f"PROMPTS: {problem}")
    _first_line(verb, f"{args.model}, {args.prompts}")
    return importlib.import_module("fastrlhf.eval").main(
        **{name: getattr(args, name) for name in ("model", "prompts", "against", "refusals", "keywords", "overwrite")},
        **{name: getattr(args, name) for name in _SAMPLING},
        reward=reward,
        outputs={"--json": args.json, "--report": args.report},
        reading=_reading(args),
        say=partial(print, flush=True),
        tell=partial(print, file=sys.stderr, flush=True),
    )


def _reward_eval(verb: str, arguments: list[str]) -> int:
    from fastrlhf.config.recipe import path_problem

    parser = _parser(verb, "FOLDER DATA [--train FILE] [options]")
    parser.add_argument("model", metavar="FOLDER", help="reward model: a folder or hub id")
    parser.add_argument("data", metavar="DATA", help="rows that people judged: whatever reward's data takes")
    parser.add_argument(
        "--train", metavar="FILE", help="rows that the bag of words learns from (default: DATA, cross-validated)"
    )
    parser.add_argument("--score-range", metavar="LOW,HIGH", help="the annotators' scale (default 1,5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--strength",
        metavar="FILE.jsonl",
        help="write the rows with their strength by an ensemble, weakest first",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of --json and --strength that exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples and of the parts (default 0)")
    _add_reading(parser, "DATA")
    args = _parse(parser, arguments)
    _check_model("FOLDER", args.model)
    for name, path in (("DATA", args.data), ("--train", args.train)):
        if path is not None and (problem := path_problem(path, "data")):
            raise UserError(f"{name}: {problem}")
    fields = {name: getattr(args, name) for name in (*_READING, "score_range")}
    config = _load("config.stages").RewardConfig(**{name: value for name, value in fields.items() if value is not None})
    _first_line(verb, f"{args.model}, {args.data}")
    return _load("eval.reward_model").main(
        **{name: getattr(args, name) for name in ("model", "data", "train", "strength", "overwrite", "raw", "seed")},
        output=args.json,
        score_range=config.score_range,
        reading={name: getattr(config, name) for name in _READING},
        say=partial(print, flush=True),
        tell=partial(print, file=sys.stderr, flush=True),
    )


def _reward_of(args: argparse.Namespace) -> Any:
    """What --reward says, as a recipe's `reward` does."""
    from fastrlhf.config.recipe import input_value, path_problem

    reward = input_value(args.reward)
    problem = path_problem(reward, "reward") if isinstance(reward, str) else None
    if problem:
        raise UserError(f"--reward: {problem}")
    return reward


def _write(path: str, rows: list[dict[str, Any]]) -> int:
    _load("inference").write_rows(path, rows)
    print(f"{len(rows)} rows -> {path}")
    return EXIT_DONE


def _report(verb: str, arguments: list[str]) -> int:
    parser = _parser(verb, "RUN_DIR [--lang zh|en]")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a run, finished or not")
    _add_language(parser, "the page (default: that of the prompts in the folder)")
    args = _parse(parser, arguments)
    return importlib.import_module("fastrlhf.report").main(args.run_dir, args.lang)


def _label(verb: str, arguments: list[str]) -> int:
    parser = _parser(
        verb, "[PROMPTS] (--policy FOLDER | --replies FILE) --output FILE.jsonl [options] | --summary FILE"
    )
    parser.add_argument("prompts", metavar="PROMPTS", nargs="?", help="rows with a prompt: JSON, JSONL, Parquet, CSV")
    parser.add_argument("--policy", metavar="FOLDER", help="sample replies of this model: folder, hub id or GGUF file")
    parser.add_argument("--replies", metavar="FILE", help="judge these replies, such as generate --output writes")
    parser.add_argument("--output", metavar="FILE.jsonl", help="judgements are added here; what is there goes on")
    parser.add_argument("--summary", metavar="FILE", help="print what the judgements in a file say, and stop")
    parser.add_argument(
        "--annotators", default="annotator", help="names, with commas; each gets an address of their own"
    )
    parser.add_argument(
        "--annotators-per-prompt", type=int, default=1, help="people who see the same prompt (default 1)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8717, help="port to serve on (default 8717; 0: any free one)")
    _add_language(parser, "the page and of --summary (default: that of the prompts)")
    parser.add_argument("--open", action="store_true", help="open the first annotator's page in a browser")
    _add_sampling(parser, samples=4)
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")
    args = _parse(parser, arguments)
    label = importlib.import_module("fastrlhf.label")
    say = partial(print, flush=True)
    if args.summary is not None:
        return label.print_summary(args.summary, args.lang, say)
    if args.output is None:
        raise UserError(f"the following arguments are required: --output; see {parser.prog} --help")
    if (args.policy is None) == (args.replies is None):
        raise UserError(f"give one of --policy and --replies; see {parser.prog} --help")
    if args.policy is not None:
        if args.prompts is None:
            raise UserError(f"the following arguments are required: PROMPTS; see {parser.prog} --help")
        _check_model("--policy", args.policy)
    _first_line(verb, f"{args.policy or args.replies} -> {args.output}")
    names = ("prompts", "output", "policy", "replies", "host", "port", *_SAMPLING)
    return label.main(
        **{name: getattr(args, name) for name in names},
        annotators=args.annotators.split(","),
        per_prompt=args.annotators_per_prompt,
        language=args.lang,
        open_browser=args.open,
        say=say,
    )


def _convert(verb: str, arguments: list[str]) -> int:
    parser = _parser(verb, "FOLDER OUT [--base FOLDER] [--checksum NUMBER]")
    parser.add_argument("folder", metavar="FOLDER", help="moss-moon-003, MOSS-RLHF, differences, or pickled weights")
    parser.add_argument("out", metavar="OUT", help="the folder to write; empty or not there")
    parser.add_argument("--base", metavar="FOLDER", help="the model that FOLDER's weights are differences to")
    parser.add_argument("--checksum", metavar="NUMBER", type=float, help="what all weights must sum up to, with --base")
    args = _parse(parser, arguments)
    _first_line(verb, f"{args.folder} -> {args.out}")
    print("\n".join(_load("convert").convert(args.folder, args.out, args.base, args.checksum)))
    return EXIT_DONE


VERBS: dict[str, tuple[Callable[[str, list[str]], int], str]] = {
    "quickstart": (_quickstart, "align a small model on embedded data, offline on a CPU: SFT, reward, PPO, verdict"),
    "sft": (_stage, "fine-tune a model on conversations or text"),
    "reward": (_stage, "train a reward model on human feedback"),
    "ppo": (_stage, "align a model with a reward model or a Python reward function"),
    "recipes": (_recipes, "list the packaged recipes; with NAME, print that one"),
    "resume": (_resume, "go on with an interrupted run"),
    "generate": (_generate, "print a model's replies to prompts, or the best of N by a reward"),
    "score": (_score, "print a reward model's scores of responses"),
    "eval": (_eval, "measure a model's replies: refusals, keywords, scripts, repetition, length, reward, win rate"),
    "reward-eval": (_reward_eval, "how far a reward model agrees with people: by kind, annotator, length; baselines"),
    "label": (_label, "judge replies in the browser: score, rank, edit; the file trains a reward model"),
    "convert": (_convert, "make a folder that transformers loads of MOSS's, MOSS-RLHF's or pickled weights"),
    "plan": (_plan, "the memory that a recipe's run will take, from its models' configurations alone"),
    "doctor": (
        _doctor,
        "check this machine, a model and rows for it: a table, and what to do about each red line",
    ),
    "report": (_report, "write report.html of a run"),
}


# ------------------------------------------------------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser(verb: str, usage: str) -> _Parser:
    parser = _Parser(prog=f"fastrlhf {verb}", usage=f"%(prog)s {usage}", description=VERBS[verb][1], allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="print the traceback of a user error")
    return parser


def _parse(parser: _Parser, arguments: list[str]) -> argparse.Namespace:
    """Options and field=value in any order. An option that does not exist is most often a field."""
    args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        field = name.lstrip("-").replace("-", "_")
        hint = f"; a field is written {field}=VALUE" if hasattr(args, "overrides") else ""
        raise UserError(f"{name}: no such option{hint}; see {parser.prog} --help")
    return args


def _add_flags(parser: _Parser, *fields: str) -> None:
    """Options that stand for field=true; `args.flags` lists those given."""
    for field in fields:
        text, option = f"{field}=true", "--" + field.replace("_", "-")
        parser.add_argument(option, action="append_const", const=text, dest="flags", help=f"the same as {text}")
    parser.set_defaults(flags=[])


def _add_accept_changed(parser: _Parser) -> None:
    parser.add_argument(
        "--accept-changed",
        metavar="NAME[,NAME]",
        help="with resume: go on although these inputs or fields are not what the run was started with",
    )


def _accepted(args: argparse.Namespace) -> list[str]:
    return [] if args.accept_changed is None else [f"accept_changed={args.accept_changed}"]


def _fields_help(stage: str) -> str:
    from fastrlhf.config.base import config_fields
    from fastrlhf.config.inputs import INPUTS
    from fastrlhf.config.stages import CONFIGS

    inputs = [(name, "required: " * spec.required + spec.description) for name, spec in INPUTS[stage].items()]
    fields = [(f"{f.name}={f.default}", f"{f.description} ({f.accepts})") for f in config_fields(CONFIGS[stage])]
    return (
        f"inputs, in the recipe or as name=value:\n{_columns(inputs)}\n\n"
        f"fields with their defaults, in the recipe or as field=value:\n{_columns(fields)}"
    )


def _columns(rows: list[tuple[str, str]]) -> str:
    left = max(len(name) for name, _ in rows) + 4
    right = max(40, shutil.get_terminal_size().columns - left)
    fill = partial(textwrap.fill, width=left + right, subsequent_indent=" " * left)
    return "\n".join(fill(text, initial_indent=f"  {name}".ljust(left)) for name, text in rows)


# -------------------------------------------------------------------------------------------------------------- output


def _check_model(argument: str, source: str) -> None:
    from fastrlhf.config.recipe import path_problem

    problem = path_problem(source, "model")
    if problem:
        raise UserError(f"{argument}: {problem}")


def _sentence(error: BaseException) -> str | None:
    """What to tell of an error that is not our bug; None: it is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a folder that cannot be written, a full disk, a host that is not reached
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    memory = sys.modules.get("fastrlhf.runtime.memory")  # outside a step, which would go on with less
    if isinstance(error, MemoryError) or (memory is not None and memory.ran_out(error)):
        return f"out of memory: {str(error) or 'this machine has no more'}; use a smaller model or smaller sizes"
    return None


def _speaks() -> bool:
    """Whether this process prints an error that others of the run have too: the first to ask does."""
    distributed = sys.modules.get("fastrlhf.runtime.distributed")
    return launch.local_rank() == 0 if distributed is None else distributed.is_first_reporter()


def _first_line(verb: str, text: str) -> None:
    if launch.rank() == 0:
        print(f"fastrlhf {__version__} {verb}: {text}", flush=True)


def _shown(text: str) -> str:
    """A model's text cannot steer the terminal; into a file or a pipe it goes as it is."""
    from fastrlhf.runtime.console import clean

    return clean(text) if sys.stdout.isatty() else text


def _print_traceback(*error: Any) -> None:
    """The traceback of `error` (type, value, traceback; none: the one being handled), safe for a terminal."""
    from fastrlhf.runtime.console import clean, redact

    lines = traceback.format_exception(*(error or sys.exc_info()))
    print(redact(clean("".join(lines))), end="", file=sys.stderr)


def _end_of_thread(end: threading.ExceptHookArgs) -> None:
    """A full disk ends the thread that writes TensorBoard's files: one sentence, the run goes on."""
    if issubclass(end.exc_type, OSError):
        _print_error(f"{end.thread.name if end.thread else 'a thread'} ended: {end.exc_value}")
    elif not issubclass(end.exc_type, SystemExit):
        _print_traceback(end.exc_type, end.exc_value, end.exc_traceback)


def _print_error(message: str) -> None:
    from fastrlhf.runtime.console import clean, redact

    lines = [line[:LINE_CHARS] for line in redact(clean(message)).splitlines()] or [""]
    if len(lines) > MESSAGE_LINES:
        rest = len(lines) - MESSAGE_LINES + 1
        lines = [*lines[: MESSAGE_LINES - 1], f"... and {rest} more"]
    print("error: " + "\n".join(lines), file=sys.stderr)


def _load(module: str) -> ModuleType:
    """A module of the package that needs torch. Its libraries make objects by the million, and a good part of the
    time would go into looking for garbage."""
    with collector_paused():
        return importlib.import_module(f"fastrlhf.{module}")
