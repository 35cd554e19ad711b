"""An engine's process that generates texts, or says how likely texts are.

Orders are those of :mod:`benchmarks.offline.orders`: ``"generate"`` continues prompts, ``"judge"`` scores what others
made of them.
"""

from typing import Any

from benchmarks.offline.orders import answer_orders


def generate(llm: Any, *, prompts: list[list[int]], tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """Continue all prompts, together.

    Args:
        llm: vLLM's ``LLM``.
        prompts: token ids.
        tokens: the most to generate for each; a text may end before.
        temperature: 0 for the most likely token each time.
        seed: of what is drawn; each prompt has its own draws.

    Returns:
        ``texts``: token ids of what was generated.
    """
    from vllm import SamplingParams

    sampling = [
        SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed + index, detokenize=False)
        for index in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return {"texts": [list(output.outputs[0].token_ids) for output in outputs]}


def judge(llm: Any, *, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, Any]:
    """How likely the engine's model finds texts, each read at once after its prompt.

    Args:
        llm: vLLM's ``LLM``.
        prompts: token ids.
        texts: token ids of what follows each.

    Returns:
        ``nll``: of every text its tokens' negative log-likelihoods, in nats.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    whole = [{"prompt_token_ids": prompt + text} for prompt, text in zip(prompts, texts, strict=True)]
    outputs = llm.generate(whole, sampling, use_tqdm=False)
    found = []
    for prompt, text, output in zip(prompts, texts, outputs, strict=True):
        rows = output.prompt_logprobs[len(prompt) :]
        found.append([-row[token].logprob for row, token in zip(rows, text, strict=True)])
    return {"nll": found}


if __name__ == "__main__":
    answer_orders({"generate": generate, "judge": judge})
