"""A small Hugging Face Hub on this machine, which the real client talks to over HTTP, and which can misbehave.

It knows what `huggingface_hub` asks for: files with ranges, listings, repositories made, and commits with large files
by LFS. Faults are switched on per file, for a number of requests:

    server = HubServer()
    server.add('org/name', {'config.json': b'{}', 'model.safetensors': weights})
    server.fault('model.safetensors', status=503, times=2)
    os.environ['HF_ENDPOINT'] = server.url  # before huggingface_hub is imported
"""

import base64
import functools
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt')
NOT_FOUND = (404, 'RepoNotFound')


@functools.lru_cache(maxsize=16)
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A repository: its files, and who may read it."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: int = 1

    @property
    def commit(self) -> str:
        return hashlib.sha1(b'commit %d' % self.commits).hexdigest()


@dataclass
class Fault:
    """What goes wrong with a file: an error status, a delay, or a body that is cut off, too short or altered."""

    path: str
    times: int = 1
    method: str = 'GET'
    status: int | None = None
    delay: float = 0.0
    cut: int | None = None  # bytes of the body after which the connection ends
    hold: bool = False  # before it ends it stays open until `HubServer.release`
    truncate: int | None = None  # bytes missing at the body's end, which its Content-Length conceals
    corrupt: bool = False  # one byte in the middle is another, the size is right


