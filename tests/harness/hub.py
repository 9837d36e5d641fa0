"""Data sets served as the Hugging Face hub serves them, as far as the package datasets asks, and who asks."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "5" * 40
# where the eleven lie: data set, configuration (None: one per subject), splits beside the one that is asked
PLACES = {
    "mmlu": ("cais/mmlu", None, ()),
    "cmmlu": ("haonan-li/cmmlu", None, ()),
    "ceval": ("ceval/ceval-exam", None, ()),
    "ifeval": ("google/IFEval", "default", ("train",)),
    "cluewsc": ("clue/clue", "cluewsc2020", ("train", "validation")),
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "math500": ("HuggingFaceH4/MATH-500", "default", ("test",)),
    "drop": ("EleutherAI/drop", "default", ("train", "validation")),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", ("train",)),
    "mbpp": ("google-research-datasets/mbpp", "full", ("train", "test", "validation", "prompt")),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval", ("test",)),
}


def put_on_hub(folder: Path, name: str, data: Path) -> None:
    """A benchmark's rows as its data set on the hub."""
    repository, configuration, splits = PLACES[name]
    if configuration is None:
        shutil.copytree(data, folder / repository)
        return
    (folder / repository / configuration).mkdir(parents=True)
    files = []
    for split in splits:
        files.append({"split": split, "path": f"{configuration}/{split}.jsonl"})
        shutil.copy(data, folder / repository / files[-1]["path"])
    front = yaml.safe_dump({"configs": [{"config_name": configuration, "data_files": files}]})
    (folder / repository / "README.md").write_text(f"---\n{front}---\n")


def npd_eval_from_hub(folder: Path, settings: dict, data: dict[str, Path], cwd: Path | None = None) -> None:
    """The command in a process of its own, with no data of its own, and a hub that has exactly what it should ask."""
    for name, place in data.items():
        put_on_hub(folder / "hub", name, place)
        del settings["benchmarks"][name]["data"]
    (folder / "eval.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "npd_ascend", "eval", "--benchmarks", str(folder / "eval.yaml")]
    with hub(folder / "hub") as (address, asked):
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        environment = os.environ | online | {"HF_HOME": str(folder / "home")}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=900, check=False
        )
    assert done.returncode == 0, done.stderr
    assert set(asked) == {PLACES[name][0] for name in data}


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address for HF_ENDPOINT, names of the data sets asked for so far); folder: owner/name/files."""
    asked: list[str] = []

    class Handler(_Handler):
        repositories, seen = folder, asked

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    repositories: Path
    seen: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """/api/datasets/OWNER/NAME/{revision,tree}/REVISION/..., /datasets/OWNER/NAME/resolve/REVISION/FILE."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        _, owner, name, what, _, *rest = [*parts[is_api:], *[""] * 5]
        repository, path = self.repositories / owner / name, "/".join(rest).strip("/")
        if not name or not repository.is_dir():
            return self._refuse("RepoNotFound")
        if is_api and what in ("", "revision"):
            self.seen.append(f"{owner}/{name}")
            files = [{"rfilename": entry["path"]} for entry in _entries(repository, "", recursive=True)]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "gated": False, "siblings": files}
            return self._answer(about | {"downloads": 0, "likes": 0, "tags": [], "disabled": False})
        if is_api and what == "tree" and (repository / path).is_dir():
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("1", "true")
            return self._answer(_entries(repository, path, recursive))
        if not is_api and what == "resolve" and (repository / path).is_file():
            return self._send(200, (repository / path).read_bytes(), "application/octet-stream")
        return self._refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        """/api/datasets/OWNER/NAME/paths-info/REVISION with paths in the body."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        _, _, owner, name, *_ = unquote(self.path).strip("/").split("/")
        entries = _entries(self.repositories / owner / name, "", recursive=True)
        self._answer([entry for entry in entries if entry["path"] in wanted])

    def _answer(self, value) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _refuse(self, code: str) -> None:
        self._send(404, b"", "text/plain", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha1(content).hexdigest()
        more = {"Content-Type": kind, "Content-Length": str(len(content)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        for key, value in (more | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _entries(repository: Path, path: str, recursive: bool) -> list[dict]:
    top = repository / path
    return [
        {
            "type": "directory" if entry.is_dir() else "file",
            "path": str(entry.relative_to(repository)),
            "size": 0 if entry.is_dir() else entry.stat().st_size,
            "oid": hashlib.sha1(str(entry).encode()).hexdigest(),
        }
        for entry in sorted(top.rglob("*") if recursive else top.iterdir())
    ]
