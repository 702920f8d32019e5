"""The first thing that a script does: see to its signals, its threads and its command line.

torch and transformers take seconds to import. From before that on, Ctrl-C ends the script with one
line. A mistyped flag, a value that is not allowed and --help are answered before it.
"""
import os
import signal


def begin(path):
    """The first call of the script at this path. What is wrong with its command line ends it here.

    `running.run` takes the signals over.
    """
    # A thread that waits for others spins only briefly, then sleeps. By default it spins long, and
    # where another program takes a core, small models then run ten times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:       # as for a job in the background
            signal.signal(number, stop_early)
    from support import command_line     # imports more, which Ctrl-C may meet already
    command_line.check(path)


def stop_early(number, _):
    """Ctrl-C or SIGTERM before the script has begun: one line, and no traceback of an import."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped before it began\n")
    os._exit(128 + number)