class HubServer:
    """The server, listening on a free port of 127.0.0.1 from the start.

    Attributes:
        url: What HF_ENDPOINT has to be.
        repos: By 'org/name'.
        tokens: Tokens that may read private and gated repositories and write.
        requests: What was asked for: method, path and headers.
        gate: Files are sent while it is set; cleared, it makes requests wait for each other.
        held: Set when a connection is held.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.objects: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.held = threading.Event()
        self._released = threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        self.reset()
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.1}, daemon=True).start()

    def reset(self) -> None:
        """Forgets everything."""
        for content in (self.repos, self.tokens, self.faults, self.requests, self.objects):
            content.clear()
        self.gate.set()
        self.release()

    def release(self) -> None:
        """Ends the connections that are held."""
        self._released.set()
        self._released = threading.Event()
        self.held.clear()

    def add(self, repo_id: str, files: dict[str, bytes], **kwargs) -> Repo:
        """Adds a repository."""
        self.repos[repo_id] = Repo(dict(files), **kwargs)
        return self.repos[repo_id]

    def fault(self, path: str, **kwargs) -> None:
        """Lets requests for a file, named by the end of its path, go wrong as `Fault` says."""
        self.faults.append(Fault(path, **kwargs))

    def count(self, method: str, path: str) -> int:
        """How often something was asked for, named by the end of its path."""
        return sum(asked == method and url.endswith(path) for asked, url, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, dict(self.headers)))
            fault = self.take_fault(path)
        if fault is not None and fault.delay:
            threading.Event().wait(fault.delay)  # not time.sleep, which tests shorten
        if fault is not None and fault.status is not None:
            return self.error(fault.status)
        routes = (
            ('HEAD|GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', lambda *parts: self.send_repo_file(fault, *parts)),
            ('POST', r'/api/repos/create', self.create_repo),
            ('POST', r'/api/validate-yaml', lambda: self.send_json({'errors': [], 'warnings': []})),
            ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', self.send_info),
            ('GET', r'/api/models/([^/]+/[^/]+)/tree/([^/]+)', self.send_tree),
            ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', self.preupload),
            ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self.lfs_batch),
            ('PUT', r'/lfs/([0-9a-f]{64})', self.lfs_put),
            ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', self.commit),
            ('GET', r'/files/(.+)', lambda name: self.send_plain_file(fault, name)),
        )
        for methods, pattern, method in routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(methods, self.command):
                return method(*match.groups())
        return self.error(*NOT_FOUND)

    def take_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None

    def token(self) -> str:
        return (self.headers.get('Authorization') or '').removeprefix('Bearer ')

    def readable(self, repo_id: str) -> Repo | None:
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get(repo_id)
        allowed = self.token() in self.hub.tokens
        if repo is None or (repo.private and not allowed):
            self.error(404 if repo is None and allowed else 401, 'RepoNotFound')
        elif repo.gated and not allowed:
            self.error(403, 'GatedRepo')
        else:
            return repo
        return None

    def writable(self, repo_id: str) -> Repo | None:
        if self.token() not in self.hub.tokens:
            self.error(403 if self.token() else 401)
            return None
        return self.readable(repo_id)

    def send_repo_file(self, fault: Fault | None, repo_id: str, revision: str, name: str) -> None:
        repo = self.readable(repo_id)
        if repo is None:
            return
        if revision not in ('main', repo.commit):
            return self.error(404, 'RevisionNotFound')
        if name not in repo.files:
            return self.error(404, 'EntryNotFound', {'X-Repo-Commit': repo.commit})
        content = repo.files[name]
        headers = {'X-Repo-Commit': repo.commit}
        if name.endswith(LFS_SUFFIXES):
            digest = sha256(content)
            headers |= {'ETag': f'"{digest}"', 'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(content))}
        else:
            headers['ETag'] = '"' + hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest() + '"'
        self.send_content(fault, content, headers)

    def send_plain_file(self, fault: Fault | None, name: str) -> None:
        """A web server's file, which knows nothing of a Hub: /files/org/name/path."""
        org, repo, name = name.split('/', 2)
        content = self.hub.repos.get(f'{org}/{repo}', Repo()).files.get(name)
        if content is None:
            return self.error(404)
        self.send_content(fault, content, {})

    def send_content(self, fault: Fault | None, content: bytes, headers: dict[str, str]) -> None:
        if self.command == 'GET':
            self.hub.gate.wait(30)
        fault = fault or Fault('')
        if fault.corrupt:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault.truncate:
            content = content[: -fault.truncate]
        start, status = 0, 200
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if wanted:
            start, status = int(wanted[1]), 206
            end = int(wanted[2]) + 1 if wanted[2] else len(content)
            headers = headers | {'Content-Range': f'bytes {start}-{end - 1}/{len(content)}'}
            content = content[start:end]
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(content)), 'Accept-Ranges': 'bytes'}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content if fault.cut is None else content[: fault.cut])
            if fault.hold:
                released = self.hub._released
                self.hub.held.set()
                released.wait(30)
            self.close_connection |= fault.cut is not None

    def send_info(self, repo_id: str, revision: str | None) -> None:
        repo = self.readable(repo_id)
        if repo is not None:
            siblings = [{'rfilename': name} for name in repo.files]
            self.send_json({'id': repo_id, 'sha': repo.commit, 'private': repo.private, 'siblings': siblings})

    def send_tree(self, repo_id: str, revision: str) -> None:
        repo = self.readable(repo_id)
        if repo is not None:
            self.send_json(
                [
                    {'type': 'file', 'path': name, 'size': len(content), 'oid': hashlib.sha1(content).hexdigest()}
                    for name, content in repo.files.items()
                ]
            )

    def create_repo(self) -> None:
        if self.token() not in self.hub.tokens:
            return self.error(403 if self.token() else 401)
        asked = json.loads(self.body)
        repo_id = f'{asked["organization"]}/{asked["name"]}'
        url = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.hub.repos:
            return self.send_json({'error': 'You already created this model repo', **url}, 409)
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.add(repo_id, {}, private=bool(private))
        self.send_json(url)

    def preupload(self, repo_id: str, revision: str) -> None:
        if self.writable(repo_id) is not None:
            files = [
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if file['path'].endswith(LFS_SUFFIXES) else 'regular',
                    'shouldIgnore': False,
                }
                for file in json.loads(self.body)['files']
            ]
            self.send_json({'files': files})

    def lfs_batch(self, repo_id: str) -> None:
        if self.writable(repo_id) is not None:
            objects = [
                {**file, 'actions': {'upload': {'href': f'{self.hub.url}/lfs/{file["oid"]}'}}}
                for file in json.loads(self.body)['objects']
            ]
            self.send_json({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid: str) -> None:
        if sha256(self.body) != oid:
            return self.error(400)
        self.hub.objects[oid] = self.body
        self.send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.writable(repo_id)
        if repo is None:
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                repo.files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                repo.files[value['path']] = self.hub.objects[value['oid']]
        repo.commits += 1
        self.send_json({'commitUrl': f'{self.hub.url}/{repo_id}/commit/{repo.commit}', 'commitOid': repo.commit})

    def send_json(self, content: dict | list, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            **(headers or {}),
            **({'X-Error-Code': code} if code else {}),
            'Content-Length': '0',
        }.items():
            self.send_header(name, value)
        self.end_headers()
