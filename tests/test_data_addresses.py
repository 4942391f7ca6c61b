"""What a shard's name means, and that no file can have a command run: commands are planted in every way."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from braceexpand import braceexpand
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny_shards import open_loader, write_shards

from vitfreeze import cli
from vitfreeze.checkpoint import find_checkpoint, folder
from vitfreeze.config import dump_config, load_config, load_run_config
from vitfreeze.data import ShardError, build_train_loader, downloads, open_split
from vitfreeze.data.addresses import Address, Kind, count_expansions, expand_names, is_remote, read_address
from vitfreeze.data.downloads import DownloadCache
from vitfreeze.data.shards import find_shards
from vitfreeze.evaluate import EvaluationData, LinearSettings, evaluate_knn, evaluate_linear

COMMAND = "touch trace"  # in the working folder, so that it also fits into the name of a file
HIDDEN_FOLDER = f"pipe:{COMMAND} #"
FORMS = [
    "pipe:{}", " pipe:{}", "PIPE:{}", "Pipe: {}", "file:pipe:{}", "file://pipe:{}", "FILE:pipe:{}", "file:file://pipe:{}",
    "file: pipe:{}", "\n\tpipe:{}", "{{pipe:{},x.tar}}", "{{x.tar,pipe:{}}}", "{{{{a,pipe}}:{},b}}", "pi{{pe:{},}}",
    "{{p,q}}ipe:{}", "{{file:,}}pipe:{}", "fi{{le:pi,x}}pe:{}", "file:{{file:,file://}}pipe:{} #", "pipe:{} #{{0..3}}",
    "\\pipe:{}", "pip\\e:{}",
]  # fmt: skip
OTHERS = [
    "./pipe:{} #", "./pipe:{} #/", "file:./pipe:{} #/", "pipe:{} #/../x.tar", "pipe://{}", "simplecache::pipe:{}",
    "filecache::file://pipe:{}", "reference::file://pipe:{}", "memory://x::pipe:{}", "local://pipe:{}", "pipe::{}",
    "http://127.0.0.1:1/pipe:{}", "s3://pipe:{}", "%70ipe:{}", "\ufeffpipe:{}", "\u200bpipe:{}", "~pipe:{}",
    "$({}).tar", "`{}`.tar", "| {}", "x.tar; {}", "x.tar|{}", "\0pipe:{}", "git://pipe:{}", "ext::sh -c {}",
]  # fmt: skip
PIECES = [
    "pipe:", "PIPE:", "file:", "file://", "File:/", " ", "\t", "\n", "\r", "\x1c", "./", "/", "~", "{", "}", ",",
    "{a,", ",a}", "{0..2}", "\\", "::", "simplecache::", "reference::", "memory://b/", "http://127.0.0.1:1/",
    "local://", "pi{p,}e:",
    "#", "?", "%70", "\ufeff", "\u00a0", "\0", "x.tar", f"{COMMAND}", f"$({COMMAND})", f"`{COMMAND}`", f";{COMMAND};",
    f"|{COMMAND}", f"\n{COMMAND}\n",
]  # fmt: skip
BRACES = [
    "{1..3}", "{a..c}", "{3..1}", "{1..9..4}", "{", "}", ",", "x", "\\", "{a,b}", "{01..03}", "{a..C}", "{9..1..-3}",
]  # fmt: skip
GRANTS = [True, "true", 1, "yes", "on", [True], "always", None]
planted = st.one_of(
    st.sampled_from([form.format(COMMAND) for form in FORMS + OTHERS]),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    st.tuples(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.sampled_from(FORMS)).map(
        lambda parts: parts[0] + parts[1].format(COMMAND)
    ),
)
fuzz = examples(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a planted command would leave; a folder whose path, cut short, is such a command lies beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
    write_shards(tmp_path / HIDDEN_FOLDER, [6], info=False)
    path = tmp_path / "trace"
    yield path
    assert not path.exists(), "a command was run"


def read(source: Any, **options: Any) -> None:
    """Open shards and read an epoch of them."""
    defaults = {
        "img_size": 16,
        "num_patches": 4,
        "global_batch": 2,
        "micro_batch": 2,
        "workers": 0,
        "cache_dir": "cache",
    }
    loader = open_loader(source, **(defaults | options))
    list(loader.batches(0, loader.steps_per_epoch))


def read_if_allowed(source: Any, **options: Any) -> None:
    """As `read`; what is refused must be refused in one sentence."""
    with in_one_sentence():
        read(source, **options)


@contextlib.contextmanager
def in_one_sentence() -> Iterator[None]:
    """Let bad input be refused; harmless names that exist may also be read."""
    reason = ""
    try:
        yield
    except ValueError as error:
        reason = str(error)
    assert "\n" not in reason


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("form", FORMS)
def test_planted_commands_are_live(form: str, tmp_path: Path, trace: Path) -> None:
    """Each form is a command where commands are allowed: the tests below can fail."""
    cache = DownloadCache(tmp_path / "cache", max_bytes=1e9, allow_pipe=True)
    for name in expand_names([form.format(COMMAND)]):
        if read_address(name, allow_pipe=True).kind is Kind.COMMAND:
            with contextlib.suppress(ShardError):  # what a brace has left of it may be no command that there is
                cache.open(name).close()
    assert trace.exists()
    trace.unlink()


@pytest.mark.parametrize("form", FORMS + OTHERS)
def test_no_form_of_a_command_runs(form: str, trace: Path) -> None:
    read_if_allowed(form.format(COMMAND))
    read_if_allowed(["x.tar", form.format(COMMAND)])
    read_if_allowed(form.format(COMMAND), workers=1)
    assert not trace.exists()


@fuzz
@given(planted)
def test_no_url_runs_a_command(trace: Path, text: str) -> None:
    read_if_allowed(text)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", [f"pipe:{COMMAND}", f" file:PIPE:{COMMAND}", "reference::file://x", "local://x", "x.tar"]
)
def test_what_opens_shards_asks_again(tmp_path: Path, name: str) -> None:
    """Also a list of names that nobody has looked at, as a data worker has it, runs nothing."""
    cache = DownloadCache(tmp_path / "cache", max_bytes=1e9)
    for use in (cache.open, cache.read_small):
        with pytest.raises(ShardError):
            use(name)


@given(planted)
def test_a_name_read_again_means_the_same(text: str) -> None:
    try:
        address = read_address(text, allow_pipe=True)
    except ShardError:
        assume(False)
    assert read_address(address.name, allow_pipe=True) == address
    if address.kind is Kind.COMMAND:
        with pytest.raises(ShardError, match="would run a shell command"):
            read_address(text)


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [
        ("x.tar", Kind.FILE, "x.tar"), ("file:///a/x.tar", Kind.FILE, "/a/x.tar"),
        ("file:a/x.tar", Kind.FILE, "a/x.tar"),
        (" file:FILE://a ", Kind.FILE, "a"), ("./pipe:x", Kind.FILE, "./pipe:x"), ("S3://B/x", Kind.URL, "s3://B/x"),
        ("http://[::1]:80/x.tar", Kind.URL, "http://[::1]:80/x.tar"), ("file:hf://d/x", Kind.URL, "hf://d/x"),
        ("pipe:cat x | y", Kind.COMMAND, "cat x | y"), ("File:Pipe:x", Kind.COMMAND, "x"),
    ],
)  # fmt: skip
def test_what_a_name_means(text: str, kind: Kind, target: str) -> None:
    assert read_address(text, allow_pipe=True) == Address(kind, target)
    assert is_remote(text) == (kind is not Kind.FILE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("simplecache::s3://u:secret@b/x.tar", "a chain of file systems"),
        ("s3://b/x::pipe:x", "a chain of file systems"),
        ("reference://x", "scheme 'reference'; allowed are abfs"), ("dask://x", "scheme 'dask'"),
        ("", "names no shard"),
        ("file:", "names no shard"), ("a\0b", "names no shard"), ("pipe:x", "on the command line of this call"),
        ("http://127.0.0.1:port/", "cannot be opened"),
    ],
)  # fmt: skip
def test_what_a_name_cannot_mean(text: str, words: str) -> None:
    with pytest.raises(ShardError, match=words) as error:
        find_shards(text, split="train")
    assert "secret" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- braces


@pytest.mark.parametrize(
    "text",
    ["{0..99999999999}", "x-{0..99999999999}.tar", "{0..999999}{0..9}", "{a..z}" * 9, "{{0..99999999999},x}",
     "{0..9}" * 400,
     "{1..99999999999\n}", f"{{0..{'9' * 5000}}}", f"{{{'0' * 5000}..1}}", "s3://b/{0..99999999999}.tar",
     "pipe:{0..99999999999}"],
)  # fmt: skip
def test_too_many_shards_are_not_even_listed(text: str) -> None:
    with pytest.raises(ShardError, match="stands for more than 1,000,000 shards") as error:
        find_shards(text, split="train")
    assert len(str(error.value)) < 400
    with pytest.raises(ShardError, match="stands for more than"):
        find_shards(["x.tar", text], split="train")


@pytest.mark.parametrize("text", ["{", "}", "x{0..3", "{a,{b}", "{" * 5000, "{" * 5000 + "}" * 5000])
def test_braces_that_do_not_match(text: str) -> None:
    with pytest.raises(ShardError, match="braces that do not match"):
        find_shards(text, split="train")


@given(st.text(alphabet="{},.01ab9-\\\n", max_size=14) | st.lists(st.sampled_from(BRACES)).map("".join))
def test_braces_are_counted_as_they_are_expanded(text: str) -> None:
    try:
        count = count_expansions(text)
    except ShardError:
        assume(False)
    assume(count < 2000)
    assert len(list(braceexpand(text))) == count
    assert expand_names([text]) == list(braceexpand(text))


# --------------------------------------------------------------------------------------------------------- paths


def test_the_home_folder_is_found(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "home" / "shards", [6, 6])
    for source in (
        "~/shards",
        "file:~/shards/",
        "~/shards/tiny-train-{0000..0001}.tar",
        "{~/shards,}/tiny-train-0000.tar",
    ):
        names = find_shards(source, split="train").names if "{~" not in source else expand_names([source])[:1]
        assert find_shards(names, split="train").names[0] == str(shards / "tiny-train-0000.tar")
    config = load_config("paper", ["run.dir=~/run", "data.cache_dir=~/cache", "model.init_from=~/w.pth"])
    assert config.run.dir == str(tmp_path / "home" / "run")
    assert config.data.cache_dir == str(tmp_path / "home" / "cache")
    assert config.model.init_from == str(tmp_path / "home" / "w.pth")


@pytest.mark.parametrize("name", ["none.tar", "none/", "none/x-{0..3}.tar", "file:none"])
def test_a_relative_path_that_is_not_found_names_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShardError, match=rf"none.* does not exist; it was sought from {tmp_path}"):
        find_shards(name, split="train")
    with pytest.raises(ShardError, match=r"does not exist$"):
        find_shards(f"{tmp_path}/{name.removeprefix('file:')}", split="train")


def test_a_full_cache_removes_only_what_it_fetched(tmp_path: Path) -> None:
    """Whoever writes a run folder also names the cache's folder and its size."""
    mine = tmp_path / "shards" / "mine.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with fsspec.open("memory://b/x.tar", "wb") as file:
        file.write(b"x" * 100)
    DownloadCache(mine.parent, max_bytes=1).open("memory://b/x.tar").close()
    assert mine.read_bytes() == b"precious"


