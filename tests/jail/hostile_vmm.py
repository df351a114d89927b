"""A VMM that was broken into, as a program: it runs in a jail in place of QEMU and tries every way out it knows.

Prints one JSON object: attempt → None when it was stopped, else what it got. Its arguments: what is outside, as JSON, and
the attempts to make (all, when none is named).
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading

ATTEMPTS = {}
KNOWN = json.loads(sys.argv[1])
LIBC = ctypes.CDLL(None, use_errno=True)


def attempt(function):
    ATTEMPTS[function.__name__] = function
    return function


def syscall(number, *arguments):
    """A system call by its number, past every library. Raises OSError."""
    ctypes.set_errno(0)
    result = LIBC.syscall(
        ctypes.c_long(number), *[ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"{number} returned {result}"


def calls(**numbers):
    """System calls that must not even be tried, with arguments that a kernel that allowed them would look at."""
    for name, (number, *arguments) in numbers.items():
        ATTEMPTS[name] = lambda number=number, arguments=arguments: syscall(number, *arguments)


def read(path):
    with open(path, "rb") as file:
        return repr(file.read(60))


def write(path):
    with open(path, "wb") as file:
        file.write(b"escaped")
    return f"wrote {path}"


# descriptors that it was given, looked at before any attempt leaves one behind


@attempt
def descriptors_that_it_was_not_given():
    given = {0, 1, 2, KNOWN["layer_fd"], KNOWN["memory_fd"]}
    return [
        f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}" for fd in range(3, 256) if fd not in given and is_open(fd)
    ] or None


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# files


@attempt
def the_hosts_passwords():
    return read("/etc/shadow")


@attempt
def the_servers_files():
    return read(KNOWN["server_file"])


@attempt
def a_list_of_the_servers_folder():
    own = {KNOWN.get("way", "machines")}  # the way to its own folder; nothing else of it is there
    return [name for name in os.listdir(os.path.dirname(KNOWN["server_file"])) if name not in own] or None


@attempt
def another_sandboxes_disk():
    return read(KNOWN["other_disk"])


@attempt
def the_templates_memory_on_disk():
    return read(KNOWN["memory_file"])


@attempt
def the_note_that_says_whose_machine_this_is():
    return read(KNOWN["note"])


@attempt
def a_note_of_our_own():
    return write(KNOWN["note"])


@attempt
def another_file_in_the_own_folder():
    return write(os.path.join(KNOWN["home"], "new"))


@attempt
def a_list_of_the_own_folder():
    return os.listdir(KNOWN["home"])


@attempt
def the_own_disk_under_another_name():
    os.rename(os.path.join(KNOWN["home"], "disk.qcow2"), os.path.join(KNOWN["home"], "moved"))
    return "renamed"


@attempt
def the_program_libraries():
    return write("/usr/lib/x86_64-linux-gnu/libc.so.6")


@attempt
def a_file_in_the_root():
    return write("/escaped")


@attempt
def above_the_root():
    own = {"usr", "etc", "lib", "lib64", "proc", "dev", "tmp", *KNOWN.get("roots", ())}
    return [name for name in os.listdir("/../../../..") if name not in own] or None


@attempt
def the_root_of_process_1():
    return read("/proc/1/root/etc/shadow")


@attempt
def sysfs():
    return os.listdir("/sys")


@attempt
def the_control_groups():
    return os.listdir("/sys/fs/cgroup")


@attempt
def where_the_host_puts_core_dumps():
    return write("/proc/sys/kernel/core_pattern")


@attempt
def the_magic_key():
    return write("/proc/sysrq-trigger")


# what its descriptors allow


@attempt
def writing_to_a_read_only_layer():
    return os.pwrite(KNOWN["layer_fd"], b"escaped", 0)


@attempt
def opening_a_read_only_layer_for_writing():
    return os.open(f"/proc/self/fd/{KNOWN['layer_fd']}", os.O_RDWR)


@attempt
def the_templates_memory_by_its_descriptor():
    return os.pwrite(KNOWN["memory_fd"], b"escaped", 0)


@attempt
def the_templates_memory_opened_again():
    fd = os.open(f"/proc/self/fd/{KNOWN['memory_fd']}", os.O_RDWR)  # this is what QEMU does, and must work
    return os.pwrite(fd, b"escaped", 0)


@attempt
def the_templates_memory_mapped_shared():
    fd = os.open(f"/proc/self/fd/{KNOWN['memory_fd']}", os.O_RDWR)
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)[:7] = b"escaped"
    return "mapped"


@attempt
def the_templates_memory_cut():
    return os.ftruncate(KNOWN["memory_fd"], 0)


@attempt
def a_disk_without_an_end():
    fd = os.open(os.path.join(KNOWN["home"], "disk.qcow2"), os.O_RDWR)  # its own, and must work
    return os.pwrite(fd, b"escaped", 1 << 40)


@attempt
def setting_its_own_limits():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 41, 1 << 41))
    return "raised"


# processes


@attempt
def seeing_other_processes():
    return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"] or None


@attempt
def a_signal_to_a_process_of_the_host():
    os.kill(KNOWN["host_pid"], signal.SIGKILL)
    return "sent"


@attempt
def a_shell():
    os.execv("/bin/sh", ["sh", "-c", "true"])


@attempt
def a_setuid_program():
    os.execv("/usr/bin/su", ["su"])


@attempt
def being_root_again():
    os.setuid(0)
    return os.getuid()


@attempt
def being_in_the_group_of_root():
    os.setgroups([0])
    return os.getgroups()


@attempt
def any_capability():
    with open("/proc/self/status") as file:
        return [line for line in file if line.startswith("Cap") and int(line.split()[1], 16)] or None


@attempt
def gaining_capabilities():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    every = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    return syscall(126, header, every)


@attempt
def more_threads_than_a_machine_needs():
    stop, threads = threading.Event(), []
    try:
        for _ in range(400):
            threads.append(threading.Thread(target=stop.wait))
            threads[-1].start()
    except RuntimeError:
        return None
    finally:
        stop.set()
    return "400 threads"


@attempt
def a_namespace_by_clone():
    return syscall(56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)


@attempt
def clone3_which_no_filter_can_look_into():
    try:
        return syscall(435, (ctypes.c_uint64 * 11)(0x10000000), 88)
    except OSError as exc:
        return None if exc.errno == errno.ENOSYS else str(exc)


# network


@attempt
def a_server_of_the_host():
    socket.create_connection(("127.0.0.1", KNOWN["host_port"]), timeout=5)
    return "connected"


@attempt
def an_abstract_socket_of_the_host():
    socket.socket(socket.AF_UNIX).connect("\0" + KNOWN["abstract"])
    return "connected"


@attempt
def raw_packets():
    return str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))


@attempt
def the_kernels_own_sockets():
    return str(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))


@attempt
def interfaces_of_the_host():
    with open("/proc/self/net/dev") as file:
        names = [line.split(":")[0].strip() for line in file.readlines()[2:]]
    return [name for name in names if name != "lo"] or None


# devices


@attempt
def devices_of_the_host():
    found = []
    for name in (
        "mem",
        "kmem",
        "kvm",
        "vda",
        "sda",
        "loop-control",
        "fuse",
        "net/tun",
        "vhost-net",
        "tty",
        "ptmx",
        "shm",
    ):
        if os.path.exists(f"/dev/{name}"):
            found.append(name)
    return found or None


@attempt
def a_device_of_its_own():
    os.mknod(os.path.join(KNOWN["home"], "disk"), 0o60600, os.makedev(254, 0))
    return "made"


calls(
    ptrace=(101, 16, KNOWN["host_pid"], 0, 0),
    memory_of_a_process_of_the_host=(310, KNOWN["host_pid"], 0, 0, 0, 0, 0),
    pidfd_open=(434, KNOWN["host_pid"], 0),
    pidfd_getfd=(438, 3, 0, 0),
    kcmp=(312, 1, 1, 0, 0, 0),
    mount=(165, b"none", b"/tmp", b"tmpfs", 0, 0),
    umount=(166, b"/proc", 2),
    fsopen=(430, b"proc", 0),
    open_tree=(428, -100, b"/", 1),
    move_mount=(429, -100, b"/", -100, b"/", 0),
    pivot_root=(155, b"/", b"/"),
    chroot=(161, b"/usr"),
    unshare_user=(272, 0x10000000),
    unshare_mounts=(272, 0x00020000),
    setns=(308, 0, 0),
    open_by_handle=(304, -100, (ctypes.c_uint32 * 8)(8, 1, 2), 0),
    keyctl=(250, 0, -3, 0),
    add_key=(248, b"user", b"x", b"y", 1, -3),
    bpf=(321, 0, (ctypes.c_uint64 * 16)(), 128),
    perf=(298, (ctypes.c_uint64 * 16)(1 | 128 << 32), 0, -1, -1, 0),
    io_uring=(425, 4, (ctypes.c_uint64 * 16)()),
    userfaultfd=(323, 1),
    kexec=(246, 0, 0, 0, 0),
    load_module=(175, 0, 0, b""),
    sysv_memory=(29, KNOWN["shm_key"], 0, 0),
    message_queue=(240, b"q", 0o102, 0o600, 0),
    kernel_log=(103, 3, ctypes.create_string_buffer(100), 100),
    host_name=(170, b"x", 1),
    clock=(227, 0, (ctypes.c_uint64 * 2)(1, 1)),
    reboot=(169, 0xFEE1DEAD, 672274793, 0, 0),
    io_ports=(172, 3),
    real_time_priority=(144, 0, 1, (ctypes.c_int * 1)(50)),
    swap=(167, b"/x", 0),
    accounting=(163, b"/x"),
    fanotify=(300, 0, 0),
    personality=(135, 0x0040000),
    local_descriptor_table=(154, 1, 0, 0),
    chmod_of_a_layer=(91, KNOWN["layer_fd"], 0o666),
    chown_of_a_layer=(93, KNOWN["layer_fd"], 1, 1),
    hard_link=(86, b"/usr/lib64/ld-linux-x86-64.so.2", b"/tmp/x"),
    symlink=(88, b"/etc/shadow", KNOWN["home"].encode() + b"/link"),
)


def main():
    got = {}
    for name in sys.argv[2:] or ATTEMPTS:
        try:
            got[name] = ATTEMPTS[name]()
        except (OSError, RuntimeError, ValueError):
            got[name] = None
    print(json.dumps(got))


main()
