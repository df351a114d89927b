"""What `python -m instavm.serve --embedded` is, on a node without virtual machines."""

import sys

from local_node import open_local_node

from instavm.serve import run_embedded

if __name__ == "__main__":
    sys.exit(run_embedded(sys.argv[1:], open_node=open_local_node))
