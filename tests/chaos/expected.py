"""What PEFT itself makes of every row that can be asked for, each by itself."""

from collections.abc import Mapping
from pathlib import Path

from tests import tiny
from tests.chaos.workload import MAX_NEW_TOKENS, PROMPTS, Ask


def expected_texts(base: Path, adapters: Mapping[str, Path]) -> dict[Ask, str]:
    """The greedy text for every prompt, with every adapter and without one, for every number of tokens."""
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = {}
    for name, folder in {"": None, **adapters}.items():
        answers = tiny.peft_generate(base, folder, prompts, MAX_NEW_TOKENS)
        for prompt, tokens in zip(PROMPTS, answers, strict=True):
            for count in range(1, MAX_NEW_TOKENS + 1):
                text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
                texts[Ask(name, prompt, count)] = text
    return texts
