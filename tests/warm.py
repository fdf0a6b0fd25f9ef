"""Commands in processes of their own that need not import every library first.

    python tests/warm.py serve FOLDER          imports the libraries once, then forks a process for every command
    python -S tests/warm.py FOLDER -m MODULE ARGUMENT ...      is such a command: its folder, environment and streams
    python -S tests/warm.py FOLDER FILE.py ARGUMENT ...        is one too

Importing them takes most of the time of most commands that the tests run, and a process forked from one that has
them is otherwise like a new one: `python -m MODULE ARGUMENT ...` with arguments, folder and environment of its own.
What it starts by `sys.executable` (ranks, runs of a sweep) is such a command too. Signals reach it, and it is killed if
the process that asked for it is. Any other command line is a plain Python's.
"""

import array
import json
import os
import signal
import socket
import sys
import time

WARM = ("vlabs", "data_prep", "torch.distributed", "submitit.core")


def ask(path, arguments):
    """Have the server at `path` run a command here, and return its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connect(connection, path)
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
            status = int(stream.readline() or b"1")
        if status < 0:  # as the command ended
            if -status != signal.SIGKILL:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        return status


def connect(connection, path):
    """Connect to the server, which may still be importing."""
    for _ in range(3000):
        try:
            return connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.1)
    raise SystemExit(f"no server came to {path}")


def attend(child, connection):
    """Pass signals on to a command, kill it if nobody waits for it any more, and return its exit status."""
    import select

    ended = os.pidfd_open(child)
    listened = [ended, connection]
    while ended not in (ready := select.select(listened, [], [])[0]):
        if connection in ready:
            received = connection.recv(16)
            if not received:
                listened = [ended]
            for number in received or [signal.SIGKILL]:
                os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve(path):
    """Answer until the process that started this ends. Returns, in a process of its own, the command to run."""
    import contextlib
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    parent = os.getppid()
    while True:
        found = select.select([listener, sys.stdin], [], [], 2)[0]
        if sys.stdin in found or os.getppid() != parent:
            os._exit(0)
        if not found:
            continue
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            while True:  # those that have ended
                try:
                    if os.waitpid(-1, os.WNOHANG)[0] == 0:
                        break
                except ChildProcessError:
                    break
            continue
        listener.close()
        _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(12))
        streams = array.array("i")
        streams.frombytes(ancillary[0][2][:12])
        with connection.makefile("rb") as stream:
            request = json.loads(stream.readline())
        child = os.fork()
        if child:
            status = attend(child, connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(b"%d\n" % status)
            os._exit(0)
        connection.close()
        for number, stream_of_it in enumerate(streams):
            os.dup2(stream_of_it, number)
            os.close(stream_of_it)
        # As in a terminal: tests send them, and a suite in the background would have handed on that it ignores them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]


def warm_up(folder):
    """Import the libraries that the commands import, and what is ours but the commands themselves."""
    import atexit
    import gc
    import importlib
    import multiprocessing
    import pkgutil
    import tempfile

    for name in (
        "torch", "torchvision", "timm", "transformers", "pytorch_lightning", "torchmetrics", "datasets", "hydra",
        "matplotlib.pyplot", "scipy.stats", "wandb",
    ):  # fmt: skip
        importlib.import_module(name)
    for package in (importlib.import_module(name) for name in ("vlabs", "data_prep")):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            with open(module.module_finder.find_spec(module.name).origin, encoding="utf-8") as file:
                if "__main__" not in file.read() and not module.name.startswith("vlabs.page"):
                    importlib.import_module(module.name)
    for found in gc.get_objects():
        if type(found) is tempfile.TemporaryDirectory:
            found._finalizer.detach()  # of W&B: the first process that ends would remove it for all others
            atexit.unregister(found.cleanup)
    # A forked process is what their servers would have forked.
    contexts = multiprocessing.context._concrete_contexts
    contexts["forkserver"] = contexts["fork"]
    sys.executable = os.path.join(folder, "python")
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all that it looks at


def run(arguments):
    """`python -m MODULE ARGUMENT ...`, or `python FILE.py ARGUMENT ...`, with all that a process does at its end but
    taking the libraries apart.
    """
    import atexit
    import runpy
    import tempfile
    import threading
    import traceback

    from lightning_fabric.utilities import rank_zero

    # Of the environment, read before.
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    tempfile.tempdir = None
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(arguments[0]))
    status = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    if folder == "serve":
        warm_up(*arguments)
        run(serve(os.path.join(*arguments, "socket")))
    command = arguments[1:] if arguments[:1] == ["-u"] else arguments
    is_ours = command[1].startswith(WARM) if command[:1] == ["-m"] else command[0].endswith(".py")
    if not is_ours:
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.exit(ask(os.path.join(folder, "socket"), command))
