"""Tools for a model whose chat template knows none: the same conversation, told in words.

The words and the form of a call are those that Hermes, Qwen and SmolLM models are trained on, and that
shoal.runtime.language.tools finds in an answer. It knows nothing about HTTP or models.
"""

import json
from typing import Any

from shoal.runtime.language.tools import CLOSE, OPEN

_INSTRUCTIONS = """# Tools

You may call one or more functions. You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def without_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a template that knows neither tools, nor calls, nor the role of their results."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            body = json.dumps(call["function"], ensure_ascii=False)
            content += f"\n{OPEN}\n{body}\n{CLOSE}" if content else f"{OPEN}\n{body}\n{CLOSE}"
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            plain.append({"role": message["role"], "content": content})
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _INSTRUCTIONS.format(signatures=lines)
        if plain and plain[0]["role"] == "system":
            plain[0] = {"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain
