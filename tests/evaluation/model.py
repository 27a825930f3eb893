"""A model for lm-evaluation-harness whose answers come from workers, by way of their queue and store.

It asks what the harness's own back end computes (lm_eval/models/huggingface.py): the same pairs, the same
windows of a long text, contexts cut off at the same place, and the same ends of what is generated.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from tests.evaluation.jobs import Jobs, Row

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts, where the harness has them, then the tokens of the context and those that are scored."""


class QueueLM(TemplateLM):
    """Rows are texts, for the worker to tokenize, wherever that means what the harness means.

    The others are token ids: windows of a long text, what has to be cut off to fit `max_length` tokens, and
    what begins with the BOS token's own text, which the harness then does not put in front once more.
    """

    def __init__(self, jobs: Jobs, tokenizer: str, max_length: int) -> None:
        super().__init__()
        self.jobs = jobs
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.max_length = max_length
        self.max_gen_toks = 256
        word, *rest = self.tokenizer.encode("a a", add_special_tokens=False)
        self._drops_space = self.tokenizer.decode([word, *rest]) == f"a {self.tokenizer.decode(rest)}"

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(self._loglikelihood_tokens([one for own in windows for one in own]))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        lines = self.jobs.run("generate", [self._prompt(*request.args) for request in requests])
        return [self._alone(line["generated_text"]) for line in lines]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        lines = self.jobs.run("score", [self._pair(*request) for request in requests])
        for line, (texts, _, target) in zip(lines, requests, strict=True):
            assert len(line["token_logprobs"]) == len(target), f"{texts} was cut elsewhere"
        return [(line["logprob"], line["is_greedy"]) for line in lines]

    def _windows(self, text: str) -> list[Pair]:
        """All tokens of a text once, each after as many others as the model takes."""
        found = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in found]

    def _pair(self, texts: tuple[str, str] | None, context: list[int], target: list[int]) -> Row:
        if len(target) > self.max_length:
            raise ValueError(f"{len(target)} tokens are to be scored; at most {self.max_length} can be")
        # The last token is not fed to the model.
        excess = len(context) + len(target) - (self.max_length + 1)
        if texts is not None and excess <= 0 and self._reads(texts[0].rstrip(), context):
            return {"input": texts[0], "target": texts[1]}
        return {"input": context[max(0, excess) :], "target": target}

    def _prompt(self, context: str, gen_kwargs: dict[str, Any]) -> Row:
        parameters = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        max_new_tokens = parameters.pop("max_gen_toks")
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise ValueError(f"max_gen_toks is {max_new_tokens}; it must be less than {self.max_length}")
        if not parameters["do_sample"]:
            parameters.pop("temperature", None)
        until = handle_stop_sequences(parameters.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        parameters |= {"max_new_tokens": max_new_tokens} | self._stops(until)
        bare = has_bos_prefix(context, self.tokenizer.bos_token)
        tokens = self.tokenizer.encode(context, add_special_tokens=not bare)
        is_whole = len(tokens) <= room and self._reads(context, tokens)
        return {"input": context if is_whole else tokens[-room:], "parameters": parameters}

    def _stops(self, until: list[str]) -> dict[str, Any]:
        """Where generation ends. Special tokens have no text of their own, so they are named by id too."""
        texts = list(dict.fromkeys(filter(None, until)))
        encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        special = set(self.tokenizer.all_special_ids)
        for text, tokens in zip(texts, encoded, strict=True):
            if len(tokens) > 1 and special.intersection(tokens):
                raise ValueError(f"until has {text!r}: a special token can only be a stop by itself")
        ids = [tokens[0] for tokens in encoded if len(tokens) == 1 and tokens[0] in special]
        return {"stop_sequences": texts, "stop_token_ids": ids}

    def _alone(self, text: str) -> str:
        """What was generated, decoded without the prompt: some tokenizers then drop its first space."""
        return text.removeprefix(" ") if self._drops_space else text

    def _reads(self, text: str, tokens: list[int]) -> bool:
        """Whether a worker will make these tokens of the text; of none it makes what the harness makes."""
        return not text or self.tokenizer.encode(text) == tokens
