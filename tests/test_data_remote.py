"""Remote shards: fetched whole, once, into a bounded cache that processes share."""

from __future__ import annotations

import functools
import http.server
import json
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from tiny_shards import open_loader, write_shards

from vitfreeze.data import ShardError, TrainLoader
from vitfreeze.data.addresses import cut_query
from vitfreeze.data.downloads import DownloadCache


@dataclass
class Site:
    """A web server over a folder that counts requests and can break."""

    url: str
    folder: Path
    requests: Counter = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: object, site: Site, **rest: object) -> None:
        self.site = site
        super().__init__(*args, directory=str(site.folder), **rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/")
        self.site.requests[self.path] += 1
        failures = self.site.failures.get(name)
        failure = failures.pop(0) if failures else ""
        if failure == "503":
            self.send_error(503)
        elif failure == "cut":
            data = (self.site.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = write_shards(tmp_path / "site", [6, 6, 6, 6])
    site = Site("", folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, site=site)) as server:
        site.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def make_loader(tmp_path: Path) -> Callable[..., TrainLoader]:
    def make(shards: object, **settings: object) -> TrainLoader:
        defaults = {"img_size": 16, "num_patches": 4, "global_batch": 4, "micro_batch": 4, "workers": 0}
        return open_loader(shards, **(defaults | {"cache_dir": tmp_path / "cache"} | settings))

    return make


def read_epoch(loader: TrainLoader) -> list[str]:
    return [key for batch in loader.batches(0, loader.steps_per_epoch) for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_web_folder_is_read_like_a_local_one(site: Site, make_loader: Callable[..., TrainLoader], workers: int) -> None:
    loader = make_loader(site.url, workers=workers)
    assert not any(path.endswith(".tar") for path in site.requests), "_info.json tells the lengths"
    keys = read_epoch(loader)
    assert keys == read_epoch(make_loader(site.folder))
    assert keys == read_epoch(make_loader(site.url, workers=workers))
    fetched = {path: count for path, count in site.requests.items() if path.endswith(".tar")}
    assert fetched == {f"/tiny-train-{shard:04d}.tar": 1 for shard in range(4)}


def test_web_pattern_without_lengths(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    (site.folder / "_info.json").unlink()
    loader = make_loader(site.url + "tiny-train-{0001..0002}.tar?token=secret")
    assert loader.num_samples == 12
    assert sorted(read_epoch(loader)) == [f"s{number:05d}" for number in range(6, 18)]


def test_other_remote_file_systems_through_fsspec(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    memory = fsspec.filesystem("memory")
    for path in site.folder.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        assert read_epoch(make_loader("memory://bucket/")) == read_epoch(make_loader(site.folder))
    finally:
        memory.rm("/bucket", recursive=True)


def test_pipe_runs_only_when_allowed(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    source = f"pipe:cat {site.folder}/tiny-train-000{{0..1}}.tar"
    with pytest.raises(
        ShardError, match=r"would run a shell command.*command line of this call.*data\.allow_pipe=true"
    ):
        make_loader(source)
    assert len(read_epoch(make_loader(source, allow_pipe=True))) == 12
    with pytest.raises(ShardError, match="status 3"):
        make_loader("pipe:exit 3", allow_pipe=True)


@pytest.mark.parametrize("failure", ["503", "cut"])
def test_passing_failures_are_tried_again(site: Site, make_loader: Callable[..., TrainLoader], failure: str) -> None:
    site.failures["tiny-train-0002.tar"] = [failure]
    assert len(read_epoch(make_loader(site.url))) == 24
    assert site.requests["/tiny-train-0002.tar"] == 2


def test_lasting_failures_name_the_shard_and_no_secret(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    with pytest.raises(ShardError, match=r"missing\.tar cannot be fetched: HTTP Error 404") as error:
        make_loader(site.url + "missing.tar?token=secret")
    assert "secret" not in str(error.value)
    assert site.requests["/missing.tar?token=secret"] == 1


def test_web_page_in_place_of_a_shard_is_not_kept(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    whole = (site.folder / "tiny-train-0001.tar").read_bytes()
    (site.folder / "tiny-train-0001.tar").write_bytes(b"<html>sign in</html>")
    with pytest.raises(ShardError, match=r"tiny-train-0001\.tar is a web page"):
        read_epoch(make_loader(site.url))
    (site.folder / "tiny-train-0001.tar").write_bytes(whole)
    assert len(read_epoch(make_loader(site.url))) == 24


def test_cache_is_keyed_by_the_full_url(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, max_bytes=1e9)
    urls = ["http://a/x.tar", "http://b/x.tar", "http://a/y/x.tar", "http://a/x.tar?v=2"]
    assert len({cache.path(url) for url in urls}) == 4
    assert cut_query("https://user:pass@host/x.tar?token=1#f") == "https://host/x.tar"


def test_cache_stays_within_its_bound(site: Site, make_loader: Callable[..., TrainLoader], tmp_path: Path) -> None:
    write_shards(site.folder, [6] * 9)
    size = (site.folder / "tiny-train-0000.tar").stat().st_size
    loader = make_loader(site.url, cache_gigabytes=2.5 * size / 1e9, window_shards=1)
    for batch in loader.batches(0, 3 * loader.steps_per_epoch):
        assert len(batch.keys) == 4
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.tar")) <= 2.5 * size
    assert sum(site.requests[f"/tiny-train-{shard:04d}.tar"] for shard in range(9)) > 9


def fetch_all(folder: Path, urls: list[str], sizes: multiprocessing.SimpleQueue) -> None:
    cache = DownloadCache(folder, max_bytes=1e9)
    for url in urls:
        with cache.open(url) as file:
            sizes.put((url, len(file.read())))


def test_processes_share_one_download(site: Site, tmp_path: Path) -> None:
    urls = [f"{site.url}tiny-train-{shard:04d}.tar" for shard in range(4)]
    sizes: multiprocessing.SimpleQueue = multiprocessing.SimpleQueue()
    processes = [multiprocessing.Process(target=fetch_all, args=(tmp_path / "c", urls, sizes)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [sizes.get() for _ in range(16)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for url, size in found:
        assert size == (site.folder / url.rpartition("/")[2]).stat().st_size
    assert all(site.requests[f"/tiny-train-{shard:04d}.tar"] == 1 for shard in range(4))
    assert not list((tmp_path / "c").glob("*.partial"))


def test_sizes_json_is_read_where_info_is_missing(site: Site, make_loader: Callable[..., TrainLoader]) -> None:
    (site.folder / "_info.json").unlink()
    (site.folder / "sizes.json").write_text(json.dumps({f"tiny-train-{shard:04d}.tar": 6 for shard in range(4)}))
    loader = make_loader(site.url + "tiny-train-{0000..0003}.tar")
    assert loader.num_samples == 24
    assert not any(path.endswith(".tar") for path in site.requests)


def test_samples_that_would_have_to_be_fetched_are_not_compared(
    site: Site, make_loader: Callable[..., TrainLoader], tmp_path: Path
) -> None:
    here = write_shards(tmp_path / "here", [6, 6, 6, 6])
    with pytest.raises(ShardError, match=f"so {site.url}.*tar and {here}.*tar must be files here"):
        make_loader(here, other_sizes=[site.url])
