"""Commands in processes of their own that need not import every library first.

    python tests/warm.py serve SOCKET          imports the libraries once, then forks a process for every command
    python -S tests/warm.py SOCKET -m MODULE ARGUMENT ...      is such a command: its folder, environment and streams

Importing them takes half of the time of most commands that the tests run, and a process forked from one that has
them is otherwise like a new one: `python -m MODULE ARGUMENT ...` with arguments, folder and environment of its own.
"""

import array
import json
import os
import socket
import sys


def ask(path, arguments):
    """Have the server at `path` run a command here, and return its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            return int(stream.readline() or b"1")


def serve(path):
    """Answer until the process that started this ends. Returns, in a process of its own, the command to run."""
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    parent = os.getppid()
    print("ready", flush=True)
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
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(b"%d\n" % status)
            os._exit(0)
        connection.close()
        for number, stream_of_it in enumerate(streams):
            os.dup2(stream_of_it, number)
            os.close(stream_of_it)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]


def warm_up():
    """Import the libraries that the commands import."""
    import atexit
    import gc
    import importlib
    import tempfile

    for name in (
        "torch", "torchvision", "timm", "transformers", "pytorch_lightning", "torchmetrics", "datasets", "hydra",
        "matplotlib.pyplot", "scipy.stats", "wandb",
    ):  # fmt: skip
        importlib.import_module(name)
    for found in gc.get_objects():
        if isinstance(found, tempfile.TemporaryDirectory):
            found._finalizer.detach()  # of W&B: the first process that ends would remove it for all others
            atexit.unregister(found.cleanup)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all that it looks at


def run(arguments):
    """`python -m MODULE ARGUMENT ...`, with all that a process does at its end but taking the libraries apart."""
    import atexit
    import runpy
    import threading
    import traceback

    assert arguments[0] == "-m"
    sys.argv = arguments[1:]
    sys.path[0] = os.getcwd()
    status = 0
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
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
    if sys.argv[1] != "serve":
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    warm_up()
    run(serve(sys.argv[2]))
