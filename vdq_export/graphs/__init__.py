"""Questions about ONNX graphs, and parts cut out of them. Rewrites are in passes."""
