"""The compiler: types, flow, input and output. Quantization mathematics lives in calib, rewrites in passes."""
