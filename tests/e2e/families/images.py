"""Tasks of an engine process with images in them. Imported by ``engine_process.py``, which has vLLM."""

from typing import Any


def noise(size: int, seed: int = 0) -> Any:
    """An image of ``size`` times ``size`` random pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_with_image(llm: Any, prompt: list[int], size: int, seed: int = 0) -> dict[str, Any]:
    """Log-probabilities of the tokens of a prompt with an image, and of 4 more: cold, and with a cached prefix.

    Args:
        llm: the engine.
        prompt: token ids, with one placeholder.
        size: of the image, in pixels.
        seed: of the image.

    Returns:
        ``logprobs``: of every token of the prompt but the first, placeholders included; ``length``: tokens of the
        prompt; ``next``: generated tokens, cold and cached; ``cached``: tokens that were found; or ``error``: what the
        engine answered.
    """
    from vllm import SamplingParams

    request = {"prompt_token_ids": prompt, "multi_modal_data": {"image": noise(size, seed)}}
    more = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    try:
        cold, warm, scored_output = (
            llm.generate([request], sampling, use_tqdm=False)[0] for sampling in (more, more, scored)
        )
    except Exception as error:
        return {"error": str(error)}
    ids = scored_output.prompt_token_ids
    entries = zip(scored_output.prompt_logprobs[1:], ids[1:], strict=True)
    return {
        "logprobs": [entry[token].logprob for entry, token in entries],
        "length": len(ids),
        "next": [list(output.outputs[0].token_ids) for output in (cold, warm)],
        "cached": warm.num_cached_tokens,
    }


def prompt_with_features(llm: Any, prompt: list[int], offset: int, grid: list[int], embeds: bool) -> dict[str, Any]:
    """A prompt that claims to have a processed image, as vLLM's endpoint for tokens takes them, past the renderer.

    Args:
        llm: the engine.
        prompt: token ids.
        offset: of the image's first token.
        grid: patches of the image: frames, rows, columns.
        embeds: whether the tokens are replaced by embeddings of the image.

    Returns:
        ``logprobs`` of every token of the prompt but the first, or ``error``: what the engine answered.
    """
    import torch
    from vllm import SamplingParams
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import (
        MultiModalFieldElem,
        MultiModalKwargsItem,
        MultiModalKwargsItems,
        MultiModalSharedField,
        PlaceholderRange,
    )

    field = MultiModalSharedField(batch_size=1)
    item = MultiModalKwargsItem({"image_grid_thw": MultiModalFieldElem(data=torch.tensor(grid), field=field)})
    length = grid[0] * grid[1] * grid[2] // 4
    mask = None if embeds else torch.zeros(length, dtype=torch.bool)
    request = mm_input(
        prompt_token_ids=prompt,
        mm_kwargs=MultiModalKwargsItems({"image": [item]}),
        mm_hashes={"image": ["an image"]},
        mm_placeholders={"image": [PlaceholderRange(offset=offset, length=length, is_embed=mask)]},
    )
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    try:
        engine.add_request("features", request, sampling)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
    except Exception as error:
        return {"error": str(error)}
    entries = zip(outputs[-1].prompt_logprobs[1:], prompt[1:], strict=True)
    return {"logprobs": [entry[token].logprob for entry, token in entries]}
