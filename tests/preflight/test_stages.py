"""What a run would fail on in the middle is said before it begins, by the run and by --dry-run in the same words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from fastrlhf import cli
from fastrlhf.config.errors import UserError
from fastrlhf.models.loading import scalar_model
from fastrlhf.models.saving import write_model
from fastrlhf.preflight.dry_run import check_inputs
from tests import runs, tiny

SHORT = [{"prompt": "hello"}]
LONG = {"prompt": tiny.TEXTS[0] * 2}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
WITH_SYSTEM = [{"role": "system", "content": "please"}, *tiny.chat("hello")]


def gpt2(positions: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=positions, n_embd=16, n_layer=1, n_head=2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Model folders by their names, without weights: nothing here may look at them."""
    root = tmp_path_factory.mktemp("models")
    other = tiny.tokenizer()
    other.add_tokens(["<other>"])
    other.chat_template = NO_SYSTEM + other.chat_template
    strict = tiny.tokenizer()
    strict.chat_template = NO_SYSTEM + strict.chat_template
    made = {
        "policy": (tiny.llama(), tiny.tokenizer()),
        "short": (gpt2(48), tiny.tokenizer()),
        "few": (tiny.llama(vocab_size=262), tiny.tokenizer()),
        "strict": (tiny.llama(), strict),
        "other": (tiny.llama(vocab_size=321), other),
    }
    for name, (model, tokenizer) in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        write_model(root / f"{name}_rm", scalar_model(model, tokenizer, seed=0), tokenizer, [1])
    for weights in root.rglob("*.safetensors"):
        weights.unlink()
    (root / "reward.py").write_text("def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    return root


@pytest.fixture
def refused(folders, tmp_path, capsys):
    """The sentence with which a run of these inputs ends; that of --dry-run is the same."""

    def sentence(stage: str, **inputs: object) -> str:
        rows = {"ppo": "prompts"}.get(stage, "data")
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in inputs.pop(rows)))
        models = {"policy": folders / "policy", "reward": f"{folders}/reward.py:length", "max_new_tokens": 8}
        given = models if stage == "ppo" else {"model": folders / "policy"}
        for name, value in inputs.items():
            given[name] = folders / value if isinstance(value, str) and (folders / value).exists() else value
        arguments = [f"{k}={v}" for k, v in {**given, rows: source, "output_dir": tmp_path / "out"}.items()]
        said = []
        for more in (["--dry-run"], []):
            code = cli.main([stage, *arguments, *more])
            said.append(capsys.readouterr().err)
            assert code == 2, said[-1]
        assert said[0] == said[1] and not (tmp_path / "out").exists()
        return said[0]

    return sentence


TOO_LONG = (
    r"the longest prompt has 2\d tokens, with its reply up to [34]\d, and the {} has 24 positions; set max_prompt_"
)
REFUSED = [
    ({"policy": "short", "max_new_tokens": 40}, r"and the policy has 48 positions; set max_prompt_tokens=8 "),
    ({"policy": "short", "max_new_tokens": 48}, r"and the policy has 48 positions; lower max_new_tokens"),
    ({"policy": "few"}, r"tokenizer: it writes token \d+ and the policy has 262"),
    ({"reward": "short_rm", "max_new_tokens": 40}, r"and the reward model .*short_rm has 48 positions"),
    ({"reward": "few_rm"}, r"reward model .*few_rm: it has 262 tokens, and the policy writes ids up to 319"),
    ({"value_model": "short_rm", "max_new_tokens": 40}, r"and the value_model has 48 positions"),
    ({"value_model": "few_rm"}, r"value_model: it has 262 tokens, and the policy writes ids up to 319"),
    ({"ref_policy": "short", "max_new_tokens": 40}, r"and the ref_policy has 48 positions"),
    ({"ref_policy": "other"}, r"ref_policy: .* has another vocabulary \(321 tokens, here 320\)"),
    ({"value_model": "other_rm"}, r"value_model: .* has another vocabulary"),
    ({"reward": "policy"}, r"reward: .*policy' is no sequence classifier"),
]


