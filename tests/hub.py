"""A Hub of our own: an HTTP server with the routes that `huggingface_hub` and `kernels` use for kernel repositories.

Repositories are git-like: a commit is a tree of files with a parent, a branch or a pull request is a name for one.
Files are regular ones, as the Hub takes text below 10 MB. Whoever sends `Bearer hf_writer` may write.

    with Hub() as hub:
        run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token})

`hub.fail("POST .*/commit/", 500)` makes the next such request fail: with a status, or `"dropped"` (the connection
closes amid the request or the answer), or `"lost"` (the request is carried out, the answer never comes). A function
instead is called first, and the request carried out. `hub.corrupted` names files that arrive with a byte changed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub.utils.sha import git_hash


@dataclass(frozen=True)
class Commit:
    files: dict[str, bytes]
    parent: str | None
    message: str

    @property
    def sha(self) -> str:
        content = [self.parent, self.message, {path: git_hash(data) for path, data in sorted(self.files.items())}]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repository:
    """Branches and pull requests are heads; `refs/pr/N` is the name of a pull request's."""

    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    operations: list[int] = field(default_factory=list)  # of every commit, in order

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        commit = Commit(files, self.heads.get(ref), message)
        self.commits[commit.sha] = commit
        self.heads[ref] = commit.sha
        return commit.sha

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.heads.get(revision, revision)].files

    @property
    def branches(self) -> dict[str, str]:
        return {name: sha for name, sha in self.heads.items() if not name.startswith("refs/")}


