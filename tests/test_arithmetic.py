"""Indices beyond 2^31, without the memory: the arithmetic of chunks, compiled by itself."""

from __future__ import annotations

import os
import shlex
import subprocess

from test_build import ROOT

PROGRAM = """
#include <initializer_list>

#include "core/params.h"
using fusedopt::Chunk;
using fusedopt::kChunkSize;

#define CHECK(condition) if (!(condition)) return __LINE__

int main() {
  for (const int64_t numel : {int64_t{1} << 31, (int64_t{1} << 34) + 5, (int64_t{1} << 45) - 3}) {
    const int64_t last = (numel - 1) / kChunkSize;
    const Chunk end{0, static_cast<uint32_t>(last)};
    CHECK(end.index == last);
    CHECK(end.begin() == last * kChunkSize);
    CHECK(end.begin() + end.size(numel) == numel);
    const Chunk before{0, static_cast<uint32_t>(last - 1)};
    CHECK(before.size(numel) == kChunkSize);
    CHECK(before.begin() + kChunkSize == end.begin());
  }
  return 0;
}
"""


def test_chunks_beyond_2_to_the_31_elements(tmp_path):
    source, program = tmp_path / "chunks.cpp", tmp_path / "chunks"
    source.write_text(PROGRAM)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run([*compiler, *flags, f"-I{ROOT}/csrc", source, "-o", program], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    assert subprocess.run([program], env=environment).returncode == 0, "a line of PROGRAM"
