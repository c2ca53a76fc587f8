"""Low-rank adapters (LoRA, Hu et al., 2106.09685): which kernels have one, what it consists of, and folding it into the weights.

An adapter lies beside its kernel in the parameter tree, as `.../lora/{a, b, scale, magnitude}`, and `model.linear` applies it.

Legend: r rank, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp

from lcx.core import quantized
from lcx.core.configs import nearest, positive
from lcx.core.errors import UserError
from lcx.core.extras import check_installed
from lcx.core.param_spec import Init, ParamSpec, paths_of
from lcx.core.trees import Tree
from lcx.model.linear import effective_kernel, norms

T = TypeVar("T")

LORA = "lora"
"""Key of an adapter beside its kernel."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the kernels that `targets` names; all other parameters are frozen, but for those of `train`.

    Without a `rank` there are none, and a run trains all its parameters.
    `targets` and `train` are regular expressions searched for in parameter paths such as `layers/attention/query/kernel`;
    `embed/embedding`, `head/kernel` and the kernels of experts can be targets too. LongLoRA (2309.12307) trains
    `train=("embed", "norm")` besides. The change of a kernel is scaled by alpha / rank, with `rank_stabilized` by alpha / √rank
    (rsLoRA, 2312.03732). `ranks` and `alphas` hold (pattern, value) pairs, of which the first that matches a path replaces `rank`
    or `alpha`. `dora` learns the norm of each output's weights apart from their direction (2402.09353). `init` of the first
    matrix: `kaiming`, uniform within 1 / sqrt(inputs), or `gaussian` of deviation 1 / rank; the second one starts at zero.
    `b_lr_ratio` multiplies the learning rate of the second matrix (LoRA+, 2402.12354). `base_dtype`: the type in which training
    holds frozen kernels and embeddings, which it widens where they are used; a model stored in bfloat16 loses nothing by bfloat16.
    With `int8` or `nf4` (QLoRA, 2305.14314; extra `qlora`) the layers' kernels are quantised, and the rest is held in bfloat16.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: tuple[str, ...] = ("layers/attention/(query|key|value|out)/",)
    train: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    rank_stabilized: bool = False
    dora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    b_lr_ratio: float = 1.0
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"

    def __post_init__(self) -> None:
        if self.rank is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    raise UserError(f"lora.{field.name} has no effect without adapters; give lora.rank too, for example 8")
        positive("lora", rank=self.rank, alpha=self.alpha, b_lr_ratio=self.b_lr_ratio)
        for field in ("ranks", "alphas"):
            for pattern, value in getattr(self, field):
                positive(f"lora.{field}", **{pattern: value})
        if self.base_dtype in quantized.KINDS:
            check_installed("qwix", f"lora.base_dtype={self.base_dtype}", "qlora")
        if not self.targets:
            raise UserError("lora.targets=() leaves nothing to adapt; name parameters, or set lora.rank=None to train all of them")
        for field, pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.{field}: {pattern!r} is not a regular expression ({error})") from error

    @property
    def patterns(self) -> list[tuple[str, str]]:
        """All patterns, with the field that each is from."""
        plain = [(name, pattern) for name in ("targets", "train") for pattern in getattr(self, name)]
        return plain + [(name, pattern) for name in ("ranks", "alphas") for pattern, _ in getattr(self, name)]

    @property
    def lr_scale(self) -> tuple[tuple[str, float], ...]:
        """What `OptimConfig.lr_scale` has to say for LoRA+."""
        return () if self.b_lr_ratio == 1 else ((f"/{LORA}/b$", self.b_lr_ratio),)

    def rank_of(self, path: str) -> int:
        """The rank of the adapter beside a parameter."""
        return _first(self.ranks, path, self.rank)

    def scale_of(self, path: str) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        rank = self.rank_of(path)
        return _first(self.alphas, path, self.alpha) / (rank**0.5 if self.rank_stabilized else rank)


def specs(table: Tree, config: LoraConfig, tied_embeddings: bool = False) -> Tree:
    """The table of a model's parameters with those of its adapters.

    Raises `UserError` for a pattern that matches nothing, a rank above a kernel's dimensions, and an adapter of a table of
    embeddings that is also the output layer.
    """
    flat = dict(paths_of(table))
    targets = [path for path in flat if _matches(config.targets, path) and _is_target(path, flat[path])]
    _check_patterns(config, flat, targets)
    extended = dict(flat)
    for path in targets:
        if path == "embed/embedding" and tied_embeddings:
            raise UserError(
                "lora.targets matches embed/embedding, which this model also uses as its output layer, where an adapter would not "
                "be applied; train the table itself with lora.train=('embed',)"
            )
        if path == "embed/embedding" and config.dora:
            raise UserError("lora.dora applies to matrices; take embed out of lora.targets, or train it with lora.train=('embed',)")
        module = path.rpartition("/")[0]
        extended |= {f"{module}/{LORA}/{name}": spec for name, spec in _adapter(path, flat[path], config).items()}
    return flax.traverse_util.unflatten_dict(extended, sep="/")


def is_trained(path: str, config: LoraConfig) -> bool:
    """Whether a run with adapters trains a parameter: those of the adapters, of `train`, and learned positions."""
    if is_adapter(path):
        return not is_constant(path)
    return path.startswith("positions/") or _matches(config.train, path)


def held_as(path: str, config: LoraConfig | None) -> str:
    """How training holds a parameter: numpy's name of a type, or one of `quantized.KINDS`."""
    is_matrix = path.endswith(("/kernel", "/embedding"))
    if config is None or not is_matrix or is_trained(path, config):
        return "float32"
    quantizable = path.startswith("layers/") and not path.endswith("/router/kernel")
    return "bfloat16" if config.base_dtype in quantized.KINDS and not quantizable else config.base_dtype


