"""parallel = fsdp: each rank holds its share of the weights too (PyTorch's FSDP2: Zhao et al. 2023, arXiv 2304.11277).

`shard` cuts every parameter along its first dimension, trained roles and frozen ones alike. Shares of trained weights
are fp32, whatever the model computes in: they are the masters. A layer is gathered when it runs, in the dtype of the
model, and let go of behind it; gradients are summed and scattered. What the rest of the code has to know of it:

- The trunk runs as the method `trunk` of the outer model, whose hooks gather what is outside of the layers: embeddings,
  last norm, head. They stay gathered until the backward pass, so the head is read behind the trunk. (Sharding the inner
  model instead would leave a tied head as it was before training, in silence.)
- Each layer of a forward and of a backward pass is a collective. Ranks make as many of them, in one order: `in_step`
  gives a rank that has fewer micro-batches than another empty ones.
- Where ranks go their own ways (decoding, scoring), `gathered` gathers all weights of the model once; where the memory
  does not hold them, a layer at a time as it runs, in turns that all ranks take together.

Only this file and `Optimizer`'s subclass in it know how a weight is cut.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.checkpoint.store import Checkpoint
from fastrlhf.checkpoint.weight_files import Header, Streamed
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.parallel.mapped import layers_of, values_of
from fastrlhf.parallel.shares import SharesOptimizer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import ran_out

T = TypeVar("T")
SUMS_SHARE = 4  # whole sums of gradients are kept over the micro-batches where they take at most 1/4 of the memory
WHOLE_SHARE = 0.75  # of the memory, that shares and a whole model beside them may take: keys and values take the rest
GIB = 1 << 30


def wanted(config: StageConfig) -> bool:
    """Whether models are to be sharded: not of one rank."""
    return config.parallel == "fsdp" and distributed.size() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether this is a model that `shard` has cut."""
    return getattr(model, "_gathered", None) is not None


def is_whole(model: nn.Module) -> bool:
    """Whether this rank may run it alone: it is not sharded, or inside of `gathered`."""
    return getattr(model, "_gathered", None) is not False


def is_layered(model: nn.Module) -> bool:
    """Whether it is inside of `gathered`, and its layers are gathered as they run."""
    return getattr(model, "_layered", False)


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype that it computes in; the shares of a trained model are fp32."""
    return model._computed_in if is_sharded(model) else model.dtype


# ------------------------------------------------------------------------------------------------------------- cutting


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Cut the model in place, all ranks together. What takes gradients now is what will. Of a model whose weights wait
    in files (mapped.py) a rank takes a layer at a time to the device, and keeps its share.

    UserError where a device cannot hold what is gathered of it at a time, and for trained weights of several dtypes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(trained) > 1:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained))
        raise UserError(f"parallel = fsdp: trained weights are {kinds}, which it cannot mix; use parallel=zero")
    layers, model._computed_in = layers_of(model), model.dtype
    _check_memory(model, layers, distributed.memory())
    computed_in = trained.pop() if trained else torch.float32
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if computed_in != torch.float32:
        policy = MixedPrecisionPolicy(computed_in, torch.float32, cast_forward_inputs=False)
    distributed.begin()
    how: dict[str, Any] = {
        "mesh": init_device_mesh(distributed.device().type, (distributed.size(),)),
        "mp_policy": policy,
    }
    for part in (*layers, model):  # a layer at a time, so that no more than one is there whole
        for parameter in part.parameters():
            if not is_share(parameter):
                parameter.data = _to_cut(parameter)
        # The head is read behind the trunk, so what the outer model holds stays until the backward pass.
        fully_shard(part, reshard_after_forward=part is not model, **how)
        part.set_gradient_divide_factor(1.0)  # losses are sums divided already
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for parameter in model.parameters():
        parameter.computed_in = computed_in if parameter.requires_grad else parameter.dtype
    type(model).dtype = property(lambda self: self._computed_in)  # of the class that fully_shard has made
    model._gathered, model._layered = False, False
    size = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    model._memory = distributed.memory()
    model._sums_whole = SUMS_SHARE * size <= model._memory
    model._size = sum(p.numel() * p.computed_in.itemsize for p in model.parameters())  # where it is gathered
    # This rank's share: fp32 masters and AdamW's moments of what is trained, the rest as it is.
    share = sum(p.numel() * (12 if p.requires_grad else p.computed_in.itemsize) for p in model.parameters())
    model._share = model._beside = share / distributed.size()
    model.trunk = types.MethodType(_trunk, model)
    register_fsdp_forward_method(model, "trunk")
    model._order = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: model._order.append(layer)) for layer in layers]
    with torch.no_grad():  # the first call settles which part is the outermost
        model.trunk(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=distributed.device()))
    for hook in hooks:
        hook.remove()
    settle(model)
    return model


def _to_cut(parameter: nn.Parameter) -> Tensor:
    """A parameter's values, whole, on this rank's device; in fp32 where it trains."""
    values = values_of(parameter).to(distributed.device())
    return values.float() if parameter.requires_grad else values


def hold_together(*models: nn.Module | None) -> None:
    """Tell the models of a run what lies on the device beside each: from it follows how they are gathered."""
    sharded = {id(model): model for model in models if model is not None and is_sharded(model)}.values()
    total = sum(model._share for model in sharded)
    for model in sharded:
        model._beside = total


def fits_whole(held: float, weights: float, memory: float) -> bool:
    """Whether so many bytes of weights are gathered whole beside the shares of a run in a device's memory. From sizes
    alone, so that every rank and a resumed run decide alike."""
    return held + weights <= WHOLE_SHARE * memory


def layer_by_layer(*models: nn.Module | None) -> bool:
    """Whether `gathered` gathers these, together, a layer at a time."""
    sharded = {id(model): model for model in models if model is not None and is_sharded(model)}.values()
    weights = sum(model._size for model in sharded)
    return any(not fits_whole(model._beside, weights, model._memory) for model in sharded)


def _trunk(model: PreTrainedModel, **inputs: Any) -> Any:
    """Run the trunk -> its last hidden states [B, L, H], or the tuple of all layers' where `inputs` ask for them."""
    output = model.base_model(**inputs)
    return output.hidden_states if inputs.get("output_hidden_states") else output.last_hidden_state