# ------------------------------------------------------------------------------------------------------- recipes


def write_recipe(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@fuzz
@given(train=planted, val=planted, grant=st.sampled_from([*GRANTS, False]), by_base=st.booleans())
def test_no_recipe_runs_a_command(tmp_path: Path, trace: Path, train: str, val: str, grant: Any, by_base: bool) -> None:
    data = {"train": train, "val": [val], "allow_pipe": grant, "workers": 0, "cache_dir": str(tmp_path / "cache")}
    recipe = write_recipe(tmp_path / "stranger.yaml", data=data, batch={"global_size": 2})
    if by_base:
        recipe = write_recipe(tmp_path / "mine.yaml", base="stranger.yaml", run={"seed": 1})
    config = None
    with in_one_sentence():
        config = load_config(recipe, ["optim.eps=1e-7"])
    assert (config is not None) == (grant is False)
    if config is None:
        return
    for open_it in (lambda: build_train_loader(config), lambda: open_split(config, "validation")):
        with in_one_sentence():
            open_it()
    assert not trace.exists()


@pytest.mark.parametrize("grant", GRANTS)
@pytest.mark.parametrize("command", ["pretrain", "finetune", "config", "plan", "doctor"])
def test_a_recipe_cannot_allow_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, grant: Any
) -> None:
    recipe = write_recipe(tmp_path / "stranger.yaml", data={"train": f"pipe:{COMMAND}", "allow_pipe": grant})
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(recipe), f"run.dir={tmp_path / 'run'}"])
    assert ended.value.code == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "stranger.yaml line 2, but a file cannot allow that" in error
    assert "data.allow_pipe=true on the command line of each call" in error


