"""`python -m bench [NAME …]`: runs the benchmarks one after the other, each in a process of its own, and prints their tables."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("append", "project", "rebuild")

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"bench.{name}"], check=True)