def _check_memory(model: nn.Module, layers: Sequence[nn.Module], memory: float) -> None:
    """UserError where the memory in bytes does not hold this rank's share beside the largest layer, whole."""

    def size(part: nn.Module, wide: int) -> int:
        return sum(p.numel() * (wide if p.requires_grad else p.element_size()) for p in part.parameters())

    share = size(model, 12) / distributed.size()  # fp32 masters and AdamW's moments
    layer = max((size(part, 4) for part in layers or [model]), default=0)
    if share + layer > memory:
        raise UserError(
            f"parallel = fsdp: a rank's share of {type(model).__name__} takes {share / GIB:.1f} GiB and its largest "
            f"layer {layer / GIB:.1f} GiB, of {memory / GIB:.1f} GiB of memory; use more GPUs, lora, or a smaller model"
        )


def is_share(tensor: Tensor) -> bool:
    """Whether this is a rank's share of a tensor, which nothing computes with."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor, in the same storage; any other as it is."""
    with torch.no_grad():
        return tensor.detach().to_local() if is_share(tensor) else tensor


def cut(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's share of a tensor with the shape of the sharded one: equal pieces of the first dimension, rounded
    up, of which the last ranks may have fewer or none. Of a tensor that is not sharded all."""
    if not is_share(like):
        return whole
    rows = -(-len(whole) // distributed.size())
    return whole[distributed.rank() * rows :][: len(local(like))]


# ------------------------------------------------------------------------------------------------------------- running


def in_step(model: nn.Module, groups: Sequence[list[T]]) -> Iterator[list[T]]:
    """Run over this rank's micro-batches, and behind them over as many empty ones as another rank has more, where the
    model is sharded: each is a forward and perhaps a backward pass of all ranks.

    Gradients cross once, in the last micro-batch, where the device holds their whole sums; else in each.
    """
    if is_whole(model):
        yield from groups
        return
    most = distributed.largest(len(groups))
    for number in range(most):
        model.set_requires_gradient_sync(number == most - 1 or not model._sums_whole)
        yield groups[number] if number < len(groups) else []


def settle(model: nn.Module) -> None:
    """Let go of what a forward pass left gathered, where no backward pass follows."""
    if not is_whole(model):
        model.reset_iter_state()


def reading(model: nn.Module) -> AbstractContextManager[None]:
    """No gradients inside. A sharded model may not be gathered in inference mode, which would stay in its weights."""
    return torch.inference_mode() if is_whole(model) and not is_layered(model) else torch.no_grad()


@contextmanager
def gathered(*models: nn.Module | None, layered: bool = False) -> Iterator[None]:
    """Inside, ranks may run sharded models alone: they are gathered, in the dtype that they compute in; where the
    memory does not hold them (`fits_whole`), or layered, what is outside of layers, and each layer while it runs
    (`reading`).

    Ranks enter and leave together; of models that are gathered already nothing is done. UserError where memory ran out.
    """
    cut = list({id(model): model for model in models if model is not None and not is_whole(model)}.values())
    turns = _Turns(cut) if cut and (layered or layer_by_layer(*cut)) else None
    try:
        for model in cut:
            _gather(model, layered=turns is not None)
        yield
        if turns is not None:
            turns.take(None)
    finally:
        if turns is not None:
            turns.end()
        for model in cut:
            model.set_reshard_after_forward(True)
            model.set_reshard_after_forward(False, recurse=False)
            model._gathered = model._layered = False
            settle(model)


class _Turns:
    """The forwards of models whose layers are gathered as they run, one forward of all ranks at a time.

    Before a forward a rank says of which model it is. The first model that any rank wants has the turn: who wants
    another one, or has no more to run, gathers its layers with the others and lets go of them, and asks again.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.hooks = [
            model.base_model.register_forward_pre_hook(partial(self._before, number))
            for number, model in enumerate(models)
        ]

    def _before(self, number: int, *_: object) -> None:
        self.take(number)

    def take(self, number: int | None) -> None:
        """Return when it is the turn of the model of this number; of None when no rank has a forward left."""
        wanted = len(self.models) if number is None else number
        said = torch.tensor([wanted], device=distributed.device())
        while (now := int(distributed.gather_equal(said).min())) != wanted:
            with torch.no_grad():
                for layer in self.models[now]._order:
                    layer.unshard()
                    layer.reshard()

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _gather(model: nn.Module, *, layered: bool) -> None:
    from torch.distributed.fsdp import FSDPModule

    if not layered:
        model.set_reshard_after_forward(False)
    model._gathered, model._layered = True, layered
    try:
        with torch.inference_mode(False), torch.no_grad():
            for part in [model] if layered else model.modules():
                if isinstance(part, FSDPModule):
                    part.unshard()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        what = f"{'parts of' if layered else 'all'} {model._size / GIB:.1f} GiB of {type(model).__name__}"
        raise UserError(
            f"parallel = fsdp: generation and scoring gather a model, and memory ran out as {what} came; use more or "
            "larger GPUs, or a smaller model"
        ) from error


# ------------------------------------------------------------------------------------------------- reading and writing


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """As `model.state_dict()`, which would cut a gathered model again; of a sharded one what of it is gathered now."""
    if not is_sharded(model):
        return model.state_dict()
    named = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False) if not is_share(p)}
    return {**named, **_buffers(model)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are saved."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def state_in_parts(
    model: nn.Module, state: Callable[[], dict[str, Tensor]] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The state dict of a sharded model a part at a time: each layer, then what is outside of layers. On the lead's
    CPU, in the dtype that it computes in, tied weights one tensor; of the other ranks each part is empty.

    All ranks run through it together, and none holds more than its share and one part. state: a state dict of another
    form (adapters merged), made of the modules that are gathered when it is called; None: `state_dict`.
    """
    settle(model)
    state, given = state or partial(state_dict, model), set()
    for unit in (*layers_of(model), model):
        with torch.inference_mode(False), torch.no_grad():
            unit.unshard()
        try:
            yield _copied(state(), given) if distributed.is_lead() else {}
        finally:
            unit.reshard()


def _copied(tensors: dict[str, Tensor], given: set[str]) -> dict[str, Tensor]:
    """Those that were not given before, on the CPU; what is one tensor stays one."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    part = {}
    for name, tensor in tensors.items():
        if name not in given:
            place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True)
            part[name] = copies[place]
    given |= part.keys()
    return part


