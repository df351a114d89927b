"""What runs inside a sandbox: the agent and the interpreter it keeps. Standard library only, no import of ours."""
