"""The peer: MLServer with the same ONNX model (loaded by MLServer, in its own environment, by the name `_predictor_mlserver.OnnxModel`)."""

import onnxruntime
from mlserver import MLModel, types  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, NumpyRequestCodec  # type: ignore[import-not-found]
from mlserver.utils import get_model_uri  # type: ignore[import-not-found]


class OnnxModel(MLModel):
    """A custom runtime as MLServer's documentation shows it."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = await get_model_uri(self._settings)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        rows = self.decode_request(payload, default_codec=NumpyRequestCodec)
        label, probabilities = self.session.run(None, {self.input: rows})
        outputs = [NumpyCodec.encode_output("label", label), NumpyCodec.encode_output("probabilities", probabilities)]
        return types.InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
