"""Compile the GPU kernels to `fedtune/kernels/cuda/kernels.fatbin`, which is committed.

    python scripts/kernels.py [--check]

`--check` says whether the committed file was made of the sources beside it, and, where nvcc is
installed, whether they compile for every architecture. nvcc 13.0 or newer is needed to compile;
nothing else in the project needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "fedtune" / "kernels" / "cuda"
FATBIN, RECORD = CUDA / "kernels.fatbin", CUDA / "kernels.json"
# Code of 8.0 runs on 8.6, 8.7 and 8.9 too, and that of 10.0 on 10.3: kernels that wait for memory
# gain nothing from code of their own there.
MACHINE_CODE = (75, 80, 90, 100, 120)
# The driver compiles PTX for GPUs that have no machine code here: newer ones of the family of 120
# from its own, any other from the oldest.
PTX = (75, 120)


def source_digest() -> str:
    """SHA-256 of all sources, in order of their names."""
    digest = hashlib.sha256()
    for path in [*sorted(CUDA.glob("*.h")), CUDA / "kernels.cu"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_kernels(target: Path) -> tuple[list[str], str]:
    """Compile all architectures into a file; returns the kernels' names and ptxas's remarks."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in MACHINE_CODE]
    codes += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in PTX]
    command = ["nvcc", "-std=c++17", "-O3", "-fatbin", "--compress-mode=size", "-Xptxas", "-v"]
    command += ["--Werror", "all-warnings", "--threads", str(os.cpu_count() or 1), *codes]
    finished = subprocess.run(
        [*command, "kernels.cu", "-o", str(target)],
        cwd=CUDA,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(f"nvcc failed:\n{finished.stdout}{finished.stderr}")
    remarks = finished.stdout + finished.stderr
    names = sorted(set(re.findall(r"Compiling entry function '(\w+)'", remarks)))
    return names, remarks


def spilled(remarks: str) -> list[str]:
    """Kernels whose values do not all fit in registers, with their architectures."""
    kernel, found = "", []
    for line in remarks.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
        if entry:
            kernel = f"{entry[1]} ({entry[2]})"
        elif re.search(r"[1-9]\d* bytes spill", line):
            found.append(kernel)
    return found


def check() -> int:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    fresh = record["sources"] == source_digest()
    if not fresh or record["fatbin"] != hashlib.sha256(FATBIN.read_bytes()).hexdigest():
        print("kernels.fatbin is not of these sources; run: python scripts/kernels.py")
        return 1
    if shutil.which("nvcc") is None:
        print("kernels.fatbin is of these sources; not compiled anew, as nvcc is not installed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        names, remarks = compile_kernels(Path(folder) / "kernels.fatbin")
    if names != record["kernels"]:
        print("kernels.json names other kernels than the sources; run: python scripts/kernels.py")
        return 1
    print(f"kernels.fatbin is up to date; {len(names)} kernels compile for {MACHINE_CODE}")
    report_spills(remarks)
    return 0


def report_spills(remarks: str) -> None:
    """A few bytes cost nothing that can be measured, so that this is news and no failure."""
    kernels = spilled(remarks)
    if kernels:
        print(f"registers spill to memory in {', '.join(kernels)}")


def main() -> int:
    if "--check" in sys.argv[1:]:
        return check()
    names, remarks = compile_kernels(FATBIN)
    record = {
        "sources": source_digest(),
        "fatbin": hashlib.sha256(FATBIN.read_bytes()).hexdigest(),
        "machine_code": MACHINE_CODE,
        "ptx": PTX,
        "kernels": names,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{FATBIN}: {len(names)} kernels, {FATBIN.stat().st_size} bytes")
    report_spills(remarks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
