"""The filter: an unprivileged process that is the only way out of every sandbox's namespace.

__main__.py     the process and the line to its server
place.py        what it knows of one sandbox: sockets, policy, stand-in addresses, open connections, log
names.py        DNS: answers allowed names with stand-ins
connections.py  TCP: decide, find out the name that is meant, dial, pass bytes on
hello.py        the name in a TLS ClientHello
web.py          HTTP, request by request
dial.py         looking up and connecting, on the host's side
denials.py      what a refused client is told
check.py        what would become of a connection, for who asks from outside
datagrams.py    UDP for address ranges
seen.py         the log
"""
