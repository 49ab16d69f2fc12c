"""From a torch network to an ONNX graph: what torch.export and torch.onnx make, mended and named."""