@pytest.mark.parametrize(("inputs", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_model_that_cannot_read_prompt_and_reply_is_refused(refused, inputs, message):
    assert re.search(message, refused("ppo", prompts=[*SHORT * 9, LONG], **inputs))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_row_that_the_template_refuses_is_refused(refused, stage):
    row = {"prompt": WITH_SYSTEM, "response": "hi"} if stage == "sft" else {"prompt": WITH_SYSTEM}
    row |= {"chosen": "a", "rejected": "b"} if stage == "reward" else {}
    name, rows = ("policy", "prompts") if stage == "ppo" else ("model", "data")
    said = refused(stage, **{name: "strict", rows: [row]})
    assert "rows.jsonl:1: the chat template refuses a conversation of system, user" in said


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_what_a_learning_model_cannot_read_is_refused(refused, stage):
    rows = [{"prompt": "hello", **reply} for reply in ({"chosen": tiny.TEXTS[0] * 3, "rejected": "b"},)]
    assert "the model has 48 positions; set max_tokens=48" in refused(stage, model="short", data=rows)
    assert "and the model has 262; use the model's own tokenizer" in refused(stage, model="few", data=rows)


def test_a_reward_models_own_template_is_tried_with_every_prompt(refused, folders):
    rows = [*({"prompt": f"hello {n}"} for n in range(9)), {"prompt": WITH_SYSTEM}]
    said = refused("ppo", prompts=rows, reward="other_rm")
    assert "rows.jsonl:10: the own chat template of reward model " in said and "no system role" in said
    config = runs.PPOConfig(skip_bad_rows=True, max_new_tokens=8)
    inputs = {"policy": str(folders / "policy"), "reward": str(folders / "other_rm"), "prompts": rows}
    lines = check_inputs(inputs, config)
    assert lines[0].startswith("prompts: 10 rows read, 9 used, dropped: 1 malformed; first malformed: row 10: the own")


def test_generation_that_is_not_supported_is_refused_before_training():
    model = tiny.llama()
    model.config.is_encoder_decoder = True
    sentence = "policy: generation does not support LlamaForCausalLM: it has an encoder; use another"
    with pytest.raises(UserError, match=sentence):
        runs.ppo_trainer(policy=model)


# ------------------------------------------------------------------------------------------------ nothing is done twice


@pytest.mark.parametrize(
    ("make", "rows"),
    [(runs.sft_trainer, {"data": 40}), (runs.reward_trainer, {"data": 60}), (runs.ppo_trainer, {"prompts": 20})],
)
def test_every_text_is_tokenized_once(make, rows):
    """Of a row the prompt, and prompt and reply together for each reply; 20 rows."""
    texts = []

    class Watched(type(tiny.tokenizer())):
        def __call__(self, text, **how):
            texts.extend(text)
            return super().__call__(text, **how)

    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = Watched
    chats = [tiny.chat(f"the {n}") for n in range(20)]
    both = {"chosen": "yes", "rejected": "no"} if make is runs.reward_trainer else {"response": "yes"}
    [(name, count)] = rows.items()
    make(**{name: [{"prompt": chat, **both} for chat in chats]}, tokenizer=tokenizer)
    of_rows = [text for text in texts if text.startswith("<|user|>the ")]
    assert len(of_rows) == len(set(of_rows)) == count


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_overwrite_removes_the_old_run_only_when_everything_is_checked(stage, tmp_path):
    make = {"sft": runs.sft_trainer, "reward": runs.reward_trainer, "ppo": runs.ppo_trainer}[stage]
    fields = {"output_dir": str(tmp_path / "run"), "save_every": 1}
    make(**fields).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    name = "policy" if stage == "ppo" else "model"
    more = {"max_new_tokens": 200} if stage == "ppo" else {}
    with pytest.raises(UserError, match="positions"):
        make(**fields, overwrite=True, **{name: gpt2(6)}, **more)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    make(**fields, overwrite=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_sample_stands_for_a_large_source(folders):
    inputs = {"model": str(folders / "policy"), "data": [{"prompt": "a", "response": str(n)} for n in range(50)]}
    lines = check_inputs(inputs, runs.SFTConfig(), sample=10)
    assert any(line.startswith("data: ") and "of a sample of 10 rows" in line for line in lines)
    assert not any("sample" in line for line in check_inputs(inputs, runs.SFTConfig(), sample=50))
