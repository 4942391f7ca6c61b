"""Exports that are sent to the Hugging Face Hub, by real requests to a server that speaks its protocol."""

# ruff: noqa: F811 (fixtures of another module are imported)

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import run_forked
from safetensors.torch import load_file
from test_export import config, images, run_dir  # noqa: F401

from vitfreeze import cli

REPO = "someone/tiny-vit"


@dataclass
class Hub:
    """Repositories by name: their files, and whether they are private."""

    address: str = ""
    tokens: set[str] = field(default_factory=lambda: {"hf_good"})
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    refused_paths: set[str] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_PUT(self) -> None:
            content = self.body()
            digest = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == digest
            hub.stored[digest] = content
            self.answer(200, {})

        def do_GET(self) -> None:
            self.body()
            self.answer(404, {"error": "Repository not found"})

        def do_POST(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            if self.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.tokens:
                self.answer(401, {"error": "Invalid credentials in Authorization header"})
            elif path in hub.refused_paths:
                self.answer(403, {"error": "You have no storage left"})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                assert json.loads(body)["content"].startswith("---\nlibrary_name: ")
                self.answer(200, {"errors": [], "warnings": []})
            elif path == f"/api/models/{REPO}/preupload/main":
                rows = json.loads(body)["files"]
                modes = ["lfs" if row["path"].endswith((".safetensors", ".pth")) else "regular" for row in rows]
                known = [
                    {"path": row["path"], "uploadMode": mode, "shouldIgnore": False}
                    for row, mode in zip(rows, modes, strict=True)
                ]
                self.answer(200, {"files": known})
            elif path == f"/{REPO}.git/info/lfs/objects/batch":
                wanted = json.loads(body)["objects"]
                for row in wanted:
                    row["actions"] = {"upload": {"href": f"{hub.address}/large/{row['oid']}"}}
                self.answer(200, {"objects": wanted, "transfer": "basic"})
            elif path == f"/api/models/{REPO}/commit/main":
                self.commit([json.loads(line) for line in body.splitlines()])
            else:
                self.answer(404, {"error": f"nothing at {path}"})

        def create(self, asked: Mapping[str, str]) -> None:
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.files:
                self.answer(409, {"error": "You already created this model repo", "url": f"{hub.address}/{repo}"})
            elif asked["organization"] != "someone":
                self.answer(403, {"error": "You don't have the rights to create a model there"})
            else:
                hub.files[repo], hub.private[repo] = {}, asked.get("visibility") == "private"
                self.answer(200, {"url": f"{hub.address}/{repo}"})

        def commit(self, lines: list[dict[str, dict[str, str]]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "lfsFile":
                    hub.files[REPO][value["path"]] = hub.stored[value["oid"]]
                else:
                    hub.files[REPO][value["path"]] = base64.b64decode(value["content"])
            self.answer(200, {"commitUrl": f"{hub.address}/{REPO}/commit/1", "commitOid": "1"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def export_with(variables: dict[str, str], arguments: list[str]) -> None:
    """Export with these variables of the Hub's package, which reads them when it is imported, and no other."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    cli.main(["export", *arguments])


def export(run: Path, out: Path, *options: str, to: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "HF_HOME": str(out.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # its servers speak another protocol; without it files go by that of git LFS
        **variables,
    }
    return run_forked(export_with, variables, [str(run), "--to", to, "--out", str(out), *options], timeout=120)


@pytest.mark.parametrize(
    ("to", "files", "loading"),
    [
        ("timm", {"model.safetensors", "config.json"}, f'timm.create_model("hf-hub:{REPO}", pretrained=True)'),
        ("torch", {"encoder.pth"}, f'hf_hub_download("{REPO}", "encoder.pth")'),
    ],
)
def test_an_export_is_sent_to_the_hub(
    to: str,
    files: set[str],
    loading: str,
    hub: Hub,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / ("encoder.pth" if to == "torch" else "out")
    options = ("--push", REPO, "--private")
    done = export(run_dir, out, *options, to=to, HF_ENDPOINT=hub.address, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/{REPO} holds the export" in done.stderr
    assert done.stdout == f"{out}\n"
    sent = hub.files[REPO]
    assert set(sent) == files | {"README.md"}
    assert hub.private[REPO]
    for name in files:
        assert sent[name] == (out / name if out.is_dir() else out).read_bytes()
    card = sent["README.md"].decode()
    assert loading in card
    for text in (card, *hub.messages, *[content.decode("latin1") for content in sent.values()]):
        assert str(run_dir) not in text, "a path of this machine is nobody's business"
    assert "step 2 of the run tiny" in card
    # A second push goes into the repository that is there.
    again = export(run_dir, out, "--push", REPO, to=to, HF_ENDPOINT=hub.address, HF_TOKEN="hf_good")
    assert again.returncode == 0, again.stderr
    assert len(hub.messages) == 2


@pytest.mark.parametrize(
    ("repo", "variables", "words"),
    [
        (
            REPO,
            {"HF_TOKEN": ""},
            "no token for the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN",
        ),
        (REPO, {"HF_TOKEN": "hf_old"}, f"refused {REPO}: Invalid credentials"),
        ("nobody/x", {}, "refused nobody/x: You don't have the rights to create a model there"),
        ("some one/x", {}, "'some one/x' is no name of a repository on the Hub, owner/name: Repo id must use"),
        ("x", {}, "'x' does not say whose repository it is: owner/name"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached: "),
    ],
)
def test_what_cannot_be_sent_is_said_and_the_export_stays(
    repo: str,
    variables: dict[str, str],
    words: str,
    hub: Hub,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_good"} | variables
    done = export(run_dir, tmp_path / "out", "--push", repo, to="timm", **variables)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert words in said
    assert said.endswith(f"; the export itself is in {tmp_path / 'out'}")
    assert "Traceback" not in done.stderr
    assert set(load_file(tmp_path / "out" / "model.safetensors"))
    assert not hub.messages


def test_an_upload_that_is_refused_halfway_is_said(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    hub.refused_paths.add(f"/{REPO}.git/info/lfs/objects/batch")
    done = export(run_dir, tmp_path / "out", "--push", REPO, to="hf", HF_ENDPOINT=hub.address, HF_TOKEN="hf_good")
    assert done.returncode == 2
    assert f"refused {REPO}: You have no storage left" in done.stderr
    assert not hub.messages
