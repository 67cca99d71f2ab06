"""The Neuron devices of this machine: device files, and what `neuron-ls` prints.

Source of the table's form: Neuron SDK docs, tools/neuron-sys-tools/neuron-ls. Written from that
page, not tried on a device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VARIABLES = (
    "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_LOGICAL_NC_CONFIG",
    "NEURON_RT_VISIBLE_CORES",
    "NEURON_RT_NUM_CORES",
    "NEURON_RT_ROOT_COMM_ID",
    "XLA_USE_BF16",
    "XLA_DOWNCAST_BF16",
)


@dataclass(frozen=True)
class Machine:
    """num_devices: device files. instance, lnc: as neuron-ls says, "" and None when it does not.

    links: the devices that each device is connected to, {} when unknown. variables: those that are
    set of `VARIABLES`. problem: why neuron-ls said nothing, "" when it did or there is no device.
    """

    num_devices: int
    instance: str
    lnc: int | None
    links: dict[int, tuple[int, ...]]
    variables: dict[str, str]
    problem: str = ""

    @property
    def chip(self) -> str:
        """ "trn1", "inf2", "trn2", "trn3", or "" when unknown."""
        found = re.match(r"(trn1|inf2|trn2|trn3)", self.instance)
        return found.group(1) if found else ""


def look(devices: Path = Path("/dev")) -> Machine:
    """This machine; nothing is started on a device."""
    num_devices = len([path for path in devices.glob("neuron*") if path.name[6:].isdigit()])
    table, problem = _neuron_ls() if num_devices else ("", "")
    instance, lnc, links = read_table(table)
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return Machine(num_devices, instance, lnc, links, variables, problem)


def read_table(text: str) -> tuple[str, int | None, dict[int, tuple[int, ...]]]:
    """Instance type, logical core configuration and links out of the text of `neuron-ls`."""
    instance = re.search(r"instance-type:\s*(\S+)", text)
    lnc = re.search(r"logical-neuroncore-config:\s*(\d+)", text)
    links = {}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    heads = [row for row in rows if "CONNECTED" in row]
    column = heads[0].index("CONNECTED") if heads else 0
    for row in rows:
        if column and len(row) > column and row[0].isdigit():
            links[int(row[0])] = tuple(int(n) for n in re.findall(r"\d+", row[column]))
    return (
        instance.group(1) if instance else "",
        int(lnc.group(1)) if lnc else None,
        links,
    )


def _neuron_ls() -> tuple[str, str]:
    """What neuron-ls prints, and what went wrong ("" when nothing did)."""
    command = shutil.which("neuron-ls") or shutil.which("neuron-ls", path="/opt/aws/neuron/bin")
    if command is None:
        return "", "not found"
    try:
        done = subprocess.run([command], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        return "", f"exit status {done.returncode}, {said[0]}"
    return done.stdout, ""
