"""Remote shards, fetched whole into a folder of bounded size that several processes share."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from vitfreeze.data.addresses import WEB_SCHEMES, Address, Kind, cut_query, read_address
from vitfreeze.data.errors import ShardError

_log = logging.getLogger(__name__)

_ATTEMPTS = 4
_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20
_NAME_DIGITS = 40


def default_cache_dir() -> Path:
    """Return the user's cache folder for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitfreeze"


class DownloadCache:
    """Files fetched from URLs, each named by a hash of its full URL.

    A file is fetched under a lock of its own into a temporary name and renamed when whole, so any number of processes
    may ask for it at once and one fetches it. When the folder outgrows its bound, the files that were opened longest
    ago go. A process that still has one open keeps reading it, so for a while the disk may hold a few more.

    Args:
        folder: where the files are kept.
        max_bytes: bound on their sum. The newest file stays even when it alone is larger.
        allow_pipe: whether the user's command line allows commands in the place of URLs.
    """

    def __init__(self, folder: Path, *, max_bytes: float, allow_pipe: bool = False) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.allow_pipe = allow_pipe

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading, fetching it if it is not here.

        Raises:
            ShardError: it cannot be fetched, or is a command that is not allowed.
        """
        address = read_address(url, allow_pipe=self.allow_pipe)
        path = self.path(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.is_file():
                self._fetch(address, path)
                self._shrink(keep=path)
            file = path.open("rb")
        os.utime(path)
        return file

    def path(self, url: str) -> Path:
        """Return where a URL's file is kept."""
        return self.folder / (hashlib.sha256(url.encode()).hexdigest()[:_NAME_DIGITS] + ".tar")

    def forget(self, url: str) -> None:
        """Remove a file that proved unusable, so that it is fetched again next time."""
        self.path(url).unlink(missing_ok=True)

    @staticmethod
    def read_small(url: str) -> bytes | None:
        """Fetch a small file into memory; None when the other side has none.

        Raises:
            ShardError: the other side cannot be reached.
        """
        try:
            with _open_url(read_address(url)) as stream:
                return stream.read(64 << 20)
        except FileNotFoundError:
            return None
        except OSError as error:
            if getattr(error, "code", None) in (403, 404, 410):  # object stores answer 403 for what does not exist
                return None
            raise ShardError(f"{cut_query(url)} cannot be read: {_one_line(error)}") from error

    def _fetch(self, address: Address, path: Path) -> None:
        url = address.name
        partial = path.with_suffix(".partial")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _copy(address, partial)
                partial.replace(path)
                return
            except (OSError, EOFError) as error:
                partial.unlink(missing_ok=True)
                if attempt == _ATTEMPTS or _is_final(error):
                    raise ShardError(f"shard {cut_query(url)} cannot be fetched: {_one_line(error)}") from error
                _log.warning("fetching %s failed (%s); trying again", cut_query(url), error)
                time.sleep(2**attempt / 4)

    def _shrink(self, *, keep: Path) -> None:
        with _locked(self.folder / "shrink.lock"):
            files = []
            for path in self.folder.glob("[0-9a-f]" * _NAME_DIGITS + ".tar"):  # nobody else's, whatever the folder
                try:
                    stat = path.stat()
                except FileNotFoundError:  # another process forgot it meanwhile
                    continue
                files.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self.max_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_final(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or (
        isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429)
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; it ends with the process that holds it, however that ends."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(address: Address, path: Path) -> None:
    """Fetch what an address stands for into a file and wait until it is on the disk."""
    with path.open("wb") as file:
        if address.kind is Kind.COMMAND:
            _copy_pipe(address.target, file)
        else:
            with _open_url(address) as stream:
                shutil.copyfileobj(stream, file, _CHUNK_BYTES)
                is_web = address.scheme in WEB_SCHEMES
                announced = stream.headers.get("Content-Length") if is_web else None  # type: ignore[attr-defined]
            if announced is not None and file.tell() != int(announced):
                raise EOFError(f"{file.tell():,} of {int(announced):,} bytes came")
        file.flush()
        os.fsync(file.fileno())


def _copy_pipe(command: str, file: BinaryIO) -> None:
    """Run a shell command and keep its output: the one place where the package runs what a name says."""
    code = subprocess.run(command, shell=True, stdout=file, check=False).returncode
    if code:
        raise EOFError(f"the command ended with status {code}")


def _open_url(address: Address) -> AbstractContextManager[BinaryIO]:
    """Open a URL for reading; raises ShardError for one that is malformed, or whose file system is not installed."""
    url = address.target
    if address.kind is not Kind.URL:
        raise ShardError(f"{address.name!r} is a {address.kind.value}, not a URL")
    try:
        if address.scheme in WEB_SCHEMES:
            return closing(urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS))
        import fsspec  # loaded here: it takes a while, and only object stores and the hub need it

        return fsspec.open(url, "rb")
    except (ImportError, ValueError, http.client.InvalidURL) as error:
        raise ShardError(f"{cut_query(url)} cannot be opened: {_one_line(error)}") from error
