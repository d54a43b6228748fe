"""Commands in processes of their own, started warm.

A Python that has yet to import PyTorch and Lightning takes longer to start than most commands take to run. Here the
fork server of Python imports them once for each worker of the tests, and forks: what is started is a real process, with
its own number, environment, folder, session and exit code, that signals reach and kill.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["simmim.pretrain", "simmim.finetune", "simmim.evaluate", "simmim.embed"])


class Started:
    """A process that is what `python <words>` would be; of `subprocess.Popen` it has what tests use.

    Args:
        words: What would follow `python`: `-m <module>`, `-c <code>` or a file, and its arguments.
        cwd: Its working directory.
        env: Changes of the environment.
    """

    def __init__(self, *words, cwd=None, env=None):
        self.args = [sys.executable, *map(str, words)]
        environment = {**os.environ, **(env or {})}
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        writing = [end for _, end in ends]
        self.process = CONTEXT.Process(target=_become, args=(self.args[1:], str(cwd or "."), environment, writing))
        self.process.start()
        self.pid = self.process.pid
        for end in writing:
            end.close()
        self.said = ["", ""]
        self.readers = [threading.Thread(target=self._read, args=(n, end)) for n, (end, _) in enumerate(ends)]
        for reader in self.readers:
            reader.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        self.process.join(0)
        return self.returncode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it wrote to stdout and to stderr, when it has ended."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in self.readers:
            reader.join()
        return self.said

    def _read(self, number, end):
        with open(end.fileno(), closefd=False) as text:
            self.said[number] = text.read()
        end.close()


def start(*words, cwd=None, env=None):
    """See `Started`."""
    return Started(*words, cwd=cwd, env=env)


def run(*words, cwd=None, env=None, timeout=250):
    """Starts, and waits for the end."""
    process = Started(*words, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_together(*words, cwd=None, timeout=250):
    """Two processes that are of one group, as torchrun starts them; when one fails, the other is killed.

    Raises:
        AssertionError: With what they wrote, if one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
    processes = [start(*words, cwd=cwd, env={key: str(value) for key, value in rank.items()}) for rank in ranks]
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    said = "".join(text[-3000:] for process in processes for text in process.communicate())
    assert [process.returncode for process in processes] == [0, 0], said


def _become(words, folder, environment, writing):
    os.setsid()
    for number, end in enumerate(writing, 1):
        os.dup2(end.fileno(), number)
        end.close()
    multiprocessing.set_start_method(None, force=True)  # of its own children: as in any process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.filterwarnings("ignore", "'simmim", RuntimeWarning)  # what is run has been imported
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