@dataclass
class Fault:
    pattern: str
    how: int | str | Callable[[], object]
    after: int


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server, from `__enter__` to `__exit__`, and what it holds."""

    token = "hf_writer"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.trusted: set[str] = set()
        self.may_create = True
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.corrupted: set[str] = set()
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, how: int | str | Callable[[], object], after: int = 0) -> None:
        """Fail one request that `pattern` is found in ("METHOD /path"), after letting `after` such pass."""
        self.faults.append(Fault(pattern, how, after))

    def fault(self, request: str) -> int | str | Callable[[], object] | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.pattern, request):
                    if fault.after == 0:
                        self.faults.remove(fault)
                        return fault.how
                    fault.after -= 1
        return None

    @property
    def writes(self) -> list[str]:
        """The requests that change something, in order."""
        return [request for request in self.requests if re.match(r"POST .*/(create|branch/|commit/)|DELETE", request)]


ROUTES: list[tuple[str, str, Callable[..., Any]]] = []


def route(method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a route; `{repo}` is `org/name`, `{rev}` one quoted part, `{path}` the rest."""
    names = {"{repo}": "(?P<repo>[^/]+/[^/]+)", "{rev}": "(?P<rev>[^/]+)", "{path}": "(?P<path>.*)"}
    pattern = re.sub(r"{\w+}", lambda match: names[match[0]], path)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, pattern, function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer, sent as head and body, waits 40 ms for an acknowledgement
    timeout = 30

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        how = self.hub.fault(f"{self.command} {url.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if how == "dropped" and length:
            self.rfile.read(length // 2)
            return self.drop()
        self.body = self.rfile.read(length)
        if callable(how):
            how()
        if isinstance(how, int):
            return self.send(how, {"error": "injected"}, {})
        try:
            with self.hub.lock:
                status, content, headers = 200, self.call(url.path), {}
        except Refusal as error:
            status, content = error.status, {"error": str(error)}
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
        if how == "lost":
            return self.drop()
        if isinstance(content, tuple):
            content, headers = content
        self.send(status, content, headers, half=how == "dropped")

    do_GET = do_HEAD = do_POST = do_DELETE = answer

    def call(self, path: str) -> Any:
        for method, pattern, function in ROUTES:
            if method in (self.command, "ANY") and (match := re.fullmatch(pattern, path)):
                arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if self.command in ("POST", "DELETE") and function is not validate_yaml:
                    self.check_token(arguments.get("repo"))
                return function(self, **arguments)
        raise Refusal(404, f"no route {self.command} {path}")

    def check_token(self, repo: str | None) -> None:
        sent = self.headers.get("Authorization")
        if sent is None:
            raise Refusal(401, "Invalid username or password.")
        proposes = "create_pr" in self.query or "/refs%2Fpr%2F" in self.path
        if sent != f"Bearer {self.hub.token}" and not proposes:
            raise Refusal(403, f"You don't have the rights to write to {repo or 'this namespace'}.")

    def send(self, status: int, content: Any, headers: dict[str, str], half: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            status, data = 206, data[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.drop()

    def drop(self) -> None:
        self.close_connection = True

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def repository(self, repo: str) -> Repository:
        if repo not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo]

    def revision(self, repo: str, rev: str) -> tuple[Repository, str]:
        repository = self.repository(repo)
        sha = repository.heads.get(rev.removeprefix("refs/heads/"), rev)
        if sha not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return repository, sha


# Reading


@route("GET", "/api/organizations/(?P<name>[^/]+)/overview")
def organization(request: _Handler, name: str) -> Any:
    known = {repo.partition("/")[0] for repo in request.hub.repositories}
    if name not in known:
        raise Refusal(404, "This organization does not exist")
    return {"name": name, "fullname": name, "avatarUrl": ""} | (
        {"trustedKernelPublisher": True} if name in request.hub.trusted else {}
    )


@route("GET", "/api/kernels/{repo}/refs")
def refs(request: _Handler, repo: str) -> Any:
    branches = request.repository(repo).branches
    return {
        "branches": [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()
        ],
        "tags": [],
        "converts": [],
    }


@route("GET", "/api/kernels/{repo}(/revision/{rev})?")
def info(request: _Handler, repo: str, rev: str) -> Any:
    _, sha = request.revision(repo, rev or "main")
    return {"id": repo, "sha": sha, "downloads": 0, "likes": 0, "author": repo.partition("/")[0]}


@route("GET", "/api/kernels/{repo}/tree/{rev}(/{path})?")
def tree(request: _Handler, repo: str, rev: str, path: str) -> Any:
    repository, sha = request.revision(repo, rev)
    files = repository.files(sha)
    below = f"{path}/" if path else ""
    entries = {}
    for name in sorted(files):
        if name.startswith(below):
            parts = name[len(below) :].split("/")
            for depth in range(1, len(parts)):
                folder = below + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            data = files[name]
            entries[name] = {"type": "file", "oid": git_hash(data), "size": len(data), "path": name}
    if not entries:
        raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
    if request.query.get("recursive", "").lower() != "true":
        entries = {name: entry for name, entry in entries.items() if "/" not in name[len(below) :]}
    return list(entries.values())


@route("GET", "/kernels/{repo}/resolve/{rev}/{path}")
@route("HEAD", "/kernels/{repo}/resolve/{rev}/{path}")
def resolve(request: _Handler, repo: str, rev: str, path: str) -> Any:
    repository, sha = request.revision(repo, rev)
    files = repository.files(sha)
    if path not in files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    data = files[path]
    if path in request.hub.corrupted:
        data = bytes([data[0] ^ 1]) + data[1:]
    return data, {"ETag": f'"{git_hash(files[path])}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}


# Writing


@route("POST", "/api/repos/create")
def create(request: _Handler) -> Any:
    asked = request.json()
    repo = f"{asked['organization']}/{asked['name']}"
    if not request.hub.may_create:
        raise Refusal(403, "This account is not approved to create kernel repositories.")
    if asked.get("type") != "kernel":
        raise Refusal(400, "this Hub has kernels only")
    url = f"{request.hub.url}/kernels/{repo}"
    if repo in request.hub.repositories:
        raise Refusal(409, "You already created this kernel repo")
    request.hub.repositories[repo] = repository = Repository()
    repository.commit("main", {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
    return {"url": url, "id": repo}


@route("POST", "/api/kernels/{repo}/branch/{rev}")
def create_branch(request: _Handler, repo: str, rev: str) -> Any:
    repository, sha = request.revision(repo, request.json().get("startingPoint", "main"))
    if rev in repository.heads:
        raise Refusal(409, f"Reference {rev} already exists")
    repository.heads[rev] = sha
    return {}


@route("DELETE", "/api/kernels/{repo}/branch/{rev}")
def delete_branch(request: _Handler, repo: str, rev: str) -> Any:
    repository, _ = request.revision(repo, rev)
    del repository.heads[rev]
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: _Handler) -> Any:
    if not request.json()["content"].startswith("---\n"):
        raise Refusal(400, "no metadata")
    return {"errors": [], "warnings": []}


@route("POST", "/api/kernels/{repo}/preupload/{rev}")
def preupload(request: _Handler, repo: str, rev: str) -> Any:
    repository, sha = request.revision(repo, rev)
    present = repository.files(sha)
    return {
        "files": [
            {"path": path, "uploadMode": "regular", "shouldIgnore": False}
            | ({"oid": git_hash(present[path])} if path in present else {})
            for path in (file["path"] for file in request.json()["files"])
        ]
    }


@route("POST", "/api/kernels/{repo}/commit/{rev}")
def commit(request: _Handler, repo: str, rev: str) -> Any:
    repository, sha = request.revision(repo, rev)
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    if header["value"].get("parentCommit", sha) != sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    if len(operations) > 1000:
        raise Refusal(413, "too many operations")
    files = dict(repository.files(sha))
    for operation in operations:
        path = operation["value"]["path"]
        if operation["key"] == "file":
            files[path] = base64.b64decode(operation["value"]["content"])
        elif operation["key"] == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    number = 1 + sum(name.startswith("refs/") for name in repository.heads)
    ref = f"refs/pr/{number}" if "create_pr" in request.query else rev
    repository.heads.setdefault(ref, sha)
    new = repository.commit(ref, files, header["value"]["summary"])
    repository.operations.append(len(operations))
    return {
        "success": True,
        "commitOid": new,
        "commitUrl": f"{request.hub.url}/kernels/{repo}/commit/{new}",
        "hookOutput": "",
        "pullRequestUrl": f"{request.hub.url}/kernels/{repo}/discussions/{number}",
    }
