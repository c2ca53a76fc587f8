"""The process that compiles: reads what to compile as JSON from standard input, writes what was found as JSON to standard output,
a line before it compiles and a line after.

A process of its own because a compiler that fails a check ends the process that it runs in, because libtpu must not be looked for
by a process that computes, and because nothing else stops a compiler that has written down what is wanted (`dumped.py`).
`compile.py` starts it: python -m lcx.planning.child < request.json
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.host import end_with_parent
from lcx.model.flops import count_jaxpr, kernel_calls
from lcx.planning.program import StepProgram, build
from lcx.planning.topology import Topology
from lcx.training.stages import RunConfig


def main() -> None:
    """Compile one request; a `UserError` becomes a reply of its own."""
    end_with_parent(signal.SIGKILL)  # a compiler does not stop for anything else
    request = json.load(sys.stdin)
    try:
        for reply in replies(request):
            print(json.dumps(reply), flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)


def replies(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is known of a step once it is traced (state, operations, mesh), then what the compiler says of it (bytes by kind, its
    text): `exhausted` is the compiler's message where it asked for more memory than there is.
    """
    run = configs.build(RunConfig, request["run"])
    where = Topology(request["name"], tuple(request["shape"]), request["slices"])
    program = build(run, request["stage"], devices(where))
    traced = program.traced()
    yield {
        "program": f"jit_{traced.fun_name}",
        "mesh": {axis: program.mesh.shape[axis] for axis in program.mesh.axis_names},
        "operations": operations(traced),
        "state": state_bytes(program),
    }
    lowered = traced.lower()
    options = {"xla_dump_to": request["dump"]} if where.chip.platform == "tpu" else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        yield {"exhausted": str(error)}
        return
    yield {"memory": memory(compiled, where.chip.platform), "text": compiled.as_text() or ""}


def devices(where: Topology) -> list[Any]:
    """The devices of a topology: this machine's CPU, split, or those that libtpu describes.

    Raises `UserError` for a slice that libtpu does not know.
    """
    if where.chip.platform == "cpu":
        return jax.devices("cpu")[: where.devices]
    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as programs find them there
    name = f"{where.name}:{'x'.join(map(str, where.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={where} is no slice that libtpu knows ({said}); name one such as v5p:4x4x4 or v5e:16x16"
        ) from error


def operations(traced: jax.stages.Traced) -> dict[str, float]:
    """Operations of the step over all devices, by walking its jaxpr: of kernels in every block of their grids, and others."""
    jaxpr = traced.jaxpr.jaxpr
    kernels = kernel_calls(jaxpr)
    return {"kernels": float(kernels), "others": float(count_jaxpr(jaxpr) - kernels)}


def state_bytes(program: StepProgram) -> dict[str, int]:
    """Bytes on a device of what a step is given and hands on: exact, by the shapes of its shards."""
    state = program.step.abstract_state()

    def total(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {"parameters": total([state.params, state.frozen]), "optimizer": total(state.opt_state)}


def memory(compiled: jax.stages.Compiled, platform: str) -> dict[str, int]:
    """The compiler's sizes on a device, in bytes, by the names of `dumped.memory`: its peak, or where it knows none all sizes.

    On a CPU all sizes, since a program takes its temporaries there as one piece, which the compiler's peak leaves out.
    """
    stats: Any = compiled.memory_analysis()

    def held(kind: str) -> int:
        sizes = {name: getattr(stats, f"{kind}{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
        return int(sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"])

    arguments = int(stats.argument_size_in_bytes)
    known = 0 if platform == "cpu" else int(getattr(stats, "peak_memory_in_bytes", 0))
    peak = max(known or held(""), arguments)
    return {"arguments": arguments, "temporary": peak - arguments, "peak": peak, "host_temporary": held("host_")}


if __name__ == "__main__":
    main()
