"""Read a compiled TPU program's text: its collectives, its loops, and of each operation cycles, FLOPs and bytes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NETWORK = '_xla_host_transfer_handler_name="xla_megascale_runtime"'  # what leaves a slice is sent by it
BETWEEN_SLICES = "slice-"  # before the kind of such a collective
_REDUCE_SCATTER_FUSION = "all-reduce-scatter"  # what the name of such a fusion begins with
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred)\[([0-9,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")  # of a layout: a memory space other than HBM

# By what it does, see Operation.kind.
PRODUCT, ELEMENTWISE, UNESTIMATED, PREFETCH = "product", "elementwise", "unestimated", "prefetch"
# What neither computes nor moves data. Of kernels (custom calls) flop_count.py counts the work.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "custom-call", "send", "send-done", "recv", "recv-done", "opt-barrier",
    "add-dependency",
})  # fmt: skip
_VIEWS = ("bitcast", "copy", "convert", "reshape", "transpose")  # through which a slice is still a slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, and how often a step runs it."""

    kind: str
    num_bytes: int  # of the whole array on one device: what is gathered, reduced or exchanged
    num_devices: int  # in one group
    count: int  # a step
    is_asynchronous: bool  # may run beside computation
    groups: tuple[tuple[int, ...], ...] = ()  # devices by their place in the mesh; of a permute (from, to)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation that is neither a collective nor a kernel, and how often a step runs it."""

    name: str
    kind: str  # PRODUCT, ELEMENTWISE; UNESTIMATED by the compiler; PREFETCH: a copy beside other work
    cycles: int  # by the compiler's estimate; 0 where it has none
    flops: float  # of matrix products
    num_bytes: int  # read from HBM and written to it, with the padding of tiles
    count: int  # a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executable:
    """What the text of a compiled program says of a step."""

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]

    @property
    def num_cycles(self) -> int:
        """Cycles of everything but kernels and collectives, by the compiler's estimate."""
        return sum(each.count * each.cycles for each in self.operations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
    name: str
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0]))


_Computation = dict[str, _Instruction]


def read_executable(text: str, *, num_devices: int) -> Executable:
    """Read the text of an optimised program for TPUs (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    exchanges, operations = [], []
    waiting = [(entry, 1, False)]  # (computation, runs a step, whether it is inside a fusion)
    while waiting:
        name, count, is_fused = waiting.pop()
        computation = computations[name]
        is_begun = any("AsyncCollectiveStart" in each.rest for each in computation.values())
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in _COLLECTIVES and (
                # An asynchronous collective is repeated in each fusion it is spread over: count the first.
                not is_fused or is_begun or name.startswith(_REDUCE_SCATTER_FUSION)
            ):
                exchanges.append(_collective(instruction, name, count=count, is_begun=is_begun, ways=num_devices))
            if instruction.opcode == "send" and _NETWORK in instruction.rest:
                exchanges.append(_between_slices(instruction, count=count))
            if not is_fused and (operation := _operation(instruction, computation, computations, count=count)):
                operations.append(operation)
            times = _trip_count(instruction, computation, computations) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                inside = is_fused or instruction.opcode not in ("while", "conditional", "call")
                waiting.append((called, count * times, inside))
    return Executable(
        collectives=tuple(each for each in exchanges if each.num_devices > 1), operations=_merged(operations)
    )


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _Instruction(
                name=found[2], result=found[3], opcode=found[4], rest=found[5], is_root=found[1] is not None
            )
    assert entry, "this is not the text of a compiled program"
    return computations, entry


def _called(instruction: _Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    names = [name.strip().removeprefix("%") for name in branches[1].split(",")] if branches else []
    return names + _CALLED.findall(instruction.rest)


def _trip_count(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int:
    """Return a loop's trip count: from the counter's first value to the constant that its condition compares it with,
    by the constant that its body adds to it."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest):  # as programs for GPUs say it
        return int(known[1])
    found = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    assert found is not None, f"the loop {instruction.name} has no condition"
    condition = computations[found[1]]
    constants = {name: int(each.rest.partition(")")[0]) for name, each in condition.items() if _is_whole(each)}
    for each in condition.values():
        if each.opcode == "compare" and "direction=LT" in each.rest and len(each.operands) == 2:
            counter, bound = each.operands
            if bound in constants:
                index = _tuple_index(condition.get(counter))
                first, step = _first_and_step(instruction, index, computation, computations)
                return max(0, math.ceil((constants[bound] - first) / step))
    raise ValueError(f"the loop {instruction.name} of the compiled program does not say how often it runs")


