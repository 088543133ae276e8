"""The wheel of a commit is the same file whoever builds it: two builds, from two clones in two places, are compared.

python checks/wheel.py        (make wheel)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]


def build(source: Path, clone: Path) -> Path:
    """The wheel of the last commit of `source`, dated as that commit is, its files with the rights that git has."""
    subprocess.run(["git", "clone", "-q", str(source), str(clone)], check=True, umask=0o022)
    stamp = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=clone, capture_output=True, text=True, check=True)
    env = {**os.environ, "SOURCE_DATE_EPOCH": stamp.stdout.strip()}
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(clone / "dist"), str(clone)]
    done = subprocess.run(command, env=env, umask=0o022, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return next((clone / "dist").glob("*.whl"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = [build(HERE, Path(folder, name)) for name in ("a", "other/place")]
        sums = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
        if sums[0] != sums[1]:
            raise SystemExit(f"{wheels[0].name}: two builds differ, {sums[0]} and {sums[1]}")
        kept = HERE / "dist" / wheels[0].name
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(wheels[0], kept)
        print(f"{kept.relative_to(HERE)}: two builds are equal, sha256 {sums[0]}")


if __name__ == "__main__":
    main()
