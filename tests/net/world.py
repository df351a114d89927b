"""A small internet, run inside a network namespace of a test: `python world.py FOLDER ADDRESS...`.

On every address: HTTP on 80 and 8080, TLS on 443, echo on TCP and UDP 9999; DNS on the first one. What it answers stands in
FOLDER/zone.json, read anew for each question; every question and every connection becomes a line in FOLDER/seen.
Repositories in FOLDER/git are served below /git/; below /to/ is a redirect to the URL that follows.
"""

import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

FOLDER = Path(sys.argv[1])
ADDRESSES = sys.argv[2:]
LOCK = threading.Lock()


def saw(*words):
    with LOCK, (FOLDER / "seen").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        here = f"{self.connection.getsockname()[0]}:{self.connection.getsockname()[1]}"
        saw("http", here, self.command, self.headers.get("Host"), self.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if self.path.startswith("/git/"):
            return self._git(body)
        if self.path.startswith("/to/"):
            return self._elsewhere(self.path.removeprefix("/to/"))
        size = int(self.path.removeprefix("/bytes/")) if self.path.startswith("/bytes/") else None
        said = b"x" * size if size is not None else f"{self.command} {self.path} at {here} {len(body)}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)
        return None

    def _elsewhere(self, url):
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _git(self, body):
        """As a web server does it: by git's own program, which speaks CGI."""
        path, _, query = self.path.removeprefix("/git").partition("?")
        asked = {"REQUEST_METHOD": self.command, "PATH_INFO": path, "QUERY_STRING": query}
        asked |= {"GIT_PROJECT_ROOT": str(FOLDER / "git"), "GIT_HTTP_EXPORT_ALL": "1", "CONTENT_LENGTH": str(len(body))}
        for name in ("Content-Type", "Content-Encoding", "Git-Protocol"):
            if name in self.headers:
                word = name.upper().replace("-", "_")
                asked[word if word == "CONTENT_TYPE" else f"HTTP_{word}"] = self.headers[name]
        said = subprocess.run(
            ["git", "http-backend"], input=body, env={**os.environ, **asked}, capture_output=True
        ).stdout
        head, _, said = said.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_HEAD = do_CONNECT = _answer

    def log_message(self, *_):
        pass


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        saw("tcp", self.request.getsockname()[0], 9999)
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Datagrams(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        saw("udp", self.server.server_address[0], 9999)
        sock.sendto(b"echo " + data, self.client_address)


class Names(socketserver.BaseRequestHandler):
    def handle(self):
        wire, sock = self.request
        asked = dns.message.from_wire(wire)
        said = dns.message.make_response(asked)
        said.flags |= dns.flags.AA | dns.flags.RA
        one = asked.question[0]
        name, kind = one.name.to_text(omit_final_dot=True).lower(), one.rdtype
        saw("dns", name, kind)
        zone = json.loads((FOLDER / "zone.json").read_text())
        owner, records = one.name, zone.get(name)
        while isinstance(records, str):  # a CNAME
            said.answer.append(dns.rrset.from_text(owner, 0, "IN", "CNAME", records + "."))
            owner, records = dns.name.from_text(records), zone.get(records)
        if records is None:
            said.set_rcode(dns.rcode.NXDOMAIN)
        elif found := [one for one in records if (":" in one) == (int(kind) == 28)] if int(kind) in (1, 28) else []:
            said.answer.append(dns.rrset.from_text(owner, 0, "IN", dns.rdatatype.to_text(kind), *found))
        sock.sendto(said.to_wire(), self.client_address)


def tls_context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FOLDER / "cert.pem", FOLDER / "key.pem")
    context.sni_callback = lambda one, name, _: saw("tls", one.getsockname()[0], name)
    return context


class Http(ThreadingHTTPServer):
    def server_bind(self):
        """Without asking what the address is called, as its parent does: nobody here could answer."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address


class Tls(Http):
    def get_request(self):
        link, sender = super().get_request()
        return tls_context().wrap_socket(link, server_side=True, do_handshake_on_connect=False), sender


class Server4(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main():
    servers = []
    for address in ADDRESSES:
        servers += [Http((address, port), Web) for port in (80, 8080)]
        servers += [Tls((address, 443), Web), Server4((address, 9999), Echo)]
        servers.append(socketserver.ThreadingUDPServer((address, 9999), Datagrams))
    servers.append(socketserver.ThreadingUDPServer((ADDRESSES[0], 53), Names))
    for one in servers:
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


socket.setdefaulttimeout(30)
main()
