"""A prompt, as a text, as chat messages or as token ids, becomes token ids. It knows nothing about what runs them."""

from collections.abc import Sequence

from ..card import Card
from ..errors import UsageError
from .tokens import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict]


class Prompts:
    """What takes prompts: it has a card, a tokenizer and a chat template ("" for none)."""

    card: Card
    tokenizer: Tokenizer
    chat_template: str

    def prompt_ids(self, prompt: Prompt, *, tools: list | None = None, raw: bool = False) -> list[int]:
        """Token ids of a prompt as `generate` takes it. Raises UsageError for one that is empty or out of range."""
        if isinstance(prompt, str):
            if raw or not self.chat_template:
                ids = self.tokenizer.encode(prompt)
                if self.card.add_bos and self.card.bos >= 0 and ids[:1] != [self.card.bos]:
                    ids = [self.card.bos, *ids]
            else:
                return self.prompt_ids([{"role": "user", "content": prompt}], tools=tools)
        elif all(isinstance(item, dict) for item in prompt):
            ids = self.tokenizer.encode(self.render(prompt, tools=tools), special=False)  # type: ignore[arg-type]
        else:
            ids = [int(item) for item in prompt]  # type: ignore[arg-type]
            if not all(0 <= item < self.card.vocab for item in ids):
                raise UsageError(
                    "The prompt has a token id that the model lacks.",
                    f"Ids are 0 to {self.card.vocab - 1}.",
                    "Correct it.",
                )
        if not ids:
            raise UsageError("The prompt is empty.", "It has no tokens.", "Give at least one token.")
        return ids

    def render(self, messages: Sequence[dict], *, tools: list | None = None) -> str:
        """The text that the chat template makes of messages."""

        from .chat import render

        def text(token: int) -> str:
            return self.tokenizer.text_of(token) if token >= 0 else ""

        eos = self.card.eos[0] if self.card.eos else -1
        return render(
            self.chat_template, list(messages), tools=tools,
            bos_token=text(self.card.bos), eos_token=text(eos), pad_token=text(self.card.pad),
        )  # fmt: skip
