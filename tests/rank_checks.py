"""What two ranks check of parallel = fsdp, in processes that `tests/rank_runs.py` starts."""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fastrlhf import PPOConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.checkpoint import weight_files
from fastrlhf.data.feedback import Prompt
from fastrlhf.models.loading import load_policy, load_reward_model, scalar_model
from fastrlhf.parallel import mapped, sharding, zero
from fastrlhf.plan.counter import LiveBytes
from fastrlhf.rl import roles
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.result import idle_share
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import shard as share_of
from fastrlhf.runtime.memory import MemoryBackoff
from tests import tiny

READERS = {"lm": load_policy, "rm": load_reward_model}


@contextmanager
def small_memory() -> Iterator[None]:
    """As where no model fits whole beside the shares."""
    with mock.patch.object(sharding, "fits_whole", lambda held, weights, memory: False):
        yield


def check_layer_by_layer() -> None:
    """Tokens, log-probs and scores of a model whose layers are gathered as they run are those of one that is gathered
    whole, to the bit: with more steps in one rank than in the other, with rows in one rank alone, and decoding without
    a cache. No more than one layer is there at a time."""
    model = sharding.shard(tiny.llama(seed=7, num_hidden_layers=4).requires_grad_(True))
    judge = sharding.shard(scalar_model(tiny.llama(), tiny.tokenizer(), seed=3).requires_grad_(False))
    layers, most, forwards = mapped.layers_of(model), [0], [0]

    def count(*_: object) -> None:
        there = sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers)
        most[0], forwards[0] = max(most[0], there), forwards[0] + 1

    for layer in layers:
        next(layer.children()).register_forward_pre_hook(count)
    ragged = [[5 + i] * (1 + 3 * i) for i in range(5)]
    for prompts, stops in ((ragged, range(0, 40)), (ragged, ()), ([[9, 4]], range(0, 20))):
        whole = generate(model, prompts, stops)
        most[0] = forwards[0] = 0
        with small_memory():
            layered = generate(model, prompts, stops)
        assert most[0] == (1 if len(prompts) > 1 or distributed.rank() == 1 else 0)  # none without a row
        assert layered.response_ids == whole.response_ids
        for name in ("log_probs", "policy_log_probs"):
            for a, b in zip(getattr(layered, name), getattr(whole, name), strict=True):
                assert torch.equal(a, b)
        each = distributed.gather(torch.tensor([forwards[0]])).tolist()
        assert len(set(each)) == (2 if len(stops) else 1), each  # one rank went on alone
    with small_memory():
        check_two_models_in_turns(model, judge)
    with sharding.gathered(model):  # and all of it again
        assert not any(isinstance(p, DTensor) for p in model.parameters())


def check_balance() -> None:
    """A rank that is expected to sample long replies gets fewer prompts; who samples what changes no token, and what
    comes back stands in the order of the prompts."""
    tokenizer, model = tiny.tokenizer(), tiny.llama(seed=7)
    prompts = [(Prompt(prompt=str(i)), [5 + i] * (1 + i)) for i in range(6)]
    asked: list[list[int]] = []

    class Watched(RolloutEngine):
        def generate(self, prompt_ids, params, **where):
            asked.append([*where["numbers"]])
            return super().generate(prompt_ids, params, **where)

    params = SamplingParams(max_new_tokens=9, n=2, stop_token_ids=tuple(range(30)), seed=4)
    engine = Watched(model, tokenizer)
    even = engine.rollout(prompts, params)
    uneven = engine.rollout(prompts, params, expected=[30, 1, 1, 1, 1, 1])
    assert asked[1] == [[0], [1, 2, 3, 4, 5]][distributed.rank()] != asked[0]
    alone = RolloutEngine(model, tokenizer).generate([ids for _, ids in prompts], params)
    for rollout in (even, uneven):
        assert rollout.response_ids == alone.response_ids and rollout.finished == alone.finished
        for ours, theirs in zip(rollout.policy_log_probs, alone.policy_log_probs, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert 0 <= rollout.idle < 0.5  # of two ranks
    assert idle_share(3.0 if distributed.rank() else 1.0) == 1 - 2 / 3


def generate(model: torch.nn.Module, prompts: list[list[int]], stops: range | tuple[()]) -> Generation:
    params = SamplingParams(max_new_tokens=12, n=2, stop_token_ids=tuple(stops), seed=3)
    mine = share_of(len(prompts))
    return RolloutEngine(model).generate(prompts[mine], params, numbers=range(mine.start, mine.stop))


def check_two_models_in_turns(one: torch.nn.Module, two: torch.nn.Module) -> None:
    """Ranks that run two models in other orders, and not as often."""
    ids = torch.arange(6)[None]
    order = [one, two, two, one] if distributed.rank() == 0 else [two, one]
    said: dict[int, torch.Tensor] = {}
    with sharding.gathered(one, two):
        assert sharding.is_layered(one) and sharding.is_layered(two)
        for model in order:
            with sharding.reading(model):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            assert torch.equal(said.setdefault(id(model), hidden), hidden)
    assert not sharding.is_layered(one) and not sharding.is_whole(one)
    with sharding.gathered(one), sharding.reading(one):  # still small: the other rank has as many forwards here
        hidden = one.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden, said[id(one)])