def state_bytes(model: nn.Module) -> int:
    """Bytes of the state dict of a sharded model, tied weights counted once."""
    return model._size + sum(buffer.nbytes for buffer in _buffers(model).values())


def streamed(tensors: dict[str, Tensor]) -> dict[str, Tensor] | Streamed:
    """Tensors as they are, or, where some are shares, gathered one after the other; all ranks run through them."""
    if not any(map(is_share, tensors.values())):
        return tensors
    headers = {name: Header(tuple(t.shape), getattr(t, "computed_in", t.dtype)) for name, t in tensors.items()}
    each = ((name, whole_tensor(tensor)) for name, tensor in tensors.items())
    return Streamed(headers, ({name: tensor.cpu()} for name, tensor in each))


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor on the lead's CPU, in the dtype it computes in (empty in the others); any other as it is."""
    if not is_share(tensor):
        return tensor.detach()
    part = local(tensor).to(tensor.computed_in)
    parts = distributed.gather_each(part)
    return torch.cat(parts).cpu() if distributed.is_lead() else part.new_empty(0, device="cpu")


def whole_everywhere(tensor: Tensor) -> Tensor:
    """A small sharded tensor, whole in every rank; any other as it is."""
    return torch.cat(distributed.gather_each(local(tensor))) if is_share(tensor) else tensor.detach()


