"""What the operators take, as named structures, and how a function becomes an operator of torch.library.

torch.library knows flat lists of tensors and numbers. Here a function names what it takes: a parameter that is one of
the structures below is spread over the operator's schema, a field an input, and put together again for the function,
for its fake (shape) function and for its backward. Nobody counts positions.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The head on rows of hidden states: z = logit_scale * (hidden @ weight.T + bias), softcap, temperature.

    lora_scale * lora_b @ lora_a is added to the weight. labels: the columns whose log-probs are wanted.
    """

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [n]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [n]; where it is given, `temperature` does not count
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float
    workspace: int = 1 << 30  # bytes for logits; which default a device has: workspace.py

    def rows(self, rows: Tensor | slice | None) -> Head:
        """The head on some of the rows: their indices, a slice, or None for all."""
        if rows is None:
            return self
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(hidden=self.hidden[rows], labels=self.labels[rows], temperatures=temperatures)


class Rows(NamedTuple):
    """Rows of logits [..., V], and what belongs to each."""

    logits: Tensor
    labels: Tensor  # [...]
    temperatures: Tensor | None  # [...]; where it is given, `temperature` does not count
    temperature: float


HEAD_GRADIENTS = ("hidden", "weight", "bias", "lora_a", "lora_b")  # the order in which gradients of a head travel


class Need(NamedTuple):
    """Which gradients of a head somebody will ask for."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool


class Tokens(NamedTuple):
    """What a policy loss knows of every token, in one shape; mask: the tokens that count."""

    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None
    ref_log_probs: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """`change` applied to every tensor that is there."""
        return Tokens(*(None if t is None else change(t) for t in self))

    def counted(self, dtype: torch.dtype) -> Tokens:
        """In the dtype of the loss, and 0 where the mask is false: what stands there may be NaN."""
        return self.map(lambda t: t if t is self.mask else torch.where(self.mask, t, 0).to(dtype))


class LossOptions(NamedTuple):
    """The scalars of the clipped policy loss."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


class Shaping(NamedTuple):
    """What rewards are made of; without scores there is nothing to make."""

    scores: Tensor | None = None  # [B]
    log_probs: Tensor | None = None  # [B, T]
    ref_log_probs: Tensor | None = None
    kl_coef: float = 0.0
    estimator: str = "k1"


SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
}