def held(path: str, x: jax.Array, spec: ParamSpec, config: LoraConfig | None) -> Any:
    """A parameter as training holds it; one that is quantised already as it is."""
    kind = held_as(path, config)
    if quantized.is_quantized(x):
        return x
    return quantized.quantize(x, kind, spec.stacked + spec.inputs - 1) if kind in quantized.KINDS else x.astype(kind)


def held_bytes(path: str, spec: ParamSpec, config: LoraConfig | None) -> float:
    """Bytes of a number of a parameter as training holds it, with its share of a scale."""
    kind = held_as(path, config)
    if kind not in quantized.KINDS:
        return jnp.dtype(kind).itemsize
    return quantized.bytes_of(kind, spec.shape[spec.stacked + spec.inputs - 1])


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return f"/{LORA}/" in path


def is_constant(path: str) -> bool:
    """Whether a parameter follows from the config: the factor of an adapter."""
    return path.endswith(f"/{LORA}/scale")


def start(params: Tree) -> Tree:
    """`params` with the magnitudes of DoRA set to the norms of their kernels, as at the beginning of training."""

    def one(module: Tree) -> Tree:
        if "magnitude" not in module[LORA]:
            return module
        stacked = module[LORA]["scale"].ndim
        kernel = effective_kernel({**module, LORA: _without_magnitude(module[LORA])}, _inputs(module))
        return {**module, LORA: {**module[LORA], "magnitude": norms(kernel, _inputs(module), stacked)}}

    return _over_adapters(params, one)


def fold(params: Tree) -> Tree:
    """Parameters without adapters, whose kernels do what the adapted ones did."""

    def one(module: Tree) -> Tree:
        rest = {name: value for name, value in module.items() if name != LORA}
        if "embedding" in module:
            lora = module[LORA]
            return {**rest, "embedding": module["embedding"] + lora["scale"] * (lora["a"] @ lora["b"])}
        return {**rest, "kernel": effective_kernel(module, _inputs(module)).astype(jnp.float32)}

    with jax.default_matmul_precision("highest"):
        return _over_adapters(params, one)


def _adapter(path: str, spec: ParamSpec, config: LoraConfig) -> dict[str, ParamSpec]:
    rank, table = config.rank_of(path), path == "embed/embedding"
    # A table of embeddings is a kernel of one-hot inputs.
    split = 1 if table else spec.stacked + spec.inputs
    stacked, outs = spec.shape[: spec.stacked], spec.shape[split:]
    ins, axes = spec.shape[spec.stacked : split], spec.logical_axes
    size = min(math.prod(ins), math.prod(outs))
    if rank > size:
        raise UserError(
            f"lora.rank={rank} is above the smaller dimension of {path}, {size}; lower it, or give ranks=(('{path}', {size}),)"
        )
    first = Init("normal", 1 / rank) if config.init == "gaussian" else Init("uniform", math.prod(ins) ** -0.5)
    zeros, drawn = Init("constant", 0.0), first if not table else Init("normal", 1.0)
    # peft starts an embedding's adapter the other way round: zeros in the table, the second matrix drawn.
    a_init, b_init = (zeros, drawn) if table else (drawn, zeros)
    count = spec.stacked
    found = {
        "a": ParamSpec((*stacked, *ins, rank), (*axes[:split], None), a_init, 0 if table else len(ins), count),
        "b": ParamSpec((*stacked, rank, *outs), (*axes[:count], None, *axes[split:]), b_init, 0 if table else 1, count),
        "scale": ParamSpec(stacked, axes[:count], Init("constant", config.scale_of(path))),
    }
    if config.dora:
        found["magnitude"] = ParamSpec((*stacked, *outs), (*axes[:count], *axes[split:]), Init("constant", 1.0))
    return found


def _is_target(path: str, spec: ParamSpec) -> bool:
    return path == "embed/embedding" or spec.inputs > 0 and not path.endswith("/router/kernel")


def _check_patterns(config: LoraConfig, flat: dict[str, ParamSpec], targets: list[str]) -> None:
    possible = [path for path in flat if _is_target(path, flat[path])]
    for field, pattern in config.patterns:
        among = {"targets": possible, "train": list(flat)}.get(field, targets)
        if not any(re.search(pattern, path) for path in among):
            kind = {"targets": "kernel", "train": "parameter"}.get(field, "target")
            raise UserError(f"lora.{field}: {pattern!r} matches no {kind}{nearest(pattern, among)}")
    both = next((path for path in targets if _matches(config.train, path)), None)
    if both is not None:
        raise UserError(f"lora.train and lora.targets both match {both}; a parameter is trained either in full or by an adapter")


def _over_adapters(tree: Tree, one: Callable[[Tree], Tree]) -> Tree:
    """`tree` with each mapping that holds an adapter replaced by `one` of it."""
    if not isinstance(tree, dict):
        return tree
    return one(tree) if LORA in tree else {name: _over_adapters(value, one) for name, value in tree.items()}


def _inputs(module: Tree) -> int:
    return module[LORA]["a"].ndim - module[LORA]["scale"].ndim - 1


def _without_magnitude(lora: Tree) -> Tree:
    return {name: value for name, value in lora.items() if name != "magnitude"}


def _first(pairs: Sequence[tuple[str, T]], path: str, default: T) -> T:
    return next((value for pattern, value in pairs if re.search(pattern, path)), default)


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)
