"""What tests that run ``xquant factorize`` share."""

from xquant_vllm.cli.main import main


def factorize(model, out, *options):
    """Without a certificate, unless options speak of one: it takes a while."""
    words = [str(option) for option in options]
    if not any(word.startswith(("--max-kl", "--certificate", "--no-certificate")) for word in words):
        words.append("--no-certificate")
    return main(["factorize", str(model), "--out", str(out), *words])


class FakeTokenizer:
    """Words to numbers."""

    bos_token_id = 1

    def encode(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + sum(map(ord, word)) % 300 for word in text.split()]
        return [1, *ids] if add_special_tokens else ids
