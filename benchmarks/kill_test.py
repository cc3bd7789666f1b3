"""Kill a compression at random moments, run the same command again, and compare the bytes.

    python benchmarks/kill_test.py MODEL --calibration FILE [--kills 10] [--seed 0] [-- FLAGS OF COMPRESS]

Without flags: --keep 0.8 --samples 16 --seq-len 512.
Every round starts ``cospadi compress`` in a directory of its own, sends SIGKILL after a random share of the time that
an undisturbed run took, and runs the command again to its end. The exit code is 0 if every result is the undisturbed
one, byte for byte. The last line is the result as JSON.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULTS = ["--keep", "0.8", "--samples", "16", "--seq-len", "512"]


@dataclass(frozen=True)
class Row:
    """One round: when the run was killed and what the next one made of what was left."""

    killed_after_seconds: float
    phase: str
    groups_done: int
    groups: int
    resume_seconds: float
    identical: bool
    error: str


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("model*.safetensors"))}


def phase_reached(log: Path) -> str:
    """The last phase that a run reported before it was killed."""
    phases = [line.split(":", 1)[0] for line in log.read_text(encoding="utf-8").splitlines() if ":  " in line]
    return phases[-1] if phases else "start"


def one_round(command: list[str], out: Path, after: float, expected: dict[str, str]) -> Row:
    """Kill a run after some seconds, finish it, and compare."""
    log = out.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=stream)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    phase = "finished" if process.returncode == 0 else phase_reached(log)
    done = len(list((out / ".cospadi/groups").glob("*.safetensors")))
    begun = time.perf_counter()
    second = subprocess.run([*command, str(out), "--json"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    groups = len(json.loads(second.stdout.splitlines()[-1])["groups"]) if second.returncode == 0 else 0
    error = "" if second.returncode == 0 else second.stderr.strip().splitlines()[-1]
    return Row(after, phase, done, groups, seconds, not error and weights(out) == expected, error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :] or DEFAULTS
    command = [sys.executable, "-m", "cospadi", "compress", "--calibration", given.calibration, *flags, given.model]
    draw = random.Random(given.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        begun = time.perf_counter()
        subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL)
        seconds, expected = time.perf_counter() - begun, weights(whole)
        print(f"undisturbed: {seconds:.1f} s, {', '.join(expected)}\n")
        print(
            f"{'kill':>4}  {'after':>8}  {'phase':<10}  {'groups kept':>11}  {'second run':>10}  same bytes", flush=True
        )
        for number in range(1, given.kills + 1):
            row = one_round(command, Path(folder, str(number)), draw.uniform(0.02, 1.0) * seconds, expected)
            rows.append(row)
            same = "yes" if row.identical else f"NO  {row.error}"
            print(
                f"{number:>4}  {row.killed_after_seconds:>6.1f} s  {row.phase:<10}  "
                f"{row.groups_done:>5}/{row.groups:<5}  {row.resume_seconds:>8.1f} s  {same}",
                flush=True,
            )
    good = all(row.identical for row in rows)
    print(f"\n{sum(row.identical for row in rows)} of {len(rows)} interrupted runs ended with the undisturbed bytes")
    print(json.dumps({"identical": good, "undisturbed_seconds": seconds, "rows": [asdict(row) for row in rows]}))
    return 0 if good and rows else 1


if __name__ == "__main__":
    sys.exit(main())
