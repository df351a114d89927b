"""The node: runs sandboxes on this host. Knows machines, guests, images; nothing of HTTP, accounts or sessions."""
