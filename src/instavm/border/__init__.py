"""Control and node as processes of their own: what one asks of the other, over a socket that they were born with.

Control reads what strangers send and needs no right on this host; the node has the rights and is told what to do in
values that are checked. Neither knows of this: control holds a `Node`, the node serves one.
"""