def test_only_the_command_line_allows_commands(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", data={"train": "x.tar", "allow_pipe": False})
    assert load_config(recipe, ["data.allow_pipe=true"]).data.allow_pipe
    assert not load_config(recipe).data.allow_pipe
    dumped = dump_config(load_config(recipe, ["data.allow_pipe=true"]))
    assert "allow_pipe" not in dumped
    (tmp_path / "dumped.yaml").write_text(dumped)
    assert not load_config(tmp_path / "dumped.yaml").data.allow_pipe


# --------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on the output of commands, as its command line allowed."""
    place = tmp_path_factory.mktemp("piped")
    shards = write_shards(place / "shards", [12])
    recipe = write_recipe(
        place / "piped.yaml",
        model={"size": "vit_tiny_test", "img_size": 32},
        data={"train": f"pipe:cat {shards}/tiny-train-0000.tar", "workers": 0, "cache_dir": str(place / "cache")},
        batch={"global_size": 4}, optim={"warmup": "1 steps"}, freeze={"mode": "off"},
        run={"length": "12 steps", "show_every": 0, "dir": str(place / "run")}, checkpoint={"every": "6 steps"},
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", str(recipe), "data.allow_pipe=true"])
    assert ended.value.code == 0
    return place / "run"


def test_going_on_needs_the_permission_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", str(run_dir.parent / "piped.yaml")]
    assert "allow_pipe" not in (run_dir / "config.yaml").read_text()
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "allow it on the command line of this call, as of every other: data.allow_pipe=true" in error
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "data.allow_pipe=true"])
    assert ended.value.code == 0


