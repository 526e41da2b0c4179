"""The peer: KServe's Python runtime with the same ONNX model, in a process of its own: `python -m benchmarks._predictor_kserve MODEL PORT`."""

import sys
from typing import Any

import kserve
import numpy as np
import onnxruntime


class OnnxModel(kserve.Model):
    """The shortest custom predictor that KServe's documentation leads to."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.ready = True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        rows = np.array([list(i.values()) for i in payload["instances"]], dtype=np.float32)
        label, probabilities = self.session.run(None, {self.input: rows})
        return {"predictions": np.asarray(label).tolist(), "probabilities": np.asarray(probabilities).tolist()}


if __name__ == "__main__":
    kserve.ModelServer(http_port=int(sys.argv[2]), enable_grpc=False).start([OnnxModel("m", sys.argv[1])])
