"""The process that compiles: reads what to compile as JSON from standard input, writes what was found as JSON to standard output.

A process of its own because a compiler that fails a check ends the process that it runs in, and because libtpu must not be looked
for by a process that computes. `compile.py` starts it: python -m lcx.planning.child < request.json
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.model.flops import count_jaxpr, kernel_calls
from lcx.planning.program import StepProgram, build
from lcx.planning.schedule import read_schedule
from lcx.planning.topology import Topology
from lcx.training.stages import RunConfig


def main() -> None:
    """Compile one request; a `UserError` becomes a reply of its own."""
    request = json.load(sys.stdin)
    try:
        reply = compiled(request)
    except UserError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply))


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """What the compiler says about a step: bytes by kind, operations, collectives; `memory` names what it asked for if too much."""
    begin = time.perf_counter()
    run = configs.build(RunConfig, request["run"])
    where = Topology(request["name"], tuple(request["shape"]), request["slices"])
    program = build(run, request["stage"], devices(where))
    traced = program.traced()
    found: dict[str, Any] = {"operations": operations(traced), "traced_seconds": time.perf_counter() - begin}
    found["state"] = state_bytes(program)
    lowered = traced.lower()
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "exhausted": str(error), "compile_seconds": time.perf_counter() - begin}
    found["compile_seconds"] = time.perf_counter() - begin
    found["memory"] = memory(compiled)
    text = compiled.as_text() or ""
    shape = {axis: program.mesh.shape[axis] for axis in program.mesh.axis_names}
    found["collectives"] = [vars(one) for one in read_schedule(text, shape)]
    if request.get("text"):
        found["text"] = text
    return found


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


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The compiler's sizes on a device, in bytes."""
    stats = compiled.memory_analysis()
    names = {
        "arguments": "argument_size_in_bytes",
        "outputs": "output_size_in_bytes",
        "aliased": "alias_size_in_bytes",
        "temporary": "temp_size_in_bytes",
        "program": "generated_code_size_in_bytes",
        "peak": "peak_memory_in_bytes",
        "host_arguments": "host_argument_size_in_bytes",
        "host_outputs": "host_output_size_in_bytes",
        "host_aliased": "host_alias_size_in_bytes",
        "host_temporary": "host_temp_size_in_bytes",
    }
    return {name: int(getattr(stats, field, 0) or 0) for name, field in names.items()}


if __name__ == "__main__":
    main()
