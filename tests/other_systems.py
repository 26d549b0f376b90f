"""Makes a process one on Windows, as far as imports go: takes away what only POSIX has.

Windows also lacks all that macOS lacks. For scripts that call `take_away` after they have imported
what others wrote, which has ways of its own there.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import tempfile
import time

MODULES = """
    _posixshmem _posixsubprocess crypt curses fcntl grp nis ossaudiodev posix pty pwd readline
    resource spwd syslog termios tty
"""
# Of the names in capitals of these modules, those that Windows has, too.
CONSTANTS = {
    os: """
        EX_OK F_OK R_OK W_OK X_OK O_APPEND O_CREAT O_EXCL O_RDONLY O_RDWR O_TRUNC O_WRONLY P_NOWAIT
        P_NOWAITO P_WAIT SEEK_CUR SEEK_END SEEK_SET TMP_MAX
    """,
    signal: "NSIG SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN",
    mmap: """
        ACCESS_COPY ACCESS_DEFAULT ACCESS_READ ACCESS_WRITE ALLOCATIONGRANULARITY PAGESIZE
    """,
    select: "",
}
# Of the others, those that it lacks.
OTHERS = {
    os: """
        chown chroot confstr copy_file_range ctermid environb eventfd eventfd_read eventfd_write
        fchdir fchown fdatasync fork forkpty fpathconf fstatvfs fwalk getegid getenvb geteuid getgid
        getgrouplist getgroups getloadavg getpgid getpgrp getpriority getrandom getresgid getresuid
        getsid getuid getxattr initgroups killpg lchown listxattr lockf login_tty major makedev
        memfd_create minor mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise
        posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork
        removexattr sched_getaffinity sched_param sched_setaffinity sched_yield sendfile setegid
        seteuid setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setsid
        setuid setxattr splice statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3
        wait4 waitid writev
    """,
    signal: """
        alarm getitimer pause pidfd_send_signal pthread_kill pthread_sigmask setitimer siginterrupt
        sigpending sigtimedwait sigwait sigwaitinfo
    """,
    select: "epoll poll",
    socket: "AF_NETLINK AF_PACKET AF_UNIX SCM_RIGHTS SO_REUSEPORT recv_fds send_fds",
    time: """
        CLOCK_MONOTONIC CLOCK_PROCESS_CPUTIME_ID CLOCK_REALTIME CLOCK_THREAD_CPUTIME_ID clock_getres
        clock_gettime clock_gettime_ns clock_settime pthread_getcpuclockid tzset
    """,
}


def take_away() -> None:
    """Have modules and names not be found that Windows does not have."""
    sys.modules |= dict.fromkeys(MODULES.split())
    for module, kept in CONSTANTS.items():
        for name in {name for name in vars(module) if name.isupper()} - set(kept.split()):
            delattr(module, name)
    for module, lacking in OTHERS.items():
        for name in vars(module).keys() & set(lacking.split()):
            delattr(module, name)
    tempfile._O_TMPFILE_WORKS = False  # it was asked before
    os.supports_dir_fd.clear()
    os.supports_fd.clear()
