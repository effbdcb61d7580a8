"""What is true of networks, whoever asks: structure, surgery, fusing, counting.

Nothing here knows an algorithm, a recipe, a file or a terminal.
"""
