"""Scripts in processes of their own, which begin with torch, transformers and matplotlib imported, and attnpatch not.

Importing the hosts takes six seconds of CPU time and is not what these tests are about. One process for each worker
imports them, and forks for every script. Where fork is missing, each script is a new interpreter.
"""

import atexit
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).parents[1]
# A server does not outlive its tests, and a script that hangs is ended.
LIMIT = 280


def interpreter(*command, cwd=None, ignore_warnings=False, **variables):
    """A new Python interpreter with ``-c CODE``, ``-m MODULE`` or a file, and its arguments."""
    options = ["-W", "ignore"] * ignore_warnings
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *options, *map(str, command)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip


def run(*command, cwd=None, ignore_warnings=False, **variables):
    """As ``interpreter``, in a process that has the hosts imported already."""
    if not hasattr(os, "fork"):
        return interpreter(*command, cwd=cwd, ignore_warnings=ignore_warnings, **variables)
    command = list(map(str, command))
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        request = {
            "command": command, "cwd": str(cwd or os.getcwd()), "ignore_warnings": ignore_warnings,
            "variables": variables, "out": out, "err": err,
        }  # fmt: skip
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = (pathlib.Path(path).read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess(command, code, *texts)


@functools.cache
def _server():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    started = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(started.stdin.close)  # ends it
    return started


def _serve():
    import signal

    import matplotlib.pyplot
    import pandas
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama

    # transformers imports these when they are first used.
    _ = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, matplotlib.pyplot, pandas)
    assert not any(name.partition(".")[0] == "attnpatch" for name in sys.modules)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(LIMIT)
            _become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(request):
    """Run the request's script in this process, as ``python`` would, and end."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["variables"])
    if request["ignore_warnings"]:
        warnings.simplefilter("ignore")
    kind, *arguments = request["command"]
    code = 0
    try:
        if kind == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(arguments[0], "<string>", "exec"), vars(main))
        elif kind == "-m":
            sys.argv, sys.path[0] = arguments, request["cwd"]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [kind, *arguments], os.path.dirname(os.path.abspath(kind))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
