"""Runs models on onnxruntime with the operator library, in a process of its own.

    python worker.py LIBRARY FOLDER THREADS...

For each ``FOLDER/<case>.onnx`` with feeds in ``<case>.npz`` it writes the outputs to ``<case>.<threads>.out.npz``, or
the reason of a failure to ``<case>.<threads>.error``. It needs onnxruntime and NumPy only, so that the environments
of old onnxruntimes can run it. An empty LIBRARY runs the function bodies. It prints onnxruntime's version.
"""

import pathlib
import sys

import numpy as np
import onnxruntime


def run(model: pathlib.Path, library: str, threads: int) -> None:
    """Runs one case."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    result = model.with_suffix(f".{threads}.out.npz")
    try:
        if library:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        with np.load(model.with_suffix(".npz")) as feeds:
            wanted = {i.name for i in session.get_inputs()}
            outputs = session.run(None, {name: feeds[name] for name in feeds.files if name in wanted})
        np.savez(result, *outputs)
    except Exception as error:  # noqa: BLE001 - whatever onnxruntime raises is the result
        model.with_suffix(f".{threads}.error").write_text(str(error), encoding="utf-8")


def main() -> None:
    """Runs all cases of a folder."""
    library, folder, *threads = sys.argv[1:]
    for model in sorted(pathlib.Path(folder).glob("*.onnx")):
        for count in threads:
            run(model, library, int(count))
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main()