def _first_and_step(
    loop: _Instruction, index: int | None, computation: _Computation, computations: dict[str, _Computation]
) -> tuple[int, int]:
    """Return a loop counter's first value and step; 0 and 1 where the text does not show them as constants."""
    body = re.search(r"body=%?([\w.\-]+)", loop.rest)
    before = computation.get(loop.operands[0]) if loop.operands else None
    if index is None or body is None or before is None or before.opcode != "tuple":
        return 0, 1
    first = _whole_constant(before.operands[index], computation)
    inside = computations[body[1]]
    root = next((each for each in inside.values() if each.is_root), None)
    after = inside.get(root.operands[index]) if root is not None and root.opcode == "tuple" else None
    step = None
    if after is not None and after.opcode == "add":
        for operand in after.operands:
            step = _whole_constant(operand, inside) if step is None else step
            carried = _tuple_index(inside.get(operand))  # a constant that goes around with the loop
            if step is None and carried not in (None, index):
                step = _whole_constant(before.operands[carried], computation)
    return first or 0, step if step and step > 0 else 1


def _is_whole(instruction: _Instruction) -> bool:
    return instruction.opcode == "constant" and re.match(r"-?\d+\)", instruction.rest) is not None


def _tuple_index(instruction: _Instruction | None) -> int | None:
    found = (
        re.search(r"index=(\d+)", instruction.rest)
        if instruction and instruction.opcode == "get-tuple-element"
        else None
    )
    return int(found[1]) if found else None


def _whole_constant(name: str, computation: _Computation) -> int | None:
    """Return the whole number that a name stands for, through copies; None if it is no constant."""
    each = computation.get(name)
    while each is not None and each.opcode in ("copy", "bitcast") and each.operands:
        each = computation.get(each.operands[0])
    return int(each.rest.partition(")")[0]) if each is not None and _is_whole(each) else None


