"""The npu backend: neural processors."""

NAME = "npu"
PROVIDERS = (
    "QNNExecutionProvider",
    "OpenVINOExecutionProvider",
    "CoreMLExecutionProvider",
    "VitisAIExecutionProvider",
)


def absent(offered: list[str]) -> str:
    return f"this onnxruntime offers {', '.join(offered) or 'nothing'}; npu needs one of {', '.join(PROVIDERS)}"