def check_that_no_rank_holds_a_whole_model_to_write_it(out: Path, parallel: str) -> None:
    """A checkpoint and an export of 12 layers, with what is alive counted: a few times the largest part, in both."""
    rows = [{"prompt": "the cat", "response": "sat on the mat"}] * 4
    fields = {"total_steps": 1, "mini_batch_size": 4, "eval_every": 0, "save_every": 0, "learning_rate": 1e-3}
    config = SFTConfig(**fields, parallel=parallel, output_dir=str(out / f"{parallel}-streamed"))
    small_parts = mock.patch.object(weight_files, "PART_BYTES", 1)
    with mock.patch.object(zero, "BUCKET_ELEMENTS", 12_000), small_parts:
        model = tiny.llama(num_hidden_layers=12).bfloat16()
        trainer = SFTTrainer(config, model=model, tokenizer=tiny.tokenizer(), data=rows)
        next(iter(trainer))
        elements = sum(p.numel() for p in trainer.optimizer.params)
        outside = elements - sum(p.numel() for layer in mapped.layers_of(model) for p in layer.parameters())
        most, written = bytes_made(trainer, trainer._save), 12 * elements
        assert 4 * 12_000 < most < written / 6, (parallel, most, written)
        if parallel == "fsdp":
            most = bytes_made(trainer, partial(trainer.save, out / "streamed"))
            assert outside * 2 <= most <= outside * 2 * 3 < elements * 2 / 2, (most, outside, elements)
    if distributed.is_lead():
        saved = load_file(out / f"{parallel}-streamed/checkpoints/step-000001/optimizer_model.safetensors")
        assert sum(tensor.numel() for name, tensor in saved.items() if "exp_avg" in name) == 2 * elements
    distributed.wait_for_all()


class Resident(LiveBytes):
    """Of what operators return, what takes memory: no mapped file, no storage that FSDP2 has emptied, no small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = sharding.local(tensor).untyped_storage()
        if storage.device.type != "meta" and storage.resizable() and storage.nbytes() > 1000:
            self.seen[storage._cdata] = storage
            self.peak = max(self.peak, self.there())

    def there(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())


def check_that_no_rank_reads_a_whole_model(out: Path) -> None:
    """Policy, reference, reward model and the critic made from it, of folders of 4 layers in fp32, in several files,
    that are to run in bf16: at a time a rank has its shares and a few times the largest part. The weights are those
    that one process reads, and so are those of a critic from the policy's trunk, and of an adapter merged into it."""
    deep = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    if distributed.is_lead():
        for name, model in (("lm", tiny.llama(**deep)), ("rm", scalar_model(tiny.llama(**deep), tiny.tokenizer(), 3))):
            model.save_pretrained(out / name, max_shard_size="100KB")
            tiny.tokenizer().save_pretrained(out / name)
    distributed.wait_for_all()
    config = PPOConfig(rollout_batch_size=4, mini_batch_size=4, dtype="bf16", parallel="fsdp")
    whole = {name: load(str(out / name), "bf16") for name, load in READERS.items()}
    how = {"ref_policy": None, "value_model": None, "device": torch.device("cpu"), "report": print}
    memory, live, cuts = MemoryBackoff(config, torch.device("cpu"), print), Resident(), []

    def cut(model: torch.nn.Module) -> torch.nn.Module:
        before = live.there()
        sharding.shard(model)
        cuts.append((before, sum(sharding.local(share).nbytes for share in model.parameters())))
        return model

    for reward, critic in ((str(out / "rm"), "rm"), (lambda prompts, responses: [0.0] * len(responses), "lm")):
        with live if critic == "rm" else contextlib.nullcontext(), mock.patch.object(roles, "shard", cut):
            made = roles.load_roles(
                config, tiny.tokenizer(), policy=str(out / "lm"), reward=reward, memory=memory, **how
            )
        models = [(made.policy, "lm"), (made.ref_policy, "lm"), (made.critic.trunk, critic)]
        models += [(model, "rm") for model in made.scorer.models]
        for model, name in models:
            expected = dict(whole[name].named_parameters())
            for key, share in model.named_parameters():
                ours = sharding.whole_tensor(share)
                if distributed.is_lead():  # no head of the policy's: 0
                    assert torch.equal(ours, expected.get(key, torch.zeros_like(ours))), (critic, name, key)
        if critic == "rm":
            outside = sum(p.numel() for p in made.policy.parameters())
            outside -= sum(p.numel() for layer in mapped.layers_of(made.policy) for p in layer.parameters())
            shares = [sum(size for _, size in cuts[:number]) for number in range(5)]
            assert all(before <= held for (before, _), held in zip(cuts, shares, strict=False)), cuts
            assert shares[-1] < live.peak < shares[-1] + 3 * 4 * outside, (live.peak, shares, outside)


