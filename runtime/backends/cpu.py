"""The cpu backend: the central processor; always there."""

NAME = "cpu"
PROVIDERS = ("CPUExecutionProvider",)


def absent(offered: list[str]) -> str:
    return f"this onnxruntime offers {', '.join(offered) or 'nothing'}; cpu needs one of {', '.join(PROVIDERS)}"
