"""Opens a GGUF file with llama.cpp: run as a script in a new interpreter, because a wrong file may end the process.

``python llama_process.py FOLDER``: reads ``job.json`` (``file``, ``ids``, ``text``) there and leaves
``answer.safetensors`` with ``logits`` ``[length, vocabulary]`` and the ``tokens`` of the text. Nothing is judged here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str) -> None:
    import numpy as np
    from llama_cpp import Llama
    from safetensors.numpy import save_file

    job = json.loads((Path(folder) / "job.json").read_text())
    ids = job["ids"]
    model = Llama(model_path=job["file"], n_ctx=max(64, len(ids)), n_gpu_layers=0, logits_all=True, verbose=False)
    model.eval(ids)
    answer = {"logits": np.array(model.scores[: len(ids)], dtype=np.float32)}
    starts = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    tokens = model.tokenize(job["text"].encode(), add_bos=starts, special=True) if job["text"] else []
    answer["tokens"] = np.array(tokens, dtype=np.int64)
    save_file(answer, Path(folder) / "answer.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
