"""Serves a model over HTTP with the llama.cpp server, on $HOST:$PORT.

The API is llama.cpp's, compatible with OpenAI's: /v1/chat/completions, /v1/completions, /health, /metrics, /slots.
Environment: PORT; optional HOST (127.0.0.1), THREADS (2), SLOTS (4), CONTEXT (tokens per slot, 1024), MODEL, and
RELEASE_LABEL, which becomes the name of the model in every answer.

On SIGTERM it finishes what is in flight and exits with 0. It does not stop the server's own threads, because that waits
forever for a client that has gone: whoever stops this program drains it first and escalates when its grace ends.
"""

import json
import os
import pathlib
import signal
import sys
import time
import urllib.request

# Two threads that spin while they wait for each other would take a machine of two cores from everybody else. libgomp
# reads these when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import xllamacpp

HERE = pathlib.Path(__file__).resolve().parent


def parameters():
    slots = int(os.environ.get("SLOTS", "4"))
    threads = int(os.environ.get("THREADS", "2"))
    params = xllamacpp.CommonParams()
    params.model.path = os.environ.get("MODEL", str(HERE / ".cache" / "gemma-3-270m-q4_k_m.gguf"))
    params.hostnames = [os.environ.get("HOST", "127.0.0.1")]
    params.port = int(os.environ["PORT"])
    # The context is shared out among the slots.
    params.n_parallel = slots
    params.n_ctx = slots * int(os.environ.get("CONTEXT", "1024"))
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    # The model fits; measuring that and a warm-up would cost most of the start.
    params.fit_params = False
    params.warmup = False
    params.endpoint_metrics = True
    params.endpoint_slots = True
    # A base model has no chat template of its own, and "gemma" is a built-in one only without Jinja.
    params.use_jinja = False
    params.chat_template = "gemma"
    params.model_alias = {"gemma3-270m-" + os.environ.get("RELEASE_LABEL", "unlabelled")}
    params.offline = True
    # Finished prompts that are kept for reuse, in MiB: the default is 8 GiB.
    params.cache_ram_mib = 64
    return params


def busy(base):
    with urllib.request.urlopen(base + "/slots", timeout=5) as answer:
        return any(slot["is_processing"] for slot in json.load(answer))


def main():
    params = parameters()
    if not os.path.exists(params.model.path):
        sys.exit(f"serve.py: there is no model at {params.model.path}; run ./fetch.py")
    # Blocked before the server's threads exist, so that only sigwait below takes them.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    server = xllamacpp.Server(params)
    base = server.listening_address
    print(f"serving {', '.join(params.model_alias)} on {base}", flush=True)
    signal.sigwait(ends)
    print("asked to end", flush=True)
    while busy(base):
        time.sleep(0.05)
    print("bye", flush=True)
    # Not through the interpreter's end, which would stop the server's threads.
    os._exit(0)


if __name__ == "__main__":
    main()
