"""What tests that run ``xquant factorize`` share."""

from xquant_vllm.cli.main import main


def factorize(model, out, *options):
    return main(["factorize", str(model), "--out", str(out), *map(str, options)])


class FakeTokenizer:
    """Words to numbers."""

    bos_token_id = 1

    def encode(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + sum(map(ord, word)) % 300 for word in text.split()]
        return [1, *ids] if add_special_tokens else ids
