"""The script for sbatch: the launcher on each node, a save before the time limit, and a start after it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from moeport.errors import UserError

SAVING_SECONDS = 300
"""How long before the time limit a run is asked to save; for short jobs a quarter of their time."""
_VALUE = re.compile(r"[\w.,:+@/-]+", re.ASCII)
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<plain>\d+(?::\d+){0,2}))", re.ASCII
)

_SCRIPT = """\
#!/bin/bash
{options}
# Adapt this: options that your site requires, such as #SBATCH --account=NAME or memory.

# Adapt this: activate the Python environment that has moeport, for example with
# source .venv/bin/activate

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# Each Slurm task is the launcher of a node, so its cores are divided among the {ranks} ranks of the node.
cores=${{SLURM_CPUS_PER_TASK:-${{SLURM_CPUS_ON_NODE:-1}}}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}
{settings}
arguments=({arguments})
{resume}
# Slurm sends USR1 {seconds} s before the time limit: the run saves and ends, and the job is queued again.
asked= signalled=
trap 'asked=yes signalled=yes; kill -USR1 "$step" 2>/dev/null' USR1
srun --kill-on-bad-exit=1 --cpus-per-task="$cores" \\
    bash -c {start} bash "${{arguments[@]}}" &
step=$!
wait "$step"
code=$?
while [ -n "$signalled" ]; do  # a signal ends `wait`, not the step
    signalled=
    wait "$step" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || code=$again  # 127: the step had ended before the signal
done
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
_SETTINGS = """
# What HCCL and the framework need on NPUs, unless you set it: docs/ascend.md.
"""
_RESUME = """\
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || arguments+=(--resume)
"""


def slurm_script(
    options: Mapping[str, str],
    ranks_per_node: int,
    launcher: Sequence[str],
    arguments: Sequence[str],
    resumes: bool,
    settings: Mapping[str, str],
) -> str:
    """The text of the script.

    Args:
        options: of sbatch, such as `{"nodes": "2", "time": "02:00:00"}`.
        ranks_per_node: number of ranks that share a node.
        launcher: the command that starts the ranks of a node, up to its arguments; its words may contain variables.
        arguments: the words that follow it, as they are.
        resumes: whether the command takes `--resume` once the job has been queued again.
        settings: environment variables of the job, where they are not set.

    Raises UserError for an option that sbatch would misread.
    """
    for name, value in options.items():
        if not _VALUE.fullmatch(value):
            raise UserError(f"--{name} {value!r}: expected letters, digits and any of . , : + @ / _ -")
    seconds = saving_seconds(options.get("time"))
    usual = {"output": "%x-%j.log", "open-mode": "append", "signal": f"B:USR1@{seconds}"}
    lines = [f"#SBATCH --{name}={value}" for name, value in (dict(options) | usual).items()] + ["#SBATCH --requeue"]
    if "cpus-per-task" not in options:
        lines += ["# All cores of the nodes; with --cpus-per-rank N, N for each rank:", "#SBATCH --exclusive"]
    return _SCRIPT.format(
        options="\n".join(lines),
        ranks=ranks_per_node,
        seconds=seconds,
        start=shlex.quote(f'exec python -m moeport.launch.node {" ".join(launcher)} "$@"'),
        arguments=shlex.join(arguments),
        resume=_RESUME if resumes else "",
        settings="".join([_SETTINGS, *(f"export {name}=${{{name}:-{value}}}\n" for name, value in settings.items())])
        if settings
        else "",
    )


def saving_seconds(limit: str | None) -> int:
    """Seconds before a job's time limit, in the notation of Slurm, at which it saves. Raises UserError for no time."""
    if limit is None:
        return SAVING_SECONDS
    found = _TIME.fullmatch(limit)
    if found is None:
        raise UserError(f"--time {limit!r}: expected a time of Slurm, such as 90 (minutes), 02:00:00 or 1-12")
    if found["plain"]:
        parts = [int(part) for part in found["plain"].split(":")]
        hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
        days = 0
    else:
        days, hours, minutes, seconds = (int(found[name] or 0) for name in ("days", "h", "m", "s"))
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return max(min(SAVING_SECONDS, total // 4), 1)
