"""Options that have no effect with the others are refused by name, and errors speak of options, not of settings."""

import json
import shutil

import pytest

from tests.factorizing import factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main, parser
from xquant_vllm.cli.option_words import in_option_words
from xquant_vllm.errors import RefusedError, SettingsError
from xquant_vllm.evaluation.methods.method_names import METHODS, SERVED_METHODS

KIVI = ("kivi", "kivi-pre-rope")
# Every option of a method, and with which methods it has an effect.
OPTIONS = {
    "--bits": ("4", tuple(set(METHODS) - {"16bit"})),
    "--group-size": ("16", (*KIVI, *SERVED_METHODS)),
    "--residual": ("0", ("kivi",)),
    "--basis": ("joint", ("xquant",)),
    "--settings": ("{}", SERVED_METHODS),
    "--calibration": ("none", SERVED_METHODS),
    "--calibration-tokens": ("64", SERVED_METHODS),
}


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xquant: ")
    return line


def test_every_option_of_a_method_is_listed_here():
    (group,) = (
        group
        for group in parser()
        ._subparsers._group_actions[0]
        .choices["eval"]
        ._subparsers._group_actions[0]
        .choices["perplexity"]
        ._action_groups
        if group.title == "method"
    )
    given = {action.option_strings[0] for action in group._group_actions}
    assert given == {"--method", *OPTIONS}


@pytest.mark.parametrize(
    ("method", "option"),
    [(method, option) for option, (_, useful) in OPTIONS.items() for method in METHODS if method not in useful],
)
@pytest.mark.parametrize("task", ["perplexity", "needle"])
def test_options_of_other_methods_are_refused(llama, tokenizer, capsys, task, method, option):
    line = refused(capsys, "eval", task, llama, "--method", method, option, OPTIONS[option][0])
    assert f"xquant: {option} has no use with --method {method}" in line
    assert "leave it out" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ("--calibration", "none", "--calibration-tokens", 99),
            "--calibration-tokens has no use with --calibration none",
        ),
        (("--bits", 4, 2, "--calibration-tokens", 99), "--calibration-tokens 99 has no use with --bits"),
        (("--group-size", 16, "--calibration-tokens", 99), "--calibration-tokens 99 has no use with --group-size"),
        (("--group-size", 16, "--calibration", "python-docs"), "--group-size cannot work with --calibration python-do"),
        (
            ("--settings", '{"skip_layers": [1]}', "--calibration-tokens", 99),
            "has no use with the setting 'skip_layers'",
        ),
        (("--method", "xquant-cl", "--bits", 8, 4), "--bits 8 4 cannot work with --method xquant-cl"),
        (("--through", "vllm", "--device", "cuda"), "--device cuda"),
        (("--group-size", -8), "--group-size -8 cannot work"),
        (("--bits", 5), "such as --bits 4 2"),
        # As it was given.
        (("--settings", '{"bits": 5}'), "setting 'bits': 5 cannot work"),
    ],
)
def test_options_that_others_make_useless_are_refused(llama, tokenizer, capsys, options, named):
    line = refused(capsys, "eval", "perplexity", llama, "--window", 64, *options)
    assert named in line
    if "--settings" not in options:
        assert "setting" not in line
        assert "{" not in line


def test_a_basis_has_no_use_where_the_layer_input_is_cached(tokenizer, tmp_path, capsys):
    mha = save_tiny_model(tmp_path / "mha", "mha")
    line = refused(capsys, "eval", "perplexity", mha, "--window", 64, "--calibration", "none", "--basis", "head")
    assert "--basis head has no use: of this model the layer input is cached" in line
    options = ("--window", "64", "--windows", "1", "--calibration", "none", "--basis", "head")
    assert main(["eval", "perplexity", str(mha), *options, "--settings", '{"cache": "latent"}']) == 0


def test_calibration_has_no_use_for_a_folder_of_factors(llama, tokenizer, tmp_path, capsys):
    assert factorize(llama, tmp_path / "folder") == 0
    for option in (("--calibration", "none"), ("--calibration-tokens", 99)):
        line = refused(capsys, "eval", "perplexity", tmp_path / "folder", "--window", 64, *option)
        assert f"{' '.join(map(str, option))} has no use: " in line
    line = refused(capsys, "eval", "perplexity", tmp_path / "folder", "--window", 64, "--basis", "joint")
    assert 'but --basis asks for "joint" (leave the option out to serve it as it is)' in line


CHAIN = ("--method", "xquant-cl", "--calibration", "python-docs")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--anchor-interval", 2), "--anchor-interval has no use with --method xquant"),
        (("--anchor-interval", 0), "--anchor-interval has no use with --method xquant"),
        (("--first-layers", 2), "--first-layers has no use with --method xquant"),
        (("--calibration", "python-docs", "--first-layers", 0), "--first-layers has no use with --method xquant"),
        ((*CHAIN, "--basis", "head"), "--basis has no use with --method xquant-cl"),
        ((*CHAIN, "--basis", "joint"), "--basis has no use with --method xquant-cl"),
        (("--calibration-tokens", 2048), "--calibration-tokens has no use without --calibration"),
        ((*CHAIN, "--rotate"), "--rotate has no use with --calibration"),
        ((*CHAIN, "--first-layers", 4), "--first-layers 4 cannot work: the model has 3 layers; set 3 or fewer"),
        (("--bits", 5), "--bits 5 cannot work: no page format has 5-bit codes; set 8, 4, 3 or 2"),
        (("--outlier-channels", -1), "--outlier-channels -1 cannot work; set 0 or more"),
        (("--outlier-channels", 1, 40), "--outlier-channels 40 (value) cannot work: a group of 32 channels"),
    ],
)
def test_factorize_refuses_what_has_no_use(llama, tokenizer, tmp_path, capsys, options, named):
    line = refused(capsys, "factorize", llama, "--out", tmp_path / "out", *options)
    assert named in line
    assert "setting" not in line
    assert "{" not in line
    assert not list(tmp_path.iterdir())


def test_settings_become_options_only_where_an_option_gave_them():
    options = parser().parse_args(["eval", "perplexity", "M", "--bits", "2", "--settings", '{"basis": "head"}'])
    error = SettingsError(
        "xquant: setting 'bits': key 4 / value 2 and the setting 'basis': 'head' and setting 'rotate': 1"
    )
    assert in_option_words(error, options) == (
        "xquant: --bits 4 2 and the setting 'basis': 'head' and setting 'rotate': 1"
    )
    kept = RefusedError('xquant: serve the model with the setting "method": "xquant-cl"')
    assert in_option_words(kept, options) == str(kept)


@pytest.mark.parametrize("task", ["perplexity", "needle"])
def test_a_model_without_a_tokenizer_is_refused(llama, capsys, task):
    assert "has no tokenizer that transformers can read" in refused(capsys, "eval", task, llama)


def test_a_model_whose_own_code_fails_is_refused(llama, tokenizer, tmp_path, capsys):
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))
    for options in (("--method", "kivi"), ()):
        assert main(["eval", "perplexity", str(folder), "--window", "64", *options]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "xquant: transformers cannot run the LlamaForCausalLM" in line
        assert "KeyError: 'nope'" in line


def test_a_configuration_that_is_no_table_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    assert "config.json is no table of settings" in refused(capsys, "eval", "perplexity", tmp_path)