def test_a_run_on_commands_says_that_it_will_ask_again(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vitfreeze.data"):
        find_shards(load_run_config(run_dir / "config.yaml").data.train, split="train", allow_pipe=True)
    assert "1 of 1 shards are read from shell commands, which this command line allows" in caplog.text
    assert "every later one must allow again, also to go on with the run" in caplog.text


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_evaluation_asks_for_the_permission(run_dir: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    train = load_run_config(run_dir / "config.yaml").data.train[0]
    options = ["--val", str(run_dir.parent / "shards"), *(["--k", "3"] if command == "knn" else ["--epochs", "11"])]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(run_dir), "--val", train, "--workers", "0"])
    assert ended.value.code == cli.EXIT_BAD_INPUT
    assert "--allow-pipe" in capsys.readouterr().err
    options[1] = train
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(run_dir), *options, "--allow-pipe"])
    assert ended.value.code == 0


def forge(checkpoint: Path, *, data: dict[str, Any]) -> None:
    """Write settings of data into a checkpoint as a stranger would: with checksums that fit."""
    content = yaml.safe_load((checkpoint / "config.yaml").read_text())
    content["data"] |= data
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(content))
    manifest = folder.read_manifest(checkpoint)
    size = (checkpoint / "config.yaml").stat().st_size
    manifest["files"]["config.yaml"] = {"bytes": size, "sha256": folder.hash_file(checkpoint / "config.yaml")}
    manifest["extra"] |= {"allow_pipe": True, "resumed_from": data["train"][0]}
    folder.write_manifest(checkpoint, manifest)
    (checkpoint.parents[1] / "config.yaml").write_bytes((checkpoint / "config.yaml").read_bytes())


