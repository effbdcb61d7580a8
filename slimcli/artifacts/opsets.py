"""Which ONNX opsets are written. No torch here: the command line knows them before it is loaded.

The newest is the last to which onnxscript itself converts. Beyond it torch hands the graph to the
converter of the onnx package, which forgets which module each node came from: nodes lose their
names, and no quantizer of the file can be told from another.
"""

LOWEST, DEFAULT, NEWEST = 18, 19, 25
