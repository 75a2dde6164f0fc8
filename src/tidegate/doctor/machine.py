"""What this machine gives a process of ours: packages, descriptors, folders, disks, the port."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tidegate.config import SECRETS, Config
from tidegate.config.environment import origins
from tidegate.doctor.finding import Finding, fail, ok, skipped, warn
from tidegate.embedded.process import command_of
from tidegate.errors import ConfigError

_OLDEST_PYTHON = (3, 11)
_NEED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[^]]*\])?>=(?P<version>[0-9.]+)(?P<only>.*)")
_FEW_FILES, _TOO_FEW_FILES = 4_096, 1_024
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 2_000_000_000, 200_000_000
_ANSWER_S = 1.0
_OURS = ("blobs", "spill")
_GB = 1_000_000_000


def look(config: Config, dotenv: Path = Path(".env")) -> Iterator[Finding]:
    """All of it; starts and changes nothing."""
    yield from _packages(config)
    yield _descriptors()
    yield _folder(config.data_dir)
    yield _disk(config.data_dir)
    yield _secret_files(dotenv)
    yield port(config)


def _packages(config: Config) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        yield fail("machine.python", f"Python {version}", "it must be 3.11 or newer")
    else:
        yield ok("machine.python", f"Python {version}")
    extras = {"gateway"} | ({"embedded"} if config.embedded else set())
    missing, old, count = [], [], 0
    for need in metadata.requires("tidegate") or ():
        found = _NEED.match(need)
        if found is None or not _applies(found["only"], extras):
            continue
        count += 1
        try:
            there = metadata.version(found["name"])
        except metadata.PackageNotFoundError:
            missing.append(found["name"])
            continue
        if _numbers(there) < _numbers(found["version"]):
            old.append(f"{found['name']} {there} (needs {found['version']})")
    names = ",".join(sorted(extras))
    if missing or old:
        said = ", ".join([f"{name} is missing" for name in missing] + [f"{one}" for one in old])
        yield fail("machine.packages", said, f"pip install --upgrade 'tidegate[{names}]'")
    else:
        yield ok("machine.packages", f"{count} packages of tidegate[{names}] are new enough")


def _applies(condition: str, extras: set[str]) -> bool:
    if "sys_platform ==" in condition and f"== '{sys.platform}'" not in condition:
        return False
    named = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
    return named is None or named[1] in extras


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _descriptors() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{soft} open files and connections a process (ulimit -n)"
    mend = f"ulimit -n {max(65_536, soft)}, or LimitNOFILE= in the unit; the hard limit is {hard}"
    if soft < _TOO_FEW_FILES:
        return fail("machine.descriptors", said, mend)
    return (
        warn("machine.descriptors", said, mend)
        if soft < _FEW_FILES
        else ok("machine.descriptors", said)
    )


def _folder(data_dir: Path) -> Finding:
    there, who = _nearest(data_dir), f"user {os.geteuid()}"
    for folder in (there, *(data_dir / name for name in _OURS if _is_there(data_dir / name))):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            return fail(
                "files.data_dir",
                f"{data_dir}: {who} may not write in {folder}",
                f"chown it, or set DATA_DIR to a folder of {who}",
            )
    if there != data_dir.absolute():
        return ok("files.data_dir", f"{data_dir} is made at the first start")
    if (data_dir / "blobs").is_dir() and (data_dir / "blobs").stat().st_mode & 0o077:
        return warn(
            "files.data_dir",
            f"other users of this machine may look into {data_dir / 'blobs'}",
            f"chmod 700 {data_dir / 'blobs'}",
        )
    return ok("files.data_dir", f"{data_dir} can be written")


def _disk(data_dir: Path) -> Finding:
    free = shutil.disk_usage(_nearest(data_dir)).free
    said = f"{free / _GB:,.1f} GB are free at {data_dir}"
    mend = "make room, or move DATA_DIR; spilled records and uploads need it"
    if free < _TOO_LITTLE_BYTES:
        return fail("files.disk", said, mend)
    return warn("files.disk", said, mend) if free < _LITTLE_BYTES else ok("files.disk", said)


def _nearest(path: Path) -> Path:
    """The folder itself, or the one in which it would be made, as far as this user may look."""
    path = path.absolute()
    while not _is_there(path):
        path = path.parent
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


def _secret_files(dotenv: Path) -> Finding:
    files = {name: Path(os.environ[f"{name}_FILE"]) for name in _by_file()}
    if dotenv.is_file() and any(place == str(dotenv) for place in _secrets().values()):
        files[".env"] = dotenv
    loose = [path for path in files.values() if path.exists() and path.stat().st_mode & 0o077]
    # Mounted secrets of a cluster belong to root and are read only: their group may be ours.
    loose = [path for path in loose if path.stat().st_uid == os.geteuid()]
    if loose:
        names = " ".join(map(str, loose))
        return warn("files.secrets", f"others may read {names}", f"chmod 600 {names}")
    if not files:
        return ok("files.secrets", "no secret is read from a file")
    return ok("files.secrets", f"nobody else may read the files with secrets ({len(files)})")


def _secrets() -> dict[str, str]:
    return {name: place for name, place in origins().items() if name in SECRETS}


def _by_file() -> list[str]:
    return [name for name in _secrets() if os.environ.get(f"{name}_FILE", "").strip()]


def port(config: Config) -> Finding:
    """Whether HOST and PORT can be had, or who has them."""
    from tidegate.supervisor.listening import listen

    if config.port == 0:
        return skipped("machine.port", "PORT=0 takes any free one")
    place = f"{config.host} port {config.port}"
    try:
        listen(config).close()
    except ConfigError as refused:
        if refused.variable != "PORT":
            return fail(
                "machine.port",
                f"{refused.variable}={refused.value} {refused.allowed}",
                "set HOST to an address of this machine, 127.0.0.1 or 0.0.0.0",
            )
        if _is_ours(config):
            return ok("machine.port", f"{place}: a Tidegate serves there")
        who = _owner_of(config.port)
        return fail(
            "machine.port",
            f"{place} {refused.allowed.partition(';')[0]}{who}",
            "stop that program, or set PORT",
        )
    return ok("machine.port", f"{place} is free")


def _is_ours(config: Config) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    try:
        with urlopen(f"http://{host}:{config.port}/health/live", timeout=_ANSWER_S) as answer:
            return bool(answer.status == 200 and answer.read(100) == b'{"status":"ok"}')
    except (URLError, OSError, ValueError):
        return False


def _owner_of(number: int) -> str:
    """Who listens on a port of this machine, where the system tells: ` (nginx, pid 12)`."""
    inodes = {inode for inode, listens_on in _listening() if listens_on == number}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(one) for one in (process / "fd").iterdir()}
        except OSError:  # gone, or somebody else's
            continue
        if links & {f"socket:[{inode}]" for inode in inodes}:
            command = command_of(int(process.name)).split(" ")[0]
            return f" ({Path(command).name}, pid {process.name})"
    return ""


def _listening() -> Iterator[tuple[str, int]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":
                yield fields[9], int(fields[1].rpartition(":")[2], 16)