def bytes_made(trainer: SFTTrainer, work: Callable[[], object]) -> int:
    """The most bytes alive at a time in the work, beside what this rank held before."""
    live, optimizer = LiveBytes(), trainer.optimizer
    moments = [t for state in optimizer.inner.state.values() for t in state.values()]
    live.add([*optimizer.masters, *moments, *(sharding.local(p) for p in trainer.model.parameters())])
    live.add(trainer.model.buffers())
    with sharding.gathered(trainer.model):  # FSDP2 keeps an empty storage of each layer, which is counted as full
        live.add(trainer.model.parameters())
    before = live.now
    with live:
        work()
    return live.peak - before


def check_that_a_full_disk_stops_no_other_rank(out: Path) -> None:
    """The lead cannot write the second part: nobody waits, the run goes on, and the next checkpoint is whole."""
    rows = [{"prompt": "the cat", "response": "sat on the mat"}] * 4
    fields = {"total_steps": 2, "mini_batch_size": 4, "eval_every": 0, "save_every": 1, "learning_rate": 1e-3}
    config = SFTConfig(**fields, parallel="fsdp", output_dir=str(out / "full"))
    trainer = SFTTrainer(config, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=rows)
    written = [0]

    def full(self: object, *arguments: object, **options: object) -> None:
        written[0] += 1
        if written[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, *arguments, **options)

    save = type(trainer.model).save_pretrained
    with (
        mock.patch.object(type(trainer.model), "save_pretrained", full),
        mock.patch.object(weight_files, "PART_BYTES", 1),
    ):
        trainer.train()
    if distributed.is_lead():
        assert [path.name for path in (out / "full/checkpoints").iterdir()] == ["step-000002"]
        assert "No space left on device" in (out / "full/events.jsonl").read_text()
        assert trainer.store.latest().step == 2
    distributed.wait_for_all()


def check_exports_of_adapters(out: Path) -> None:
    """Merged weights, the adapter and the mean of an ensemble's heads, of shares, are those of whole models; where
    memory is short too."""
    rows = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in ("the cat", "thank you", "please")]
    fields = {"total_steps": 1, "mini_batch_size": 3, "eval_every": 0, "save_every": 0, "learning_rate": 1e-3}
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    for parallel in ("ddp", "fsdp"):
        config = RewardConfig(**fields, parallel=parallel, lora=4, ensemble=2, center_rewards=True)
        options = {"model": tiny.llama(), "tokenizer": tiny.tokenizer(), "data": rows}
        with small_memory():
            trainer = RewardTrainer(config, **options, sft_data=[{"prompt": "the cat", "response": "sat"}])
            trainer.train()
            trainer.save(out / f"{parallel}-merged")
            trainer.save(out / f"{parallel}-adapter", adapter=True)
        distributed.wait_for_all()
        files = ("merged/model", "adapter/adapter_model")
        found[parallel] = [load_file(out / f"{parallel}-{file}.safetensors") for file in files]
    texts = [(out / f"{parallel}-merged" / "score_heads.json").exists() for parallel in found]
    assert all(texts)
    for whole, shares in zip(*found.values(), strict=True):
        assert whole.keys() == shares.keys()
        for name in whole:
            torch.testing.assert_close(shares[name], whole[name], rtol=1e-4, atol=1e-6)
    distributed.wait_for_all()