@torch.no_grad()
def load_model(checkpoint: Checkpoint, name: str, model: PreTrainedModel) -> None:
    """Put a checkpoint's weights into the live model; errors are those of `Checkpoint.load_model`. Each rank reads its
    share of them."""
    if not is_sharded(model):
        checkpoint.load_model(name, model)
        return
    settle(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stands: dict[int, Tensor] = {}
    for p in parameters.values():
        stands.setdefault(id(p), torch.empty((), dtype=p.computed_in).expand(p.shape))
    live = {name: stands[id(p)] for name, p in parameters.items()} | _buffers(model)
    for key, saved in checkpoint.model_tensors(name, model, live).items():
        if key in parameters:
            local(parameters[key]).copy_(cut(parameters[key], saved))
        else:
            live[key].copy_(saved)


def shares(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What this rank holds of named tensors, and its shares of whole ones of the same names and shapes."""
    fits = {name for name in live.keys() & saved.keys() if live[name].shape == saved[name].shape}
    ours = {name: local(tensor) if name in fits else tensor for name, tensor in live.items()}
    return ours, {name: cut(live[name], tensor) if name in fits else tensor for name, tensor in saved.items()}


class ShardedOptimizer(SharesOptimizer):
    """An `Optimizer` whose masters are this rank's shares of a sharded model, in their own storage. Parameters that are
    not of one (a critic's head) are whole on every rank, as with ddp."""

    def _make_masters(self) -> list[nn.Parameter]:
        self.owners = list(range(len(self.params)))
        self.in_fp32 = [getattr(p, "computed_in", p.dtype) == torch.float32 for p in self.params]
        self.sharded = [is_share(p) for p in self.params]
        return [nn.Parameter(local(p)) if cuts else p for p, cuts in zip(self.params, self.sharded)]

    def _owners_of_gradients(self) -> Sequence[Any]:
        return self.params  # the model moves them itself

    def _cut(self, share: int, whole: Tensor) -> Tensor:
        return cut(self.params[share], whole)

    @torch.no_grad()
    def _add_up_ranks(self) -> None:
        for param, master, cuts in zip(self.params, self.masters, self.sharded):
            if cuts:
                master.grad = None if param.grad is None else local(param.grad)
                param.grad = None
        distributed.all_reduce_gradients([p for p, cuts in zip(self.params, self.sharded) if not cuts])

    def _total_norm(self, grads: list[Tensor]) -> Tensor:
        """grads: of the masters; those of shares are summed over the ranks."""
        squares = torch.zeros(2, dtype=torch.float64)
        for master, cuts in zip(self.masters, self.sharded):
            if master.grad is not None:
                squares[int(cuts)] += master.grad.double().square().sum().cpu()
        distributed.all_reduce_sum(squares[1:])
        return squares.sum().sqrt()

    def _copy_down(self) -> None:
        """The shares are the weights."""

    def _gathered(self, values: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for index, (value, cuts) in enumerate(zip(values, self.sharded)):
            parts = distributed.gather_each(value.detach().float()) if cuts else [value.detach()]
            if distributed.is_lead():
                yield index, torch.cat(parts).cpu()

    @torch.no_grad()
    def load_masters(self, tensors: dict[str, Tensor]) -> None:
        for index, master in enumerate(self.masters):
            if not self.in_fp32[index]:
                master.copy_(self._cut(index, tensors[f"master.{index}"]))