class Operator:
    """A function as an operator: opaque to torch.compile, and run outside autocast (its results are fp32)."""

    def __init__(self, body: Callable[..., Any], returns: int, name: str, mutates: tuple[str, ...] = ()) -> None:
        """body: takes tensors, numbers and structures, all annotated; returns: how many tensors it gives back; mutates:
        the inputs that it changes in place."""
        hints = typing.get_type_hints(body)
        self.body = body
        self.parameters = {field: hint if hasattr(hint, "_fields") else None for field, hint in hints.items()}
        inputs: dict[str, str] = {}
        for parameter, structure in self.parameters.items():
            fields = {parameter: hints[parameter]} if structure is None else typing.get_type_hints(structure)
            for field, hint in fields.items():
                inputs[field if field not in inputs else f"{parameter}_{field}"] = SCHEMA[hint]
        self.inputs = tuple(inputs)
        results = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
        written = {field: f"Tensor({'abcdefgh'[i]}!)" for i, field in enumerate(mutates)}
        declared = ", ".join(f"{written.get(field, kind)} {field}" for field, kind in inputs.items())
        schema = f"({declared}) -> {results}"
        self.registered = torch.library.custom_op(f"fastrlhf::{name}", self.run, mutates_args=mutates, schema=schema)

    def __call__(self, *arguments):
        return self.registered(*flat(arguments))

    def direct(self, *arguments):
        """Without the dispatcher, which takes 0.1 ms, but under torch.compile. For functions without a gradient."""
        if torch.compiler.is_compiling():
            return self(*arguments)
        return self.body(*arguments)

    def run(self, *inputs):
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return self.body(**self.arguments(inputs))

    def arguments(self, inputs) -> dict[str, Any]:
        """The flat inputs of the operator as the arguments of the function."""
        values, arguments = iter(inputs), {}
        for name, structure in self.parameters.items():
            if structure is None:
                arguments[name] = next(values)
            else:
                arguments[name] = structure(*(next(values) for _ in structure._fields))
        return arguments

    def fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of a function that makes empty tensors of the results' shapes from the same arguments.

        `**_` takes those that it does not look at.
        """
        self.registered.register_fake(lambda *inputs: shapes(**self.arguments(inputs)))
        return shapes

    def differentiable(self, prepare: Callable[..., None], gradients: Callable[..., dict[str, Tensor]]) -> None:
        """prepare(ctx, arguments, outputs) says what to keep, as `ctx.kept` (tensors) and in other attributes.

        gradients(ctx, arguments, needs, *output gradients) gives {input: gradient}; needs: the inputs that want one.
        """

        def setup(ctx, inputs, output):
            ctx.kept = ()
            prepare(ctx, self.arguments(inputs), output)
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            ctx.scalars = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.save_for_backward(*tensors, *ctx.kept)
            ctx.kept = ()  # autograd holds them now, and checks that nobody writes over them
            ctx.set_materialize_grads(False)

        def backward(ctx, *output_gradients):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                raise RuntimeError(
                    "fastrlhf_kernels differentiates once: double backward (create_graph=True) is not supported"
                )
            saved = ctx.saved_tensors
            ctx.kept = saved[len(self.inputs) :]
            inputs = [number if t is None else t for t, number in zip(saved, ctx.scalars)]
            needs = {name for name, yes in zip(self.inputs, ctx.needs_input_grad) if yes}
            results = {}
            if needs and any(g is not None for g in output_gradients):
                results = gradients(ctx, self.arguments(inputs), needs, *output_gradients)
            return tuple(results.get(name) if name in needs else None for name in self.inputs)

        self.registered.register_autograd(backward, setup_context=setup)

    def gives_its_gradients(self, *names: str, in_place: bool) -> None:
        """The last outputs are the gradients of these inputs; the first output, a loss, is what they belong to.

        The backward only scales them. in_place, for gradients that are large: [V, H] twice would set the peak of
        memory. Then the first backward gives the buffers away; a second (retain_graph) computes them anew.
        """

        def prepare(ctx, arguments, outputs):
            ctx.gradients = outputs[-len(names) :]
            ctx.mark_non_differentiable(*outputs[1:])

        def gradients(ctx, arguments, needs, loss_gradient, *_):
            if ctx.gradients is None:
                with torch.no_grad():
                    ctx.gradients = self(*arguments.values())[-len(names) :]
            inputs = dict(zip(self.inputs, flat(arguments.values())))
            results = {}
            for name, given in zip(names, ctx.gradients):
                if name in needs and given.shape == inputs[name].shape:
                    dtype = inputs[name].dtype
                    if not in_place or type(given) is not Tensor:  # a traced backward must be functional
                        results[name] = (given * loss_gradient).to(dtype)
                    elif arguments["triton"] and given.is_contiguous():
                        from .gpu.scaling import scaled

                        results[name] = scaled(given, loss_gradient, dtype)
                    elif given.dtype == dtype:
                        results[name] = given.mul_(loss_gradient)
                    else:  # one pass over [V, H], not one to multiply and one to round
                        results[name] = torch.mul(given, loss_gradient, out=torch.empty_like(given, dtype=dtype))
            if in_place:
                ctx.gradients = None
            return results

        self.differentiable(prepare, gradients)


def operator(
    returns: int = 1, name: str | None = None, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function as an Operator of `returns` results, under its own name or `name`, that changes the
    inputs `mutates` in place."""
    return lambda body: Operator(body, returns, name or body.__name__, mutates)


def flat(arguments) -> list[Any]:
    """Structures spread into their fields."""
    inputs: list[Any] = []
    for value in arguments:
        inputs.extend(list(value) if isinstance(value, tuple) else [value])  # torch.compile of 2.11 adds lists only
    return inputs


def or_empty(tensors, like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for a result that nobody needs."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)