def _operation(
    instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation], *, count: int
) -> Operation | None:
    """Return an instruction outside of fusions as an operation; None where it is none, or no time goes into it."""
    opcode = instruction.opcode
    is_start = opcode.endswith("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode.removesuffix("-start") in _COLLECTIVES:
        return None
    bodies = [computations[name] for name in _called(instruction)]
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    if found is None and any(each.opcode in _COLLECTIVES for body in bodies for each in body.values()):
        return None  # an exchange, counted as such
    cycles = int(found[1]) if found else 0
    if is_start:  # its result holds what it copies, the copy, and a flag
        num_bytes = sum(_hbm_bytes(instruction.result)[:2]) or _bytes_moved(instruction, computation, computations)
        kind = PREFETCH
    else:
        num_bytes = _bytes_moved(instruction, computation, computations)
        kind = UNESTIMATED
    flops = 0.0 if is_start else _flops(instruction, computation, computations)
    if found:
        kind = PRODUCT if flops else ELEMENTWISE
    if not cycles and not num_bytes and not flops:
        return None
    return Operation(name=instruction.name, kind=kind, cycles=cycles, flops=flops, num_bytes=num_bytes, count=count)


def _merged(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return operations with those of equal cost as one, under the name of the first."""
    counts: collections.Counter[tuple] = collections.Counter()
    names: dict[tuple, str] = {}
    for each in operations:
        key = (each.kind, each.cycles, each.flops, each.num_bytes)
        names.setdefault(key, each.name)
        counts[key] += each.count
    return tuple(
        Operation(name=names[key], kind=key[0], cycles=key[1], flops=key[2], num_bytes=key[3], count=count)
        for key, count in counts.items()
    )


def _flops(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
    """Return the FLOPs of the products in an instruction, those of fusions inside included.

    A product of [B, M, K] and [B, K, N] is 2 B M N K = 2 sqrt(BMK x BKN x BMN / B), whatever the order of the axes.
    A compiled program writes it as a convolution, whose batch axes are windows that are dilated to miss one another.
    """
    total = 0.0
    if instruction.opcode in ("convolution", "dot"):
        sizes = [_num_elements(computation[name].result) for name in instruction.operands[:2]]
        sizes.append(_num_elements(instruction.result))
        total = 2 * math.sqrt(math.prod(sizes) / _num_batches(instruction, computation))
    for name in _called(instruction) if instruction.opcode == "fusion" else ():
        body = computations[name]
        total += sum(_flops(each, body, computations) for each in body.values())
    return total


def _num_batches(instruction: _Instruction, computation: _Computation) -> int:
    if instruction.opcode == "dot":
        found = re.search(r"lhs_batch_dims=\{([\d,]+)\}", instruction.rest)
        dims = _dims(computation[instruction.operands[0]].result)
        return math.prod(dims[int(each)] for each in found[1].split(",")) if found else 1
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    if "size" not in fields or "lhs_dilate" not in fields:
        return 1
    pairs = zip(fields["size"].split("x"), fields["lhs_dilate"].split("x"), strict=True)
    return math.prod(int(size) for size, dilation in pairs if int(dilation) > 1)


def _bytes_moved(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int:
    """Return the bytes that an operation reads from HBM and writes to it: of slices, what is sliced."""
    if instruction.opcode != "fusion":
        body, parameters = computation, list(instruction.operands)
        roots = [instruction]
        users = {name: [instruction] for name in parameters}
    else:
        body = computations[_called(instruction)[0]]
        parameters = _parameters(body)
        roots = [each for each in body.values() if each.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [body[name] for name in roots[0].operands]
        users = collections.defaultdict(list)
        for each in body.values():
            for operand in each.operands:
                users[operand].append(each)
    num_bytes = 0
    for place, name in enumerate(instruction.operands):
        whole = sum(_hbm_bytes(computation[name].result)) if name in computation else 0
        if whole and place < len(parameters):
            read = _read_bytes(parameters[place], users, body, computations)
            num_bytes += whole if read is None else min(whole, read)
    written = _hbm_bytes(instruction.result)
    for place, whole in enumerate(written):
        root = _behind_views(roots[place], body) if place < len(roots) else None
        num_bytes += min(whole, _written_bytes(root, body, computations) or whole)
    return num_bytes


def _parameters(body: _Computation) -> list[str]:
    """Return the names of a computation's parameters in their order."""
    numbered = {int(each.rest.partition(")")[0]): name for name, each in body.items() if each.opcode == "parameter"}
    return [numbered[number] for number in sorted(numbered)]


def _read_bytes(
    name: str, users: dict[str, list[_Instruction]], body: _Computation, computations: dict[str, _Computation]
) -> int | None:
    """Return how much is read of an operand of which only slices or rows are used; None if all of it is."""
    total = 0
    for user in users.get(name, ()):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += _all_bytes(user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        elif user.opcode == "scatter" and user.operands[0] == name:
            total += _all_bytes(body[user.operands[-1]].result)  # the rows that are added to
        elif user.opcode in _VIEWS and user.name in users:
            inner = _read_bytes(user.name, users, body, computations)
            if inner is None:
                return None
            total += inner
        elif user.opcode == "fusion":
            inside = computations[_called(user)[0]]
            more: dict[str, list[_Instruction]] = collections.defaultdict(list)
            for each in inside.values():
                for operand in each.operands:
                    more[operand].append(each)
            for place, operand in enumerate(user.operands):
                inner = _read_bytes(_parameters(inside)[place], more, inside, computations) if operand == name else 0
                if inner is None:
                    return None
                total += inner
        else:
            return None
    return total


def _written_bytes(root: _Instruction | None, body: _Computation, computations: dict[str, _Computation]) -> int | None:
    """Return how much a result that is written in place gets; None if all of it is written."""
    if root is None:
        return None
    if root.opcode == "dynamic-update-slice":
        return _all_bytes(body[root.operands[1]].result)
    if root.opcode == "scatter":
        return _all_bytes(body[root.operands[-1]].result)
    if root.opcode == "fusion":
        inside = computations[_called(root)[0]]
        last = next((each for each in inside.values() if each.is_root), None)
        return _written_bytes(_behind_views(last, inside), inside, computations)
    return None


def _behind_views(root: _Instruction | None, body: _Computation) -> _Instruction | None:
    while root is not None and root.opcode == "bitcast" and root.operands and root.operands[0] in body:
        root = body[root.operands[0]]
    return root


def _hbm_bytes(result: str) -> list[int]:
    """Return the bytes of each array of a type, 0 of those outside of HBM."""
    return [
        0 if _ON_CHIP.search(layout) else _BYTES[dtype] * _num_padded(dims, layout)
        for dtype, dims, layout in _ARRAY.findall(result)
    ]


def _all_bytes(result: str) -> int:
    return sum(_BYTES[dtype] * _num_padded(dims, layout) for dtype, dims, layout in _ARRAY.findall(result))


def _num_padded(dims: str, layout: str) -> int:
    """Return an array's elements with the padding of its tiles, T(8,128) of the two dims that vary fastest."""
    sizes = [int(dim) for dim in dims.split(",") if dim]
    order, tile = re.match(r"[\d,]*", layout), re.search(r"T\(([\d,]+)\)", layout)
    if order is None or tile is None or not order[0]:
        return math.prod(sizes)
    slowest_first = [sizes[int(dim)] for dim in reversed(order[0].split(","))]
    for place, size in enumerate(reversed(tile[1].split(",")), start=1):
        if place <= len(slowest_first):
            slowest_first[-place] = -(-slowest_first[-place] // int(size)) * int(size)
    return math.prod(slowest_first)


def _dims(result: str) -> list[int]:
    found = _ARRAY.search(result)
    assert found is not None, result
    return [int(dim) for dim in found[2].split(",") if dim]


def _num_elements(result: str) -> int:
    return math.prod(_dims(result))


def _collective(instruction: _Instruction, computation: str, *, count: int, is_begun: bool, ways: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    is_started = instruction.opcode != kind
    sizes = [_num_bytes(dtype, dims) for dtype, dims, _ in _ARRAY.findall(instruction.result)]
    # A started collective's result holds its operands too, except for all-reduce; the whole arrays are the larger.
    n = len(instruction.operands) or 1
    whole = max(sum(sizes[:n]), sum(sizes[n : 2 * n]))
    num_bytes = whole if is_started and kind != "all-reduce" else sum(sizes)
    groups = device_groups(instruction.rest, num_devices=ways)
    # The pairs of a permute say who sends to whom; each device is in a chain of all of them, as far as is known.
    group = ways if kind == "collective-permute" else len(groups[0])
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
        groups=groups,
    )


def _between_slices(instruction: _Instruction, *, count: int) -> Collective:
    """Return a collective over the data-center network; its results come by a `recv`, work may be done until then."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', instruction.rest)
    assert kind is not None and slices is not None, instruction.rest
    return Collective(
        kind=BETWEEN_SLICES + kind[1].lower().replace("_", "-"),
        num_bytes=_num_bytes(*_ARRAY.findall(instruction.result)[0][:2]),
        num_devices=len(slices[1].split(",")),
        count=count,
        is_asynchronous=True,
    )


def _num_bytes(dtype: str, dims: str) -> int:
    return _BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)


def device_groups(attributes: str, *, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices of a collective, from any of the notations; of a permute the pairs (from, to)."""
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else list(range(math.prod(sizes.values())))
        axes = list(sizes)
        return _groups(ids, list(sizes.values()), [axes.index(name) for name in re.findall(r"'(\w+)'", mesh[4])])
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids, size = _iota(tiled[3], tiled[4]), int(tiled[2])
        return tuple(tuple(ids[start : start + size]) for start in range(0, len(ids), size))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes):
        return tuple(tuple(map(int, each.split(","))) for each in re.findall(r"\{([\d,]+)\}", listed[1]))
    return (tuple(range(num_devices)),)


def _iota(dims: str, order: str | None) -> list[int]:
    """Return 0, 1, 2, ... as an array of `dims`, its axes in `order`, flattened."""
    sizes = [int(dim) for dim in dims.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else list(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ids = [0]
    for axis in axes:
        ids = [each + step * strides[axis] for each in ids for step in range(sizes[axis])]
    return ids


def _groups(ids: list[int], sizes: list[int], within: list[int]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of an array of ids: along the axes `within`, one for each place on the others."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]

    def places(axes: list[int]) -> list[int]:
        found = [0]
        for axis in axes:
            found = [each + step * strides[axis] for each in found for step in range(sizes[axis])]
        return found

    others = [axis for axis in range(len(sizes)) if axis not in within]
    return tuple(tuple(ids[first + along] for along in places(within)) for first in places(others))
