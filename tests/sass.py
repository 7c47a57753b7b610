"""Reads machine code of CUDA kernels: the instructions, and the loops among them."""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9._]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    op: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a jump goes to."""
        found = re.search(r"0x([0-9a-f]+)\)?$", self.operands)
        return int(found[1], 16) if self.op.startswith("BRA") and found else None

    def next(self, following: int) -> list[int]:
        """The possible next addresses. None after a call: compilers call only rare code."""
        if self.op.startswith("BRA"):
            # As in "BRA 0x8ed0", or "BRA P1, 0x8ed0", or "BRA.DIV UR4, 0x8ed0"
            goes_on = self.conditional or "," in self.operands
            return [*([self.target] if self.target is not None else []),
                    *([following] if goes_on else [])]  # fmt: skip
        if self.op.startswith(("EXIT", "RET", "CALL", "BRX", "JMP")):
            return [following] if self.conditional else []
        return [following]


Code = list[Instruction]


def disassembler() -> str | None:
    """The path of cuobjdump: from the CUDA toolkit, from NVIDIA's package, or from Triton."""
    folders = [*os.get_exec_path(), "/usr/local/cuda/bin"]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            folders.append(f"{root}/{folder}")
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def machine_code(cuobjdump: str, made: Path, architecture: str) -> str:
    """What cuobjdump prints of an object, but for the bits. It is kept in a file beside the object,
    as it takes half a second, and other processes need it too."""
    kept = made.with_suffix(f".sm_{architecture}.gz")
    if kept.exists() and kept.stat().st_mtime > made.stat().st_mtime:
        return gzip.decompress(kept.read_bytes()).decode()
    command = [cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(made)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r" */\* 0x\w+ \*/\n?", "", printed)
    writing = kept.with_suffix(f".{os.getpid()}")
    writing.write_bytes(gzip.compress(text.encode(), compresslevel=1))
    writing.replace(kept)
    return text


def disassemble(cuobjdump: str, objects: Sequence[Path], architecture: str) -> dict[str, Code]:
    """The instructions of each kernel for compute capability `architecture` ("90")."""
    # Each process begins with another object, so that they share the work.
    shuffled = random.sample(objects, len(objects))
    text = "".join(machine_code(cuobjdump, it, architecture) for it in shuffled)
    _, *parts = re.split(r"Function : (\S+)", text)
    return {
        name: [
            Instruction(int(address, 16), bool(condition), op, operands)
            for address, condition, op, operands in INSTRUCTION.findall(part)
        ]
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    }


def loops(code: Code) -> list[list[str]]:
    """The operations on the shortest way round each loop: without slow paths and options."""
    index = {it.address: i for i, it in enumerate(code)}
    following = [it.address for it in code[1:]] + [-1]
    found = []
    for last, jump in enumerate(code):
        if jump.target is None or jump.target > jump.address or jump.target not in index:
            continue
        first = index[jump.target]
        ways: dict[int, list[int]] = {first: [first]}  # by where they end
        for i in range(first, last):
            for address in code[i].next(following[i]) if i in ways else ():
                to = index.get(address, -1)
                if i < to <= last and (to not in ways or len(ways[i]) + 1 < len(ways[to])):
                    ways[to] = [*ways[i], to]
            if i != first:
                ways.pop(i, None)
        if last in ways:
            found.append([code[i].op for i in ways[last] if code[i].op != "NOP"])
    return found