@examples(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=planted, val=planted, grant=st.sampled_from([*GRANTS, False]), linear=st.booleans())
def test_no_run_folder_runs_a_command(
    run_dir: Path, trace: Path, train: str, val: str, grant: Any, linear: bool
) -> None:
    found = find_checkpoint(run_dir)
    assert found is not None
    kept = {path: path.read_bytes() for path in (found.path / "config.yaml", found.path / "manifest.json")}
    try:
        forge(found.path, data={"train": [train], "val": [val], "allow_pipe": grant, "cache_dir": "cache"})
        # The training images are the user's own where that brings the stranger's to be read.
        for own in ((), (str(run_dir.parent / "shards"),)):
            data = EvaluationData(workers=0, limit=4, train=own)
            with in_one_sentence():
                if linear:
                    evaluate_linear(str(run_dir), data, settings=LinearSettings(epochs=2, warmup_epochs=1))
                else:
                    evaluate_knn(str(run_dir), data, k=(1,))
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert not trace.exists()


def test_a_run_folder_that_allows_commands_can_still_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Older versions wrote the permission down; it does not count, and that is said."""
    (tmp_path / "config.yaml").write_text(f"data: {{train: 'pipe:{COMMAND}', allow_pipe: true}}\n")
    assert not load_run_config(tmp_path / "config.yaml").data.allow_pipe
    assert "data.allow_pipe is True in config.yaml line 1, but a file cannot allow that" in caplog.text


# ----------------------------------------------------------------------------------------------------- manifests


@fuzz
@given(name=planted, other=planted, where=st.sampled_from(["_info.json", "sizes.json", "both"]))
def test_no_list_beside_the_shards_runs_a_command(
    tmp_path: Path, trace: Path, name: str, other: str, where: str
) -> None:
    shards = write_shards(tmp_path / "listed", [6], info=False)
    split = {"name": name, "filenames": ["tiny-train-0000.tar", name], "shard_lengths": [6, 6]}
    info, sizes = {"name": other, "splits": {"train": split, other: split}}, {name: 6, other: 3}
    for file, content in (("_info.json", info), ("sizes.json", sizes)):
        (shards / file).unlink(missing_ok=True)
        if where in (file, "both"):
            (shards / file).write_text(json.dumps(content))
    read_if_allowed(str(shards))
    read_if_allowed(f"{shards}/tiny-train-0000.tar")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/_info.json", json.dumps(info).encode())
    memory.pipe("/bucket/tiny-train-0000.tar", (shards / "tiny-train-0000.tar").read_bytes())
    read_if_allowed("memory://bucket/")
    assert not trace.exists()


def test_no_pointer_runs_a_command(run_dir: Path, trace: Path) -> None:
    pointer = run_dir / folder.FOLDER_NAME / "newest"
    kept = pointer.read_bytes()
    try:
        for form in FORMS + OTHERS:
            pointer.write_text(form.format(COMMAND))
            assert find_checkpoint(run_dir) is not None
    finally:
        pointer.write_bytes(kept)
    assert not trace.exists()
