"""TensorRT engines: built from ONNX files, audited, described, run. Nothing is imported here."""
