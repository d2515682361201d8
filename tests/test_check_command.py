"""`check`, and `export --check`: what they print and the exit codes; the rules are tested with the writers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import call, done

MODEL = Path(__file__).parent.parent / "demo" / "model"
EXPORT = ("export", MODEL, "--to", "onnx", "--max-positions", 64)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network for each runtime."""
    folder = tmp_path_factory.mktemp("check") / "network"
    done(*EXPORT, "--target", "onnxruntime", "--target", "tensorrt:bfloat16", "--check", "tensorrt:10.15", "-o", folder)
    return folder


def test_a_network_for_another_runtime_is_refused_before_it_is_written(tmp_path: Path) -> None:
    result = call(*EXPORT, "--check", "tensorrt", "-o", tmp_path / "network")
    assert result.exit_code == 2
    assert result.output.startswith("error: TensorRT 11.4: 32 places against 1 of its import rules")
    for slot in range(16):  # all of them, however many
        assert f"onnxruntime.onnx: present_k_{slot} (TensorScatter): expected a number of positions" in result.output
    assert "--target tensorrt" in result.output
    assert not list(tmp_path.iterdir())


def test_a_folder_passes_by_its_networks_for_tensorrt(network: Path) -> None:
    assert done("check", network).output == "no rule of tensorrt is broken by tensorrt.onnx\n"
    assert "tensorrt:10.16" in done("check", network, "--against", "tensorrt:10.16").output


def test_a_file_is_checked_by_itself(network: Path) -> None:
    result = call("check", network / "onnxruntime.onnx")
    assert result.exit_code == 2
    assert "cache-capacity" in result.output
    assert "cache-batch" not in result.output, "warnings are for networks that would run"


def test_warnings_are_printed_and_pass(network: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(network / "tensorrt.onnx", load_external_data=False)
    model.ir_version = 13
    onnx.save(model, tmp_path / "newer.onnx")
    result = done("check", tmp_path / "newer.onnx")
    assert "warning: TensorRT 11.4: 1 places against 1" in result.output
    assert "ir-version" in result.output


def test_an_op_is_known_where_a_plugin_has_it(network: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(network / "tensorrt.onnx", load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("ours", 1))
    model.graph.node.append(onnx.helper.make_node("Mystery", [model.graph.input[0].name], ["found"], domain="ours"))
    onnx.save(model, tmp_path / "ours.onnx")
    for plugins in ([], ["--plugin", "Another"]):
        result = call("check", tmp_path / "ours.onnx", *plugins)
        assert (result.exit_code, "op-unknown" in result.output) == (2, True)
    done("check", tmp_path / "ours.onnx", "--plugin", "Another", "--plugin", "Mystery")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "{network}", "--against", "tensorrt:9.3"), "10.15, 10.16, 11.0"),
        (("check", "{network}/network.json"), "not a readable ONNX network"),
        (("check", "{network}/nothing"), "no network to check: expected an .onnx file"),
        ((*EXPORT, "--check", "vllm", "-o", "{network}-2"), "expected tensorrt"),
    ],
)
def test_refuses(arguments: tuple[object, ...], message: str, network: Path) -> None:
    result = call(*(str(argument).format(network=network) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
