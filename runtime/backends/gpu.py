"""The gpu backend: graphics processors."""

NAME = "gpu"
PROVIDERS = (
    "CUDAExecutionProvider",
    "WebGpuExecutionProvider",
    "DmlExecutionProvider",
    "ROCMExecutionProvider",
)


def absent(offered: list[str]) -> str:
    return f"this onnxruntime offers {', '.join(offered) or 'nothing'}; gpu needs one of {', '.join(PROVIDERS)}"
