"""Read a compiled TPU program's text: its collectives, its loops, and the compiler's estimate of its cycles."""

from __future__ import annotations

import dataclasses
import math
import re

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NETWORK = '_xla_host_transfer_handler_name="xla_megascale_runtime"'  # what leaves a slice is sent by it
BETWEEN_SLICES = "slice-"  # before the kind of such a collective
_REDUCE_SCATTER_FUSION = "all-reduce-scatter"  # what the name of such a fusion begins with
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, and how often a step runs it."""

    kind: str
    num_bytes: int  # of the whole array on one device: what is gathered, reduced or exchanged
    num_devices: int  # in one group
    count: int  # a step
    is_asynchronous: bool  # may run beside computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executable:
    """What the text of a compiled program says of a step."""

    collectives: tuple[Collective, ...]
    num_cycles: int  # of everything but kernels and collectives, by the compiler's estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
    name: str
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes


def read_executable(text: str, *, num_devices: int) -> Executable:
    """Read the text of an optimised program for TPUs (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    exchanges, num_cycles = [], 0
    waiting = [(entry, 1, False)]  # (computation, runs a step, whether it is inside a fusion)
    while waiting:
        name, count, is_fused = waiting.pop()
        instructions = computations[name]
        is_begun = any("AsyncCollectiveStart" in each.rest for each in instructions)
        for instruction in instructions:
            if instruction.opcode.removesuffix("-start") in _COLLECTIVES and (
                # An asynchronous collective is repeated in each fusion it is spread over: count the first.
                not is_fused or is_begun or name.startswith(_REDUCE_SCATTER_FUSION)
            ):
                exchanges.append(_collective(instruction, name, count=count, is_begun=is_begun, ways=num_devices))
            if instruction.opcode == "send" and _NETWORK in instruction.rest:
                exchanges.append(_between_slices(instruction, count=count))
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if cycles and not is_fused:  # a fusion's estimate covers what is in it
                num_cycles += count * int(cycles[1])
            times = _trip_count(instruction, computations) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                inside = is_fused or instruction.opcode not in ("while", "conditional", "call")
                waiting.append((called, count * times, inside))
    return Executable(collectives=tuple(each for each in exchanges if each.num_devices > 1), num_cycles=num_cycles)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(name=found[1], result=found[2], opcode=found[3], rest=found[4]))
    assert entry, "this is not the text of a compiled program"
    return computations, entry


def _called(instruction: _Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    names = [name.strip().removeprefix("%") for name in branches[1].split(",")] if branches else []
    return names + _CALLED.findall(instruction.rest)


def _trip_count(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Return a loop's trip count: the constant that its condition compares the counter from 0 with."""
    found = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    assert found is not None, f"the loop {instruction.name} has no condition"
    condition = computations[found[1]]
    constants = {each.name: each.rest for each in condition if each.opcode == "constant"}
    for each in condition:
        if each.opcode == "compare" and "direction=LT" in each.rest:
            for operand in re.findall(r"%([\w.\-]+)", each.rest.split(")")[0]):
                if operand in constants:
                    return int(constants[operand].split(")")[0])
    raise ValueError(f"the loop {instruction.name} of the compiled program does not say how often it runs")


def _collective(instruction: _Instruction, computation: str, *, count: int, is_begun: bool, ways: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    is_started = instruction.opcode != kind
    sizes = [_num_bytes(*array) for array in _ARRAY.findall(instruction.result)]
    # A started collective's result holds its operand too, except for all-reduce; the whole array is the larger.
    num_bytes = max(sizes) if is_started and kind != "all-reduce" else sum(sizes)
    group = _group_size(instruction.rest, num_devices=ways)
    if kind == "reduce-scatter":
        num_bytes *= 1 if is_started else group
    if computation.startswith(_REDUCE_SCATTER_FUSION):  # with the slice that follows
        kind = "reduce-scatter"
    return Collective(
        kind=kind,
        num_bytes=num_bytes,
        num_devices=group,
        count=count,
        is_asynchronous=is_started or is_begun,
    )


def _between_slices(instruction: _Instruction, *, count: int) -> Collective:
    """Return a collective over the data-center network; its results come by a `recv`, work may be done until then."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', instruction.rest)
    assert kind is not None and slices is not None, instruction.rest
    return Collective(
        kind=BETWEEN_SLICES + kind[1].lower().replace("_", "-"),
        num_bytes=_num_bytes(*_ARRAY.findall(instruction.result)[0]),
        num_devices=len(slices[1].split(",")),
        count=count,
        is_asynchronous=True,
    )


def _num_bytes(dtype: str, dims: str) -> int:
    return _BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)


def _group_size(attributes: str, *, num_devices: int) -> int:
    """Return the number of devices in a group, from any of the three notations of replica groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return num_devices
