"""A network of its own for each sandbox, from which nothing leads outside but our filter.

space.py      the namespace: tap, addresses, the sockets that receive what the guest sends
rules.py      what is refused in the kernel, at the first packet
policy.py     what a policy allows
addresses.py  which addresses no broad rule opens
guard.py      all namespaces, and the filter's process seen from the server
ports.py      which ports are the control plane's own
filter/       that process: names, connections, datagrams
"""
