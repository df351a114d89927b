"""The three programs of the mission, as they stand, and how long each sandbox took to start."""

import time

from instavm import InstaVM


def steps(vm: InstaVM, asked_at: float) -> str:
    total = (time.perf_counter() - asked_at) * 1000
    start = vm.get_session_info()["start"]
    parts = ", ".join(f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in start["steps_ms"].items())
    first = " (first of its size: its template was booted)" if start["cold"] else ""
    return f"  asked for → result: {total:.0f} ms on {start['driver']}, {start['tier']} tier{first}: {parts}"


asked = time.perf_counter()
with InstaVM(api_key="your_api_key", cpu_count=4, memory_mb=4096) as vm:
    result = vm.execute("import multiprocessing; print(multiprocessing.cpu_count())")
    print(f"4 vCPUs, 4096 MB: {result}".rstrip())
    print(steps(vm, asked))

asked = time.perf_counter()
with InstaVM(api_key="your_api_key", env={"DATABASE_URL": "postgres://..."}) as vm:
    result = vm.execute("import os; print(os.getenv('DATABASE_URL'))")
    print(f"environment: {result}".rstrip())
    print(steps(vm, asked))

asked = time.perf_counter()
with InstaVM(api_key="your_api_key") as vm:
    vm.execute("x = 42")
    result = vm.execute("print(x)")
    print(f"state: {result}".rstrip())
    print(steps(vm, asked))
