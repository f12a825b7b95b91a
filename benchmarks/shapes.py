"""The 2-D weights of one layer of Qwen2-1.5B, (out, in), as every benchmark of one layer takes them."""

SHAPES = {
    "q": (1536, 1536),
    "k": (256, 1536),
    "v": (256, 1536),
    "o": (1536, 1536),
    "gate": (8960, 1536),
    "up": (8960, 1536),
    "down": (1536, 8960),
}
