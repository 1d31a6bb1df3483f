"""What a compiled program moves to and from the memory of its device."""

from delta_jax.compiled.hlo import Instruction, computations, instructions, runs

# What moves nothing by itself.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
)


def memory_bytes(hlo: str) -> float:
    """Bytes that each device reads from and writes to its main memory in a run of a compiled program.

    Every instruction reads its operands and writes its result once, but for arrays in a faster memory; of an operand that
    is only sliced, or a result that is updated in place, the part alone counts. Loops count as often as they run. Padding
    of small axes to tiles is left out.

    Args:
        hlo: the text of the compiled program.
    """
    entry, lines = computations(hlo)
    parsed = instructions(lines)
    moved = (
        times * moved_bytes(instruction, parsed[name], parsed)
        for name, times in runs(entry, lines).items()
        for instruction in parsed[name].values()
    )
    return float(sum(moved))


def moved_bytes(
    instruction: Instruction, here: dict[str, Instruction], parsed: dict[str, dict[str, Instruction]]
) -> int:
    """Bytes that one run of an instruction of the computation `here` moves; `parsed` are all computations."""
    opcode = instruction.opcode
    operands = [here[name] for name in instruction.operands if name in here]
    if opcode in FREE or opcode.endswith(("-done", "-update")) or (opcode == "custom-call" and not operands):
        return 0  # a custom call without operands makes room
    if opcode in ("copy-start", "slice-start"):  # source and destination are the first two arrays of the result
        ends = list(instruction.sizes())[:2]
        return min(size for size, _ in ends) * sum(slow for _, slow in ends)
    if opcode.endswith("-start"):
        return 2 * sum(operand.bytes() for operand in operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return instruction.bytes() * (2 if operands and operands[0].bytes() else 1)
    if opcode == "dynamic-update-slice":
        return operands[1].bytes() * 2 if instruction.bytes() else 0
    if opcode != "fusion" or instruction.called not in parsed:
        return instruction.bytes() + sum(operand.bytes() for operand in operands)
    inside = parsed[instruction.called]
    read = sum(_read(index, operand, inside) for index, operand in enumerate(operands))
    return read + _written(instruction, inside)


def _read(index: int, operand: Instruction, inside: dict[str, Instruction]) -> int:
    """Bytes that a fusion reads of an operand."""
    whole = operand.bytes()
    if not whole:
        return 0
    names = {name for name, i in inside.items() if i.opcode == "parameter" and i.text.startswith(f"{index})")}
    part = 0
    while True:  # through bitcasts
        uses = [(name, i) for name, i in inside.items() if names & set(i.operands)]
        more = {name for name, i in uses if i.opcode == "bitcast"} - names
        if not more:
            break
        names |= more
    for _, use in uses:
        if use.opcode == "bitcast":
            continue
        if use.opcode in ("dynamic-slice", "slice", "gather") and use.operands[0] in names:
            part += sum(size for size, _ in use.sizes())
        elif not (use.opcode == "dynamic-update-slice" and use.operands[0] in names):
            return whole
    return min(part, whole)


def _written(fusion: Instruction, inside: dict[str, Instruction]) -> int:
    """Bytes that a fusion writes; of an array that it updates in place, the update."""
    root = next(i for i in inside.values() if i.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result, (size, here) in zip(results, fusion.sizes(), strict=False):
        while result.opcode == "bitcast" and result.operands[0] in inside:
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            size = min(size, sum(part for part, _ in inside[result.operands[1]].sizes()))
        total += size if here else 0
    return total
