"""A process of its own for test_launch.py: Triton's interpreter must be chosen before Triton is imported.

python through_launch.py LIBRARY
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.attention.attention_cases import Spec, make_case
from tests.attention.integer_case import on_integers
from xquant_vllm.attention import reference
from xquant_vllm.attention.gpu import launch
from xquant_vllm.attention.gpu.cuda import decode as cuda_decode
from xquant_vllm.attention.gpu.cuda import library as cuda_library

CASES = (
    make_case(Spec(seqs=((150, 1), (70, 2)), dtype=torch.float16, bias=True)),
    make_case(Spec(seqs=((150, 1), (70, 2)), dtype=torch.float16, allocated=1.0, group=1)),
    on_integers(make_case(Spec(seqs=((150, 1), (70, 2)), dtype=torch.float16, bias=True))),
    make_case(Spec(seqs=((150, 1), (70, 2)), dtype=torch.float16, bias=True, folded=True)),
    make_case(Spec(seqs=((150, 1), (70, 2)), dtype=torch.float16, allocated=1.0, group=1, folded=True)),
)


def main() -> None:
    library = cuda_library.load(Path(sys.argv[1]))
    cuda_library.library = lambda: library
    calls = []
    decode = cuda_decode.launch
    cuda_decode.launch = lambda *of_call: (calls.append(of_call), decode(*of_call))
    for case in CASES:
        tokens = int(case.batch.query_start_loc[-1])
        output, expected = (case.run(kernels)[:tokens].float() for kernels in (launch, reference))
        error = (output - expected).abs().max() / expected.abs().max()
        assert error < 4e-3, error
    assert len(calls) == len(CASES)


if __name__ == "__main__":
    main()
